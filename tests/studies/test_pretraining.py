"""The training step as a user runs it: from the command line, on two processes, killed and resumed,
with pairs, with bad input."""

import json
import os
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
from PIL import Image
from typer.testing import CliRunner

from synthpi.cli import app
from synthpi.core.runs import hold_folder
from synthpi.pairs.stains import StainGenerator
from synthpi.models.files import load_encoder
from synthpi.pairs.privileged import add_privileged
from synthpi.studies.pretraining import pretrain, tiles_to_train

ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = dict(
    encoder="resnet10_narrow", widths=(64, 64), size=32, batch_size=10, progress=False, device="cpu"
)
FLAGS = [
    "--encoder",
    "resnet10_narrow",
    "--widths",
    "64,64",
    "--size",
    "32",
    "--batch-size",
    "10",
    "--device",
    "cpu",
    "--workers",
    "0",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "24 loose tiles of 40 pixels, and two caches of synthetic images"
    root, rng = tmp_path_factory.mktemp("pretrain"), np.random.default_rng(0)
    (root / "tiles").mkdir()
    for k in range(24):
        coarse = rng.integers(60, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 40), Image.BICUBIC).save(root / "tiles" / f"{k:02}.png")
    ds, _ = tiles_to_train(root / "tiles")
    add_privileged(ds, StainGenerator(), root / "cache")
    add_privileged(ds, StainGenerator("eosin"), root / "eosin")
    return root


def synthpi(*arguments):
    return CliRunner().invoke(app, ["pretrain", *map(str, arguments)])


def test_from_the_command_line(folder, tmp_path):
    result = synthpi(
        "--tiles",
        folder / "tiles",
        "--pairs-cache",
        folder / "cache",
        "--method",
        "trident",
        "--loss",
        "barlow",
        "--steps",
        3,
        "--out",
        tmp_path / "run",
        *FLAGS,
    )
    assert result.exit_code == 0, result.output
    assert "3 steps" in result.output and "GB" in result.output
    encoder = load_encoder(tmp_path / "run" / "encoder.safetensors")
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 128) and encoder.about["loss"] == "barlow"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        record["layout"] == [0, 0, 1]
        and record["tiles"]["n"] == 24
        and record["environment"]["packages"]["torch"]
        and record["processes"] == 1
    )
    assert (
        len(pd.read_csv(tmp_path / "run" / "history.csv")) == 3
        and (tmp_path / "run" / "history.png").stat().st_size > 1000
    )


@pytest.mark.parametrize(
    "loss, caches, method, branches",
    [
        ("vicreg", (), "siamese", 2),
        ("barlow", ("cache",), "siamese", 2),
        ("simclr", ("cache",), "trident", 3),
        ("infonce", ("cache", "eosin"), "trident", 4),
    ],
)
def test_every_loss_and_layout_trains(loss, caches, method, branches, folder, tmp_path):
    run = pretrain(
        folder / "tiles",
        tmp_path / "run",
        [folder / c for c in caches],
        method,
        loss,
        steps=2,
        **SMALL,
    )
    assert len(run.history) == 2 and np.isfinite(run.history.loss).all()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["layout"]) == len(record["columns"]) == branches and record["columns"].count(
        "primary"
    ) == (1 if caches and method == "siamese" else 2)


@pytest.mark.parametrize(
    "name, where",
    [
        ("weak", "workers"),
        ("strong", "device"),
        ("histology", "workers"),
        ("histology", "device"),
        ("farndale", "device"),
    ],
)
def test_every_recipe_trains_on_either_side(name, where, folder, tmp_path):
    run = pretrain(
        folder / "tiles",
        tmp_path / "run",
        [folder / "cache"],
        steps=2,
        augmentation=name,
        augment_on=where,
        same_geometry=True,
        **SMALL,
    )
    assert np.isfinite(run.history.loss).all()


def test_a_micro_batch_changes_nothing_but_memory(folder, tmp_path):
    """With GroupNorm the encoder has no statistics of the batch; the projector's BatchNorm is what
    is left, so it is a projector of one layer"""
    args = SMALL | dict(norm="group", widths=(64,), steps=4)
    whole, parts = (
        pretrain(folder / "tiles", tmp_path / str(m), micro_batch=m, **args).history
        for m in (None, 3)
    )
    np.testing.assert_allclose(whole.loss, parts.loss, rtol=2e-4)  # float32, four steps


