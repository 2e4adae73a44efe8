"""The main job through the command line: results as promised, bad input told and nothing lost, a
stopped study that goes on."""

import json
import os
import pickle
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
from PIL import Image
from typer.testing import CliRunner

from synthpi.studies.tissue import inputs as inputs_module
from synthpi.explain import maps
from synthpi.studies.tissue import study as study_module
from synthpi.cli import app
from synthpi.pairs.generators import ModuleGenerator, load_generator, make_unet, save_generator
from synthpi.models.files import load_encoder
from synthpi.data.phantoms import write_tissue
from synthpi.pairs.quality import MEASURES
from synthpi.studies import tissue_study, TissueSettings

REAL = Path(__file__).parents[3] / "shared" / "data"
TINY = dict(steps=2, batch_size=8, size=32, generator_steps=2, generator_crop=32)
SMALL = [x for k, v in TINY.items() for x in (f"--{k.replace('_', '-')}", v)] + (
    "--device cpu --workers 0 --um-per-px-tiles .75 --um-per-px-pairs .5".split()
)


def synthpi(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def tissue(tiles, out, *more):
    return synthpi("tissue", "--tiles", tiles, "--out", out, *SMALL, *more)


@pytest.fixture(scope="module", autouse=True)
def quick_maps():
    "UMAP has its own tests: compiling it takes longer than the study. PCA stands for it."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "_layout", lambda reduced, params: reduced[:, :2])
        yield


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    "Simulated tiles and pairs; never changed by a test"
    folder = tmp_path_factory.mktemp("source")
    write_tissue(
        folder,
        {"train": 4, "val": 2, "test": 4},
        {"train": 2, "val": 1, "test": 2},
        n_pairs=6,
        n_pair_patients=3,
    )
    return folder


@pytest.fixture
def data(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "data"))


@pytest.fixture
def no_report(monkeypatch):
    "For tests of the numbers alone: the page that is written of them takes longer than the study"
    monkeypatch.setattr(study_module, "write_report", lambda *a: None)


@pytest.fixture(scope="session")
def study(source, tmp_path_factory):
    "A study of all arms, controls and two seeds"
    out = tmp_path_factory.mktemp("study") / "out"
    result = tissue(source / "tiles", out, "--pairs", source / "pairs", "--controls", "--seeds", 2)
    assert result.exit_code == 0, result.output
    return out


def test_results_hold_what_is_promised(study):
    r = json.loads((study / "results.json").read_text())
    assert (
        r["schema"] == 1
        and r["seeds"] == [0, 1]
        and r["command"].startswith("synthpi")
        and r["environment"]["packages"]["torch"]
    )
    assert list(r["arms"]) == [
        "mean_rgb",
        "colour_histogram",
        "random_encoder",
        "supervised",
        "siamese_unprivileged",
        "siamese_privileged",
        "trident",
        "trident_real_pairs",
        "trident_shuffled",
        "trident_blank",
        "trident_third_view",
        "trident_haematoxylin",
    ]
    for name, arm in r["arms"].items():
        trained = not name.endswith(("rgb", "histogram", "random_encoder"))
        for score in ("accuracy", "balanced_accuracy", "macro_f1", "accuracy_stain_shift"):
            low, high = arm[score]["ci"]
            assert 0 <= low <= arm[score]["mean"] <= high <= 1 and len(arm[score]["per_seed"]) == (
                1 if name in ("mean_rgb", "colour_histogram") else 2
            )
        assert (
            set(arm["per_class_recall"]) == set(r["data"]["classes"])
            and arm["steps"] == 2 * trained
            and (arm["seconds"] > 0) == trained
        )
        assert set(arm.get("by_augmentation", ())) == ({"weak", "strong"} if trained else set())
    assert {(e["base"], e["model"]) for e in r["error_reduction"]} >= {
        ("siamese_unprivileged", "trident"),
        ("trident_real_pairs", "trident"),
        ("trident_shuffled", "trident"),
    }
    assert (
        r["generator"]["key"] == load_generator(study / "generator.safetensors").key
        and 0 <= r["generator"]["dice_validation"] <= 1
    )
    assert r["pairs"]["n"] == 36 and r["pairs"]["cache_hits"] == 0


