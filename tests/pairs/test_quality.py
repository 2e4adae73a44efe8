"""Measures of pairs agree with their definitions, fall on damage beyond their intervals, and stay
put without it; KID and the encoder that ships."""
import importlib.util
import json
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

from synthpi.core.files import read_safetensors
from synthpi.data.folders import pair_folders
from synthpi.pairs.kid import PhantomEncoder, RandomFeatures, embed_images, kid, pooled_stages
from synthpi.models.encoders import make_encoder
from synthpi.data.phantoms import pair_phantoms, tissue_phantoms, write_tissue
from synthpi.pairs.measures import MEASURES
from synthpi.pairs.quality import DAMAGES, damage, worst_pairs
from synthpi.pairs.measures import count_nuclei, nuclear_density
from synthpi.pairs.quality import pair_quality as judge_pairs

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent/"shared/data/he_nuclei_pairs"

def opened(path):
    "A script as a module"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script

def pair_quality(pairs, **options): return judge_pairs(pairs, **{"um_per_px": .5, **options})

@pytest.fixture(scope="module")
def tissue(): return pair_phantoms(24, 8)

@pytest.fixture(scope="module")
def synthetic(tissue):
    return [
        np.uint8(255 / (1 + np.exp(-12 * (gaussian_filter(m / 255.0, 1.2) - 0.5))))
        for m in tissue.mask
    ]

def records(tissue, images):
    return [
        {"primary": p, "privileged": y, "group": g}
        for p, y, g in zip(tissue.image, images, tissue.patient_id)
    ]

@pytest.fixture(scope="module")
def intact(tissue, synthetic):
    return pair_quality(records(tissue, synthetic), true=tissue.mask, seam=(32, 0), n_boot=300)

@pytest.mark.parametrize(
    "how, fall, stay",
    [
        ("control", "", " ".join(MEASURES)),
        ("shuffled", "ssim psnr l1 dice edges nuclear_stain nuclei_rank", "diversity undecided"),
        ("blurred", "ssim psnr l1 dice undecided", ""),
        ("shifted", "ssim psnr l1 dice edges nuclear_stain", "nuclei_rank"),
        ("inverted", "ssim psnr l1 dice kid nuclear_stain", "edges diversity"),
        ("checkerboard", "ssim l1 checkerboard", "edges nuclear_stain"),
        ("collapsed", "ssim psnr l1 dice diversity nuclei_rank edges nuclear_stain", ""),
        ("seams", "l1 seam", "nuclear_stain edges"),
    ],
)
def test_measures_fall_on_damage_and_only_where_they_should(
    tissue, synthetic, intact, how, fall, stay
):
    found, t = (
        pair_quality(
            records(tissue, damage(synthetic, how)),
            true=tissue.mask,
            kind="mask",
            seam=(32, 0),
            n_boot=50,
        ),
        intact.table,
    )
    for m in fall.split():
        value = found.table.loc[m, "mean"]
        assert (
            value < t.loc[m, "low"] if t.loc[m, "better"] == "higher" else value > t.loc[m, "high"]
        ), (m, value, t.loc[m])
    for m in stay.split():
        # 1e-3: intervals of almost constant measures
        if m in t.index:
            assert (
                t.loc[m, "low"] - 1e-3 <= found.table.loc[m, "mean"] <= t.loc[m, "high"] + 1e-3
            ), (m, found.table.loc[m], t.loc[m])
    # sets are compared: blind to shuffling, which must not look worse
    if how == "shuffled": assert found.table.loc["kid", "mean"] <= t.loc["kid", "high"]
    assert (
        found.collapsed == (how == "collapsed") and ("COLLAPSED" in str(found)) == found.collapsed
    )

def test_saturation_and_damage_of_colour_images(tissue):
    pairs = records(tissue, damage(tissue.image, "blurred"))
    base, spoilt = (
        pair_quality(
            records(tissue, damage([r["privileged"] for r in pairs], how)), n_boot=100
        ).table
        for how in ("control", "saturated")
    )
    assert (
        "undecided" not in base.index
        and spoilt.loc["saturation", "mean"] > base.loc["saturation", "high"] + 0.1
    )
    shuffled = damage(tissue.image, "shuffled")
    assert not any(np.array_equal(a, b) for a, b in zip(shuffled, tissue.image)) and sorted(
        x.sum() for x in shuffled
    ) == sorted(x.sum() for x in tissue.image)
    assert set(DAMAGES) > {"shuffled", "blurred", "shifted", "inverted"}

