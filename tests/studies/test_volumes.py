"""The study of volumes through the command line: the promised results, bad input refused, and a
stopped study that continues."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from synthpi.studies.volumes import report as report_module, study as study_module
from synthpi.volumes.bodies import write_bodies
from synthpi.cli import app
from synthpi.volumes.crop_lists import read_crop_list
from synthpi.volumes.crop_views import CROP_RECIPES, CropRecipe, CropViews
from synthpi.volumes.crops import crop_batches, sample_crops
from synthpi.evaluate.crossval import cross_validate
from synthpi.core.groups import group_folds
from synthpi.evaluate.features import extract_features
from synthpi.losses.geometry import distance_agreement
from synthpi.models.files import load_encoder
from synthpi.evaluate.regression import position_probe
from synthpi.studies.volumes.arms import VOLUME_ARMS, train_volume_arm, volume_loss
from synthpi.models.distances import load_distances
from synthpi.studies.volumes.scores import testable_regions as regions_to_test
from synthpi.studies.volumes.settings import VolumeSettings
from synthpi.studies.volumes.inputs import study_records
from synthpi.studies.volumes.study import volume_study
from synthpi.volumes.store import VolumeStore
from synthpi.volumes.scans import prepare_volumes

REAL = Path(__file__).parents[3]/"shared"/"data"
SMALL = [
    "--steps",
    "2",
    "--size",
    "8",
    "--n-volumes",
    "3",
    "--n-crops",
    "4",
    "--place-crops",
    "16",
    "--region-crops",
    "40",
    "--device",
    "cpu",
    "--workers",
    "0",
]

def synthpi(*arguments): return CliRunner().invoke(app, [str(a) for a in arguments])
# of each kind one: no network, untrained, one view, two views, a head of its own
ARMS = ["position_atlas", "intensity_histogram", "random_encoder", "isimed", "barlow", "two_head"]

def study_of(volumes, out, *more):
    return synthpi("volumes", "--volumes", volumes, "--out", out, *SMALL, *more)

@pytest.fixture(scope="module", autouse=True)
def quick_maps():
    "UMAP has its own tests; two columns of the features stand for it."
    with pytest.MonkeyPatch.context() as patch:
        def fake(h, seed=0): return {"coords": h[:, :2], "trustworthiness": 1.}
        patch.setattr(report_module, "embedding_map", fake)
        yield

@pytest.fixture
def no_report(monkeypatch):
    "For tests of the numbers alone: the figures of the page take longer than the study."
    monkeypatch.setattr(study_module, "write_volume_report", lambda *a: None)

@pytest.fixture(scope="session")
def source(tmp_path_factory):
    "Simulated bodies; never changed by a test"
    return write_bodies(
        tmp_path_factory.mktemp("bodies"), 9, shape=(28, 22, 28), spacing_mm=14, test_share=4 / 9
    )

@pytest.fixture
def data(source, tmp_path): return Path(shutil.copytree(source, tmp_path/"data"))

@pytest.fixture(scope="module")
def study(source, tmp_path_factory):
    "A study of two seeds; never changed by a test"
    out = tmp_path_factory.mktemp("study")/"out"
    result = study_of(source, out, "--labels", "--seeds", 2, "--arms", ",".join(ARMS))
    assert result.exit_code == 0, result.output
    assert "mean AUC" in result.output and "Traceback" not in result.output
    return out

def settings_of(volumes, **more):
    tiny = dict(steps=3, size=8, n_volumes=2, n_crops=3, place_crops=16, region_crops=40)
    return VolumeSettings(volumes, **tiny | more)

def results_of(out): return json.loads((out/"results.json").read_text())
def features(out, arm, seed=0): return dict(np.load(out/"runs"/f"{arm}-seed{seed}"/"features.npz"))

def test_results_hold_what_is_promised(study):
    r = results_of(study)
    assert (
        r["schema"] == 1
        and r["kind"] == "volumes"
        and r["seeds"] == [0, 1]
        and r["command"].startswith("synthpi")
        and r["environment"]["packages"]["torch"]
    )
    assert list(r["arms"]) == ARMS
    assert (
        r["data"]["frame"] == "world_mm"
        and r["data"]["volumes"] == {"train": 5, "test": 4}
        and r["regions"]["folds"] == 4
        and len(r["regions"]["used"]) >= 3
    )
    assert (
        set(r["regions"]["used"]) | set(r["regions"]["left_out"])
        == set(r["data"]["labels"].values())
        and "liver" in r["regions"]["positives"]
    )
    for name, arm in r["arms"].items():
        seeds = 1 if name in ("position_atlas", "intensity_histogram") else 2
        assert arm["steps"] == 2 * bool(VOLUME_ARMS[name].views) and (arm["seconds"] > 0) == bool(
            VOLUME_ARMS[name].views
        )
        assert (
            arm["auc"]["ci"][0] <= arm["auc"]["mean"] <= arm["auc"]["ci"][1]
            and len(arm["auc"]["per_fold"]) == 4
            and len(arm["auc"]["per_seed"]) == seeds
            and list(arm["auc"]["per_region"]) == r["regions"]["used"]
        )
        if name == "position_atlas":
            assert "position_r2" not in arm
            continue
        for score in ("position_r2", "position_mae_mm"):
            low, high = arm[score]["ci"]
            assert low <= arm[score]["mean"] <= high and len(arm[score]["per_seed"]) == seeds
        assert (
            np.mean(arm["position_mae_axes_mm"]) == pytest.approx(arm["position_mae_mm"]["mean"])
            and -1 <= arm["distance_spearman"]["mean"] <= 1
            and arm["rankme"] > 1
        )
    assert [(c["model"], c["base"]) for c in r["comparisons"]][:2] == [
        ("isimed", "position_atlas"),
        ("isimed", "intensity_histogram"),
    ]
    for c in r["comparisons"]:
        assert (
            c["difference"]
            == pytest.approx(
                r["arms"][c["model"]]["auc"]["mean"] - r["arms"][c["base"]]["auc"]["mean"]
            )
            and c["ci"][0] <= c["difference"] <= c["ci"][1]
            and c["df"] == 3
        )
        assert c["p_plain"] <= c["p"] <= c["p_holm"] + 1e-12

def test_numbers_are_those_of_the_stored_features(study):
    "Read again by hand from the encoder files, the crop lists and the labels"
    r, store = results_of(study), VolumeStore(study/"cache"/"volumes")
    crops = {
        k: read_crop_list(study / "crops" / f"{k}.json", store)
        for k in ("place-train", "place-test", "regions-test")
    }
    for arm in ("isimed", "random_encoder"):
        h = {
            k: extract_features(
                load_encoder(study / "runs" / f"{arm}-seed0" / "encoder.safetensors"),
                (b["crop"] for b in c.batches(store)),
            )
            for k, c in crops.items()
        }
        for k in h:
            np.testing.assert_allclose(h[k], features(study, arm)[f"h_{k}"], rtol=1e-4, atol=1e-5)
        p = position_probe(
            h["place-train"],
            crops["place-train"].positions(store),
            crops["place-train"].subjects(store),
            h["place-test"],
            crops["place-test"].positions(store),
            crops["place-test"].subjects(store),
        )
        assert p.r2["mean"] == pytest.approx(
            r["arms"][arm]["position_r2"]["per_seed"][0], abs=1e-4
        ) and p.mae_mm["mean"] == pytest.approx(
            r["arms"][arm]["position_mae_mm"]["per_seed"][0], rel=1e-4
        )
    subjects, (values, y) = (
        crops["regions-test"].subjects(store),
        crops["regions-test"].labels(store),
    )
    keep = regions_to_test(y, subjects)
    cv = cross_validate(
        features(study, "intensity_histogram")["h_regions-test"],
        y[:, keep],
        subjects,
        np.unique(subjects, return_inverse=True)[1],
    )
    # the folds are single subjects, in another order
    assert cv.mean == pytest.approx(r["arms"]["intensity_histogram"]["auc"]["mean"], abs=.02)

def test_every_run_leaves_an_encoder_that_loads(study):
    files = sorted(study.glob("runs/*/encoder.safetensors"))
    assert len(files) == 2*4
    encoder = load_encoder(files[0])
    assert (
        encoder(torch.rand(2, 1, 8, 8, 8)).shape == (2, 128)
        and encoder.about["frame"] == "world_mm"
        and encoder.about["spacing_mm"] == pytest.approx([14] * 3)
        and not list(study.glob("runs/*/checkpoints/*"))
    )

def test_distances_of_the_stored_embedding_are_those_of_the_study(study):
    r, store = results_of(study), VolumeStore(study/"cache"/"volumes")
    crops = read_crop_list(study/"crops"/"place-test.json", store)
    for arm in ("isimed", "two_head"):
        embed = load_distances(study/"runs"/f"{arm}-seed1")
        with torch.no_grad(): z = torch.cat([embed(b["crop"]) for b in crops.batches(store)])
        np.testing.assert_allclose(
            z / embed.scale, features(study, arm, 1)["z_place-test"], rtol=1e-3, atol=1e-4
        )
        assert (
            distance_agreement(z, crops.positions(store)).spearman
            == pytest.approx(r["arms"][arm]["distance_spearman"]["per_seed"][1], abs=1e-3)
            and 50 < embed.scale < 400
        )
    with pytest.raises(FileNotFoundError): load_distances(study/"runs"/"barlow-seed0")

def test_report_is_one_file(study):
    page = (study/"report.html").read_text()
    assert (
        "http://" not in page
        and "https://" not in page
        and "volumes are simulated" not in page
        and "position_atlas" in page
        and "corrected t-test" in page
    )
    heads = re.findall(r'<button type="button">(.*?)</button>', page)
    # the sentences stand last, behind the numbers
    assert heads[0] == "arm" and heads[1] == "R²" and heads[heads.index("what") - 1] == "seconds"
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(alts) == 9 and all(a.endswith(".") and len(a.split()) > 7 for a in alts), alts
    assert {
        "crops",
        "position",
        "places",
        "distance_errors",
        "map",
        "maps",
        "auc",
        "regions",
        "losses",
    } == {p.stem for p in (study / "figures").glob("*.png")}

def test_splits_and_crops_are_portable(study):
    for path in [study / "splits.json", *study.glob("crops/*.json")]:
        assert str(study) not in path.read_text() and "/tmp" not in path.read_text()

def test_a_second_call_finds_everything(study, source, no_report):
    before, results = (
        {p: p.stat().st_mtime_ns for p in study.glob("runs/*/result.json")},
        results_of(study),
    )
    result = study_of(source, study, "--labels", "--seeds", 2, "--arms", ",".join(ARMS))
    assert (
        result.exit_code == 0
        and "continuing (10 of 10 runs are finished)" in result.output
    ), result.output
    assert {
        p: p.stat().st_mtime_ns for p in study.glob("runs/*/result.json")
    } == before and results_of(study)["arms"] == results["arms"]

def test_another_study_is_refused_and_replaced_only_when_told(source, tmp_path, no_report):
    assert study_of(source, tmp_path/"out", "--arms", "intensity_histogram").exit_code == 0
    kept = (tmp_path/"out"/"results.json").read_bytes()
    again = study_of(source, tmp_path/"out", "--arms", "intensity_histogram", "--rule", "any")
    assert (
        again.exit_code == 2
        and "rule was 'center', is 'any'" in again.output
        and (tmp_path / "out" / "results.json").read_bytes() == kept
    )
    assert (
        study_of(
            source,
            tmp_path / "out",
            "--arms",
            "intensity_histogram",
            "--rule",
            "any",
            "--overwrite",
        ).exit_code
        == 0
    )
    r = results_of(tmp_path/"out")
    assert r["regions"]["rule"] == "any" and sum(r["regions"]["positives"].values()) > sum(
        json.loads(kept)["regions"]["positives"].values()
    )

def test_without_labels_only_places_are_judged(data, tmp_path):
    for p in data.glob("*_label.nii.gz"): p.unlink()
    result = study_of(data, tmp_path/"out", "--arms", "intensity_histogram,isimed")
    assert result.exit_code == 0, result.output
    r = results_of(tmp_path/"out")
    assert (
        "auc" not in r["arms"]["isimed"]
        and "comparisons" not in r
        and r["arms"]["isimed"]["position_r2"]
        and not (tmp_path / "out" / "crops" / "regions-test.json").exists()
    )
    refused = study_of(data, tmp_path/"other", "--labels")
    assert (
        refused.exit_code == 2
        and "9 of 9 volumes have no labels" in refused.output
        and not (tmp_path / "other").exists()
    )
    refused = study_of(data, tmp_path/"other", "--arms", "position_atlas")
    assert refused.exit_code == 2 and "there are no labels" in refused.output

def test_volumes_without_splits_are_divided_by_subject(data, tmp_path):
    # two volumes of two subjects
    (data / "subjects.csv").write_text(
        "name,subject\n"
        + "\n".join(f"body_{k:03d},patient_{max(k - 2, k // 2)}" for k in range(9))
        + "\n"
    )
    records, labels = study_records(VolumeSettings(data, labels=False))
    split = {}
    for r in records: split.setdefault(r["subject"], set()).add(r["split"])
    assert (
        not labels
        and all(len(s) == 1 for s in split.values())
        and {s for ss in split.values() for s in ss} == {"train", "test"}
    )
    assert records == study_records(VolumeSettings(data, labels=False))[0]
    with pytest.raises(ValueError, match="2 subjects are in test; expected 3 or more"):
        study_records(VolumeSettings(data))

def _spoil_subjects(old, new):
    def spoil(data):
        table = data/"subjects.csv"
        table.write_text(table.read_text().replace(old, new))
    return spoil

BAD_FLAGS = {
    "--frame nowhere": "frame 'nowhere'",
    "--frame mm_local": "pairs='within'",
    "--arms isimed,mystery": "arm 'mystery'",
    "--arms isimed,isimed": "expected one or more different ones",
    "--encoder vgg": "encoder 'vgg'",
    "--rule most": "rule 'most'",
    "--recipe wild --arms isimed": "recipe 'wild'",
    "--pairs some --arms isimed": "pairs='some'",
    "--window 1,x": "--window 1,x",
    "--device tpu": "device 'tpu'",
    "--weight -1": "weight=-1",
    "--encoder densenet121 --size 16": "too small for densenet121",
    "--recipe none": "recipe 'none' with arms that compare two views",
    "--pairs within --n-crops 1": "two crops of a volume for 'within'",
    "--temperature 0": "temperature",
}

@pytest.mark.parametrize("flags,message", BAD_FLAGS.items(), ids=BAD_FLAGS.keys())
def test_bad_flags_are_refused_before_anything_is_written(source, tmp_path, flags, message):
    result = study_of(source, tmp_path/"out", *flags.split())
    assert result.exit_code == 2 and message in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path/"out").exists()

BAD_DATA = {
    "body_003": lambda d: (d/"body_003.nii.gz").write_bytes(b"no volume"),
    "more than one split": _spoil_subjects("body_001,body_001", "body_001,body_008"),
    "without test": _spoil_subjects(",test", ",val"),
    "no such file or folder": shutil.rmtree,
}

@pytest.mark.parametrize("message,spoil", BAD_DATA.items(), ids=BAD_DATA.keys())
def test_bad_volumes_are_refused_in_a_line(data, tmp_path, message, spoil):
    spoil(data)
    result = study_of(data, tmp_path/"out")
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert message in result.output and not (tmp_path/"out"/"results.json").exists()

def test_labels_that_are_required_must_be_there(data, tmp_path):
    (data/"body_002_label.nii.gz").unlink()
    result = study_of(data, tmp_path/"out", "--labels")
    assert result.exit_code == 2 and "1 of 9 volumes have no labels" in result.output

def test_volumes_of_different_voxels_are_refused_or_resampled(data, tmp_path, no_report):
    import nibabel as nib
    for name in ("body_000", "body_000_label"):
        image = nib.load(data/f"{name}.nii.gz")
        nib.save(
            nib.Nifti1Image(np.asarray(image.dataobj), image.affine * np.array([1, 1, 2, 1])),
            data / f"{name}.nii.gz",
        )
    refused = study_of(data, tmp_path/"out", "--arms", "intensity_histogram")
    assert (
        refused.exit_code == 2
        and "voxels differ in size" in refused.output
        and "--spacing-mm" in refused.output
    )
    assert (
        study_of(
            data, tmp_path / "new", "--arms", "intensity_histogram", "--spacing-mm", 14
        ).exit_code
        == 0
    )

def test_a_stopped_study_continues_and_ends_with_the_same_numbers(source, tmp_path, monkeypatch, no_report):
    settings, quiet = settings_of(source, arms=["isimed", "barlow"], labels=False), dict(device="cpu", progress=False)
    whole = volume_study(settings, tmp_path/"whole", **quiet)
    real, calls = study_module.train_volume_arm, []
    def stopping(name, *args, **kwargs):
        calls.append(name)
        if name == "barlow" and len(calls) < 3: raise KeyboardInterrupt
        return real(name, *args, **kwargs)
    monkeypatch.setattr(study_module, "train_volume_arm", stopping)
    out = tmp_path/"out"
    with pytest.raises(KeyboardInterrupt): volume_study(settings, out, **quiet)
    assert (out/"runs"/"isimed-seed0"/"result.json").exists() and not (out/"results.json").exists()
    r = volume_study(settings, out, **quiet)
    assert calls == ["isimed", "barlow", "barlow"]
    def strip(arms):
        return {n: {k: v for k, v in a.items() if k != "seconds"} for n, a in arms.items()}
    assert strip(r["arms"]) == strip(whole["arms"])

def test_crops_are_kept_when_the_files_change_beneath(source, data, tmp_path, no_report):
    assert study_of(data, tmp_path/"out", "--arms", "intensity_histogram").exit_code == 0
    (tmp_path/"out"/"crops"/"place-test.json").write_text("{}")
    result = study_of(data, tmp_path/"out", "--arms", "intensity_histogram")
    assert result.exit_code == 2 and "place-test.json" in result.output

def test_edited_crops_are_refused_or_replaced_with_their_features(source, tmp_path, no_report):
    out = tmp_path/"out"
    assert study_of(source, out, "--arms", "intensity_histogram").exit_code == 0
    path, before = out/"crops"/"place-test.json", results_of(out)["arms"]
    text = path.read_text()
    facts = json.loads(text)
    for v in facts["volumes"]: v["starts"] = [[a + 1, b, c] for a, b, c in v["starts"]]
    path.write_text(json.dumps(facts))
    result = study_of(source, out, "--arms", "intensity_histogram")
    assert result.exit_code == 2 and "place-test.json is not the list that this study draws" in result.output
    assert study_of(source, out, "--arms", "intensity_histogram", "--overwrite").exit_code == 0
    assert path.read_text() == text
    assert results_of(out)["arms"]["intensity_histogram"]["position_r2"] == before["intensity_histogram"]["position_r2"]

def test_a_call_that_failed_before_it_computed_anything_may_be_corrected(data, tmp_path, no_report):
    # three regions of one name
    (data / "labels.csv").write_text(
        (data / "labels.csv").read_text().replace("heart", "liver").replace("lung", "liver")
    )
    kept = (data/"body_003.nii.gz").read_bytes()
    (data/"body_003.nii.gz").write_bytes(b"no volume")
    assert study_of(data, tmp_path/"out", "--arms", "position_atlas").exit_code == 2
    (data/"body_003.nii.gz").write_bytes(kept)
    # an arm without a place probe is enough
    result = study_of(data, tmp_path/"out", "--arms", "position_atlas")
    assert result.exit_code == 0, result.output
    r = results_of(tmp_path/"out")
    assert len(set(r["data"]["labels"].values())) == len(r["data"]["labels"]) and {
        "liver (3)",
        "liver (4)",
        "liver (5)",
    } <= set(r["data"]["labels"].values())

def test_new_crops_do_not_meet_old_features(source, tmp_path, no_report):
    assert study_of(source, tmp_path/"out", "--arms", "intensity_histogram").exit_code == 0
    before = (tmp_path/"out"/"runs"/"intensity_histogram-seed0"/"result.json").stat().st_mtime_ns
    (tmp_path/"out"/"crops"/"place-test.json").unlink()
    assert study_of(source, tmp_path/"out", "--arms", "intensity_histogram").exit_code == 0
    assert (
        tmp_path / "out" / "runs" / "intensity_histogram-seed0" / "result.json"
    ).stat().st_mtime_ns > before

# Views

@pytest.fixture(scope="session")
def store(source, tmp_path_factory):
    return prepare_volumes(source, tmp_path_factory.mktemp("store") / "s")

def test_views_depend_on_their_key_alone(store):
    views, whole = (
        CropViews(2, "scanner", seed=3),
        list(crop_batches(store, 4, 3, 8, steps=2, seed=1)),
    )
    parts = [list(crop_batches(store, 4, 3, 8, steps=2, seed=1, rank=r, world=2)) for r in range(2)]
    for a, b, c in zip(whole, *parts):
        for k in range(2):
            torch.testing.assert_close(
                views(a)["views"][k],
                torch.cat([views(b)["views"][k], views(c)["views"][k]]),
                rtol=0,
                atol=0,
            )
    a, b = views(whole[0])["views"]
    assert (a != b).any(-1).any(-1).any(-1).all() and (
        CropViews(2, "scanner", seed=4)(whole[0])["views"][0] != a
    ).any()
    assert views(whole[0])["center_mm"] is whole[0]["center_mm"] and "crop" not in views(whole[0])

RECIPES = [dict(gain=.3), dict(gamma=.5), dict(noise=.1), dict(holes=2), dict(holes=2, keep=1.)]

@pytest.mark.parametrize("recipe", [CropRecipe(**r) for r in RECIPES])
def test_each_part_of_a_recipe_does_its_own(store, recipe):
    batch = sample_crops(store, [0, 1, 2], 40, 16, seed=0)
    batch["crop"] = (
        torch.rand(120, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    )
    x, y = batch["crop"], CropViews(1, recipe)(batch)["views"][0]
    assert (
        y.shape == x.shape
        and 0 <= y.min()
        and y.max() <= 1
        and (x != y).flatten(1).any(1).float().mean() > 0.9
    )
    if recipe.gain:
        factor = (y/x).flatten(1).median(1).values.log()
        assert factor.abs().max() <= .3 + 1e-4 and factor.std() == pytest.approx(.3/3**.5, rel=.2)
    if recipe.gamma:
        power = (y.log()/x.log()).flatten(1)
        assert power.std(1).max() < 1e-3 and power[:, 0].log().abs().max() <= .5 + 1e-4
    if recipe.noise:
        noise = (y - x).flatten(1)
        assert (
            noise.mean(1).abs().max() < 0.01
            and noise.std(1).max() < 0.101
            and noise.std(1).mean() == pytest.approx(0.05, rel=0.2)
            and (torch.corrcoef(noise[:20]) - torch.eye(20)).abs().max() < 0.1
        )
    if recipe.holes:
        empty = (y == 0).flatten(1).float().mean(1)
        assert ((y == 0) | (y == x)).all() and (empty > 0).all()
        assert empty.mean() > .8 if recipe.keep else empty.max() < 2*.36**3

REFUSED_VIEWS = {
    "n_views=0": lambda: CropViews(0),
    "recipe 'wild'": lambda: CropViews(2, "wild"),
    "0 or more": lambda: CropViews(2, CropRecipe(gain=-1.)),
    "at most 1": lambda: CropViews(2, CropRecipe(hole=(.1, 1.5))),
    "without": lambda: CropViews(2)({"crop": torch.rand(2, 1, 8, 8, 8)}),
}

@pytest.mark.parametrize("message,make", REFUSED_VIEWS.items(), ids=REFUSED_VIEWS.keys())
def test_views_refuse_what_they_cannot_do(message, make):
    with pytest.raises(ValueError, match=message): make()

# Arms

@pytest.mark.parametrize("name", [n for n, a in VOLUME_ARMS.items() if a.views])
def test_arms_learn(store, name):
    "The loss falls, and an arm that is told places is the better judge of distances for it"
    train = store.indices("train")
    settings = settings_of("bodies", steps=12, n_volumes=4, n_crops=6)
    net, head, trainer = train_volume_arm(name, store, train, settings, seed=1)
    loss = trainer.history["loss"]
    assert (
        len(loss) == 12
        and np.isfinite(loss).all()
        and loss[8:].mean() < loss[:3].mean()
        and not net.training
    )
    assert ("abs_error" in trainer.history) == (name in ("isimed", "barlow_isimed", "two_head"))

def test_arms_are_told_places_only_if_they_should_be(store, monkeypatch):
    "Moved places change what the arms with places learn, and nothing else"
    def weights(name, moved):
        real = VolumeStore.position
        if moved:
            monkeypatch.setattr(
                VolumeStore,
                "position",
                lambda self, i, p, frame="world_mm": (
                    real(self, i, p, frame)[..., ::-1].copy() * np.array([3.0, 1, 0.2])
                ),
            )
        settings = settings_of("bodies", steps=2, n_crops=4)
        net = train_volume_arm(name, store, store.indices("train"), settings)[0]
        monkeypatch.setattr(VolumeStore, "position", real)
        return torch.cat([p.flatten() for p in net.parameters()])
    for name, arm in VOLUME_ARMS.items():
        if arm.views:
            assert torch.equal(weights(name, False), weights(name, True)) == (not arm.places), name

def test_without_a_projector_the_representation_itself_is_compared(store):
    centers, volumes = torch.rand(30, 3)*100, torch.arange(30)//10
    bare, usual = settings_of("bodies", projector=False, steps=1), settings_of("bodies")
    for name in ("simclr", "barlow", "barlow_isimed"):
        head = volume_loss(name, 8, centers, volumes, bare)[0]
        assert isinstance(head, torch.nn.Identity)
        assert list(volume_loss(name, 8, centers, volumes, usual)[0].parameters())
    head = train_volume_arm("barlow_isimed", store, [0, 1], bare)[1]
    assert not list(head.parameters())

def test_frames_without_millimetres_are_refused(store):
    with pytest.raises(ValueError, match="distances are in mm"):
        train_volume_arm("isimed", store, [0, 1], settings_of("bodies"), frame="voxel_local")

# Processes

@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child there")
def test_ctrl_c_keeps_what_is_done(source, tmp_path):
    command = [
        sys.executable,
        "-m",
        "synthpi",
        "volumes",
        "--volumes",
        str(source),
        "--out",
        str(tmp_path / "out"),
        *SMALL[2:],
        "--steps",
        "100000",
        "--arms",
        "intensity_histogram,isimed",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while (
        time.monotonic() < deadline
        and process.poll() is None
        and not (tmp_path / "out" / "runs" / "intensity_histogram-seed0" / "result.json").exists()
    ):
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "the same command continues from there" in said, said
    assert (
        tmp_path / "out" / "runs" / "intensity_histogram-seed0" / "result.json"
    ).exists() and not (tmp_path / "out" / "results.json").exists()

# Real volumes

@pytest.mark.slow
@pytest.mark.parametrize("folder", ["volumes", "volumes_hippocampus"])
def test_real_volumes_run_from_end_to_end(folder, tmp_path):
    if not (REAL/folder).is_dir(): pytest.skip(f"no real volumes in {REAL/folder}")
    names = sorted(
        p.name[:-7]
        for p in (REAL / folder).glob("*.nii.gz")
        if not p.name.endswith("_label.nii.gz")
    )
    table = pd.read_csv(REAL/folder/"subjects.csv").set_index("name")
    few = [n for n in names if table.split[n] == "train"][:4] + [
        n for n in names if table.split[n] == "test"
    ][:3]
    pd.DataFrame(
        [
            {
                "name": n,
                "image": os.path.relpath(REAL / folder / f"{n}.nii.gz", tmp_path),
                "label": os.path.relpath(REAL / folder / f"{n}_label.nii.gz", tmp_path),
                "split": table.split[n],
            }
            for n in few
        ]
    ).to_csv(tmp_path / "few.csv", index=False)
    result = synthpi(
        "volumes",
        "--volumes",
        tmp_path / "few.csv",
        "--out",
        tmp_path / "out",
        *SMALL,
        "--size",
        "16",
        "--place-crops",
        "60",
        "--arms",
        "position_atlas,intensity_histogram,random_encoder,isimed",
    )
    assert result.exit_code == 0, result.output
    r = results_of(tmp_path/"out")
    assert (
        r["data"]["frame"] == ("mm_centered" if folder == "volumes" else r["data"]["frame"])
        and r["arms"]["random_encoder"]["position_r2"]["mean"] > (0.2 if folder == "volumes" else 0)
        and r["arms"]["position_atlas"]["auc"]["mean"] > 0.75
    )
