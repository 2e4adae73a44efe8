"Measures of pairs agree with their definitions, fall on damage beyond their intervals, and stay put without it."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import nn

from synthpi.data import pair_folders
from synthpi.phantoms import pair_phantoms
from synthpi.quality import DAMAGES, MEASURES, RandomFeatures, count_nuclei, damage, kid, nuclear_density, pair_quality, worst_pairs

REAL = Path(__file__).parents[2]/"shared/data/he_nuclei_pairs"

@pytest.fixture(scope="module")
def tissue(): return pair_phantoms(24, 8)

@pytest.fixture(scope="module")
def synthetic(tissue): return [np.uint8(255/(1 + np.exp(-12*(gaussian_filter(m/255., 1.2) - .5)))) for m in tissue.mask]

def records(tissue, images): return [{"primary": p, "privileged": y, "group": g} for p, y, g in zip(tissue.image, images, tissue.patient_id)]

@pytest.fixture(scope="module")
def intact(tissue, synthetic): return pair_quality(records(tissue, synthetic), true=tissue.mask, seam=(32, 0), n_boot=300)

@pytest.mark.parametrize("how, fall, stay", [
    ("control", "", " ".join(MEASURES)), ("shuffled", "ssim psnr l1 dice edges nuclear_stain nuclei_rank", "diversity undecided"), ("blurred", "ssim psnr l1 dice undecided", ""),
    ("shifted", "ssim psnr l1 dice edges nuclear_stain", "nuclei_rank"), ("inverted", "ssim psnr l1 dice kid nuclear_stain", "edges diversity"), ("checkerboard", "ssim l1 checkerboard", "edges nuclear_stain"),
    ("collapsed", "ssim psnr l1 dice diversity nuclei_rank edges nuclear_stain", ""), ("seams", "l1 seam", "nuclear_stain edges")])
def test_measures_fall_on_damage_and_only_where_they_should(tissue, synthetic, intact, how, fall, stay):
    found, t = pair_quality(records(tissue, damage(synthetic, how)), true=tissue.mask, kind="mask", seam=(32, 0), n_boot=50), intact.table
    for m in fall.split():
        value = found.table.loc[m, "mean"]
        assert value < t.loc[m, "low"] if t.loc[m, "better"] == "higher" else value > t.loc[m, "high"], (m, value, t.loc[m])
    for m in stay.split():
        if m in t.index: assert t.loc[m, "low"] - 1e-3 <= found.table.loc[m, "mean"] <= t.loc[m, "high"] + 1e-3, (m, found.table.loc[m], t.loc[m])     # 1e-3: intervals of almost constant measures
    if how == "shuffled": assert found.table.loc["kid", "mean"] <= t.loc["kid", "high"]       # sets are compared: blind to shuffling, which must not look worse
    assert found.collapsed == (how == "collapsed") and ("COLLAPSED" in str(found)) == found.collapsed

def test_saturation_and_damage_of_colour_images(tissue):
    pairs = records(tissue, damage(tissue.image, "blurred"))
    base, spoilt = (pair_quality(records(tissue, damage([r["privileged"] for r in pairs], how)), n_boot=100).table for how in ("control", "saturated"))
    assert "undecided" not in base.index and spoilt.loc["saturation", "mean"] > base.loc["saturation", "high"] + .1
    shuffled = damage(tissue.image, "shuffled")
    assert not any(np.array_equal(a, b) for a, b in zip(shuffled, tissue.image)) and sorted(x.sum() for x in shuffled) == sorted(x.sum() for x in tissue.image)
    assert set(DAMAGES) > {"shuffled", "blurred", "shifted", "inverted"}

def test_a_perfect_copy_has_perfect_scores(tissue):
    t = pair_quality(records(tissue, tissue.mask), true=tissue.mask, n_boot=20).table["mean"]
    assert t["ssim"] == pytest.approx(1) and t["dice"] == 1 and t["l1"] == 0 and t["psnr"] == 60 and abs(t["kid"]) < 1e-9      # the matched pairs are left out of the mixed sum
    t = pair_quality(records(tissue, tissue.image), n_boot=20).table["mean"]
    assert t["edges"] == pytest.approx(1) and t["diversity"] == pytest.approx(1)

def test_intervals_are_over_groups(tissue, synthetic):
    "Each patient five times over: over pairs the interval narrows by the root of five, over groups it stays"
    few, many = records(tissue, synthetic), records(tissue, synthetic)*5
    def width(pairs, groups): t = pair_quality(pairs, groups=groups, n_boot=400).table.loc["edges"]; return t["high"] - t["low"]
    owners = [r["group"] for r in many]
    assert width(many, owners) == pytest.approx(width(few, None), rel=1e-6)
    assert width(many, list(range(len(many)))) < .7*width(few, list(range(len(few))))
    assert "too narrow" in str(pair_quality([{k: r[k] for k in ("primary", "privileged")} for r in few], n_boot=20))

