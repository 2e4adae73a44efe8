"""Pairs as a long run makes them: killed, damaged, on a full disk, by several processes, of several
generators, as a stream; and `synthesise`, which puts it together."""
import csv
import errno
import hashlib
import importlib.util
import io
import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset, Features, Image as ImageFeature, IterableDataset, Value
from PIL import Image

import synthpi.pairs.cache as cache_module
import synthpi.pairs.makers as makers_module
from synthpi.pairs.cache import COLUMNS, check_item, encode_item, read_manifest
from synthpi.data.folders import image_folder
from synthpi.pairs.generators import ModuleGenerator, make_unet, save_generator
from synthpi.pairs.stains import StainGenerator
from synthpi.pairs.privileged import add_privileged, cached_privileged, refuse_overlap
from synthpi.studies.pretraining import pretrain
from synthpi.pairs.stains import RandomWeights
from synthpi.studies.synthesise import NOTE, choose_generator, synthesise

FORK = mp.get_context("fork") if "fork" in mp.get_all_start_methods() else None
needs_fork = pytest.mark.skipif(FORK is None, reason="this system cannot fork")

class Counting(StainGenerator):
    "Counts the images that it has made"
    asked = 0
    def translate(self, images, um_per_px=None):
        self.asked += len(images)
        return super().translate(images, um_per_px)

class Scaled:
    "Its image is the scale that it was given, as a gray"
    um_per_px, training_ids, name, key = .5, (), "scaled", "scaled"
    def translate(self, images, um_per_px=None): return torch.full_like(images, um_per_px or 0)

def write_tiles(folder, n, size=24, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for k in range(n):
        Image.fromarray(rng.integers(40, 256, (size, size, 3), dtype=np.uint8)).save(
            folder / f"{k:03}.png"
        )
    return folder

def tiles(folder, **columns):
    files = sorted(folder.glob("*.png"))
    features = {"primary": ImageFeature(), "path": Value("string")} | {
        c: Value("float32" if c == "um_per_px" else "string") for c in columns
    }
    return Dataset.from_dict(
        {"primary": [str(f) for f in files], "path": [f.name for f in files], **columns},
        features=Features(features),
    )

@pytest.fixture
def ds(tmp_path): return tiles(write_tiles(tmp_path/"tiles", 10))

def items(cache): return sorted(cache.glob("*/*.png"))
def contents(cache): return {p.name: p.read_bytes() for p in items(cache)}
def table(cache):
    return list(csv.DictReader(open(cache / "manifest.csv", encoding="utf-8", newline="")))
def images(ds, column="privileged"): return [np.asarray(r[column]) for r in ds]

# ---- made once

def test_the_image_of_a_tile_is_what_the_generator_gives(ds, tmp_path):
    pairs, stats = add_privileged(ds, Counting(), tmp_path/"cache", batch_size=4)
    assert stats == {
        "n": 10,
        "cache_hits": 0,
        "made": 10,
        "rebuilt": 0,
        "generator": StainGenerator().key,
    }
    for r in pairs:
        x = torch.from_numpy(np.asarray(r["primary"]).copy()).permute(2, 0, 1)[None].float()/255
        # one channel: gray images are stored gray
        assert np.array_equal(
            np.asarray(r["privileged"]),
            (StainGenerator().translate(x)[0, 0] * 255).round().byte().numpy(),
        )

def test_a_second_run_calls_nobody_and_writes_nothing_also_after_a_move(ds, tmp_path):
    add_privileged(ds, Counting(), tmp_path/"cache")
    shutil.move(tmp_path/"cache", tmp_path/"moved")
    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path/"moved").rglob("*")}
    before, generator = state(), Counting()
    pairs, stats = add_privileged(ds, generator, tmp_path/"moved")
    assert generator.asked == 0 and stats["cache_hits"] == 10 and state() == before
    assert not [r for r in table(tmp_path/"moved") if str(tmp_path) in str(r)]          # portable

def test_a_tile_that_is_there_twice_is_made_once(ds, tmp_path):
    shutil.copy(tmp_path/"tiles"/"000.png", tmp_path/"tiles"/"099.png")
    generator, seen = Counting(), []
    pairs, stats = add_privileged(
        tiles(tmp_path / "tiles"), generator, tmp_path / "cache", batch_size=4, on_tiles=seen.append
    )
    assert (
        stats["n"],
        stats["made"],
        generator.asked,
        len(items(tmp_path / "cache")),
        sum(seen),
    ) == (11, 10, 10, 10, 11)
    assert len(table(tmp_path/"cache")) == 11 and np.array_equal(*images(pairs.select([0, 10])))

def test_tiles_of_many_sizes_share_batches_with_their_like(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path/"tiles").mkdir()
    for k in range(40):
        Image.fromarray(rng.integers(0, 256, (16 + k % 10, 20, 3), dtype=np.uint8)).save(
            tmp_path / "tiles" / f"{k:03}.png"
        )
    sizes = []
    class Watching(StainGenerator):
        def translate(self, x, um_per_px=None):
            sizes.append(tuple(x.shape))
            return super().translate(x)
    pairs, _ = add_privileged(tiles(tmp_path/"tiles"), Watching(), tmp_path/"cache", batch_size=2)
    assert all(r["primary"].size == r["privileged"].size for r in pairs)
    assert sum(b for b, *_ in sizes) == 40 and {b for b, *_ in sizes} == {2}

def test_equal_tiles_give_equal_files(ds, tmp_path):
    for name in "ab": add_privileged(ds, StainGenerator(), tmp_path/name)
    assert contents(tmp_path/"a") == contents(tmp_path/"b")
    assert (tmp_path/"a"/"manifest.csv").read_bytes() == (tmp_path/"b"/"manifest.csv").read_bytes()