@pytest.mark.slow
def test_two_processes_give_the_trace_of_one(folder, tmp_path):
    """BatchNorm, 2 + 2 layers deep, an odd batch (7 rows: 4 and 3), three branches: `torchrun`
    against the same command alone"""
    flags = [
        "pretrain",
        "--tiles",
        folder / "tiles",
        "--pairs-cache",
        folder / "cache",
        "--method",
        "trident",
        "--steps",
        "6",
        "--augment-on",
        "workers",
        *FLAGS,
        "--batch-size",
        "7",
    ]
    alone = synthpi(*flags[1:], "--out", tmp_path / "one")
    assert alone.exit_code == 0, alone.output
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "synthpi",
        *flags,
        "--out",
        tmp_path / "two",
    ]
    done = subprocess.run(
        [str(c) for c in launch], env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (pd.read_csv(tmp_path / n / "history.csv") for n in ("one", "two"))
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert done.stdout.count("Encoder:") == 1  # one process speaks
    assert len(one) == len(two) == 6
    # before any step: float32 sums in another order
    np.testing.assert_allclose(one.loss[0], two.loss[0], rtol=1e-5)
    # AdamW divides small gradients by their own size, so rounding grows with the steps
    np.testing.assert_allclose(one.loss, two.loss, rtol=5e-3)
    np.testing.assert_allclose(one.grad_norm[0], two.grad_norm[0], rtol=1e-3)
    a, b = (load_encoder(tmp_path / n / "encoder.safetensors") for n in ("one", "two"))
    # BatchNorm has seen the joined batch
    for (name, x), y in zip(a.named_buffers(), b.buffers()):
        if "running_mean" in name:
            torch.testing.assert_close(x, y, rtol=0.05, atol=0.02, msg=name)


@pytest.mark.slow
def test_killed_and_resumed_from_the_command_line(folder, tmp_path):
    "Killed in a process of its own; refused, resumed and left alone in this one"
    arguments = [
        "--tiles",
        folder / "tiles",
        "--steps",
        "20",
        "--save-every",
        "0",
        "--out",
        tmp_path / "run",
        *FLAGS,
    ]
    first = subprocess.Popen(
        [str(c) for c in (sys.executable, "-u", "-m", "synthpi", "pretrain", *arguments)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("run/checkpoints/step-*.pt")):
        assert first.poll() is None and time.monotonic() < deadline, first.stderr.read()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    assert not (tmp_path / "run" / "encoder.safetensors").exists()
    refused = synthpi(*arguments)
    # nothing is replaced without being asked
    assert refused.exit_code == 2 and "--resume" in refused.output
    resumed = synthpi(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    whole = pretrain(folder / "tiles", tmp_path / "whole", steps=20, **SMALL)
    assert pd.read_csv(tmp_path / "run" / "history.csv").equals(
        pd.read_csv(tmp_path / "whole" / "history.csv")
    )
    assert (tmp_path / "run" / "encoder.safetensors").read_bytes() == (
        tmp_path / "whole" / "encoder.safetensors"
    ).read_bytes()
    assert len(whole.history) == 20


def test_ctrl_c_says_how_to_go_on(folder, tmp_path, monkeypatch):
    import synthpi.train.trainer as trainer

    one = trainer.Trainer._one

    def stop_at_three(self, batches):
        if self.done == 3:
            raise KeyboardInterrupt
        return one(self, batches)

    monkeypatch.setattr(trainer.Trainer, "_one", stop_at_three)
    result = synthpi("--tiles", folder / "tiles", "--steps", 6, "--out", tmp_path / "run", *FLAGS)
    assert (
        result.exit_code == 130
        and "stopped after step 3" in result.output
        and "--resume" in result.output
    )
    monkeypatch.undo()
    assert (
        synthpi(
            "--tiles", folder / "tiles", "--steps", 6, "--out", tmp_path / "run", "--resume", *FLAGS
        ).exit_code
        == 0
    )
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 6


def test_resume_with_nothing_there_begins_and_overwrite_replaces(folder, tmp_path):
    first = pretrain(folder / "tiles", tmp_path / "run", steps=2, resume=True, **SMALL)
    again = pretrain(folder / "tiles", tmp_path / "run", steps=2, overwrite=True, **SMALL)
    assert again.history.equals(first.history)
    other = pretrain(folder / "tiles", tmp_path / "run", steps=3, seed=1, overwrite=True, **SMALL)
    assert len(other.history) == 3 and other.history.loss[0] != first.history.loss[0]


def test_other_pixels_of_the_same_size_are_another_run(folder, tmp_path):
    tiles = Path(shutil.copytree(folder/"tiles", tmp_path/"tiles"))
    before, caches = tiles_to_train(tiles)[1], [folder/"cache", folder/"eosin"]
    assert tiles_to_train(folder/"tiles")[1] == before
    assert len({tiles_to_train(tiles, [c])[1] for c in caches} | {before}) == 3
    for file in sorted(tiles.iterdir())[:2]: file.rename(tiles/f"_{file.name}")
    a, b = sorted(tiles.glob("_*"))                 # two tiles change places: names and bytes remain
    a.rename(tiles/b.name[1:])
    b.rename(tiles/a.name[1:])
    assert tiles_to_train(tiles)[1] != before

def test_a_folder_is_held_while_a_run_is_in_it(folder, tmp_path):
    with hold_folder(tmp_path/"run"):
        result = synthpi("--tiles", folder/"tiles", "--steps", 2, "--out", tmp_path/"run", *FLAGS)
    assert result.exit_code == 2 and f"in use by process {os.getpid()}" in result.output

@pytest.mark.parametrize(
    "flags, message",
    [
        (["--method", "trident"], "without a cache of pairs"),
        (["--method", "tripod"], "method 'tripod'"),
        (["--loss", "hinge"], "expected one of vicreg, barlow"),
        (["--batch-size", "99"], "99 for 24 tiles"),
        (["--encoder", "resnet99"], "resnet99"),
        (["--augmentation", "none"], "augmentation 'none'"),
        (["--widths", "a,b"], "whole numbers"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--precision", "fp8"], "fp8"),
        (["--resume", "--overwrite"], "give resume"),
        (["--lr", "-1"], "learning rate"),
        (["--epochs", "2"], "give one of them"),
        (["--micro-batch", "1"], "BatchNorm"),
        (["--batch-size", "3", "--micro-batch", "2"], "of 2 parts one would have 1"),
        (["--track", "nothing"], "nothing"),
        (["--widths", "0"], "width"),
        (["--pairs-cache", "nowhere"], "manifest.csv"),
        (["--norm", "spectral"], "spectral"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(flags, message, folder, tmp_path):
    result = synthpi(
        "--tiles", folder / "tiles", "--steps", 2, "--out", tmp_path / "run", *FLAGS, *flags
    )
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_told(folder, tmp_path):
    pytest.importorskip("accelerate")
    try:
        import wandb
    except ImportError:
        pass
    else:
        pytest.skip("wandb is installed here")
    with pytest.raises(ValueError, match="pip install wandb"):
        pretrain(folder / "tiles", tmp_path / "run", steps=1, track="wandb", **SMALL)
    assert not (tmp_path / "run").exists()


def test_more_time_may_be_given_to_a_run_in_steps_and_overwrite_takes_the_trackers_files_along(
    folder, tmp_path
):
    out, args = tmp_path / "run", SMALL | dict(steps=200)
    first = pretrain(folder / "tiles", out, minutes=0.5 / 60, track="tensorboard", **args)
    second = pretrain(folder / "tiles", out, minutes=1.0 / 60, resume=True, **args)
    assert 1 <= len(first.history) < len(second.history) < 400
    assert list(out.glob("*/events*"))
    pretrain(folder / "tiles", out, overwrite=True, **SMALL | dict(steps=1))
    assert not list(out.glob("*/events*"))


def test_a_disk_that_is_full_at_the_end_still_gets_the_encoder(folder, tmp_path, monkeypatch):
    import errno

    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not be written"):
        pretrain(folder / "tiles", tmp_path / "run", steps=2, **SMALL)
    assert load_encoder(tmp_path / "run" / "encoder.safetensors").about["done"] == 2


def test_a_missing_synthetic_image_is_told(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "cache", tmp_path / "cache")
    next((tmp_path / "cache").glob("*/*.png")).unlink()
    with pytest.raises(ValueError, match="1 of 24 tiles have no intact image"):
        pretrain(folder / "tiles", tmp_path / "run", [tmp_path / "cache"], steps=2, **SMALL)


def test_only_the_training_split_is_used(folder, tmp_path):
    for k, p in enumerate(sorted((folder / "tiles").glob("*.png"))):
        target = tmp_path / "tiles" / ("test" if k < 6 else "train") / p.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(p.read_bytes())
    ds, _ = tiles_to_train(tmp_path / "tiles")
    assert len(ds) == 18 and set(ds["split"]) == {"train"}


def test_an_unreadable_tile_is_named_or_skipped(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "tiles", tmp_path / "tiles")
    (tmp_path / "tiles" / "07.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="07.png"):
        pretrain(tmp_path / "tiles", tmp_path / "run", steps=1, **SMALL)
    with pytest.warns(UserWarning, match="07.png"):
        run = pretrain(tmp_path / "tiles", tmp_path / "run", steps=1, on_bad="skip", **SMALL)
    assert run.encoder.about["n_tiles"] == 23
