"""Volumes: the world stays where it is through reading, resampling and cropping; a store is whole
or not there; crops are a function of seed, epoch and volume."""
import gzip
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthpi.volumes import scans as volumes
from synthpi.volumes.bodies import ORGANS, body_phantoms, write_bodies
from synthpi.volumes.crops import crop_batches, crops_at, grid_crops, sample_crops
from synthpi.volumes.sets import (
    check_records,
    find_volumes,
    read_manifest,
    read_splits,
    split_subjects,
    write_splits,
)
from synthpi.volumes.store import FRAMES, VolumeStore
from synthpi.volumes.scans import foreground, prepare_volumes, read_volume, resample

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent/"shared/data"
real = pytest.mark.skipif(
    not (REAL / "volumes").exists(),
    reason="the real volumes (shared/data beside the repository) are not here",
)
RNG = np.random.default_rng(0)

def save(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path

def ball(shape=(24, 20, 22), center=None, seed=0):
    "A textured ball in empty space"
    d = np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape)/2 if center is None else center)
    return (np.random.default_rng(seed).uniform(50, 100, shape) * ((d**2).sum(-1) < 64)).astype(
        np.float32
    )

def world(affine, shape):
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]

def oblique(spacing, angle=.3, origin=(-20, 5, 40)):
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag(spacing), origin
    return affine

@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    return write_bodies(
        tmp_path_factory.mktemp("bodies"), n_subjects=4, shape=(40, 30, 36), spacing_mm=11.0, seed=4
    )

@pytest.fixture(scope="module")
def store(bodies, tmp_path_factory):
    return prepare_volumes(bodies, tmp_path_factory.mktemp("store") / "s")

def checksums(store): return [item["sha256"] for item in store.items]

# ---- where things are

def test_two_foregrounds_one_affine_the_same_point_has_distance_0(tmp_path):
    affine = oblique((2, 1.5, 3))
    shared = RNG.uniform(50, 100, (40, 30, 30)).astype(np.float32)
    for name, corner in (("a", 4), ("b", 14)):
        x = np.zeros_like(shared)
        x[corner:30, 4:26, 4:26] = shared[corner:30, 4:26, 4:26]
        save(tmp_path/"in"/f"{name}.nii.gz", x, affine)
    store = prepare_volumes(
        tmp_path / "in",
        tmp_path / "out",
        margin=2,
        percentiles=(0, 100),
        window=(0, 100),
        foreground_above=1,
        dtype="float32",
    )
    assert store.items[0]["shape"][0] != store.items[1]["shape"][0]
    point = (affine @ [20, 15, 15, 1])[None, :3]
    a, b = (crops_at(store, i, point, 5) for i in (0, 1))
    assert torch.equal(a["center_mm"], b["center_mm"]) and torch.equal(a["crop"], b["crop"])
    assert np.allclose(a["center_mm"], point, atol=1e-4) and np.allclose(
        a["crop"][0, 0], shared[18:23, 13:18, 13:18] / 100, atol=1e-6
    )
    apart = {
        frame: np.linalg.norm(
            np.subtract(*[store.position(i, store.voxel(i, point), frame) for i in (0, 1)])
        )
        for frame in FRAMES
    }
    assert (
        apart["world_mm"] < 1e-9
        and abs(apart["voxel_local"] - 10) < 1e-6
        and abs(apart["mm_local"] - 20) < 1e-5
        and apart["box"] > 0.1
    )

def test_positions_are_those_of_the_formula(store):
    for frame in FRAMES:
        batch = sample_crops(store, [1, 3], 6, (7, 8, 9), frame=frame)
        raw = (
            sample_crops(store, [1, 3], 6, (7, 8, 9), frame="voxel_local")["center_mm"]
            .numpy()
            .astype(float)
        )
        for k, i in enumerate(batch["volume_id"].tolist()):
            item = store.items[i]
            p = raw[k] + item["box"][0]
            size = item["box"][1] - item["box"][0]
            expected = {
                "world_mm": (item["affine"] @ [*p, 1])[:3],
                "voxel_local": raw[k],
                "mm_local": raw[k] * 11,
                "box": (raw[k] + 0.5) / size,
                "mm_centered": (raw[k] - (size - 1) / 2) * 11,
            }[frame]
            assert np.allclose(batch["center_mm"][k], expected, atol=1e-3)
            start = p - (np.array([7, 8, 9]) - 1)/2
            # p = start + (size - 1)/2
            assert np.allclose(start, np.round(start))
            x, y, z = np.round(start).astype(int)
            assert np.allclose(
                batch["crop"][k, 0],
                store.array(i)[x : x + 7, y : y + 8, z : z + 9] * store.scale,
                atol=1e-6,
            )
    box = store.items[0]["box"]
    assert np.allclose(store.position(0, box[0] - 0.5, "box"), 0) and np.allclose(
        store.position(0, box[1] - 0.5, "box"), 1
    )
    with pytest.raises(ValueError, match="frame='mm'"): store.position(0, [[0, 0, 0]], "mm")

@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_order_of_the_axes_in_the_file_does_not_matter(tmp_path, flip, order):
    values, affine = ball(), oblique((1, 1, 2), .1)
    canonical = nib.Nifti1Image(values, affine)
    ornt = np.array([[order[k], flip[k]] for k in range(3)], float)
    turned = canonical.as_reoriented(ornt)
    nib.save(turned, tmp_path/"t.nii.gz")
    x, a = read_volume(tmp_path/"t.nii.gz")
    assert np.array_equal(x, values) and np.allclose(a, affine, atol=1e-4)