def test_colour_stays_and_gray_is_one_channel(ds, tmp_path):
    class Half(StainGenerator):
        key = "half"
        def translate(self, x, um_per_px=None): return x/2
    class One(StainGenerator):
        key = "one"
        def translate(self, x, um_per_px=None): return x[:, :1]
    colour, gray = (
        add_privileged(ds, g(), tmp_path / "cache")[0][0]["privileged"] for g in (Half, One)
    )
    assert (colour.mode, gray.mode) == ("RGB", "L")
    assert np.abs(np.asarray(colour) - np.asarray(ds[0]["primary"])/2).max() <= .5

@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x: x*2, "expected \\[0, 1\\]"),
        (lambda x: x*float("nan"), "nan"),
        (lambda x: x[..., 1:], "gave shape"),
        (lambda x: x[:, :2], "gave shape"),
        (lambda x: x[:1], "gave shape"),
    ],
)
def test_a_generator_that_breaks_its_promise_is_named_and_nothing_is_stored(
    bad, message, ds, tmp_path
):
    class Bad(StainGenerator):
        def translate(self, x, um_per_px=None): return bad(x)
    with pytest.raises(ValueError, match=message): add_privileged(ds, Bad(), tmp_path/"cache")
    assert not items(tmp_path/"cache")

def test_bad_arguments(ds, tmp_path):
    for kw, message in (
        (dict(batch_size=0), "batch_size=0"),
        (dict(column="primary"), "none called primary"),
        (dict(generator={}), "at least one"),
        (dict(ds=ds.remove_columns("primary")), "image column primary"),
    ):
        with pytest.raises(ValueError, match=message):
            add_privileged(
                **(dict(ds=ds, generator=StainGenerator(), cache=tmp_path / "cache") | kw)
            )
    (tmp_path/"tiles"/"010.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="the tile 010.png cannot be read"):
        add_privileged(
            tiles(tmp_path / "tiles"), StainGenerator(), tmp_path / "cache", batch_size=2
        )
    assert len(items(tmp_path/"cache")) >= 8                # those before it are kept

def test_a_folder_with_a_table_of_something_else_is_left_alone(ds, tmp_path):
    (tmp_path/"cache").mkdir()
    (tmp_path/"cache"/"manifest.csv").write_text("path,label\na.png,tumour\n")
    with pytest.raises(ValueError, match="no manifest of synthetic images"):
        add_privileged(ds, StainGenerator(), tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["manifest.csv"] and "tumour" in (
        tmp_path / "cache" / "manifest.csv"
    ).read_text()

def test_a_cache_of_version_0_1_0_is_not_mistaken(ds, tmp_path):
    old = tmp_path/"cache"/"ab"/"ab0123456789abcd.png"
    old.parent.mkdir(parents=True)
    Image.new("L", (24, 24)).save(old)
    (tmp_path / "cache" / "manifest.csv").write_text(
        "primary,privileged,generator,generator_key,um_per_px\n"
        f"000.png,ab/{old.name},haematoxylin,{StainGenerator().key},\n"
    )
    with pytest.raises(ValueError, match="no images with checksums"):
        cached_privileged(ds, tmp_path / "cache")
    pairs, stats = add_privileged(ds, StainGenerator(), tmp_path/"cache")
    assert stats["made"] == 10 and len(table(tmp_path/"cache")) == 10 and old.exists()

# ---- damage

def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]

def other_pixels(data):
    file = io.BytesIO()
    Image.fromarray(255 - np.asarray(Image.open(io.BytesIO(data)))).save(file, "PNG")
    return file.getvalue()

DAMAGES = {
    "bit": flip,
    "pixels": other_pixels,
    "cut": lambda d: d[:100],
    "empty": lambda d: b"",
    "longer": lambda d: d + b"x",
    "last bit": lambda d: d[:-1] + bytes([d[-1] ^ 1]),
}
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_made_good(damage, ds, tmp_path):
    add_privileged(ds, StainGenerator(), tmp_path/"cache")
    before, victim = contents(tmp_path/"cache"), items(tmp_path/"cache")[3]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(ValueError, match=r"1 of 10 tiles .* \(damaged\)"):
        cached_privileged(ds, tmp_path / "cache")
    generator = Counting()
    _, stats = add_privileged(ds, generator, tmp_path/"cache")
    assert (stats["cache_hits"], stats["rebuilt"], stats["made"], generator.asked) == (
        9,
        1,
        1,
        1,
    ) and contents(tmp_path / "cache") == before

def test_the_intact_image_of_another_tile_or_generator_is_damage_too(ds, tmp_path):
    add_privileged(ds, {"a": StainGenerator(), "b": StainGenerator("dab")}, tmp_path/"cache")
    before, (one, two, *_) = contents(tmp_path/"cache"), items(tmp_path/"cache")
    shutil.copy(one, two)
    _, stats = add_privileged(
        ds, {"a": StainGenerator(), "b": StainGenerator("dab")}, tmp_path / "cache"
    )
    assert (
        sum(s["rebuilt"] for s in stats.values()) == sum(s["made"] for s in stats.values()) == 1
        and contents(tmp_path / "cache") == before
    )

# ---- killed

class Slow(StainGenerator):
    "Tells of every image"
    def __init__(self, tell):
        super().__init__()
        self.tell = tell
    def translate(self, x, um_per_px=None):
        time.sleep(.02)
        for _ in range(len(x)): self.tell.send("image")
        return super().translate(x)

def _child(folder, cache, kind, tell):
    ds = tiles(folder)
    tell.send("ready")
    if kind == "stream":
        list(add_privileged(ds.to_iterable_dataset(), Slow(tell), cache, batch_size=3)[0])
    else:
        add_privileged(ds, Slow(tell), cache, batch_size=3)

def child(tmp_path, kind="set"):
    """A process of its own, forked because importing takes much longer than the work; and the end
    of a pipe from it"""
    here, there = FORK.Pipe(duplex=False)
    p = FORK.Process(
        target=_child, args=(tmp_path / "tiles", tmp_path / "cache", kind, there), daemon=True
    )
    p.start()
    there.close()
    return p, here

@needs_fork
@pytest.mark.parametrize("kind", ["set", "stream"])
def test_killed_at_any_moment_it_continues(kind, tmp_path):
    ds, rng = tiles(write_tiles(tmp_path/"tiles", 60)), random.Random(kind)
    add_privileged(ds, StainGenerator(), tmp_path/"whole")
    whole, kept = contents(tmp_path/"whole"), set()
    for _ in range(5):
        p, tell = child(tmp_path, kind)
        assert tell.recv() == "ready"
        for _ in range(rng.randrange(1, 10)): tell.recv()
        time.sleep(rng.random()*.02)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        now = contents(tmp_path/"cache")
        # nothing half-written, and nothing lost
        assert kept <= set(now) and {n: whole[n] for n in now} == now
        kept = set(now)
    assert 0 < len(kept) < 60
    (tmp_path/"cache"/".writing"/"of a killed run").mkdir(parents=True, exist_ok=True)
    (tmp_path/"cache"/".writing"/"of a killed run"/"half.png").write_bytes(b"half")
    generator = Counting()
    pairs, stats = add_privileged(ds, generator, tmp_path/"cache")
    # none twice, none missing
    assert (stats["cache_hits"], stats["made"], stats["rebuilt"], generator.asked) == (
        len(kept),
        60 - len(kept),
        0,
        60 - len(kept),
    )
    assert (
        contents(tmp_path / "cache") == whole
        and len(table(tmp_path / "cache")) == 60
        and not (tmp_path / "cache" / ".writing").exists()
    )
    assert sorted(p.name for p in (tmp_path / "cache").iterdir() if p.is_file()) == [
        ".lock",
        "manifest.csv",
    ]

@needs_fork
def test_the_unfinished_files_of_another_program_are_left(ds, tmp_path):
    with cache_module.writing(tmp_path/"cache") as other:
        (other/"half.png").write_bytes(b"half")
        p, _ = child(tmp_path)
        p.join(60)
        assert p.exitcode == 0
        add_privileged(ds, StainGenerator(), tmp_path/"cache")
        assert (other/"half.png").read_bytes() == b"half"
    assert not other.exists()

def test_ctrl_c_keeps_what_is_done_and_says_so_in_the_manifest(ds, tmp_path, monkeypatch):
    publish = makers_module.publish
    # most of the images are still to be written when it comes
    monkeypatch.setattr(makers_module, "publish", lambda *a: time.sleep(.1) or publish(*a))
    class Interrupted(StainGenerator):
        calls = 0
        def translate(self, x, um_per_px=None):
            self.calls += 1
            if self.calls == 3: raise KeyboardInterrupt
            return super().translate(x)
    with pytest.raises(KeyboardInterrupt):
        add_privileged(ds, Interrupted(), tmp_path / "cache", batch_size=3)
    assert len(items(tmp_path/"cache")) == len(table(tmp_path/"cache")) == 6
    assert len(cached_privileged(ds.select(range(6)), tmp_path/"cache")) == 6
    assert add_privileged(ds, StainGenerator(), tmp_path/"cache")[1]["made"] == 4

# ---- a full disk

def test_room_is_looked_for_before_anything_is_written(ds, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cache_module.shutil,
        "disk_usage",
        lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 40_000, 40_000),
    )
    with pytest.raises(
        OSError,
        match=r"10 synthetic images need about 0\.0 MB, by the first 10 .*, and 0\.0 MB are free",
    ) as e:
        add_privileged(ds, StainGenerator(), tmp_path / "cache")
    assert e.value.errno == errno.ENOSPC and not items(tmp_path/"cache")
    monkeypatch.setattr(
        cache_module.shutil,
        "disk_usage",
        lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 41_000, 41_000),
    )
    # ten blocks of 4096
    assert add_privileged(ds, StainGenerator(), tmp_path/"cache")[1]["made"] == 10