def test_synthetic_images_are_judged_with_and_without_truth(study):
    r = json.loads((study / "results.json").read_text())
    tiles, pairs = (r["pairs"]["quality"][k] for k in ("tiles", "pairs"))
    # six pairs of three patients: one patient is held out
    assert tiles["pairs"] == 36 and pairs["pairs"] == 2 and tiles["kind"] == pairs["kind"] == "mask"
    assert {
        "edges",
        "nuclear_stain",
        "nuclei_difference",
        "diversity",
        "undecided",
        "checkerboard",
    } <= set(tiles["measures"]) <= set(MEASURES) and not {"ssim", "dice", "kid"} & set(
        tiles["measures"]
    )
    assert (
        {"ssim", "psnr", "l1", "dice"} <= set(pairs["measures"])
        and "simulated tissue only" in pairs["features"]
        and tiles["features"] == "not computed"
    )
    for m in tiles["measures"].values():
        assert m["mean"] is None or m["ci"][0] - 1e-9 <= m["mean"] <= m["ci"][1] + 1e-9, m
    # per pair here, per patient there
    assert pairs["measures"]["dice"]["mean"] == pytest.approx(
        r["generator"]["dice_validation"], abs=0.1
    )
    page = (study / "report.html").read_text()
    assert (
        "How good are the synthetic images?" in page
        and page.count("training aids, not findings") >= 2
        and {"worst_tiles", "worst_pairs"} <= {p.stem for p in (study / "figures").glob("*.png")}
    )
    assert ("COLLAPSED" in page) == (tiles["collapsed"] or pairs["collapsed"])


def test_no_place_of_this_machine_is_in_the_results(study, source):
    "Paths name users and projects"
    written = [p for p in study.rglob("*") if p.suffix in (".json", ".html") and "cache" not in p.parts]
    assert len(written) > 20
    for path in written:
        text = path.read_text()
        assert str(source) not in text and str(study.parent) not in text, path


@pytest.fixture
def settings(data):
    "Read in a second: no arm is trained"
    return TissueSettings(
        data/"tiles", data/"pairs", um_per_px_tiles=.75, um_per_px_pairs=.5, size=32, steps=2,
        arms=["mean_rgb", "trident"],
    )


def _swap(files):
    "Two files change places: names and sizes in all remain"
    a, b = (f.read_bytes() for f in files)
    files[0].write_bytes(b)
    files[1].write_bytes(a)

def _correct_a_label(data):
    table = pd.read_csv(data/"tiles"/"tiles.csv", dtype=str)
    table.loc[0, "label"] = next(c for c in table["label"] if c != table["label"][0])
    table.to_csv(data/"tiles"/"tiles.csv", index=False)

@pytest.mark.parametrize("what, change", [
    ("tiles", _correct_a_label),
    ("tiles", lambda data: _swap(sorted((data/"tiles"/"train").rglob("*.png"))[:2])),
    ("pairs", lambda data: _swap(sorted((data/"pairs"/"privileged").iterdir())[:2])),
])
def test_corrected_data_is_another_study(what, change, settings, data):
    before = inputs_module.read_inputs(settings).identity
    change(data)
    after = inputs_module.read_inputs(settings).identity
    assert {k for k in before if before[k] != after[k]} == {what}



def test_too_few_test_tiles_are_refused_before_anything_is_trained(settings, data):
    table = pd.read_csv(data/"tiles"/"tiles.csv", dtype=str)
    few = table[table["split"] == "test"].index[4:]
    table.drop(few).to_csv(data/"tiles"/"tiles.csv", index=False)
    with pytest.raises(ValueError, match="4 tiles are in the test split; expected 5 or more"):
        inputs_module.read_inputs(settings)


def test_chosen_augmentation_is_the_one_with_the_higher_validation_accuracy(study):
    for arm in json.loads((study / "results.json").read_text())["arms"].values():
        if by := arm.get("by_augmentation"):
            assert (
                arm["val_accuracy"]
                == max(b["val_accuracy"] for b in by.values())
                == by[arm["augmentation"]]["val_accuracy"]
            )


def test_every_run_leaves_an_encoder_that_loads(study):
    files = sorted(study.glob("runs/*/encoder.safetensors"))
    assert len(files) == 2 * (1 + 2 * 9)
    assert load_encoder(files[0]).training is False and not list(study.glob("runs/*/checkpoints/*"))


