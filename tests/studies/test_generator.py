"""A generator from folders, as a user trains it: from the command line, stopped and taken up again,
without pairs, with bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

from synthpi.cli import app
from synthpi.data.folders import image_folder
from synthpi.studies.generator import train_generator
from synthpi.studies.generator_settings import GeneratorSettings
from synthpi.pairs.generators import load_generator
from synthpi.pairs.privileged import cached_privileged
from synthpi.data.phantoms import write_tissue
from synthpi.pairs.quality import pair_quality
from synthpi.studies.synthesise import synthesise

ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = dict(
    um_per_px=0.5,
    width=4,
    steps=4,
    crop=32,
    batch_size=2,
    evaluate_every=2,
    device="cpu",
    progress=False,
)

def train(pairs, out, objective="regression", **more):
    "A training with the arguments of the call beside those of the settings."
    call = {k: more.pop(k) for k in ("device", "overwrite", "command", "progress") if k in more}
    if "options" in more: more["option"] = more.pop("options")
    return train_generator(GeneratorSettings(pairs, objective=objective, **more), out, **call)

FLAGS = [
    "--um-per-px",
    "0.5",
    "--width",
    "4",
    "--crop",
    "32",
    "--batch-size",
    "2",
    "--device",
    "cpu",
]

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("generator")
    write_tissue(root, {"train": 1}, {"train": 1}, n_pairs=24, n_pair_patients=8)
    return root

def synthpi(*arguments): return CliRunner().invoke(app, [*map(str, arguments)])

def test_the_command_leaves_generator_report_and_numbers_and_its_images_can_be_made(
    folder, tmp_path
):
    ran = synthpi(
        "generator",
        "--pairs",
        folder / "pairs",
        "--out",
        tmp_path / "g",
        *FLAGS,
        "--steps",
        4,
        "--evaluate-every",
        2,
        "--objective",
        "pix2pix",
        "--option",
        "l1=50",
        "--licence",
        "CC0",
    )
    assert ran.exit_code == 0, ran.output
    results = json.loads((tmp_path/"g"/"results.json").read_text())
    assert results["generator"]["objective_settings"]["l1"] == 50 and {
        "dice",
        "kid",
        "ssim",
    } <= set(results["quality"]["measures"])
    generator = load_generator(tmp_path/"g"/"generator.safetensors")
    three = [
        set(results["test_groups"]),
        set(generator.about["validation_groups"]),
        set(generator.training_ids),
    ]
    assert (
        all(three)
        and not three[0] & three[1]
        and not three[0] & three[2]
        and not three[1] & three[2]
        and sum(map(len, three)) == 8
    )
    page = (tmp_path/"g"/"report.html").read_text(encoding="utf-8")
    assert (
        "training aids, not findings" in page
        and "worst" in page
        and (tmp_path / "g" / "figures" / "test.png").exists()
    )
    assert [p.name for p in sorted((tmp_path / "g" / "samples").iterdir())] == [
        "step-000002.png",
        "step-000004.png",
    ]
    made = synthpi(
        "pairs",
        "--tiles",
        folder / "tiles",
        "--generator",
        tmp_path / "g" / "generator.safetensors",
        "--out",
        tmp_path / "p",
        "--um-per-px",
        "0.75",
        "--device",
        "cpu",
    )
    assert (
        made.exit_code == 0
        and (tmp_path / "p" / "preview.png").exists()
        and "CC0" in (tmp_path / "p" / "manifest.csv").read_text()
    ), made.output
    again = synthpi(
        "pairs",
        "--tiles",
        folder / "tiles",
        "--generator",
        tmp_path / "g" / "generator.safetensors",
        "--out",
        tmp_path / "p",
        "--um-per-px",
        "0.75",
        "--device",
        "cpu",
    )
    assert again.exit_code == 0 and ": 0 images made" in again.output

def test_a_network_of_others_gets_its_values_and_its_scale_from_the_command_line(folder, tmp_path):
    network = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(3, 3, 3, padding=1)).eval()
    # at most 27 x .02 + .02
    for p in network.parameters(): torch.nn.init.constant_(p, .02)
    torch.jit.trace(network, torch.rand(1, 3, 32, 32)).save(tmp_path/"theirs.pt")
    command = [
        "pairs",
        "--tiles",
        folder / "tiles",
        "--generator",
        tmp_path / "theirs.pt",
        "--out",
        tmp_path / "p",
        "--um-per-px",
        "0.75",
        "--device",
        "cpu",
    ]
    for flags, words in (
        ([], "range="),
        (["--option", "range=[-1,1]"], "is not known"),
        (
            ["--option", "values=3", "--generator-um-per-px", "0.5"],
            "expected arguments of load_generator",
        ),
    ):
        ran = synthpi(*command, *flags)
        assert ran.exit_code == 2 and words in ran.output and not (tmp_path / "p").exists(), (
            ran.output
        )
    ran = synthpi(
        *command,
        "--option",
        "range=[-1,1]",
        "--generator-um-per-px",
        "0.5",
        "--generator-licence",
        "MIT",
    )
    assert ran.exit_code == 0 and "MIT" in (tmp_path/"p"/"manifest.csv").read_text(), ran.output

BAD_FLAGS = {
    "--um-per-px half": "expected micrometres per pixel",
    "--um-per-px -1": "um_per_px=-1",
    "": "give um_per_px",
    "--um-per-px 1 --objective gan": "regression, pix2pix, cyclegan, cut",
    "--um-per-px 1 --option l1": "expected NAME=VALUE",
    "--um-per-px 1 --option lambda=3 --objective pix2pix": "lambda",
    "--um-per-px 1 --test 1.5": "test=1.5",
    "--um-per-px 1 --crop 40": "multiple of 16",
    "--um-per-px 1 --val 0": "between 0 and 1",
    "--um-per-px 1 --lr -1": "above 0",
    "--um-per-px 1 --objective pix2pix --option l1=abc": "expected a number",
    "--um-per-px 1 --objective pix2pix --option kind=image": "option kind",
    "--um-per-px 1 --privileged PAIRS/privileged": "learns from pairs",
}

@pytest.mark.parametrize("flags, words", BAD_FLAGS.items(), ids=BAD_FLAGS.keys())
def test_bad_input_is_told_in_a_line_and_nothing_is_written(folder, tmp_path, flags, words):
    flags = flags.split()
    source = folder/"pairs"/"image" if "--privileged" in flags else folder/"pairs"
    ran = synthpi(
        "generator",
        "--pairs",
        source,
        "--out",
        tmp_path / "g",
        *[f.replace("PAIRS", str(folder / "pairs")) for f in flags],
        "--width",
        4,
        "--steps",
        1,
    )
    assert ran.exit_code == 2 and words in ran.output and not (tmp_path/"g").exists(), ran.output

def test_two_folders_without_pairs(folder, tmp_path):
    made = train(
        folder / "pairs" / "image",
        tmp_path / "g",
        "cut",
        privileged=folder / "pairs" / "privileged",
        **SMALL,
        options={"blocks": 1, "patches": 16},
    )
    assert (
        made.quality is None
        and "kid_validation" in made.generator.about
        and made.generator.about["unpaired"]
    )
    assert "without pairs" in (tmp_path/"g"/"report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="files are in both folders"):
        train(
            folder / "pairs" / "image",
            tmp_path / "h",
            "cut",
            privileged=folder / "pairs" / "image",
            **SMALL,
        )

def test_the_split_of_the_set_goes_before_a_split_of_ours(folder, tmp_path):
    pairs = tmp_path/"pairs"
    for side in ("image", "privileged"): (pairs/side).mkdir(parents=True)
    rows = ["name,patient,split"]
    for i, f in enumerate(sorted((folder/"pairs"/"image").iterdir())):
        for side in ("image", "privileged"):
            Image.open(next((folder / "pairs" / side).glob(f"{f.stem}.*"))).save(
                pairs / side / f"{f.stem}.png"
            )
        rows.append(f"{f.stem},p{i//4},{['train', 'train', 'train', 'val', 'test', 'test'][i//4]}")
    (pairs/"pairs.csv").write_text("\n".join(rows))
    made = train(pairs, tmp_path/"g", **SMALL)
    assert (
        made.generator.training_ids,
        made.generator.about["validation_groups"],
        sorted(set(made.quality.scores["group"])),
    ) == (["p0", "p1", "p2"], ["p3"], ["p4", "p5"])

@pytest.mark.slow
def test_another_training_does_not_overwrite(folder, tmp_path):
    first = train(folder/"pairs", tmp_path/"g", **SMALL)
    with (
        FileLock(tmp_path / "g" / ".lock"),
        pytest.raises(ValueError, match="is in use by another process"),
    ):
        train(folder / "pairs", tmp_path / "g", **SMALL)
    with pytest.raises(ValueError, match="another study.*steps was 4, is 5"):
        train(folder / "pairs", tmp_path / "g", **SMALL | {"steps": 5})
    assert (
        train(folder / "pairs", tmp_path / "g", **SMALL).generator.key
        == first.generator.key
    )
    assert (
        train(
            folder / "pairs", tmp_path / "g", overwrite=True, **SMALL | {"steps": 5}
        ).generator.about["steps"]
        == 5
    )

def test_an_unknown_scale_stays_unknown(folder, tmp_path):
    assert (
        train(
            folder / "pairs", tmp_path / "g", **SMALL | {"um_per_px": "unknown"}
        ).generator.um_per_px
        is None
    )
    ran = synthpi(
        "pairs",
        "--tiles",
        folder / "tiles",
        "--generator",
        tmp_path / "g" / "generator.safetensors",
        "--out",
        tmp_path / "p",
        "--um-per-px",
        "0.75",
        "--device",
        "cpu",
    )
    assert ran.exit_code == 2 and "is not known" in ran.output
    ran = synthpi(
        "pairs",
        "--tiles",
        folder / "tiles",
        "--generator",
        tmp_path / "g" / "generator.safetensors",
        "--out",
        tmp_path / "p",
        "--um-per-px",
        "same",
        "--device",
        "cpu",
    )
    assert ran.exit_code == 0, ran.output

@pytest.mark.slow
def test_killed_and_interrupted_trainings_end_alike(folder, tmp_path):
    """SIGINT, then kill -9, then to the end: the file is that of a training which was left alone.
    What ends a process is done to a process of its own; the trainings that run to the end share
    this one"""
    arguments = [
        "generator",
        "--pairs",
        str(folder / "pairs"),
        *FLAGS,
        "--steps",
        "30",
        "--evaluate-every",
        "5",
        "--objective",
        "cyclegan",
        "--option",
        "blocks=1",
        "--test",
        "0",
    ]
    ended = []
    for how in (signal.SIGINT, signal.SIGKILL):
        running = subprocess.Popen(
            [sys.executable, "-m", "synthpi", *arguments, "--out", str(tmp_path / "cut")],
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        seen = (
            len(list((tmp_path / "cut" / "samples").glob("*")))
            if (tmp_path / "cut" / "samples").exists()
            else 0
        )
        while running.poll() is None and (
            not (tmp_path / "cut" / "samples").exists()
            or len(list((tmp_path / "cut" / "samples").glob("step*"))) <= seen
        ):
            time.sleep(0.05)
        if running.poll() is None: running.send_signal(how)
        running.communicate()
        ended.append(running.returncode)
    assert set(ended) & {130, -9} and set(ended) <= {130, -9, 0}, ended
    for name in ("cut", "whole"):
        done = synthpi(*arguments, "--out", tmp_path/name)
        assert done.exit_code == 0, done.output
    keys = [load_generator(tmp_path/name/"generator.safetensors").key for name in ("cut", "whole")]
    assert keys[0] == keys[1]

def copy(source, target, change=lambda image, side: image, table=True):
    for side in ("image", "privileged"):
        (target/side).mkdir(parents=True)
        for f in sorted((source / side).iterdir()):
            change(Image.open(f), side).save(target / side / f"{f.stem}.png")
    if table: (target/"pairs.csv").write_text((source/"pairs.csv").read_text())
    return target

def test_other_images_under_the_same_names_are_another_training(folder, tmp_path):
    pairs = copy(folder/"pairs", tmp_path/"pairs")
    train(pairs, tmp_path/"g", **SMALL)
    one = sorted((pairs/"privileged").iterdir())[0]
    Image.open(one).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(one)
    with pytest.raises(ValueError, match="images was"):
        train(pairs, tmp_path / "g", **SMALL)

def test_patients_that_are_not_known_are_not_claimed(folder, tmp_path):
    pairs = copy(folder/"pairs", tmp_path/"pairs", table=False)
    (pairs/"provenance.json").write_text(json.dumps({"licence": "CC BY-NC-SA 4.0"}))
    made = train(pairs, tmp_path/"g", **SMALL)
    assert (
        "no group is known" in made.quality.notes[0] and made.generator.licence == "CC BY-NC-SA 4.0"
    )
    page = (tmp_path/"g"/"report.html").read_text(encoding="utf-8")
    assert "their patients are not known" in page and "never used" not in page
    results = json.loads((tmp_path/"g"/"results.json").read_text())
    assert (
        results["patients_known"] is False and results["generator"]["licence"] == "CC BY-NC-SA 4.0"
    )

def test_masks_of_classes_are_told_and_no_masks_are_refused(folder, tmp_path):
    classes = copy(
        folder / "pairs",
        tmp_path / "classes",
        lambda image, side: (
            Image.fromarray(
                (np.array(image) > 0).astype(np.uint8)
                * np.uint8(50 + 50 * (np.arange(image.width) // 24))
            )
            if side == "privileged"
            else image
        ),
    )
    with pytest.warns(UserWarning, match="objects and classes are not told apart"):
        train(classes, tmp_path / "c", **SMALL)
    gray = copy(
        folder / "pairs",
        tmp_path / "gray",
        lambda image, side: (
            Image.fromarray(np.maximum(np.array(image), 10)) if side == "privileged" else image
        ),
    )
    with pytest.raises(ValueError, match="100.00% of the pixels of the masks are foreground"):
        train(gray, tmp_path / "d", **SMALL)
    mixed = copy(folder/"pairs", tmp_path/"mixed")
    one = sorted((mixed/"privileged").iterdir())[3]
    Image.open(one).convert("RGB").save(one)
    with pytest.raises(
        ValueError, match="some privileged images have one channel and others several"
    ):
        train(mixed, tmp_path / "e", **SMALL)
    assert not (tmp_path/"d").exists() and not (tmp_path/"e").exists()

def test_what_cannot_be_judged_is_told_and_the_generator_is_kept(folder, tmp_path, monkeypatch):
    def fail(*a, **k): raise ValueError("no measure fits")
    monkeypatch.setattr("synthpi.studies.generator.pair_quality", fail)
    made = train(folder/"pairs", tmp_path/"g", **SMALL)
    assert made.quality is None and json.loads((tmp_path / "g" / "results.json").read_text())[
        "quality"
    ] == {"not_judged": "no measure fits"}
    assert "no measure fits" in (tmp_path/"g"/"report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="less than 32 pixels"):
        train(
            copy(folder / "pairs", tmp_path / "small", lambda image, side: image.resize((24, 24), 0)),
            tmp_path / "h",
            **SMALL,
        )

REAL = Path(__file__).parents[3]/"shared"/"data"

THERE = all((REAL/n).exists() for n in ("he_nuclei_pairs", "tissue"))

@pytest.mark.slow
@pytest.mark.skipif(not THERE, reason="no real pairs and tiles in shared/data beside the repository")
def test_real_pairs_to_a_generator_and_real_tiles_to_pairs(tmp_path):
    """A short training on MoNuSeg (all of it as nuclei would give 0.4), then some tiles of LC25000,
    twice"""
    made = train(
        REAL / "he_nuclei_pairs",
        tmp_path / "g",
        um_per_px=0.5,
        width=8,
        steps=50,
        batch_size=8,
        crop=64,
        test=0.3,
        evaluate_every=25,
        device="cpu",
        progress=False,
        licence="CC BY-NC-SA 4.0",
    )
    assert (
        made.generator.about["dice_validation"] > 0.55
        and made.quality.table.loc["dice", "low"] > 0.5
        and made.quality.scores["group"].nunique() == 9
    )
    (tmp_path/"tiles").mkdir()
    for f in sorted((REAL/"tissue"/"test").glob("*/*.jpg"))[::20]: shutil.copy(f, tmp_path/"tiles")
    first, second = (
        synthesise(
            tmp_path / "tiles",
            tmp_path / "g" / "generator.safetensors",
            tmp_path / "p",
            um_per_px=0.5,
            batch_size=4,
            device="cpu",
            progress=False,
        )
        for _ in range(2)
    )
    assert first.made == first.n >= 10 and (second.made, second.rebuilt) == (0, 0)
    with warnings.catch_warnings(action="ignore"):
        tiles = cached_privileged(image_folder(tmp_path / "tiles"), tmp_path / "p")
    quality = pair_quality(tiles, kind="mask", um_per_px=.5)
    assert quality.table.loc["nuclear_stain", "mean"] > .3 and not quality.collapsed