@pytest.mark.parametrize("kind", ["set", "stream"])
def test_a_disk_that_fills_up_stops_cleanly(kind, ds, tmp_path, monkeypatch):
    real, written, lock = Path.write_bytes, [], threading.Lock()
    def full(path, data):
        with lock:
            written.append(path)
            if len(written) > 4: raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError,
        match=r"No space left on device: stopped with \d+ of the \d+ missing images written",
    ) as e:
        if kind == "set":
            add_privileged(ds, StainGenerator(), tmp_path / "cache", batch_size=3)
        else:
            list(
                add_privileged(
                    ds.to_iterable_dataset(), StainGenerator(), tmp_path / "cache", batch_size=3
                )[0]
            )
    monkeypatch.undo()
    assert (
        e.value.errno == errno.ENOSPC
        and len(items(tmp_path / "cache")) == len(table(tmp_path / "cache")) == 4
        and not (tmp_path / "cache" / ".writing").exists()
    )
    if kind == "set": assert "stopped with 4 of the 10" in str(e.value)
    assert (
        len(
            cached_privileged(
                ds.select(
                    [
                        i
                        for i, p in enumerate(ds["path"])
                        if p in {r["primary"] for r in table(tmp_path / "cache")}
                    ]
                ),
                tmp_path / "cache",
            )
        )
        == 4
    )
    _, stats = add_privileged(ds, StainGenerator(), tmp_path/"cache")
    assert (stats["cache_hits"], stats["made"], stats["rebuilt"]) == (4, 6, 0)