def test_report_is_one_file(study):
    page = (study / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and "tiles are simulated" not in page
    # 2 steps, 2 seeds: no study of this size says yes
    assert (
        "**" not in page
        and ("A hint, not a finding" in page or "No difference was shown:" in page)
        and "the best arm without training" in page
    )
    heads = re.findall(r'<button type="button">(.*?)</button>', page)
    # the sentences stand last, behind the numbers
    assert heads.count("what") == 2 and heads[heads.index("what") + 1] in ("arm", "base")
    alts = re.findall(r'<img [^>]*alt="([^"]*)"', page)
    assert len(alts) > 8 and all(a.endswith(".") and len(a.split()) > 7 for a in alts), alts
    assert {
        "pairs",
        "accuracy",
        "losses",
        "recall",
        "confusion",
        "saliency",
        "map",
        "augmentation",
    } <= {p.stem for p in (study / "figures").glob("*.png")}


def test_a_second_call_finds_everything(study, source, no_report):
    before = {p: p.stat().st_mtime_ns for p in study.glob("runs/*/*")}
    results = json.loads((study / "results.json").read_text())
    result = tissue(
        source / "tiles", study, "--pairs", source / "pairs", "--controls", "--seeds", 2
    )
    assert (
        result.exit_code == 0
        and "36 found in the cache, 0 made" in result.output
        and "continuing with what is there" in result.output
    )
    assert {p: p.stat().st_mtime_ns for p in study.glob("runs/*/*")} == before
    again = json.loads((study / "results.json").read_text())
    assert again["arms"] == results["arms"] and again["pairs"]["cache_hits"] == 36


def test_another_study_is_refused_and_replaced_only_when_told(study, source):
    kept = (study / "results.json").read_bytes()
    result = tissue(source / "tiles", study, "--arms", "mean_rgb")
    assert (
        result.exit_code == 2
        and "holds another study" in result.output
        and "--overwrite" in result.output
    )
    assert (study / "results.json").read_bytes() == kept


def test_overwrite_replaces_a_study_and_nothing_else(source, tmp_path, no_report):
    assert tissue(source / "tiles", tmp_path / "out", "--arms", "mean_rgb").exit_code == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (
        tissue(
            source / "tiles", tmp_path / "out", "--arms", "colour_histogram", "--overwrite"
        ).exit_code
        == 0
    )
    assert (
        list(json.loads((tmp_path / "out" / "results.json").read_text())["arms"])
        == ["colour_histogram"]
        and (tmp_path / "out" / "notes.txt").read_text() == "mine"
    )


def test_a_generator_file_replaces_the_pairs(study, source, tmp_path, no_report):
    result = tissue(
        source / "tiles",
        tmp_path / "out",
        "--generator",
        study / "generator.safetensors",
        "--arms",
        "trident,siamese_unprivileged",
    )
    assert result.exit_code == 0, result.output
    r = json.loads((tmp_path / "out" / "results.json").read_text())
    assert r["generator"]["key"] == load_generator(study / "generator.safetensors").key and set(
        r["arms"]
    ) == {"trident", "siamese_unprivileged"}


def test_unlabelled_tiles_train_and_skip_the_probe(source, tmp_path):
    (tmp_path / "tiles").mkdir()
    for i, p in enumerate(sorted((source / "tiles" / "train").rglob("*.png"))):
        shutil.copy(p, tmp_path / "tiles" / f"{i}.png")
    result = tissue(tmp_path / "tiles", tmp_path / "out", "--pairs", source / "pairs")
    assert result.exit_code == 0, result.output
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert (
        set(arms) == {"siamese_unprivileged", "siamese_privileged", "trident", "trident_real_pairs"}
        and "accuracy" not in arms["trident"]
    )
    assert "no labels" in (tmp_path / "out" / "report.html").read_text()


def test_mixed_modes_and_sizes_are_one_kind_of_tile(data, tmp_path, no_report):
    files = sorted((data / "tiles" / "train").rglob("*.png"))
    gray = np.array(Image.open(files[0]).convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(files[0])
    Image.fromarray(gray).save(files[1])
    Image.open(files[2]).convert("RGBA").save(files[2])
    Image.open(files[3]).resize((90, 70)).save(files[3])
    cmyk = files[4].with_suffix(".jpg")
    Image.open(files[4]).convert("CMYK").save(cmyk)
    table = pd.read_csv(data / "tiles" / "tiles.csv")
    table["path"] = [
        str(Path(p).with_suffix(".jpg")) if (data / "tiles" / p) == files[4] else p
        for p in table["path"]
    ]
    table.to_csv(data / "tiles" / "tiles.csv", index=False)
    files[4].unlink()
    assert (
        tissue(
            data / "tiles", tmp_path / "out", "--pairs", data / "pairs", "--arms", "trident"
        ).exit_code
        == 0
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert (
        set(found["modes"]) == {"I;16", "L", "RGBA", "CMYK", "RGB"} and found["sizes"]["70x90"] == 1
    )


def damage(data, how):
    "Damage a copy of the data, and return what the message has to name"
    tiles, train = data / "tiles", sorted((data / "tiles" / "train").rglob("*.png"))
    table = pd.read_csv(tiles / "tiles.csv")
    if how == "missing folder":
        shutil.rmtree(tiles)
        return "no such file or folder"
    if how == "empty folder":
        shutil.rmtree(tiles)
        tiles.mkdir()
        return "no image"
    if how == "truncated tile":
        train[3].write_bytes(train[3].read_bytes()[:700])
        return train[3].name
    if how == "text for a tile":
        train[3].write_text("not an image")
        return train[3].name
    if how == "missing tile":
        train[3].unlink()
        return train[3].name
    if how == "group in two splits":
        table.loc[table["split"] == "test", "group"] = table["group"][0]
        table.to_csv(tiles / "tiles.csv", index=False)
        return table["group"][0]
    if how == "same file in two splits":
        shutil.copy(train[0], sorted((tiles / "test").rglob("*.png"))[0])
        return train[0].name
    if how == "one class":
        table[table["label"] == "TUM"].to_csv(tiles / "tiles.csv", index=False)
        return "two classes"
    if how == "no test split":
        table[table["split"] != "test"].assign(group="all").to_csv(tiles / "tiles.csv", index=False)
        return "group"
    if how == "pair without its partner":
        first = sorted((data / "pairs" / "image").iterdir())[0]
        first.unlink()
        return first.stem
    if how == "truncated pair":
        first = sorted((data / "pairs" / "privileged").iterdir())[0]
        first.write_bytes(first.read_bytes()[:80])
        return first.stem
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "missing folder",
        "empty folder",
        "truncated tile",
        "text for a tile",
        "missing tile",
        "group in two splits",
        "same file in two splits",
        "one class",
        "no test split",
        "pair without its partner",
        "truncated pair",
    ],
)
def test_bad_input_is_named_and_nothing_is_written(data, tmp_path, how):
    name = damage(data, how)
    result = tissue(data / "tiles", tmp_path / "out", "--pairs", data / "pairs")
    assert result.exit_code == 2 and name in result.output and "Traceback" not in result.output, (
        result.output
    )
    assert not (tmp_path / "out").exists()


def test_bad_tiles_are_skipped_and_counted_when_told(data, tmp_path, no_report):
    name = damage(data, "truncated tile")
    assert (
        tissue(data / "tiles", tmp_path / "out", "--arms", "mean_rgb", "--on-bad", "skip").exit_code
        == 0
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert [Path(p).name for p in found["skipped"]] == [name] and found["tiles"]["train"] == 35


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--arms", "trident"], "needs pairs or a generator"),
        (["--arms", "tridents"], "Did you mean 'trident'"),
        (["--encoder", "resnet51"], "expected one of resnet10_narrow"),
        (["--hard-pair", "TUM,CAT"], "expected two of the classes"),
        (["--device", "cuda:9"], "expected one of auto, cpu, cuda"),
    ],
)
def test_bad_flags_are_told(source, tmp_path, flags, words):
    result = tissue(source / "tiles", tmp_path / "out", *flags)
    assert result.exit_code == 2 and words in result.output and not (tmp_path / "out").exists()