def test_a_perfect_copy_has_perfect_scores(tissue):
    t = pair_quality(records(tissue, tissue.mask), true=tissue.mask, n_boot=20).table["mean"]
    # the matched pairs are left out of the mixed sum
    assert (
        t["ssim"] == pytest.approx(1)
        and t["dice"] == 1
        and t["l1"] == 0
        and t["psnr"] == 60
        and abs(t["kid"]) < 1e-9
    )
    t = pair_quality(records(tissue, tissue.image), n_boot=20).table["mean"]
    assert t["edges"] == pytest.approx(1) and t["diversity"] == pytest.approx(1)

def test_intervals_are_over_groups(tissue, synthetic):
    """Each patient five times over: over pairs the interval narrows by the root of five, over
    groups it stays"""
    few, many = records(tissue, synthetic), records(tissue, synthetic)*5
    def width(pairs, groups):
        t = pair_quality(pairs, groups=groups, n_boot=400).table.loc["edges"]
        return t["high"] - t["low"]
    owners = [r["group"] for r in many]
    assert width(many, owners) == pytest.approx(width(few, None), rel=1e-6)
    assert width(many, list(range(len(many)))) < .7*width(few, list(range(len(few))))
    assert "too narrow" in str(
        pair_quality([{k: r[k] for k in ("primary", "privileged")} for r in few], n_boot=20)
    )

def test_numbers_agree_with_their_definitions(tissue, synthetic, intact):
    s, mean = intact.scores, intact.table["mean"]
    a = [(m > 127) & (x > 127) for m, x in zip(tissue.mask, synthetic)]
    dice = [
        2 * i.sum() / ((m > 127).sum() + (x > 127).sum())
        for i, m, x in zip(a, tissue.mask, synthetic)
    ]
    assert np.allclose(s["dice"], dice) and mean["dice"] == pytest.approx(np.mean(dice))
    # float32
    assert np.allclose(
        s["l1"],
        [np.abs(m / 255.0 - x / 255.0).mean() for m, x in zip(tissue.mask, synthetic)],
        atol=1e-6,
    )
    assert mean["nuclei_rank"] == pytest.approx(
        spearmanr(s["nuclei_primary"], s["nuclei_synthetic"])[0]
    )

def test_kid_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    same = [kid(*rng.standard_normal((2, 30, 8))) for _ in range(200)]
    # four standard errors around zero
    assert abs(np.mean(same)) < 4*np.std(same)/200**.5 and np.std(same) > 0
    assert kid(rng.standard_normal((50, 8)), rng.standard_normal((50, 8)) + 1) > 10*np.std(same)
    z = rng.standard_normal((200, 30, 8))
    # the second set is of the same tissue, a little wider
    paired = [kid(x, x + .3*rng.standard_normal(x.shape), range(30)) for x in z]
    biased = [kid(x, x + .3*rng.standard_normal(x.shape)) for x in z]
    independent = [
        kid(x, y + 0.3 * rng.standard_normal(x.shape))
        for x, y in zip(z, rng.standard_normal(z.shape))
    ]
    error = np.hypot(np.std(paired), np.std(independent))/200**.5
    assert (
        abs(np.mean(paired) - np.mean(independent))
        < 4 * error
        < np.mean(independent) - np.mean(biased)
    )
    with pytest.raises(ValueError, match="at least two rows"):
        kid(np.zeros((1, 3)), np.zeros((4, 3)))

def test_encoder_is_used_named_and_left_alone(tissue, synthetic):
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    q = pair_quality(records(tissue, synthetic), true=tissue.mask, encoder=encoder, n_boot=10)
    assert encoder[1].training and all(
        torch.equal(v, before[k]) for k, v in encoder.state_dict().items()
    )
    assert "Sequential" in q.features
    shipped, same = (
        pair_quality(records(tissue, synthetic), true=tissue.mask, encoder=e, n_boot=10)
        for e in (None, PhantomEncoder())
    )
    assert (
        "PhantomEncoder of synthpi, trained on simulated tissue only" in shipped.features
        and "not comparable" in str(shipped)
        and shipped.features in str(shipped)
    )
    assert (
        shipped.table.loc["kid", "mean"]
        == same.table.loc["kid", "mean"]
        != q.table.loc["kid", "mean"]
    )
    assert torch.equal(
        RandomFeatures()(torch.ones(1, 3, 40, 40)), RandomFeatures()(torch.ones(1, 3, 40, 40))
    )
    with pytest.raises(ValueError, match="pool and flatten"):
        pair_quality(records(tissue, synthetic), true=tissue.mask, encoder=encoder[0], n_boot=10)