def test_a_small_file_system_that_is_really_full(tmp_path, monkeypatch):
    mount = tmp_path/"small"
    mount.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", mount], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        ds = tiles(write_tiles(tmp_path/"tiles", 60))
        with pytest.raises(
            OSError, match=r"60 synthetic images need about 0\.2 MB, by the first 8 of them"
        ):
            add_privileged(ds, StainGenerator(), mount / "cache", batch_size=8)
        monkeypatch.setattr(makers_module, "require_room", lambda *a: None)
        with pytest.raises(OSError, match="No space left on device: stopped with") as e:
            add_privileged(ds, StainGenerator(), mount / "cache", batch_size=8)
        n = len(items(mount/"cache"))
        assert (
            f"stopped with {n} of the 60" in str(e.value)
            and 0 < n < 60
            and all(
                check_item(p.relative_to(mount / "cache").as_posix(), p.read_bytes())
                for p in items(mount / "cache")
            )
        )
        shutil.copytree(mount/"cache", tmp_path/"cache", ignore=shutil.ignore_patterns(".writing"))
        assert add_privileged(ds, StainGenerator(), tmp_path/"cache")[1]["cache_hits"] == n
    finally: subprocess.run(["umount", mount], check=True)

# ---- several generators, and the manifest

def test_several_generators_share_a_folder(ds, tmp_path):
    cache = tmp_path/"cache"
    both, stats = add_privileged(
        ds, {"nuclei": StainGenerator(), "eosin": StainGenerator("eosin")}, cache
    )
    assert {c: s["made"] for c, s in stats.items()} == {"nuclei": 10, "eosin": 10} and {
        *both.column_names
    } == {"primary", "path", "nuclei", "eosin"}
    one, _ = add_privileged(ds, StainGenerator("dab"), cache, column="dab")
    two, _ = add_privileged(one, StainGenerator(), cache, column="nuclei")
    assert all(map(np.array_equal, images(two, "nuclei"), images(both, "nuclei"))) and not any(
        map(np.array_equal, images(two, "nuclei"), images(two, "dab"))
    )
    assert len(table(cache)) == 30
    with pytest.raises(
        ValueError, match="images of 3 generators: give generator_key, one of .*eosin"
    ) as e:
        cached_privileged(ds, cache)
    assert all(StainGenerator(s).key in str(e.value) for s in ("haematoxylin", "eosin", "dab"))
    for stain in ("haematoxylin", "eosin", "dab"):
        found = cached_privileged(ds, cache, "x", StainGenerator(stain).key)
        assert all(
            map(
                np.array_equal,
                images(found, "x"),
                images(add_privileged(ds, StainGenerator(stain), tmp_path / stain)[0]),
            )
        )
    with pytest.raises(ValueError, match="generator_key='nobody'"):
        cached_privileged(ds, cache, generator_key="nobody")

def test_the_manifest_says_what_a_pair_is_made_of(tmp_path):
    ds = tiles(
        write_tiles(tmp_path / "tiles", 3),
        split=["train", "val", "train"],
        group=list("abc"),
        um_per_px=[0.25] * 3,
    )
    generator = RandomWeights(
        ModuleGenerator(make_unet(4), um_per_px=0.25, name="unet", licence="CC BY-NC-SA 4.0"),
        seed=7,
    )
    add_privileged(ds, generator, tmp_path/"cache", licence="CC0")
    rows = table(tmp_path/"cache")
    assert (
        tuple(rows[0]) == COLUMNS
        and [r["primary"] for r in rows] == ["000.png", "001.png", "002.png"]
        and [r["split"] for r in rows] == ["train", "val", "train"]
    )
    for row in rows:
        file, tile = (
            (tmp_path / "cache" / row["privileged"]).read_bytes(),
            (tmp_path / "tiles" / row["primary"]).read_bytes(),
        )
        assert (row["sha256"], row["primary_sha256"]) == (
            hashlib.sha256(file).hexdigest(),
            hashlib.sha256(tile).hexdigest(),
        )
        assert (
            row["generator"],
            row["generator_key"],
            row["um_per_px"],
            row["generator_um_per_px"],
        ) == ("random unet", generator.key, "0.25", "0.25")
        assert (row["seed"], row["generator_licence"], row["licence"]) == (
            "7",
            "CC BY-NC-SA 4.0",
            "CC0",
        ) and row["synthpi"]

def test_the_manifest_keeps_what_others_wrote_and_drops_what_is_gone(ds, tmp_path):
    cache, other = tmp_path/"cache", tiles(write_tiles(tmp_path/"other", 4, seed=1))
    add_privileged(ds, StainGenerator(), cache, licence="CC0")
    add_privileged(other, StainGenerator(), cache)
    assert len(table(cache)) == 14 and [r["licence"] for r in table(cache)] == ["CC0"]*10 + [""]*4
    before = (cache/"manifest.csv").read_text()
    # no licence given: what is known stays
    add_privileged(ds, StainGenerator(), cache)
    assert (cache/"manifest.csv").read_text() == before
    (cache/table(cache)[0]["privileged"]).unlink()
    add_privileged(other.select([0]), StainGenerator("dab"), cache)
    assert len(table(cache)) == 14 and "000.png" not in [r["primary"] for r in table(cache)[:9]]