def test_a_pickle_for_a_generator_is_refused(source, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    for content, message in (
        (b"\x80\x04.", "not a whole PyTorch file"),
        (pickle.dumps({"netG": Bomb()}), "a pickle can run code"),
    ):
        (tmp_path / "old.pth").write_bytes(content)
        result = tissue(source / "tiles", tmp_path / "out", "--generator", tmp_path / "old.pth")
        assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "exploded").exists()


def test_a_generator_or_pairs_of_evaluated_patients_are_refused(study, data, tmp_path):
    generator = study / "generator.safetensors"
    table = pd.read_csv(data / "tiles" / "tiles.csv")
    table["group"] = table["group"].replace(
        {
            g: load_generator(generator).training_ids[0]
            for g in table["group"][table["split"] == "val"]
        }
    )
    table.to_csv(data / "tiles" / "tiles.csv", index=False)
    for given in (["--generator", generator], ["--pairs", data / "pairs"]):
        result = tissue(data / "tiles", tmp_path / "out", *given)
        assert (
            result.exit_code == 2
            and "validation or test split" in result.output
            and not (tmp_path / "out").exists()
        )


def test_output_inside_the_tiles_or_in_a_foreign_folder_is_refused(data, tmp_path):
    result = tissue(data / "tiles", data / "tiles" / "out")
    assert result.exit_code == 2 and "lies in the input folder" in result.output
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("meow")
    result = tissue(data / "tiles", tmp_path / "photos", "--arms", "mean_rgb", "--overwrite")
    assert (
        result.exit_code == 2
        and "no study" in result.output
        and [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.txt"]
    )


@pytest.mark.slow
def test_interrupt_keeps_what_is_done_and_the_same_command_goes_on(source, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "synthpi",
        "tissue",
        "--tiles",
        source / "tiles",
        "--out",
        out,
        *SMALL,
        "--arms",
        "siamese_unprivileged",
    ]
    command[command.index("--steps") + 1] = "40"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [str(c) for c in command],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    first, deadline = (
        out / "runs" / "siamese_unprivileged-weak-seed0" / "result.json",
        time.monotonic() + 300,
    )
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "log").read_text()
    assert (
        "the same command continues" in (tmp_path / "log").read_text()
        and not (out / "results.json").exists()
    )
    kept = first.stat().st_mtime_ns
    done = subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "continuing with what is there" in done.stderr, done.stderr
    assert first.stat().st_mtime_ns == kept and set(
        json.loads((out / "results.json").read_text())["arms"]
    ) == {"siamese_unprivileged"}