def test_numbers_agree_with_their_definitions(tissue, synthetic, intact):
    s, mean = intact.scores, intact.table["mean"]
    a = [(m > 127) & (x > 127) for m, x in zip(tissue.mask, synthetic)]
    dice = [2*i.sum()/((m > 127).sum() + (x > 127).sum()) for i, m, x in zip(a, tissue.mask, synthetic)]
    assert np.allclose(s["dice"], dice) and mean["dice"] == pytest.approx(np.mean(dice))
    assert np.allclose(s["l1"], [np.abs(m/255. - x/255.).mean() for m, x in zip(tissue.mask, synthetic)], atol=1e-6)      # float32
    assert mean["nuclei_rank"] == pytest.approx(spearmanr(s["nuclei_primary"], s["nuclei_synthetic"])[0])

def test_kid_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    same = [kid(*rng.standard_normal((2, 30, 8))) for _ in range(200)]
    assert abs(np.mean(same)) < 4*np.std(same)/200**.5 and np.std(same) > 0       # four standard errors around zero
    assert kid(rng.standard_normal((50, 8)), rng.standard_normal((50, 8)) + 1) > 10*np.std(same)
    z = rng.standard_normal((200, 30, 8))
    paired = [kid(x, x + .3*rng.standard_normal(x.shape), range(30)) for x in z]       # the second set is of the same tissue, a little wider
    biased = [kid(x, x + .3*rng.standard_normal(x.shape)) for x in z]
    independent = [kid(x, y + .3*rng.standard_normal(x.shape)) for x, y in zip(z, rng.standard_normal(z.shape))]
    error = np.hypot(np.std(paired), np.std(independent))/200**.5
    assert abs(np.mean(paired) - np.mean(independent)) < 4*error < np.mean(independent) - np.mean(biased)
    with pytest.raises(ValueError, match="at least two rows"): kid(np.zeros((1, 3)), np.zeros((4, 3)))

def test_encoder_is_used_named_and_left_alone(tissue, synthetic):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    q = pair_quality(records(tissue, synthetic), true=tissue.mask, encoder=encoder, n_boot=10)
    assert encoder[1].training and all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert "Sequential" in q.features and "untrained" in pair_quality(records(tissue, synthetic), true=tissue.mask, n_boot=10).features
    assert torch.equal(RandomFeatures()(torch.ones(1, 3, 40, 40)), RandomFeatures()(torch.ones(1, 3, 40, 40)))
    with pytest.raises(ValueError, match="pool and flatten"): pair_quality(records(tissue, synthetic), true=tissue.mask, encoder=encoder[0], n_boot=10)

def test_dataset_and_records_give_the_same(tissue, synthetic):
    rows = records(tissue, synthetic)
    ds = Dataset.from_dict({"primary": [Image.fromarray(r["primary"]) for r in rows], "privileged": [Image.fromarray(r["privileged"]) for r in rows],
                            "real": [Image.fromarray(m) for m in tissue.mask], "group": [r["group"] for r in rows]})
    a, b = pair_quality(ds, true="real", n_boot=50), pair_quality(rows, true=tissue.mask, n_boot=50)
    pd.testing.assert_frame_equal(a.table, b.table)
    assert a.kind == "mask" and len(pair_quality(ds, most=7, n_boot=10).scores) == 7
    figure = worst_pairs(a, ds, "dice", 3, true="real")
    worst = a.scores.nsmallest(3, "dice")
    assert [ax.get_title() for ax in figure.axes[:3]] == [f"pair {i}, {g}\n{d:.3f}" for i, g, d in zip(worst["pair"], worst["group"], worst["dice"])]
    assert np.array_equal(figure.axes[0].images[0].get_array(), tissue.image[worst["pair"].iloc[0]])

def test_what_cannot_be_judged_is_refused(tissue, synthetic):
    rows = records(tissue, synthetic)
    for pairs, arguments, message in (([], {}, "0 pairs"), (rows[:1], {}, "1 pair"), ([{"primary": tissue.image[0]}]*2, {}, "have no 'privileged'"), (rows, {"true": "missing"}, "have no 'missing'"),
                                      ([rows[0], {**rows[1], "privileged": synthetic[1][:40]}], {}, "pair 1 have sizes"), (rows, {"groups": [1]}, "1 groups arrived"),
                                      (rows, {"kind": "he"}, "expected 'image', 'mask'"), ([{k: v[:20] if k != "group" else v for k, v in r.items()} for r in rows], {}, "at least 32")):
        with pytest.raises(ValueError, match=message): pair_quality(pairs, **arguments)
    with pytest.raises(ValueError, match="one of control"): damage(synthetic, "burnt")

@pytest.mark.skipif(not REAL.exists(), reason="the real pairs (shared/data/he_nuclei_pairs beside the repository) are not here")
def test_real_pairs_are_told_from_shuffled_ones():
    ds = pair_folders(REAL)
    rows = [{"primary": r["primary"], "privileged": r["privileged"], "group": r["group"]} for r in ds.select(range(0, len(ds), len(ds)//12))]
    right = pair_quality(rows, n_boot=100)
    wrong = pair_quality([{**r, "privileged": y} for r, y in zip(rows, damage([r["privileged"] for r in rows], "shuffled"))], n_boot=100)
    assert right.kind == "mask" and not right.collapsed
    for m in ("edges", "nuclear_stain"): assert right.table.loc[m, "low"] > wrong.table.loc[m, "high"], (right, wrong)
    assert count_nuclei(nuclear_density(rows[0]["primary"])) > 10