def test_a_line_that_was_cut_short_does_not_spoil_the_next(ds, tmp_path):
    list(
        add_privileged(
            ds.select(range(5)).to_iterable_dataset(), StainGenerator(), tmp_path / "cache"
        )[0]
    )
    with open(tmp_path/"cache"/"manifest.csv", "a") as f: f.write("010.png,ab/ab")
    assert len(read_manifest(tmp_path/"cache")) == 5
    list(add_privileged(ds.to_iterable_dataset(), StainGenerator(), tmp_path/"cache")[0])
    assert (
        [r["primary"] for r in table(tmp_path / "cache")]
        == ds["path"][:]
        == [p for p, _ in read_manifest(tmp_path / "cache")]
    )

def test_a_path_of_this_machine_does_not_get_into_the_manifest(ds, tmp_path):
    add_privileged(
        ds.map(lambda r: {"path": str(tmp_path / "tiles" / r["path"])}),
        StainGenerator(),
        tmp_path / "a",
    )
    add_privileged(ds.remove_columns("path"), StainGenerator(), tmp_path/"b")
    add_privileged(
        ds.remove_columns("path").to_iterable_dataset(), StainGenerator(), tmp_path / "c"
    )[0].take(1)
    for cache in "ab":
        assert [r["primary"] for r in table(tmp_path / cache)] == [f"{k:03}.png" for k in range(10)]

# ---- scale

def test_the_scale_is_asked_for_used_and_part_of_the_name(ds, tmp_path):
    with pytest.raises(ValueError, match="no resolution of the images"):
        add_privileged(ds, Scaled(), tmp_path / "cache")
    grays = {}
    for um in (.5, .4, "same"):
        pairs, stats = add_privileged(ds, Scaled(), tmp_path/"cache", um_per_px=um)
        assert stats["made"] == 10
        grays[um] = int(images(pairs)[0][0, 0])
    assert grays == {.5: 128, .4: 102, "same": 0}
    with pytest.raises(ValueError, match="at several scales .*give um_per_px"):
        cached_privileged(ds, tmp_path / "cache")
    for um, gray in ((0.5, 128), (0.4, 102)):
        assert images(cached_privileged(ds, tmp_path / "cache", um_per_px=um))[0][0, 0] == gray
    with pytest.warns(
        UserWarning,
        match="0.25 micrometres per pixel and the generator 'scaled' was trained at 0.5",
    ):
        add_privileged(ds, Scaled(), tmp_path / "cache", um_per_px=0.25)
    for wrong in (0, -1, "0.5", float("inf")):
        with pytest.raises(ValueError, match="um_per_px="):
            add_privileged(ds, StainGenerator(), tmp_path / "cache", um_per_px=wrong)

def test_every_tile_may_have_its_own_scale(tmp_path):
    write_tiles(tmp_path/"tiles", 6)
    # the column has 32 bits: 0.4 is 0.4000000059604645 there
    ds = tiles(tmp_path/"tiles", um_per_px=[.4, .6]*3)
    pairs, _ = add_privileged(ds, Scaled(), tmp_path/"cache")
    assert [int(i[0, 0]) for i in images(pairs)] == [102, 153] * 3 and [
        r["um_per_px"] for r in table(tmp_path / "cache")
    ] == ["0.4", "0.6"] * 3
    assert all(map(np.array_equal, images(cached_privileged(ds, tmp_path/"cache")), images(pairs)))
    assert all(
        map(
            np.array_equal,
            images(cached_privileged(ds.remove_columns("um_per_px"), tmp_path / "cache")),
            images(pairs),
        )
    )
    assert (
        add_privileged(
            tiles(tmp_path / "tiles").select([0, 2, 4]), Scaled(), tmp_path / "cache", um_per_px=0.4
        )[1]["made"]
        == 0
    )
    with pytest.raises(
        ValueError, match="um_per_px=0.4 for tiles whose column um_per_px says 0.6"
    ):
        add_privileged(ds, Scaled(), tmp_path / "cache", um_per_px=0.4)
    with pytest.raises(ValueError, match="no resolution"):
        add_privileged(
            tiles(tmp_path / "tiles", um_per_px=[0.4] * 5 + [float("nan")]),
            Scaled(),
            tmp_path / "cache",
        )

# ---- the guard

def test_the_guard_holds_for_every_generator_and_in_streams(tmp_path):
    write_tiles(tmp_path/"tiles", 6)
    ds = tiles(tmp_path/"tiles", group=[*"123123"], split=["train", "val", "test"]*2)
    seen = StainGenerator()
    for ids, meets in (([1], None), (["2"], "2"), ([3, "9"], "3")):
        seen.training_ids = ids
        if meets is None:
            assert (
                add_privileged(ds, {"a": StainGenerator("dab"), "b": seen}, tmp_path / "cache")[1][
                    "b"
                ]["n"]
                == 6
            )
            assert (
                len(list(add_privileged(ds.to_iterable_dataset(), seen, tmp_path / "cache")[0]))
                == 6
            )
            continue
        with pytest.raises(ValueError, match=rf"validation or test split, or in none \({meets}\)"):
            add_privileged(ds, {"a": StainGenerator("eosin"), "b": seen}, tmp_path / "new")
        with pytest.raises(ValueError, match=rf"validation or test split, or in none \({meets}\)"):
            list(add_privileged(ds.to_iterable_dataset(), seen, tmp_path / "new", batch_size=1)[0])
        shutil.rmtree(tmp_path/"new", ignore_errors=True)

# ---- streams