def call(source, out, **more):
    "The study in Python, without any scale"
    given = TINY | dict(arms=["trident", "siamese_unprivileged"], all_settings=False) | more
    settings = TissueSettings(source / "tiles", **given)
    return tissue_study(settings, out, device="cpu", progress=False)


@pytest.fixture
def nothing_is_read(monkeypatch):
    def refuse(*a, **k):
        raise AssertionError("images were read before the scale was asked for")

    monkeypatch.setattr(inputs_module, "load_tiles", refuse)


def scaled(path, um):
    save_generator(ModuleGenerator(make_unet(8), um), path)
    return path


@pytest.mark.parametrize(
    "given, words",
    [
        (
            {},
            [
                "the tiles and of the pairs",
                "--um-per-px-tiles and --um-per-px-pairs",
                "--same-scale",
                "'trident'",
            ],
        ),
        ({"um_per_px_tiles": 0.75}, ["scale of the pairs", "--um-per-px-pairs"]),
        (
            {"um_per_px_pairs": 0.5, "arms": ["trident_real_pairs"]},
            ["scale of the tiles", "'trident_real_pairs'"],
        ),
        (
            {"um_per_px_tiles": 0.75, "um_per_px_pairs": 0.5, "same_scale": True},
            ["0.75", "0.5", "one or the other"],
        ),
        ({"um_per_px_tiles": -1.0, "um_per_px_pairs": 0.5}, ["--um-per-px-tiles=-1.0", "above 0"]),
        ({"generator_um_per_px": 0.5}, ["without a generator"]),
    ],
)
def test_a_missing_or_contradictory_scale_is_asked_for_before_any_work(
    source, tmp_path, nothing_is_read, given, words
):
    with pytest.raises(ValueError) as error:
        call(source, tmp_path / "out", pairs=source / "pairs", **given)
    for w in words:
        assert w in str(error.value), error.value
    assert not (tmp_path / "out").exists()