def test_resampling_keeps_the_world_and_makes_no_labels(tmp_path):
    affine = oblique((1, 2, 3.5))
    field = (world(affine, (31, 20, 15)) @ [1, .5, .25]).astype(np.float32)
    for spacing in ((2, 2, 2), (1, 1, 1), (1.5, 3, .7)):
        y, a = resample(field, affine, spacing)
        assert np.allclose(np.linalg.norm(a[:3, :3], axis=0), spacing)
        inside = (world(np.linalg.inv(affine) @ a, y.shape) <= np.array(field.shape) - 1).all(-1)
        assert inside.mean() > 0.5 and np.allclose(
            y[inside], (world(a, y.shape) @ [1, 0.5, 0.25])[inside], atol=1e-3
        )
    label = RNG.choice([0, 3, 7], (31, 20, 15)).astype(np.uint8)
    got = resample(label, affine, (.9, 1.1, 1.3), nearest=True)[0]
    assert set(np.unique(got)) == {0, 3, 7}
    save(tmp_path/"in/x.nii.gz", ball((30, 30, 20)), affine)
    save(tmp_path/"in/x_label.nii.gz", (ball((30, 30, 20)) > 0).astype(np.uint8)*5, affine)
    store = prepare_volumes(tmp_path/"in", tmp_path/"out", spacing_mm=1.5)
    assert (
        np.allclose(store.spacing_mm(0), 1.5)
        and store.items[0]["labels"] == [0, 5]
        and store.array(0, "label").shape == store.array(0).shape
    )
    labelled = np.argwhere(store.array(0, "label") > 0)
    assert (
        np.abs(
            store.position(0, labelled).mean(0)
            - world(affine, (30, 30, 20))[ball((30, 30, 20)) > 0].mean(0)
        ).max()
        < 0.5
    )

def test_intensities(tmp_path):
    x = ball()
    # outside, and not of the foreground
    x[0, 0, 0] = 30000
    save(tmp_path/"in/x.nii.gz", x)
    mask = foreground(x, 10)
    for dtype, tolerance in (("uint8", .51/255), ("uint16", .51/65535), ("float32", 1e-6)):
        store = prepare_volumes(
            tmp_path / "in",
            tmp_path / dtype,
            percentiles=(5, 95),
            foreground_above=10,
            margin=100,
            dtype=dtype,
        )
        lo, hi = np.percentile(x[mask], [5, 95])
        assert (
            np.allclose(
                store.array(0) * store.scale, np.clip((x - lo) / (hi - lo), 0, 1), atol=tolerance
            )
            and store.array(0).dtype == dtype
        )
    ct = prepare_volumes(
        tmp_path / "in",
        tmp_path / "ct",
        window=(60, 80),
        foreground_above=10,
        margin=100,
        dtype="float32",
    )
    assert np.allclose(ct.array(0), np.clip((x - 60)/20, 0, 1), atol=1e-6)
    assert prepare_volumes(tmp_path / "in", tmp_path / "ct2", window="ct").settings["window"] == [
        -1000,
        1000,
    ]
    with pytest.raises(ValueError, match="window='bone'"):
        prepare_volumes(tmp_path / "in", tmp_path / "ct3", window="bone")

def test_the_foreground_is_the_body_with_its_lungs_and_without_the_table():
    body = body_phantoms(1, "ct", (40, 30, 36), 11.)[0]
    image = body.image.copy()
    image[:, 0] = 300                                                                    # a table
    assert (body.label[:, 1] == 0).all()
    mask = foreground(image, -500)
    assert (
        not mask[:, 0].any()
        and mask[body.label == 3].mean() > 0.9
        and mask[body.label > 0].mean() > 0.95
    )

# ---- what cannot be prepared

def _broken(kind, folder):
    x, label = ball(), None
    affine = np.eye(4)
    if kind == "nan": x[3, 4, 5] = np.nan
    if kind == "constant": x[:] = np.where(x > 0, 7, 0)
    if kind == "zeros": x[:] = 0
    if kind == "flat": x = x[0]
    if kind == "four": x = np.stack([x, x], -1)
    if kind == "empty": x = x[:0]
    if kind == "shape": label = np.zeros((24, 20, 21), np.uint8)
    if kind == "place": label = np.zeros(x.shape, np.uint8)
    if kind == "fraction": label = np.full(x.shape, .5, np.float32)
    if kind == "negative": label = np.full(x.shape, -1, np.int16)
    save(folder/"bad.nii.gz", x, affine)
    if kind == "singular":
        raw = bytearray(gzip.decompress((folder/"bad.nii.gz").read_bytes()))
        # the second row of the affine
        raw[296:312] = bytes(16)
        (folder/"bad.nii.gz").write_bytes(gzip.compress(raw))
    if label is not None:
        save(
            folder / "bad_label.nii.gz",
            label,
            np.diag([1, 1, 1, 1.0]) if kind != "place" else oblique((1, 1, 1)),
        )
    if kind == "cut": (folder/"bad.nii.gz").write_bytes((folder/"bad.nii.gz").read_bytes()[:500])

@pytest.mark.parametrize("kind, says", [("nan", "1 of 10560 values that are not finite"), ("constant", "constant"), ("zeros", "no value is above"), ("flat", r"expected a volume \(X, Y, Z\)"), ("four", "channel=0 to 1"),
    ("empty", "with at least one voxel"), ("shape", r"\(24, 20, 21\) and its image \(24, 20, 22\)"), ("place", "lies elsewhere"), ("fraction", "0.5"), ("negative", "-1"), ("singular", "singular"), ("cut", "could not be read")])
def test_what_is_wrong_is_said_and_the_others_are_kept(tmp_path, kind, says):
    _broken(kind, tmp_path/"in")
    save(tmp_path/"in/good.nii.gz", ball())
    with pytest.raises(ValueError, match="1 of 2 volumes could not be prepared(?s:.)*bad: ") as e:
        prepare_volumes(tmp_path / "in", tmp_path / "out")
    assert re.search(says, str(e.value)), str(e.value)
    with pytest.raises(FileNotFoundError, match="no finished store"): VolumeStore(tmp_path/"out")
    for p in (tmp_path/"in").glob("bad*"): p.unlink()
    store = prepare_volumes(tmp_path/"in", tmp_path/"out")
    # kept from the first call
    assert store.names == ["good"] and store.made == 0
    assert [p.name for p in (tmp_path/"out/items").iterdir()] == ["good"]