def test_a_stream_gives_the_same_and_makes_it_when_it_is_asked(ds, tmp_path):
    generator, expected = (
        Counting(),
        images(add_privileged(ds, StainGenerator(), tmp_path / "whole")[0]),
    )
    stream, stats = add_privileged(
        ds.to_iterable_dataset(), generator, tmp_path / "cache", batch_size=4
    )
    assert (
        isinstance(stream, IterableDataset)
        and generator.asked == 0
        and stream.features["privileged"] == ImageFeature()
        and stream.features["primary"] == ImageFeature()
    )
    first = next(iter(stream))
    assert (
        generator.asked == 4
        and isinstance(first["primary"], Image.Image)
        and len(table(tmp_path / "cache")) == 4
    )
    found = list(stream)
    assert (
        all(map(np.array_equal, images(found), expected))
        and [r["path"] for r in found] == ds["path"][:]
        and generator.asked == 10
    )
    assert stats == {"n": 14, "cache_hits": 4, "made": 10, "rebuilt": 0, "generator": generator.key}
    assert (
        all(map(np.array_equal, images(list(stream)), expected))
        and generator.asked == 10
        and len(table(tmp_path / "cache")) == 10
    )
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole") and table(
        tmp_path / "cache"
    ) == table(tmp_path / "whole")
    assert all(map(np.array_equal, images(cached_privileged(ds, tmp_path/"cache")), expected))

def test_a_stream_may_have_several_generators_scales_and_damage(tmp_path):
    write_tiles(tmp_path/"tiles", 6)
    ds = tiles(tmp_path/"tiles", um_per_px=[.4, .6]*3)
    stream, stats = add_privileged(
        ds.to_iterable_dataset(),
        {"scaled": Scaled(), "stain": StainGenerator()},
        tmp_path / "cache",
        batch_size=4,
    )
    assert [int(i[0, 0]) for i in images(stream, "scaled")] == [102, 153] * 3 and len(
        table(tmp_path / "cache")
    ) == 12
    victim = items(tmp_path/"cache")[0]
    victim.write_bytes(flip(victim.read_bytes()))
    list(stream)
    assert sum(s["rebuilt"] for s in stats.values()) == 1 and all(
        check_item(p.relative_to(tmp_path / "cache").as_posix(), p.read_bytes())
        for p in items(tmp_path / "cache")
    )
    with pytest.raises(ValueError, match="no resolution"):
        add_privileged(
            ds.remove_columns("um_per_px").to_iterable_dataset(), Scaled(), tmp_path / "cache"
        )

def test_a_stream_of_records_without_features(ds, tmp_path):
    def records():
        for r in ds: yield {"primary": r["primary"], "path": r["path"]}
    stream, stats = add_privileged(
        IterableDataset.from_generator(records), StainGenerator(), tmp_path / "cache", batch_size=4
    )
    assert all(
        map(
            np.array_equal,
            images(stream),
            images(add_privileged(ds, StainGenerator(), tmp_path / "whole")[0]),
        )
    )
    list(stream)
    assert (stats["made"], stats["cache_hits"]) == (10, 10)

# ---- several processes

def _member(rank, n, port, folder, cache, what, out):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "1",
    }
    PartialState._reset_state()
    class Here(Counting):
        def translate(self, x, um_per_px=None):
            if what == "error" and rank == 1: raise RuntimeError("out of memory, say")
            time.sleep(.005)
            return super().translate(x)
    ds, generator = tiles(folder), Here()
    try:
        pairs, stats = add_privileged(ds, generator, cache, batch_size=2)
        said = [
            stats,
            {p.name for p in items(cache)}
            == {
                Path(r["path"]).name
                for r in pairs.cast_column("privileged", ImageFeature(decode=False))["privileged"]
            },
        ]
    except Exception as e: said = str(e)
    out.send([said, generator.asked])
    dist.destroy_process_group()

def together(tmp_path, what, n=2):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes = [FORK.Pipe(duplex=False) for _ in range(n)]
    children = [
        FORK.Process(
            target=_member,
            args=(k, n, port, tmp_path / "tiles", tmp_path / "cache", what, pipes[k][1]),
            daemon=True,
        )
        for k in range(n)
    ]
    for p in children: p.start()
    try:
        assert all(here.poll(100) for here, _ in pipes), "a process hung"
        return [here.recv() for here, _ in pipes]
    finally:
        for p in children:
            p.join(10)
            p.kill()
            p.join()

@needs_fork
def test_two_processes_share_the_work(tmp_path):
    ds = tiles(write_tiles(tmp_path/"tiles", 53))
    # 50 different tiles: with 16 to a round, the shares of 25 meet once on the way
    for k in (50, 51, 52): shutil.copy(tmp_path/"tiles"/"000.png", tmp_path/"tiles"/f"{k:03}.png")
    add_privileged(tiles(tmp_path/"tiles"), StainGenerator(), tmp_path/"whole")
    said = together(tmp_path, "work")
    assert [asked for _, asked in said] == [25, 25]
    assert all(
        s
        == [
            {"n": 53, "cache_hits": 0, "made": 50, "rebuilt": 0, "generator": StainGenerator().key},
            True,
        ]
        for s, _ in said
    )
    assert (
        contents(tmp_path / "cache") == contents(tmp_path / "whole")
        and (tmp_path / "cache" / "manifest.csv").read_bytes()
        == (tmp_path / "whole" / "manifest.csv").read_bytes()
    )
    for victim in items(tmp_path/"cache")[:3]: victim.unlink()
    said = together(tmp_path, "again")
    assert sorted(asked for _, asked in said) == [1, 2] and contents(
        tmp_path / "cache"
    ) == contents(tmp_path / "whole")
    assert [asked for _, asked in together(tmp_path, "nothing to do")] == [0, 0]