def test_a_generator_without_a_scale_is_asked_for_it(source, tmp_path, nothing_is_read):
    unknown, known = (
        scaled(tmp_path / "a.safetensors", None),
        scaled(tmp_path / "b.safetensors", 0.5),
    )
    for file, given, words in (
        (unknown, {"um_per_px_tiles": 0.75}, "--generator-um-per-px.*scale of the generator"),
        (known, {}, "--um-per-px-tiles: .*scale of the tiles"),
        (unknown, {}, "--um-per-px-tiles and --generator-um-per-px"),
        (known, {"um_per_px_tiles": 0.75, "same_scale": True}, "--generator-um-per-px is 0.5"),
        (known, {"um_per_px_tiles": 0.75, "generator_um_per_px": 0.3}, "trained at 0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            call(source, tmp_path / "out", generator=file, **given)
    assert not (tmp_path / "out").exists()


def test_arms_without_a_second_image_need_no_scale(source, tmp_path, no_report):
    assert set(
        call(
            source, tmp_path / "out", pairs=source / "pairs", arms=["mean_rgb", "colour_histogram"]
        )["arms"]
    ) == {"mean_rgb", "colour_histogram"}


def test_the_same_scale_and_a_given_one_reach_the_generator(source, tmp_path, recwarn, request):
    unknown = scaled(tmp_path / "a.safetensors", None)
    same = call(source, tmp_path / "same", generator=unknown, same_scale=True, arms=["trident"])
    assert (
        same["generator"]["um_per_px"] is None
        and "nuclei_rank" not in same["pairs"]["quality"]["tiles"]["measures"]
        and "Nuclei were not counted" in str(same["pairs"]["quality"])
    )
    assert not [w for w in recwarn if "micrometres per pixel" in str(w.message)]
    # the page is the same as any other from here on
    request.getfixturevalue("no_report")
    with pytest.warns(UserWarning, match="0.75 micrometres per pixel.*at 0.5"):
        other = call(
            source,
            tmp_path / "other",
            generator=unknown,
            um_per_px_tiles=0.75,
            generator_um_per_px=0.5,
            arms=["trident"],
        )
    assert (
        other["generator"]["um_per_px"] == 0.5
        and "nuclei_rank" in other["pairs"]["quality"]["tiles"]["measures"]
        and "pairs" not in other["pairs"]["quality"]
    )
    cached = [
        sorted(p.read_bytes() for p in (tmp_path / k / "cache").rglob("*.png"))
        for k in ("same", "other")
    ]
    assert len(cached[0]) == len(cached[1]) == 36 and cached[0] != cached[1]


def test_the_scale_of_the_tables_counts(data, tmp_path, no_report):
    for table, um in ((data / "tiles" / "tiles.csv", 0.75), (data / "pairs" / "pairs.csv", 0.5)):
        pd.read_csv(table).assign(um_per_px=um).to_csv(table, index=False)
    r = call(data, tmp_path / "out", pairs=data / "pairs", arms=["trident", "trident_real_pairs"])
    assert (
        r["generator"]["um_per_px"] == pytest.approx(0.5)
        and "nuclei_rank" in r["pairs"]["quality"]["tiles"]["measures"]
    )
    # 64 pixels of .75 um are 96 of .5: the pairs are as large
    assert r["pairs"]["real"] == 6


def test_tiles_that_cannot_be_judged_do_not_end_the_study(source, tmp_path):
    shutil.copytree(source / "tiles", tmp_path / "tiles")
    for p in (tmp_path / "tiles").rglob("*.png"):
        Image.open(p).resize((24, 24)).save(p)
    r = call(tmp_path, tmp_path / "out", pairs=source / "pairs", arms=["trident"], same_scale=True)
    assert (
        "at least 32" in r["pairs"]["quality"]["tiles"]["not_judged"]
        and "dice" in r["pairs"]["quality"]["pairs"]["measures"]
    )
    assert "not judged, because" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the example data are not beside the repository")
def test_real_tiles_and_pairs(tmp_path):
    """A few real tiles of each class and split, and one pair of each second patient; the columns of
    the sets' own tables are understood"""
    table = pd.read_csv(REAL / "tissue" / "tiles.csv").groupby(["split", "class"]).head(3)
    for p in table["path"]:
        (tmp_path / "tiles" / p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REAL / "tissue" / p, tmp_path / "tiles" / p)
    table.to_csv(tmp_path / "tiles" / "tiles.csv", index=False)
    pairs = pd.read_csv(REAL / "he_nuclei_pairs" / "pairs.csv").groupby("patient").head(1).iloc[::2]
    for side in ("image", "privileged"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for name in pairs["name"]:
            shutil.copy(
                next((REAL / "he_nuclei_pairs" / side).glob(f"{name}.*")), tmp_path / "pairs" / side
            )
    pairs.to_csv(tmp_path / "pairs" / "pairs.csv", index=False)
    result = tissue(
        tmp_path / "tiles",
        tmp_path / "out",
        "--pairs",
        tmp_path / "pairs",
        "--arms",
        "colour_histogram,trident,trident_real_pairs",
        "--hard-pair",
        "lung_aca,lung_scc",
    )
    assert result.exit_code == 0, result.output
    r = json.loads((tmp_path / "out" / "results.json").read_text())
    assert r["data"]["groups"]["train"] < r["data"]["tiles"]["train"] == 15 and r["arms"][
        "trident"
    ]["hard_pair"]["classes"] == ["lung_aca", "lung_scc"]
    assert r["generator"]["validation_groups"] and all(
        g.startswith("TCGA") for g in r["generator"]["validation_groups"]
    )