def test_a_channel_may_be_chosen(tmp_path):
    x = np.stack([ball(), 2*ball(seed=1)], -1)
    save(tmp_path/"x.nii.gz", x)
    assert np.array_equal(read_volume(tmp_path/"x.nii.gz", 1)[0], x[..., 1])
    with pytest.raises(ValueError, match="channel 2 of .* holds 2"):
        read_volume(tmp_path / "x.nii.gz", 2)
    save(tmp_path/"y.nii.gz", x[..., :1])
    # one volume in a 4D file
    assert np.array_equal(read_volume(tmp_path/"y.nii.gz")[0], x[..., 0])

def test_settings_are_checked(tmp_path, bodies):
    for wrong in (
        {"spacing_mm": 0},
        {"spacing_mm": (1, 2, -1)},
        {"percentiles": (90, 10)},
        {"window": (5, 5)},
        {"dtype": "int8"},
        {"margin": -1},
    ):
        with pytest.raises(ValueError, match="arrived"):
            prepare_volumes(bodies, tmp_path / "out", **wrong)
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other things"):
        prepare_volumes(bodies, tmp_path / "mine")
    with pytest.raises(FileNotFoundError): prepare_volumes(tmp_path/"nowhere", tmp_path/"out")
    with pytest.raises(ValueError, match="'s' .*|more than one split"):
        prepare_volumes(
            [
                {"name": n, "image": f"{n}.nii", "subject": "s", "split": n}
                for n in ("train", "test")
            ],
            tmp_path / "out",
        )

# ---- once, whole, and again

KILLED = """
import os, signal, sys, io
import numpy as np
from synthpi.volumes import scans as volumes
save, calls = np.save, []
def dying(path, array):
    calls.append(path)
    if len(calls) == 5:
        save(path, array)
        os.truncate(path, 300)
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, array)
volumes.np.save = dying
volumes.prepare_volumes(sys.argv[1], sys.argv[2])
"""

@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_goes_on(tmp_path, bodies, store):
    out = tmp_path/"out"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(bodies), str(out)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()[-500:]
    # three arrays each: it died in the second volume
    assert len(list(out.glob("items/*/item.json"))) == 1 and list(out.glob("items/*/.*"))
    with pytest.raises(FileNotFoundError, match="goes on"): VolumeStore(out)
    again = prepare_volumes(bodies, out)
    assert (
        again.made == 3
        and not list(out.glob("items/*/.*"))
        and checksums(again) == checksums(store)
    )

def test_what_is_damaged_or_changed_is_made_again(tmp_path, bodies, store):
    source, out = tmp_path/"in", tmp_path/"out"
    shutil.copytree(bodies, source)
    def made(**kw): return prepare_volumes(source, out, **kw).made
    assert (made(), made()) == (4, 0)
    whole = checksums(VolumeStore(out))
    assert whole == checksums(store)
    for name, damage in (
        ("image.npy", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x07")),
        ("foreground.npy", Path.unlink),
        ("item.json", lambda p: p.write_text("{")),
        ("label.npy", lambda p: p.write_bytes(b"")),
    ):
        p = out / "items/body_002" / name
        damage(p)
        if name != "item.json":
            with pytest.raises(ValueError, match="1 volumes are damaged: body_002"):
                VolumeStore(out).check()
        assert made() == 1 and checksums(VolumeStore(out)) == whole
    VolumeStore(out).check()
    shutil.move(source, tmp_path/"moved")
    assert prepare_volumes(tmp_path/"moved", out).made == 0
    assert prepare_volumes(tmp_path/"moved", out, margin=1).made == 4
    save(
        tmp_path / "moved/body_001.nii.gz",
        body_phantoms(3, "ct", (40, 30, 36), 11.0)[1].image,
        nib.load(tmp_path / "moved/body_001_label.nii.gz").affine,
    )
    with pytest.raises(ValueError, match="4 of 4 volumes"):
        prepare_volumes(
            tmp_path / "moved", out, margin=1, window=(5000, 6000), foreground_above=99999
        )
    # the one whose image was exchanged
    assert prepare_volumes(tmp_path/"moved", out, margin=1).made == 1
    shutil.rmtree(tmp_path / "moved")
    shutil.copytree(bodies, tmp_path / "moved")
    records = find_volumes(tmp_path/"moved")[:2]
    assert prepare_volumes(records, out, root=tmp_path/"moved").names == ["body_000", "body_001"]
    # the other items stayed, and are of other settings
    assert (
        len(list((out / "items").iterdir())) == 4
        and prepare_volumes(tmp_path / "moved", out).made == 2
    )

def test_processes_make_the_same(tmp_path, bodies, store):
    again = prepare_volumes(bodies, tmp_path/"out", workers=2)
    assert again.names == store.names and checksums(again) == checksums(store)

def test_few_arrays_are_open_and_a_store_can_be_sent(bodies, store):
    small = VolumeStore(store.folder, open_mb=store.array(0).nbytes*2.5/2**20)
    for i in (0, 1, 2, 3, 0): small.array(i)
    assert 1 <= len(small._open) <= 2
    tiny = VolumeStore(store.folder, open_mb=0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            sample_crops(tiny, [0, 1], 3, 8).values(),
            sample_crops(pickle.loads(pickle.dumps(store)), [0, 1], 3, 8).values(),
        )
    )
    with pytest.raises(ValueError): store.array(0)[0, 0, 0] = 1
    with pytest.raises(ValueError, match="has no 'lesion'"): store.array(0, "lesion")
    assert store.indices("test") == [3] and store.indices("train") == [0, 1, 2]
    with pytest.raises(ValueError, match="no volume is in the split 'val'"): store.indices("val")

# ---- layouts