def test_dataset_and_records_give_the_same(tissue, synthetic):
    rows = records(tissue, synthetic)
    ds = Dataset.from_dict(
        {
            "primary": [Image.fromarray(r["primary"]) for r in rows],
            "privileged": [Image.fromarray(r["privileged"]) for r in rows],
            "real": [Image.fromarray(m) for m in tissue.mask],
            "group": [r["group"] for r in rows],
        }
    )
    a, b = pair_quality(ds, true="real", n_boot=50), pair_quality(rows, true=tissue.mask, n_boot=50)
    pd.testing.assert_frame_equal(a.table, b.table)
    assert a.kind == "mask" and len(pair_quality(ds, most=7, n_boot=10).scores) == 7
    figure = worst_pairs(a, ds, "dice", 3, true="real")
    worst = a.scores.nsmallest(3, "dice")
    assert [ax.get_title() for ax in figure.axes[:3]] == [
        f"pair {i}\n{g}\n{d:.3f}" for i, g, d in zip(worst["pair"], worst["group"], worst["dice"])
    ]
    assert np.array_equal(figure.axes[0].images[0].get_array(), tissue.image[worst["pair"].iloc[0]])

def test_what_cannot_be_judged_is_refused(tissue, synthetic):
    rows = records(tissue, synthetic)
    for pairs, arguments, message in (
        ([], {}, "0 pairs"),
        (rows[:1], {}, "1 pair"),
        ([{"primary": tissue.image[0]}] * 2, {}, "have no 'privileged'"),
        (rows, {"true": "missing"}, "have no 'missing'"),
        ([rows[0], {**rows[1], "privileged": synthetic[1][:40]}], {}, "pair 1 have sizes"),
        (rows, {"groups": [1]}, "1 groups"),
        (rows, {"kind": "he"}, "one of image, mask"),
        (rows, {"um_per_px": 0}, "got um_per_px=0"),
        (
            [{k: v[:20] if k != "group" else v for k, v in r.items()} for r in rows],
            {},
            "at least 32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pair_quality(pairs, **arguments)
    with pytest.raises(ValueError, match="one of control"): damage(synthetic, "burnt")

def test_nuclei_are_counted_only_at_a_known_scale(tissue, synthetic):
    known, unknown = (
        pair_quality(records(tissue, synthetic), um_per_px=um, n_boot=20) for um in (0.5, None)
    )
    counted = {"nuclei_rank", "nuclei_difference"}
    assert set(known.table.index) - set(unknown.table.index) == counted and not {
        "nuclei_primary",
        "nuclei_synthetic",
    } & set(unknown.scores)
    assert "Nuclei were not counted" in str(unknown) and "Nuclei were not counted" not in str(known)
    fine = pair_quality(records(tissue, synthetic), um_per_px=.15, n_boot=20).scores
    # at 0.15 um nuclei would have to be three times as wide
    assert fine["nuclei_primary"].sum() < .7*known.scores["nuclei_primary"].sum()

def test_the_record_is_the_table_ready_for_json(tissue, synthetic, intact):
    r = json.loads(json.dumps(intact.record()))
    assert (
        set(r["measures"]) == set(intact.table.index)
        and r["pairs"] == 24
        and r["groups"] == 8
        and r["collapsed"] is False
        and r["notes"] == intact.notes
        and r["features"] == intact.features
    )
    for m, x in r["measures"].items():
        assert [x["mean"], *x["ci"], x["n"], x["better"]] == list(
            intact.table.loc[m, ["mean", "low", "high", "n", "better"]]
        )
    gray = [np.full((96, 96, 3), 99, np.uint8)]*4
    # no input differs from another: diversity has no meaning
    flat = pair_quality(
        [{"primary": x, "privileged": x, "group": i} for i, x in enumerate(gray)], n_boot=10
    )
    assert "diversity" not in flat.table.index and flat.record()["collapsed"] is False

def test_the_study_of_damaged_pairs_writes_and_prints_its_table(tmp_path, monkeypatch, capsys):
    """tests/evidence/damaged_pairs.py, which makes the table on real pairs, here on a few simulated
    ones"""
    write_tissue(tmp_path, {"train": 1}, {"train": 1}, n_pairs=8, n_pair_patients=4)
    script = opened(ROOT/"tests"/"evidence"/"damaged_pairs.py")
    monkeypatch.setattr(script, "DAMAGES", ("control", "shuffled", "inverted"))
    script.main(tmp_path/"pairs", tmp_path/"out.json", .5, 6, 20, 0)
    found, printed = json.loads((tmp_path/"out.json").read_text()), capsys.readouterr().out
    assert found["data"]["pairs"] == 6 and set(found["kinds"]) == {
        "true masks",
        "haematoxylin images",
    }
    masks = found["kinds"]["true masks"]["damaged"]
    assert (
        masks["shuffled"]["dice"]["half_widths_worse"] > 1
        and masks["inverted"]["nuclear_stain"]["half_widths_worse"] > 1
        and abs(masks["control"]["ssim"]["half_widths_worse"]) < 1
    )
    assert (
        printed.count("| damage | ssim |") == 2
        and f"| {masks['shuffled']['dice']['half_widths_worse']:.1f}".replace("| ", "**") in printed
    )

# The features of KID

@pytest.fixture(scope="module")
def shipped(): return PhantomEncoder()

def test_the_shipped_encoder_is_small_frozen_and_says_what_it_is(shipped):
    path = ROOT/"synthpi"/"phantom_encoder.safetensors"
    assert (
        path.stat().st_size < 7e5
        and not shipped.training
        and not any(p.requires_grad for p in shipped.parameters())
    )
    facts, state = read_safetensors(path, "synthpi-encoder-1")
    assert (
        all(t.dtype == torch.float16 for t in state.values() if t.is_floating_point())
        and facts["about"]["data"] == "synthpi.phantoms.tissue_phantoms"
    )
    assert (
        len(facts["about"]["mean"])
        == len(facts["about"]["std"])
        == shipped(torch.rand(2, 3, 48, 40)).shape[1]
        == 256
    )
    assert (
        facts["about"]["held_out"]["accuracy_tissue"] > 0.6
        and facts["about"]["held_out"]["accuracy_rendering"] > 0.9
    )

def test_the_stored_command_makes_such_a_file(tmp_path, monkeypatch, shipped):
    """Two steps of it: its defaults are those of the shipped file, a batch depends on seed and step
    only, and the file opens as the shipped one does"""
    script = opened(ROOT/"tests"/"phantom_encoder.py")
    asked = script.parse(["--out", "x"])
    assert {k: v for k, v in vars(asked).items() if k != "out"} == {
        k: shipped.about[k] for k in ("steps", "batch_size", "n_per_class", "seed")
    }
    tissue = script.draw_tissue(12, 0)
    monkeypatch.setattr(script, "draw_tissue", lambda n, seed: tissue)
    (x, known), (again, _), (other, _) = (script.batch(tissue, 16, 0, k) for k in (3, 3, 4))
    assert (
        torch.equal(x, again)
        and not torch.equal(x, other)
        and x.shape == (16, 3, 64, 64)
        and 0 <= x.min()
        and x.max() <= 1
    )
    gray = (x == x[:, :1]).all(1).flatten(1).all(1)
    assert not gray[known["rendering"] == 0].any() and set(known["rendering"].tolist()) == {
        0,
        1,
        2,
        3,
    }
    script.main(tmp_path/"a", 2, 8, 12, 0)
    facts, state = read_safetensors(tmp_path/"a", "synthpi-encoder-1")
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in shipped.encoder.state_dict().items()
    } and set(facts["about"]) == set(shipped.about)

def test_features_are_standard_on_tissue_of_others(shipped):
    "Mean 0 and spread 1 on simulated tiles in many renderings; on H&E alone of the same order"
    h = embed_images(shipped, tissue_phantoms(12, 6, seed=77).image)
    assert (
        h.shape == (108, 256) and abs(h.mean()) < 0.6 and 0.3 < h.std() < 2 and np.isfinite(h).all()
    )

def test_pooled_stages_end_with_what_the_encoder_gives():
    torch.manual_seed(0)
    encoder, x = make_encoder("resnet10_narrow").eval(), torch.rand(2, 3, 64, 48)
    with torch.no_grad(): h = pooled_stages(encoder, x)
    assert h.shape == (2, 16 + 16 + 32 + 64 + 128) and torch.allclose(
        h[:, -128:], encoder(x), atol=1e-6
    )
    assert torch.allclose(h[:, :16], encoder.act(encoder.bn1(encoder.conv1(x))).mean((2, 3)))

def test_the_shipped_encoder_knows_tissue(shipped):
    """The nearest tile of another patient is of the same tissue; random convolutions are misled by
    stain and focus"""
    t = tissue_phantoms(12, 6, size=64, um_per_px=.6, seed=21)
    owner, right = np.array(t.patient_id), []
    for net in (shipped, RandomFeatures()):
        h = embed_images(net, t.image)
        far = (
            (((h - h.mean(0)) / (h.std(0) + 1e-9))[:, None] - ((h - h.mean(0)) / (h.std(0) + 1e-9)))
            .__pow__(2)
            .sum(2)
        )
        far[owner[:, None] == owner] = np.inf
        right.append((t.label[far.argmin(1)] == t.label).mean())
    assert right[0] > .55 and right[0] > right[1] + .1, right

@pytest.mark.parametrize("kind", ["H&E", "mask"])
def test_kid_rises_with_damage_that_a_set_can_show(tissue, synthetic, shipped, kind):
    true = list(tissue.image if kind == "H&E" else tissue.mask)
    images = (
        [np.uint8(gaussian_filter(x.astype(float), (0.7, 0.7, 0)).round()) for x in tissue.image]
        if kind == "H&E"
        else synthetic
    )
    h_true, owner = embed_images(shipped, true), np.array(tissue.patient_id)
    h = {
        how: embed_images(shipped, damage(images, how))
        for how in (
            "control",
            "blurred",
            "inverted",
            "checkerboard",
            "collapsed",
            "seams",
            "shuffled",
            "shifted",
        )
    }
    rng = np.random.default_rng(0)
    keep = [np.isin(owner, rng.choice(np.unique(owner), 4, replace=False)) for _ in range(40)]
    high = np.percentile([kid(h["control"][k], h_true[k], owner[k]) for k in keep], 97.5)
    value = {how: kid(x, h_true, owner) for how, x in h.items()}
    for how in ["blurred", "inverted", "checkerboard", "collapsed"] + ["seams"] * (kind == "H&E"):
        assert value[how] > high, (how, value, high)
    # sets are compared: neither changes the set
    for how in ("shuffled", "shifted"): assert value[how] <= high, (how, value, high)

def test_images_of_many_sizes_are_embedded_in_their_order(tissue, shipped):
    mixed = [tissue.image[0], tissue.image[1][:64], tissue.mask[2], tissue.image[3][:, :40]]
    rows = embed_images(shipped, mixed, batch_size=2)
    for x, row in zip(mixed, rows):
        assert np.allclose(embed_images(shipped, [x])[0], row, atol=1e-4)
    assert not np.allclose(rows[0], rows[1], atol=1e-2)

@pytest.mark.skipif(not REAL.exists(), reason="the real pairs (shared/data/he_nuclei_pairs beside "
                                              "the repository) are not here")
def test_real_pairs_are_told_from_shuffled_ones():
    ds = pair_folders(REAL)
    rows = [
        {"primary": r["primary"], "privileged": r["privileged"], "group": r["group"]}
        for r in ds.select(range(0, len(ds), len(ds) // 12))
    ]
    right = pair_quality(rows, n_boot=100)
    wrong = pair_quality(
        [
            {**r, "privileged": y}
            for r, y in zip(rows, damage([r["privileged"] for r in rows], "shuffled"))
        ],
        n_boot=100,
    )
    assert right.kind == "mask" and not right.collapsed
    for m in ("edges", "nuclear_stain"):
        assert right.table.loc[m, "low"] > wrong.table.loc[m, "high"], (right, wrong)
    assert count_nuclei(nuclear_density(rows[0]["primary"])) > 10