@needs_fork
def test_the_error_of_one_process_is_raised_in_all(tmp_path):
    ds = tiles(write_tiles(tmp_path/"tiles", 40))
    (said0, asked0), (said1, asked1) = together(tmp_path, "error")
    assert (
        said1 == "out of memory, say"
        and said0 == "process 1 of 2 stopped: RuntimeError: out of memory, say"
        and asked1 == 0
    )
    # the other one did not make its whole share first
    assert (
        0 < len(items(tmp_path / "cache")) == asked0 < 20
        and not (tmp_path / "cache" / ".writing").exists()
    )
    assert len(table(tmp_path/"cache")) == asked0
    assert add_privileged(ds, StainGenerator(), tmp_path/"cache")[1]["cache_hits"] == asked0

@needs_fork
def test_programs_that_know_nothing_of_each_other_share_a_cache(tmp_path):
    ds = tiles(write_tiles(tmp_path/"tiles", 30))
    add_privileged(ds, StainGenerator(), tmp_path/"whole")
    children = [child(tmp_path, kind) for kind in ("set", "set", "stream")]
    for p, _ in children: p.join(100)
    assert [p.exitcode for p, _ in children] == [0, 0, 0]
    assert contents(tmp_path/"cache") == contents(tmp_path/"whole")
    assert len(read_manifest(tmp_path/"cache")) == 30 and not (tmp_path/"cache"/".writing").exists()
    assert all(
        hashlib.sha256((tmp_path / "cache" / r["privileged"]).read_bytes()).hexdigest()
        == r["sha256"]
        for r in table(tmp_path / "cache")
    )

def test_the_first_of_two_equal_writers_stays(tmp_path):
    a, b = (encode_item("ab/x.png", np.full((8, 8, 1), v, np.uint8)) for v in (1, 2))
    with cache_module.writing(tmp_path) as own:
        first = cache_module.publish(a, tmp_path, "ab/x.png", own)
        assert (
            cache_module.publish(b, tmp_path, "ab/x.png", own) == first
            and (tmp_path / "ab" / "x.png").read_bytes() == a
        )
        (tmp_path/"ab"/"x.png").write_bytes(a[:-1])
        assert (
            cache_module.publish(b, tmp_path, "ab/x.png", own) == hashlib.sha256(b).hexdigest()
            and (tmp_path / "ab" / "x.png").read_bytes() == b
        )
        assert [p.name for p in own.iterdir()] == ["lock"]