def test_msd_and_nnunet(tmp_path):
    msd, affine = tmp_path/"Task01", np.diag([1, 1, 2, 1.])
    (msd).mkdir()
    for n in ("BRATS_001", "BRATS_002"):
        save(msd/f"imagesTr/{n}.nii.gz", np.stack([ball(seed=k) for k in range(2)], -1), affine)
        save(msd/f"labelsTr/{n}.nii.gz", (ball() > 0).astype(np.uint8), affine)
    # as macOS leaves them in the published archives
    (msd/"imagesTr/._BRATS_001.nii.gz").write_bytes(b"")
    training = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
        for n in ("BRATS_001", "BRATS_002")
    ]
    (msd / "dataset.json").write_text(
        json.dumps({"modality": {"0": "FLAIR", "1": "T1w"}, "training": training, "test": []})
    )
    with pytest.raises(ValueError, match="2 sequences .0 FLAIR, 1 T1w.: choose"): find_volumes(msd)
    with pytest.raises(ValueError, match="sequence='T2w'"):
        find_volumes(msd, sequence="T2w")
    records = find_volumes(msd, sequence="t1w")
    assert [(r["name"], r["channel"], r["image"], r["label"]) for r in records][0] == (
        "BRATS_001",
        1,
        "imagesTr/BRATS_001.nii.gz",
        "labelsTr/BRATS_001.nii.gz",
    )
    store = prepare_volumes(
        msd,
        tmp_path / "out",
        sequence=1,
        margin=100,
        dtype="float32",
        window=(0, 100),
        foreground_above=1,
    )
    assert np.allclose(store.array(0), ball(seed=1) / 100, atol=1e-6) and store.items[0][
        "labels"
    ] == [0, 1]
    nnu = tmp_path/"Task500"
    for n in ("BraTS2021_00000", "BraTS2021_00002"):
        for k in range(2): save(nnu/f"imagesTr/{n}_{k:04d}.nii.gz", ball(seed=k))
        save(nnu/f"labelsTr/{n}.nii.gz", (ball() > 0).astype(np.uint8))
    for facts in (
        {
            "modality": {"0": "T1", "1": "T1ce"},
            "training": [
                {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
                for n in ("BraTS2021_00000", "BraTS2021_00002")
            ],
        },
        {"channel_names": {"0": "T1", "1": "T1ce"}, "numTraining": 2, "file_ending": ".nii.gz"},
    ):
        (nnu / "dataset.json").write_text(json.dumps(facts))
        assert [(r["image"], r["channel"]) for r in find_volumes(nnu, sequence="T1ce")] == [
            (f"imagesTr/{n}_0001.nii.gz", None) for n in ("BraTS2021_00000", "BraTS2021_00002")
        ]
    (nnu/"imagesTr/BraTS2021_00002_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="BraTS2021_00002.*download complete"):
        find_volumes(nnu, sequence="T1ce")
    (msd/"labelsTr/BRATS_002.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="BRATS_002"): find_volumes(msd, sequence=0)
    (msd/"dataset.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"): find_volumes(msd)

def test_brats(tmp_path):
    for n in ("BraTS2021_00000", "BraTS2021_00002"):
        for s in ("t1", "t1ce", "t2", "flair", "seg"):
            (tmp_path / "old" / n).mkdir(parents=True, exist_ok=True)
            (tmp_path / "old" / n / f"{n}_{s}.nii.gz").touch()
    with pytest.raises(ValueError, match="0 t1, 1 t1ce, 2 t2, 3 flair"):
        find_volumes(tmp_path / "old")
    for s in ("t1", "t1ce", "t2", "flair"):
        assert [
            (r["name"], r["image"], r["label"]) for r in find_volumes(tmp_path / "old", sequence=s)
        ][1] == (
            "BraTS2021_00002",
            f"BraTS2021_00002/BraTS2021_00002_{s}.nii.gz",
            "BraTS2021_00002/BraTS2021_00002_seg.nii.gz",
        )
    for n in ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-GLI-00006-000"):
        for s in ("t1n", "t1c", "t2w", "t2f", "seg"):
            (tmp_path / "new" / n).mkdir(parents=True, exist_ok=True)
            (tmp_path / "new" / n / f"{n}-{s}.nii.gz").touch()
    records = find_volumes(tmp_path/"new", sequence="t1ce")
    assert [r["subject"] for r in records] == ["BraTS-GLI-00005"] * 2 + [
        "BraTS-GLI-00006"
    ] and records[0]["image"].endswith("-t1c.nii.gz")
    assert find_volumes(tmp_path/"new", sequence="t2w")[0]["image"].endswith("-t2w.nii.gz")
    (tmp_path/"old/BraTS2021_00002/BraTS2021_00002_t2.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="BraTS2021_00002 has no t2"):
        find_volumes(tmp_path / "old", sequence="t2")

def test_autopet(tmp_path):
    root, affine = tmp_path/"FDG-PET-CT-Lesions", np.diag([-2., -2, 3, 1])
    studies = (
        "PETCT_01/07-12-2003-NA-24980",
        "PETCT_01/08-01-2004-NA-24981",
        "PETCT_02/01-01-2005-NA-3",
    )
    ct = np.where(ball() > 0, 40, -1000).astype(np.int16) + RNG.integers(
        -20, 20, (24, 20, 22)
    ).astype(np.int16)
    for s in studies:
        save(root / s / "CTres.nii.gz", ct, affine)
        save(root / s / "SUV.nii.gz", ball(), affine)
        save(root / s / "SEG.nii.gz", (ball() > 90).astype(np.uint8), affine)
        # the unresampled CT and PET lie there as well
        save(root / s / "CT.nii.gz", ct[:, :, ::2], affine)
    with pytest.raises(ValueError, match="0 CTres, 1 SUV"): find_volumes(root)
    records = find_volumes(root, sequence="CT")
    assert [r["name"] for r in records] == list(studies) and [r["subject"] for r in records] == [
        "PETCT_01",
        "PETCT_01",
        "PETCT_02",
    ]
    assert (
        records[2]["image"] == f"{studies[2]}/CTres.nii.gz"
        and records[2]["label"] == f"{studies[2]}/SEG.nii.gz"
    )
    divided = split_subjects(records, {"train": .5, "test": .5}, seed=1)
    store = prepare_volumes(divided, tmp_path/"out", root=root, window="ct")
    assert (
        store.splits[0] == store.splits[1] != store.splits[2]
        and store.items[0]["labels"] == [0, 1]
        and store.subjects == ["PETCT_01", "PETCT_01", "PETCT_02"]
    )
    assert find_volumes(root, sequence="SUV")[0]["image"].endswith("SUV.nii.gz")
    with pytest.raises(ValueError, match="a study without a patient"):
        find_volumes(root / "PETCT_01", sequence="CT")

def test_plain_folders_and_tables(tmp_path, bodies):
    records = find_volumes(bodies)
    assert [r["split"] for r in records] == ["train"] * 3 + ["test"] and records[0][
        "label"
    ] == "body_000_label.nii.gz"
    for n in ("a/x.nii.gz", "b/x.nii", "b/x_label.nrrd"):
        (tmp_path / "in" / n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / n).touch()
    assert [(r["name"], r["label"]) for r in find_volumes(tmp_path / "in")] == [
        ("a/x", ""),
        ("b/x", "b/x_label.nrrd"),
    ]
    (tmp_path/"in/subjects.csv").write_text("name,subject,split\na/x,p,train\n")
    with pytest.raises(ValueError, match="differ in b/x"): find_volumes(tmp_path/"in")
    (tmp_path/"in/subjects.csv").write_text("name,subject,split\na/x,p,train\nb/x,p,test\n")
    with pytest.raises(ValueError, match="'p': a/x in 'train', b/x in 'test'"):
        find_volumes(tmp_path / "in")
    (tmp_path/"in/a/x.nii").touch()
    with pytest.raises(ValueError, match="both called a/x"): find_volumes(tmp_path/"in")
    (tmp_path/"none").mkdir()
    with pytest.raises(FileNotFoundError, match="no volumes below"): find_volumes(tmp_path/"none")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost/y_label.nii.gz").touch()
    with pytest.raises(ValueError, match="labels without an image"): find_volumes(tmp_path/"lost")
    (tmp_path / "table.json").write_text(
        json.dumps([{"name": "one", "image": str(bodies / "body_000.nii.gz")}])
    )
    assert prepare_volumes(tmp_path/"table.json", tmp_path/"out").names == ["one"]
    shutil.copy(bodies/"body_001.nii.gz", tmp_path/"z.nii.gz")
    (tmp_path/"table.csv").write_text("name,image\ntwo,z.nii.gz\n")
    assert read_manifest(tmp_path / "table.csv")[0]["subject"] == "two" and prepare_volumes(
        tmp_path / "table.csv", tmp_path / "out"
    ).names == ["two"]
    for record, says in (
        ({"name": "../x", "image": "x"}, "relative"),
        ({"name": "/x", "image": "x"}, "relative"),
        ({"image": "x"}, "a name and an image"),
        ({"name": "x", "image": "x", "age": 3}, "entries age"),
    ):
        with pytest.raises(ValueError, match=says):
            check_records([record])
    with pytest.raises(ValueError, match="more than once"):
        check_records([{"name": "A", "image": "x"}, {"name": "a", "image": "y"}])
    with pytest.raises(ValueError, match="0 volumes"): check_records([])

def test_splits_are_portable_and_by_subject(tmp_path):
    records = [
        {"name": f"s{k % 20}/{k}", "image": f"/data/{k}.nii", "subject": f"s{k % 20}"}
        for k in range(50)
    ]
    a, b = split_subjects(records, seed=3), split_subjects(records[::-1], seed=3)
    assert (
        {r["name"]: r["split"] for r in a}
        == {r["name"]: r["split"] for r in b}
        != {r["name"]: r["split"] for r in split_subjects(records, seed=4)}
    )
    assert [
        len({r["subject"] for r in a if r["split"] == s}) for s in ("train", "val", "test")
    ] == [12, 4, 4]
    write_splits(tmp_path/"s.json", a)
    text = (tmp_path/"s.json").read_text()
    assert "/data" not in text and str(tmp_path) not in text
    assert read_splits(tmp_path/"s.json", records) == a
    with pytest.raises(ValueError, match="says nothing of s1/99"):
        read_splits(
            tmp_path / "s.json", [*records, {"name": "s1/99", "image": "x", "subject": "s1"}]
        )
    with pytest.raises(ValueError, match="another subject"):
        read_splits(tmp_path / "s.json", [{**records[0], "subject": "other"}])
    facts = json.loads(text)
    facts["splits"]["test"]["s0/0"] = facts["splits"]["train"]["s0/0"] = "s0"
    (tmp_path/"s.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="s0/0 in"): read_splits(tmp_path/"s.json", records)
    with pytest.raises(ValueError, match="have no split"): write_splits(tmp_path/"t.json", records)
    with pytest.raises(ValueError, match="enough for one"): split_subjects(records[:2])
    with pytest.raises(ValueError, match="add to 1"):
        split_subjects(records, {"train": 0.5, "test": 0.6})

# ---- other formats

@pytest.mark.parametrize("name, package", [("x.nrrd", "pynrrd"), ("x.mha", "itk"), ("series", "pydicom"), ("x.nii.gz", "nibabel")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    if name == "series": (tmp_path/name).mkdir()
    else: (tmp_path/name).touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ImportError, match=f"pip install {package}"): read_volume(tmp_path/name)
    (tmp_path/"x.png").touch()
    with pytest.raises(ValueError, match="expected a file ending in"): read_volume(tmp_path/"x.png")

LPS = np.diag([-1., -1, 1, 1])

def test_nrrd(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    affine = LPS @ oblique((1, 2, 3), .2)
    nrrd.write(
        str(tmp_path / "x.nrrd"),
        ball(),
        {
            "space": "left-posterior-superior",
            "space directions": affine[:3, :3].T,
            "space origin": affine[:3, 3],
        },
    )
    x, a = read_volume(tmp_path/"x.nrrd")
    assert np.array_equal(x, ball()) and np.allclose(a, oblique((1, 2, 3), .2), atol=1e-4)

def test_mha(tmp_path):
    itk = pytest.importorskip("itk")
    affine = LPS @ oblique((1, 2, 3), .2)
    image = itk.image_from_array(np.ascontiguousarray(ball().T))
    image.SetSpacing([1.0, 2.0, 3.0])
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(affine[:3, :3]/[1, 2, 3])))
    itk.imwrite(image, str(tmp_path/"x.mha"))
    x, a = read_volume(tmp_path/"x.mha")
    assert np.array_equal(x, ball()) and np.allclose(a, oblique((1, 2, 3), .2), atol=1e-4)

def write_series(folder, values, spacing, z0=10., uid="1.2.3", skip=()):
    "Axial slices, as a scanner writes them: rows to the left, columns to the back"
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(values.shape[2]):
        if k in skip: continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
            CTImageStorage,
            f"{uid}.{k + 1}",
            ExplicitVRLittleEndian,
        )
        d = FileDataset(None, {}, file_meta=meta, preamble=b"\0"*128)
        d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID, d.Modality, d.PatientID = (
            CTImageStorage,
            f"{uid}.{k + 1}",
            uid,
            "CT",
            "p",
        )
        d.ImagePositionPatient, d.ImageOrientationPatient, d.PixelSpacing, d.SliceThickness = (
            [-20, -30, z0 + k * spacing[2]],
            [1, 0, 0, 0, 1, 0],
            [spacing[1], spacing[0]],
            spacing[2],
        )
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = (
            values.shape[1],
            values.shape[0],
            1,
            "MONOCHROME2",
        )
        (
            d.BitsAllocated,
            d.BitsStored,
            d.HighBit,
            d.PixelRepresentation,
            d.RescaleSlope,
            d.RescaleIntercept,
            d.InstanceNumber,
        ) = 16, 16, 15, 0, 1, -1024, k + 1
        d.PixelData = (values[:, :, k].T + 1024).astype("<u2").tobytes()
        # names in no order
        d.save_as(folder/f"{uid}_{(7*k) % 23:03d}.dcm", enforce_file_format=True)

def test_dicom_series(tmp_path):
    pytest.importorskip("pydicom")
    values = np.round(ball((16, 12, 10), (8, 6, 5))).astype(int) - 1000
    write_series(tmp_path/"in/p1/ct", values, (2, 3, 4))
    (tmp_path/"in/p1/ct/README.txt").write_text("not a slice")
    x, a = read_volume(tmp_path/"in/p1/ct")
    # DICOM's axes go to the left and to the back
    assert np.array_equal(x, values[::-1, ::-1])
    first = (a @ [15, 11, 0, 1])[:3]
    assert np.allclose(first, [20, 30, 10], atol=1e-4) and np.allclose(np.diag(a), [2, 3, 4, 1])
    store = prepare_volumes(
        tmp_path / "in", tmp_path / "out", window=(-1000, -900), foreground_above=-990
    )
    assert (
        store.names == ["p1/ct"]
        and prepare_volumes(
            tmp_path / "in", tmp_path / "out", window=(-1000, -900), foreground_above=-990
        ).made
        == 0
    )
    write_series(tmp_path/"gap", values, (2, 3, 4), skip=(4,))
    with pytest.raises(ValueError, match="4.00 to 8.00 mm apart"): read_volume(tmp_path/"gap")
    write_series(tmp_path / "two", values, (2, 3, 4))
    write_series(tmp_path / "two", values, (2, 3, 4), uid="1.2.4")
    with pytest.raises(ValueError, match="2 DICOM series"): read_volume(tmp_path/"two")

# ---- crops

def test_crops_depend_on_seed_epoch_and_volume_alone(store):
    def run(volumes=(0, 1, 2), **kw):
        return sample_crops(
            store, volumes, **{"n_crops": 5, "size": 8, "seed": 1, "epoch": 2, **kw}
        )
    whole = run()
    for k, v in enumerate((2, 0, 1)):
        part = run((2, 0, 1))
        for key in whole: assert torch.equal(whole[key][5*v:5*v+5], part[key][5*k:5*k+5])
    for other in ({"seed": 2}, {"epoch": 3}):
        assert not torch.equal(whole["center_mm"], run(**other)["center_mm"])
    assert torch.equal(run((0, 0), epoch=[2, 3])["center_mm"][5:], run((0,), epoch=3)["center_mm"])
    assert not torch.equal(whole["center_mm"][:5], whole["center_mm"][5:10])
    assert (
        whole["crop"].shape == (15, 1, 8, 8, 8)
        and whole["crop"].dtype == torch.float32
        and whole["volume_id"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    )
    assert (
        whole["center_mm"].dtype == torch.float32
        and whole["volume_id"].dtype == torch.int64
        and 0 <= whole["crop"].min()
        and whole["crop"].max() <= 1
    )
    for wrong in (
        {"n_crops": 0},
        {"size": 0},
        {"size": (1, 2)},
        {"size": 2.5},
        {"volumes": ()},
        {"epoch": [1]},
        {"frame": "mm"},
    ):
        with pytest.raises(ValueError):
            run(**wrong)
    with pytest.raises(IndexError): run((9,))

def test_the_seed_is_of_the_name_not_of_the_number(bodies, store, tmp_path):
    part = prepare_volumes(find_volumes(bodies)[1:], tmp_path/"out", root=bodies)
    assert torch.equal(
        sample_crops(part, [1], 4, 8)["crop"], sample_crops(store, [2], 4, 8)["crop"]
    )

def test_every_crop_holds_tissue_and_all_tissue_is_reached(store):
    batch = sample_crops(store, [0], 3000, 5, labels=True)
    assert batch["label"].gt(0).flatten(1).any(1).float().mean() > .99
    starts = np.round(store.voxel(0, batch["center_mm"].numpy()) - 2).astype(int)
    seen, mask = np.zeros(store.items[0]["shape"], bool), store.array(0, "foreground")
    for (x, y, z), label in zip(starts, batch["label"].numpy()):
        assert mask[x : x + 5, y : y + 5, z : z + 5].any() and np.array_equal(
            label, store.array(0, "label")[x : x + 5, y : y + 5, z : z + 5]
        )
        seen[x:x+5, y:y+5, z:z+5] = True
    assert seen[mask].mean() > .97
    centres = mask[tuple((starts + 2).T)]
    # all but those that were moved into the array
    assert centres.mean() > .9
    anywhere = sample_crops(store, [0], 500, 5, foreground=False)["center_mm"]
    p = np.round(store.voxel(0, anywhere.numpy())).astype(int)
    assert .2 < mask[tuple(p.T)].mean() < .8

def test_a_thin_foreground_is_found(tmp_path):
    x = np.zeros((60, 60, 60), np.float32)
    x[range(60), range(60), range(60)] = x[range(1, 60), range(59), range(59)] = x[
        range(1, 60), range(1, 60), range(59)
    ] = 50
    x[x > 0] += RNG.uniform(0, 50, (x > 0).sum())
    save(tmp_path/"in/line.nii.gz", x)
    store = prepare_volumes(tmp_path/"in", tmp_path/"out", foreground_above=1)
    p = np.round(store.voxel(0, sample_crops(store, [0], 40, 1)["center_mm"].numpy())).astype(int)
    assert store.array(0, "foreground")[tuple(p.T)].all() and len(np.unique(p[:, 0])) > 15

def test_a_volume_smaller_than_a_crop_lies_in_its_middle(tmp_path):
    save(tmp_path/"in/x.nii.gz", ball((20, 20, 20)), np.diag([2., 2, 2, 1]))
    store = prepare_volumes(tmp_path/"in", tmp_path/"out", margin=0)
    side = int(store.items[0]["shape"][0])
    batch = sample_crops(store, [0], 3, (side + 7, 4, side + 2))
    assert torch.equal(batch["center_mm"][:, [0, 2]], batch["center_mm"][:1, [0, 2]].expand(3, 2))
    for crop, c in zip(batch["crop"][:, 0], batch["center_mm"].numpy()):
        assert not crop[:3].any() and not crop[3 + side + 1:].any() and crop[4:4 + side].any()
        start = np.round(store.voxel(0, c[None])[0] - (np.array(crop.shape) - 1)/2).astype(int)
        inner = crop[-start[0]:side - start[0], :, -start[2]:side - start[2]].numpy()
        assert np.allclose(inner, store.array(0)[:, start[1]:start[1] + 4]*store.scale, atol=1e-6)
    outside = crops_at(store, 0, [[1000., 0, 0]], 4)
    assert not outside["crop"].any()
    with pytest.raises(ValueError, match=r"expected finite \(K, 3\)"):
        crops_at(store, 0, [1.0, 2, 3], 4)

def test_batches_are_a_function_of_the_step(store):
    def run(**kw): return list(crop_batches(store, 3, 2, 6, steps=9, seed=7, **kw))
    whole = run()
    assert (
        len(whole) == len(crop_batches(store, 3, 2, 6, 9)) == 9
        and len(crop_batches(store, 3, 2, 6, 9, start=9)) == 0
    )
    for start in (1, 5, 8):
        for a, b in zip(whole[start:], run(start=start), strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)
    served = torch.cat([b["volume_id"][::2] for b in whole]).tolist()
    epochs = [served[k:k + 4] for k in range(0, 24, 4)]
    assert all(sorted(e) == [0, 1, 2, 3] for e in epochs) and len(set(map(tuple, epochs))) > 2
    for world in (2, 3):
        parts = [run(rank=r, world=world) for r in range(world)]
        for step, batch in enumerate(whole):
            for k in batch: assert torch.equal(batch[k], torch.cat([p[step][k] for p in parts]))
    some = run(volumes=[1, 3], labels=True, frame="box")
    assert (
        {*torch.cat([b["volume_id"] for b in some]).tolist()} == {1, 3}
        and "label" in some[0]
        and some[0]["center_mm"].max() <= 1.5
    )
    assert (
        not torch.equal(some[0]["crop"][:2], some[2]["crop"][:2])
        or some[0]["volume_id"][0] != some[2]["volume_id"][0]
    )
    for wrong in ({"start": 10}, {"volumes": []}, {"rank": 1, "world": 1}, {"rank": 0, "world": 4}):
        with pytest.raises(ValueError): run(**wrong)

@pytest.mark.parametrize("size, stride", [(8, None), ((7, 9, 5), None), (8, 4), (6, (3, 6, 5)), (100, None)])
def test_grids_cover_the_foreground(store, size, stride):
    sides, step = np.broadcast_to(size, 3), np.broadcast_to(stride or size, 3)
    mask, count, shares = (
        store.array(1, "foreground"),
        np.zeros(store.items[1]["shape"] + 250, int),
        [],
    )
    for batch in grid_crops(store, 1, size, stride, batch=7):
        assert len(batch["crop"]) <= 7
        for c, crop, share in zip(
            batch["center_mm"].numpy(), batch["crop"][:, 0].numpy(), batch["tissue"].tolist()
        ):
            start = np.round(store.voxel(1, c[None])[0] - (sides - 1) / 2).astype(int)
            assert ((start - store.items[1]["box"][0]) % step == 0).all()
            region = tuple(slice(a, a + s) for a, s in zip(start, sides))
            inside = store.array(1)[region] * store.scale
            assert np.allclose(
                crop[tuple(slice(0, n) for n in inside.shape)], inside, atol=1e-6
            ) and np.isclose(crop.sum(), inside.sum(), rtol=1e-4)
            assert np.isclose(share, mask[region].sum() / sides.prod())
            count[region] += 1
            shares.append(share)
    count = count[tuple(slice(0, n) for n in mask.shape)]
    assert (count[mask] >= 1).all() and min(shares) > 0
    if stride is None: assert (count[mask] == 1).all()
    everything = sum(len(b["crop"]) for b in grid_crops(store, 1, size, stride, tissue=-1))
    assert everything >= len(shares) and sum(
        len(b["crop"]) for b in grid_crops(store, 1, size, stride, tissue=0.5)
    ) == sum(s > 0.5 for s in shares)

def test_the_trainer_takes_the_batches(store, tmp_path):
    "A run that was stopped and taken up again gives the weights of one that was not"
    from synthpi.train.trainer import Trainer
    def step(model, loss, batch):
        z = model(batch["crop"].flatten(1))
        value = loss(torch.cdist(z, z), torch.cdist(batch["center_mm"], batch["center_mm"])/100)
        return value, {}
    def run(folder, stop=None):
        def on_step(trainer):
            if trainer.done == stop: raise KeyboardInterrupt
        torch.manual_seed(0)
        model = torch.nn.Linear(216, 8)
        trainer = Trainer(
            model,
            torch.nn.MSELoss(),
            torch.optim.SGD(model.parameters(), 0.1),
            lambda start: crop_batches(store, 2, 4, 6, 6, start, seed=3),
            6,
            step=step,
            run_dir=folder,
            on_step=on_step,
            watch_every=0,
            progress=None,
        )
        trainer.fit()
        return trainer.done, model.weight.detach()
    done, whole = run(tmp_path/"a")
    assert done == 6 and run(tmp_path/"b", stop=4)[0] == 4
    done, resumed = run(tmp_path/"b")
    assert done == 6 and torch.equal(resumed, whole)

# ---- phantoms, real volumes, benchmark

def test_bodies_are_a_function_of_seed_and_subject(tmp_path):
    kw = {"shape": (24, 20, 24), "spacing_mm": 17.}
    two, three = body_phantoms(2, **kw), body_phantoms(3, **kw)
    for a, b in zip(two, three):
        assert (
            np.array_equal(a.image, b.image)
            and np.array_equal(a.label, b.label)
            and np.array_equal(a.affine, b.affine)
        )
    assert (
        not np.array_equal(two[0].image, body_phantoms(1, seed=1, **kw)[0].image)
        and len(ORGANS) >= 12
    )
    for b in three:
        middle = np.array(
            [
                np.average(p, weights=None)
                for p in (b.affine[:3, :3] @ np.argwhere(b.label > 0).T + b.affine[:3, 3:])
            ]
        )
        # the world's origin is in the trunk
        assert np.abs(middle).max() < 40
    for wrong in (
        {"contrast": "pet"},
        {"n_subjects": 0},
        {"shape": (4, 20, 20)},
        {"spacing_mm": 0},
    ):
        with pytest.raises(ValueError):
            body_phantoms(**{**kw, **wrong})
    write_bodies(tmp_path / "a", 2, **kw)
    write_bodies(tmp_path / "b", 2, **kw)
    assert all(
        p.read_bytes() == (tmp_path / "b" / p.name).read_bytes() for p in (tmp_path / "a").iterdir()
    )

def test_place_is_in_the_shapes_not_in_the_intensities(store):
    """Ridge regression of the position in the body: the crops' voxels against their histograms, on
    a subject that is not among the 3"""
    def features(volumes, kind):
        batch = sample_crops(store, volumes, 250, 10, seed=9, frame="box")
        x = batch["crop"][:, 0].double()
        if kind == "histogram": x = torch.stack([torch.histc(c, 16, 0, 1) for c in x])
        else: x = torch.nn.functional.avg_pool3d(x[:, None], 2).flatten(1)
        return x, batch["center_mm"].double()
    def r2(kind):
        (x, y), (u, v) = features([0, 1, 2], kind), features([3], kind)
        mean, std = x.mean(0), x.std(0) + 1e-6
        x, u = (torch.cat([(t - mean)/std, torch.ones(len(t), 1)], 1) for t in (x, u))
        w = torch.linalg.solve(x.T @ x + 30*torch.eye(x.shape[1]), x.T @ y)
        return 1 - ((u @ w - v)**2).sum()/((v - v.mean(0))**2).sum()
    shapes, intensities = r2("voxels"), r2("histogram")
    assert shapes > .4 and intensities < .3 and shapes > intensities + .2, (shapes, intensities)

@real
@pytest.mark.parametrize("name, spacing", [("volumes", None), ("volumes", 4), ("volumes_hippocampus", None)])
def test_real_volumes(tmp_path, name, spacing):
    folder = REAL/name
    records = find_volumes(folder)
    assert len(records) == {"volumes": 32, "volumes_hippocampus": 48}[name] and all(
        r["label"] and r["split"] in ("train", "test") for r in records
    )
    store = prepare_volumes(records[:2], tmp_path/"out", root=folder, spacing_mm=spacing)
    for i in range(2):
        source = nib.load(folder/records[i]["label"])
        label = np.asarray(source.dataobj)
        def middles(of, label):
            return np.array(
                [of(np.argwhere(label == k).mean(0)) for k in np.unique(source.dataobj)[1:]]
            )
        true = middles(lambda p: source.affine[:3, :3] @ p + source.affine[:3, 3], label)
        mine = middles(lambda p: store.position(i, p), np.asarray(store.array(i, "label")))
        if spacing is None:
            assert np.abs(true - mine).max() < 0.01
        # a thin region loses voxels on a coarser grid
        else:
            assert np.abs((true - mine).mean(0)).max() < 0.5 and np.abs(true - mine).max() < spacing
        assert (np.asarray(store.array(i, "label")) > 0)[store.array(i, "foreground")].mean() > .05
    batch = sample_crops(store, [0, 1], 8, 16, labels=True)
    assert batch["crop"].std() > .05 and batch["label"].gt(0).any()

def test_the_benchmark_compares_the_same_and_its_numbers_are_stored():
    spec = importlib.util.spec_from_file_location(
        "benchmark_volumes", ROOT / "tests/benchmarks/volumes.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    r = module.run(quick=True)
    assert json.dumps(r) and all(x["min"] > 0 for x in r["results"]["times_faster"].values())
    stored = json.loads((ROOT/"tests/benchmarks/results/volumes.json").read_text())
    assert not stored["quick"] and set(stored["results"]["times_faster"]) == set(
        r["results"]["times_faster"]
    ) == set(r["goals"])
