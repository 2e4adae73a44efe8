"""Volumes: the world stays where it is through reading, resampling and cropping; a store is whole
or not there."""
import gzip
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from volume_files import ball, oblique, save, world

from synthpi.volumes.bodies import body_phantoms
from synthpi.volumes.crops import crops_at, sample_crops
from synthpi.volumes.scans import foreground, prepare_volumes, read_volume, resample
from synthpi.volumes.sets import (
    find_volumes,
)
from synthpi.volumes.store import FRAMES, VolumeStore

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent/"shared/data"
real = pytest.mark.skipif(
    not (REAL / "volumes").exists(),
    reason="the real volumes (shared/data beside the repository) are not here",
)
RNG = np.random.default_rng(0)

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
    with pytest.raises(ValueError, match="got frame 'mm'"): store.position(0, [[0, 0, 0]], "mm")

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
    ct = prepare_volumes(tmp_path / "in", tmp_path / "ct2", window="ct", foreground_above=10)
    assert ct.settings["window"] == [-1000, 1000]
    with pytest.raises(ValueError, match="got window 'bone'"):
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

def _damaged(x, kind):
    "Values that are wrong in one way"
    if kind == "nan": x[3, 4, 5] = np.nan
    if kind == "constant": x[:] = np.where(x > 0, 7, 0)
    if kind == "zeros": x[:] = 0
    return {"flat": x[0], "four": np.stack([x, x], -1), "empty": x[:0]}.get(kind, x)

LABELS = {
    "shape": np.zeros((24, 20, 21), np.uint8),
    "place": np.zeros((24, 20, 22), np.uint8),
    "fraction": np.full((24, 20, 22), .5, np.float32),
    "negative": np.full((24, 20, 22), -1, np.int16),
}

def _broken(kind, folder):
    path = save(folder/"bad.nii.gz", _damaged(ball(), kind), np.eye(4))
    if kind in LABELS:
        affine = oblique((1, 1, 1)) if kind == "place" else np.eye(4)
        save(folder/"bad_label.nii.gz", LABELS[kind], affine)
    if kind == "singular":
        raw = bytearray(gzip.decompress(path.read_bytes()))
        # the second row of the affine
        raw[296:312] = bytes(16)
        path.write_bytes(gzip.compress(raw))
    if kind == "cut": path.write_bytes(path.read_bytes()[:500])

@pytest.mark.parametrize("kind, says", [
    ("nan", "1 of 10560 values that are not finite"),
    ("constant", "constant"),
    ("zeros", "no value is above"),
    ("flat", r"expected a volume \(X, Y, Z\)"),
    ("four", "channel=0 to 1"),
    ("empty", "with at least one voxel"),
    ("shape", r"\(24, 20, 21\) and its image \(24, 20, 22\)"),
    ("place", "lies elsewhere"),
    ("fraction", "0.5"),
    ("negative", "-1"),
    ("singular", "singular"),
    ("cut", "could not be read"),
])
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
    with pytest.raises(ValueError, match="got channel 2 of .* expected 0 to 1"):
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
        with pytest.raises(ValueError, match="expected"):
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

def _prepare_and_die(bodies, out):
    "In a process of its own: killed while it writes its fifth array"
    save, calls = np.save, []
    def dying(path, array):
        calls.append(path)
        save(path, array)
        if len(calls) < 5: return
        os.truncate(path, 300)
        os.kill(os.getpid(), signal.SIGKILL)
    np.save = dying
    prepare_volumes(bodies, out)

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_killed_run_continues(tmp_path, bodies, store):
    out = tmp_path/"out"
    # forked, because a new process would import MONAI again
    child = multiprocessing.get_context("fork").Process(target=_prepare_and_die, args=(bodies, out))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    # three arrays each: it died in the second volume
    assert len(list(out.glob("items/*/item.json"))) == 1 and list(out.glob("items/*/.*"))
    with pytest.raises(FileNotFoundError, match="continues where it stopped"): VolumeStore(out)
    again = prepare_volumes(bodies, out)
    assert (
        again.made == 3
        and not list(out.glob("items/*/.*"))
        and checksums(again) == checksums(store)
    )

def test_what_is_damaged_or_changed_is_prepared_again(tmp_path, bodies, store):
    source, out = tmp_path/"in", tmp_path/"out"
    shutil.copytree(bodies, source)
    def made(**kw): return prepare_volumes(source, out, **kw).made
    assert (made(), made()) == (4, 0)
    # killed while it wrote the list
    (out/".store-x1.json").write_text('{"format"')
    assert made() == 0 and not list(out.glob(".store*"))
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

@pytest.mark.slow
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
    with pytest.raises(ValueError, match="got split 'val'"): store.indices("val")

# ---- other formats

@pytest.mark.parametrize("name, package", [
    ("x.nrrd", "pynrrd"), ("x.mha", "itk"), ("series", "pydicom"), ("x.nii.gz", "nibabel"),
])
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

# ---- real volumes, benchmark

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