def test_a_process_that_is_alone_does_not_choose_a_device(ds, tmp_path, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name in ("WORLD_SIZE", "PMI_SIZE"): monkeypatch.delenv(name, raising=False)
    add_privileged(ds, StainGenerator(), tmp_path/"cache")
    assert not PartialState._shared_state

# ---- threads

def test_reading_and_writing_continue_while_the_generator_works(ds, tmp_path, monkeypatch):
    """The first images wait for the second call of the generator to be written, and it waits for
    them and for the third batch to be read: that only threads can do"""
    read, real, publish, second = [], makers_module._pixels, makers_module.publish, threading.Event()
    def late(*a):
        assert second.wait(5)
        return publish(*a)
    monkeypatch.setattr(makers_module, "publish", late)
    monkeypatch.setattr(makers_module, "_pixels", lambda source: read.append(1) or real(source))
    class Waiting(StainGenerator):
        calls = 0
        def translate(self, x, um_per_px=None):
            self.calls += 1
            if self.calls == 2: second.set()
            end = time.monotonic() + 20
            while self.calls == 2 and (len(items(tmp_path/"cache")) < 2 or len(read) < 6):
                assert time.monotonic() < end, (len(items(tmp_path/"cache")), len(read))
                time.sleep(.005)
            return super().translate(x)
    assert add_privileged(ds, Waiting(), tmp_path/"cache", batch_size=2)[1]["made"] == 10

# ---- synthesise

@pytest.fixture
def folder(tmp_path): return write_tiles(tmp_path/"tiles", 20, size=32)

def test_a_folder_of_tiles_becomes_pairs_that_pretrain_reads(folder, tmp_path, capsys):
    save_generator(
        ModuleGenerator(make_unet(4), um_per_px=0.5, name="unet", licence="CC0"),
        tmp_path / "generator.safetensors",
        seed=3,
    )
    result = synthesise(
        folder,
        tmp_path / "generator.safetensors",
        tmp_path / "out",
        um_per_px=0.5,
        batch_size=8,
        device="cpu",
        licence="CC BY 4.0",
        command="synthpi pairs",
    )
    said = capsys.readouterr()
    assert (result.n, result.made, result.rebuilt, result.interrupted) == (
        20,
        20,
        0,
        False,
    ) and result.images_per_second > 0
    assert (
        "preview.png" in said.out
        and NOTE in said.out
        and "8 of 20 tiles have their image; about" in said.out
        and "20/20" in said.err
    )
    record = json.loads((tmp_path/"out"/"run.json").read_text())
    assert (
        record["command"],
        record["made"],
        record["generator"]["about"],
        record["generator"]["licence"],
        record["note"],
    ) == ("synthpi pairs", 20, {"seed": 3}, "CC0", NOTE)
    assert (
        record["environment"]["packages"]["torch"]
        and record["images_per_second"] == result.images_per_second
        and record["tiles"]["path"] == "tiles"
    )
    assert {(r["seed"], r["licence"], r["generator_licence"]) for r in table(tmp_path / "out")} == {
        ("3", "CC BY 4.0", "CC0")
    }
    assert Image.open(tmp_path/"out"/"preview.png").size[0] > 400
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(cached_privileged(image_folder(folder), tmp_path/"out")) == 20
    run = pretrain(
        folder,
        tmp_path / "run",
        [tmp_path / "out"],
        "siamese",
        encoder="resnet10_narrow",
        widths=(8, 8),
        size=24,
        batch_size=4,
        steps=1,
        device="cpu",
        progress=False,
    )
    assert len(run.history) == 1

def test_the_preview_is_there_before_the_rest_is_made(folder, tmp_path):
    there = []
    class Watching(StainGenerator):
        def translate(self, x, um_per_px=None):
            there.append((tmp_path/"out"/"preview.png").exists())
            return super().translate(x)
    synthesise(folder, Watching(), tmp_path/"out", batch_size=5, device="cpu", progress=False)
    assert there == [False, True, True, True]
    synthesise(
        folder,
        Watching(),
        tmp_path / "other",
        batch_size=5,
        device="cpu",
        progress=False,
        preview=False,
    )
    assert not (tmp_path/"other"/"preview.png").exists()

def test_interrupted_the_same_call_continues(folder, tmp_path, capsys):
    class Interrupted(StainGenerator):
        left = 3
        def translate(self, x, um_per_px=None):
            self.left -= 1
            if self.left < 0: raise KeyboardInterrupt
            return super().translate(x)
    first = synthesise(folder, Interrupted(), tmp_path/"out", batch_size=4, device="cpu")
    assert (
        first.interrupted
        and first.made == 12
        and json.loads((tmp_path / "out" / "run.json").read_text())["interrupted"]
        and "the same call goes on" in capsys.readouterr().out
    )
    generator = Counting()
    second = synthesise(
        folder, generator, tmp_path / "out", batch_size=4, device="cpu", progress=False
    )
    assert (second.made, generator.asked, second.interrupted) == (8, 8, False)
    write_tiles(tmp_path/"more", 2, seed=5)
    for p in (tmp_path/"more").iterdir(): shutil.copy(p, folder/f"more{p.name}")
    # tiles that were added since
    assert synthesise(folder, generator, tmp_path/"out", device="cpu", progress=False).made == 2
    with pytest.raises(ValueError, match="pairs was .*overwrite"):
        synthesise(folder, "eosin", tmp_path / "out", device="cpu", progress=False)
    assert (
        synthesise(
            folder, "eosin", tmp_path / "out", device="cpu", progress=False, overwrite=True
        ).made
        == 22
    )
    assert len(items(tmp_path / "out")) == 22 and {
        r["generator"] for r in table(tmp_path / "out")
    } == {"eosin"}

def test_what_cannot_work_is_refused_before_anything_is_written(folder, tmp_path):
    unet = ModuleGenerator(make_unet(4), um_per_px=.5)
    def call(generator="eosin", **kw):
        return synthesise(
            **(
                dict(
                    tiles=folder,
                    generator=generator,
                    out=tmp_path / "out",
                    device="cpu",
                    progress=False,
                )
                | kw
            )
        )
    for f, error, message in (
        (lambda: call(unet), ValueError, "no resolution"),
        (lambda: call("haematoxilin"), FileNotFoundError, "no generator file"),
        (lambda: call(device="tpu"), ValueError, "device 'tpu'"),
        (lambda: call(batch_size=0), ValueError, "batch_size=0"),
        (
            lambda: call(unet, um_per_px=0.5, generator_um_per_px=0.25),
            ValueError,
            "um_per_px=0.25 for the generator",
        ),
        (lambda: call(out=folder / "out"), ValueError, "lies in the input folder"),
        (lambda: call(tiles=tmp_path / "nowhere"), FileNotFoundError, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            f()
    (folder/"bad.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match="bad.png"): call()
    assert not (tmp_path/"out").exists() and not (folder/"out").exists()
    with pytest.warns(UserWarning, match="left out"): assert call(on_bad="skip").n == 20
    assert "bad.png" in json.loads((tmp_path/"out"/"run.json").read_text())["tiles"]["left_out"]

@pytest.mark.parametrize("name", ["haematoxylin", "eosin", "dab", "macenko"])
def test_generators_by_name(name, folder, tmp_path):
    result = synthesise(folder, name, tmp_path/"out", device="cpu", progress=False)
    assert result.made == 20 and choose_generator(name, "cpu").name.startswith(
        "haematoxylin" if name == "macenko" else name
    )

# ---- the benchmark

def test_the_benchmark_works():
    spec = importlib.util.spec_from_file_location(
        "benchmark_pairs", Path(__file__).parents[1] / "benchmarks" / "pairs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    r, = module.run(quick=True)["results"]
    assert r["ratio"]["min"] > 0 and r["bytes_per_image"] > 100
    for name in ("U-Net-256", "ResNet-9"):
        assert isinstance(module.NETWORKS[name](), torch.nn.Module)

def test_a_relative_cache_is_found_from_elsewhere(tmp_path, monkeypatch):
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path/"a.png")
    ds = Dataset.from_dict({"primary": [str(tmp_path / "a.png")]}).cast_column(
        "primary", ImageFeature()
    )
    monkeypatch.chdir(tmp_path)
    made = add_privileged(ds, StainGenerator(), "cache")[0]
    monkeypatch.chdir("/")
    assert made[0]["privileged"].size == (32, 32)

def test_large_images_are_given_few_at_a_time(monkeypatch):
    class Counting(StainGenerator):
        seen = []
        def translate(self, images, um_per_px=None):
            self.seen.append(len(images))
            return super().translate(images)
    monkeypatch.setattr(makers_module, "_PIXELS", 3*32*32)
    images = [np.full((32, 32, 3), 20*k, np.uint8) for k in range(8)]
    out = makers_module._translate(Counting(), images, None)
    assert Counting.seen == [3, 3, 2]
    monkeypatch.undo()
    assert (out == makers_module._translate(StainGenerator(), images, None)).all()

def test_patients_that_chose_the_checkpoint_are_kept_out_too():
    generator = StainGenerator()
    generator.about = {"validation_groups": ["p3"]}
    with pytest.raises(ValueError, match="chosen by.*p3"): refuse_overlap(generator, ["p1", "p3"])
