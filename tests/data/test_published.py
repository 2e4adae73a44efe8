"""Published sets in their published layouts, tiny: what is read is what was written, and every way
to be incomplete is named."""
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from datasets import Dataset, Features, Image as ImageFeature, Value
from PIL import Image

from synthpi.data.nuclei_sets import (
    PANNUKE_CLASSES,
    draw_outlines,
    monuseg,
    nuclear_mask,
    pannuke,
    read_outlines,
)
from synthpi.data.conversion import SETS, source_fingerprint
from synthpi.data.splits import assert_disjoint, check_images, check_labels, split_by_group
from synthpi.data.folders import image_folder, pair_folders
from synthpi.data.tile_sets import NCT_CLASSES, hub_tiles, nct_crc, pcam
from synthpi.data.published import PRESETS, read_published
from synthpi.data.stain_sets import bci, paired_folders
from synthpi.data.stain_sets import _pick, apply_window, tiff_pairs

ROOT = Path(__file__).parents[2]
REAL = Path(__file__).parents[3]/"shared/data"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no group is known"),
    pytest.mark.filterwarnings("ignore:.*is read as 'val'"),
]

def picture(seed, h=32, w=32):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)

def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)

def stamps(folder):
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.stat().st_ino)
        for p in Path(folder).rglob("*.png")
    }

# ---- PanNuke

def write_pannuke(root, folds=(1, 2, 3), n=3, size=24, layout="Fold {f}/{kind}/fold{f}"):
    "Published layout; nucleus 1 of class 0, nuclei 7 and 9 of class 3 that touch."
    for f in folds:
        rng = np.random.default_rng(f)
        images, masks = (
            rng.integers(0, 256, (n, size, size, 3)).astype(float),
            np.zeros((n, size, size, 6)),
        )
        masks[:, 2:8, 2:8, 0], masks[:, 10:16, 4:9, 3], masks[:, 10:16, 9:14, 3] = 1, 7, 9
        masks[..., 5] = (masks[..., :5] == 0).all(-1)
        for kind, name, a in (
            ("images", "images", images),
            ("images", "types", np.array(["Breast", "Bile-duct", "HeadNeck"] * n)[:n]),
            ("masks", "masks", masks),
        ):
            folder = root / layout.format(f=f, kind=kind)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{name}.npy", a)
    return root

@pytest.fixture
def nuke(tmp_path): return write_pannuke(tmp_path/"pannuke")

def test_pannuke_nuclei(nuke, tmp_path):
    ds = pannuke(nuke, tmp_path/"out")
    assert (
        Counter(ds["split"]) == {"train": 3, "val": 3, "test": 3}
        and set(ds["um_per_px"]) == {0.25}
        and len(set(ds["group"])) == 9
    )
    assert ds.features["label"].names == ["Bile-duct", "Breast", "HeadNeck"]
    stored = np.load(nuke/"Fold 2/images/fold2/images.npy")
    row = ds[ds["path"][:].index("image/fold2_00001_Bile-duct.png")]
    assert row["split"] == "val" and np.array_equal(row["primary"], stored[1])
    mask, numbers = (
        np.array(row["privileged"]),
        np.array(Image.open(tmp_path / "out/instances/fold2_00001_Bile-duct.png")),
    )
    assert numbers.dtype == np.uint16 and set(np.unique(numbers)) == {0, 1, 2, 3}
    assert len(set(numbers[12, 5:7])) == 1 and numbers[12, 5] != numbers[12, 12] != numbers[4, 4]
    assert (
        np.array_equal(mask, nuclear_mask(numbers))
        and mask[12, 8] == mask[12, 9] == 128
        and mask[4, 4] == 255
        and mask[20, 20] == 0
    )
    assert mask[2, 2] == mask[7, 5] == 128 and mask[1, 2] == mask[8, 5] == 0     # the rim is inside
    facts = json.loads((tmp_path/"out/provenance.json").read_text())
    assert (
        facts["finished"]
        and facts["licence"] == SETS["pannuke"].licence
        and facts["source"]["files"] == 9
    )
    assert check_images(ds)[1]["kept"] == 9
    assert_disjoint(ds)

def test_pannuke_classes_can_be_undone(nuke, tmp_path):
    ds = pannuke(nuke, tmp_path/"out", masks="classes", folds={2: "train", 3: "test"})
    gray = np.array(ds[0]["privileged"])
    assert Counter(ds["split"]) == {"train": 3, "test": 3} and set(np.unique(gray)) == {0, 50, 200}
    wanted = np.load(nuke/"Fold 2/masks/fold2/masks.npy")[0, ..., :5]
    assert np.array_equal(gray//50, np.where(wanted.any(-1), wanted.argmax(-1) + 1, 0))
    assert json.loads((tmp_path / "out/provenance.json").read_text())["options"]["gray"] == {
        c: 50 * k for k, c in enumerate(("background", *PANNUKE_CLASSES))
    }

def test_pannuke_overlap_takes_the_first_class_and_full_images_keep_their_first_nucleus(tmp_path):
    root = write_pannuke(tmp_path/"p", folds=(1,), n=1)
    masks = np.zeros((1, 24, 24, 6))
    masks[..., 4], masks[0, :12, :, 1] = 5, 3
    np.save(root/"Fold 1/masks/fold1/masks.npy", masks)
    gray = np.array(pannuke(root, tmp_path/"c", masks="classes")[0]["privileged"])
    assert (gray[:12] == 100).all() and (gray[12:] == 250).all()
    masks[:, :, 12:, 4] = 3       # the same number in another class is another nucleus
    np.save(root/"Fold 1/masks/fold1/masks.npy", masks)
    pannuke(root, tmp_path/"n")
    assert set(
        np.unique(np.array(Image.open(tmp_path / "n/instances/fold1_00000_Breast.png")))
    ) == {1, 2, 3}

@pytest.mark.parametrize("layout", ["fold_{f}/{kind}", "pannuke/Fold{f}/{kind}", "fold{f}"])
def test_pannuke_other_spellings(tmp_path, layout):
    assert len(pannuke(write_pannuke(tmp_path/"manifold9", layout=layout), tmp_path/"out")) == 9
def test_pannuke_one_fold(nuke, tmp_path):
    assert set(pannuke(nuke / "Fold 3", tmp_path / "out")["split"]) == {"test"}

@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda p: (p / "Fold 1/masks/fold1/masks.npy").unlink(),
            FileNotFoundError,
            "fold 1 .* no masks.npy",
        ),
        (
            lambda p: (p / "Fold 1/images/fold1/types.npy").unlink(),
            FileNotFoundError,
            "no types.npy",
        ),
        (
            lambda p: os.truncate(p / "Fold 2/images/fold2/images.npy", 20000),
            ValueError,
            "images.npy cannot be read",
        ),
        (
            lambda p: (p / "Fold 2/images/fold2/images.npy").write_bytes(b""),
            ValueError,
            "cannot be read",
        ),
        (
            lambda p: np.save(p / "Fold 2/images/fold2/types.npy", np.array(["a", None], object)),
            ValueError,
            "without pickled objects",
        ),
        (
            lambda p: np.save(p / "Fold 2/masks/fold2/masks.npy", np.zeros((2, 24, 24, 6))),
            ValueError,
            "fold 2 has 3 images, 2 masks, 3 types",
        ),
        (
            lambda p: np.save(p / "Fold 2/masks/fold2/masks.npy", np.zeros((3, 20, 24, 6))),
            ValueError,
            r"\(3, 20, 24, 6\); expected \(any, 24, 24, 6\)",
        ),
        (
            lambda p: np.save(p / "Fold 2/masks/fold2/masks.npy", np.zeros((3, 24, 24, 5))),
            ValueError,
            "expected .*24, 6",
        ),
        (
            lambda p: np.save(p / "Fold 2/masks/fold2/masks.npy", np.full((3, 24, 24, 6), 0.5)),
            ValueError,
            "whole numbers of nuclei",
        ),
        (
            lambda p: np.save(p / "Fold 2/images/fold2/images.npy", np.full((3, 24, 24, 3), 0.5)),
            ValueError,
            "image 0 of fold 2 has values 0.5 to 0.5",
        ),
        (
            lambda p: np.save(p / "Fold 2/images/fold2/images.npy", np.full((3, 24, 24, 3), 300.0)),
            ValueError,
            "0 to 255",
        ),
        (
            lambda p: np.save(p / "Fold 2/images/fold2/images.npy", np.zeros((3, 24, 24))),
            ValueError,
            "has the shape",
        ),
        (
            lambda p: shutil.copytree(p / "Fold 2", p / "copy of Fold 2"),
            ValueError,
            "are both images of fold 2",
        ),
        (lambda p: (p / "Fold 1").rename(p / "Fold 7"), ValueError, "names the folds"),
        (
            lambda p: shutil.copytree(write_pannuke(p.parent / "x", folds=(4,)), p / "more"),
            ValueError,
            r"folds \[1, 2, 3, 4\]",
        ),
        (
            lambda p: [shutil.rmtree(p / f"Fold {f}") for f in (1, 2, 3)] and (p / "a.txt").touch(),
            FileNotFoundError,
            "Found: a.txt",
        ),
    ],
)
def test_damaged_pannuke(nuke, tmp_path, damage, error, message):
    damage(nuke)
    with pytest.raises(error, match=message): pannuke(nuke, tmp_path/"out")

@pytest.mark.parametrize(
    "options, message",
    [
        (dict(masks="cells"), "masks 'cells'"),
        (dict(folds={4: "test"}), "got fold 4"),
        (dict(folds={1: "dev"}), "splits dev"),
    ],
)
def test_pannuke_options(nuke, tmp_path, options, message):
    with pytest.raises(ValueError, match=message): pannuke(nuke, tmp_path/"out", **options)
    assert not (tmp_path/"out").exists()

# ---- an output folder

def test_again_rewrites_nothing_and_repairs_what_is_missing(nuke, tmp_path):
    out = tmp_path/"out"
    pannuke(nuke, out)
    before, facts = stamps(out), (out/"provenance.json").read_bytes()
    lost = sorted(out.rglob("*.png"))[::4]
    content = [p.read_bytes() for p in lost]
    for p in lost: p.unlink()
    (out/"image/.fold1-abcd1234.png").write_bytes(b"half")
    pannuke(nuke, out)
    after = stamps(out)
    assert (
        after.keys() == before.keys()
        and [p.read_bytes() for p in lost] == content
        and (out / "provenance.json").read_bytes() == facts
    )
    assert all(after[p] == before[p] for p in before if out/p not in lost)

def test_again_computes_nothing(nuke, tmp_path, monkeypatch):
    pannuke(nuke, tmp_path/"out")
    monkeypatch.setattr("synthpi.data.nuclei_sets.nuclear_mask", None)
    assert len(pannuke(nuke, tmp_path/"out")) == 9

def test_moved_source_goes_on_and_changed_source_does_not(nuke, tmp_path):
    pannuke(nuke, tmp_path/"out")
    before = stamps(tmp_path/"out")
    nuke.rename(tmp_path/"moved")
    pannuke(tmp_path/"moved", tmp_path/"out")
    assert stamps(tmp_path/"out") == before
    a = np.load(tmp_path/"moved/Fold 1/images/fold1/images.npy")
    a[0, 0, 0, 0] = (a[0, 0, 0, 0] + 1) % 256
    np.save(tmp_path/"moved/Fold 1/images/fold1/images.npy", a)
    with pytest.raises(ValueError, match="another conversion: source was"):
        pannuke(tmp_path / "moved", tmp_path / "out")

@pytest.mark.parametrize(
    "there, message",
    [
        ("note.txt", "holds 1 files or folders .note.txt. and no provenance.json"),
        (".", "is a file"),
        (None, "lies in the source"),
    ],
)
def test_other_content_is_refused(nuke, tmp_path, there, message):
    out = tmp_path/"out"
    if there == ".": out.touch()
    elif there:
        out.mkdir()
        (out/there).touch()
    else: out = nuke/"deep/out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message): pannuke(nuke, out)
    assert sorted(tmp_path.rglob("*")) == before
def test_unreadable_provenance(nuke, tmp_path):
    pannuke(nuke, tmp_path/"out")
    (tmp_path/"out/provenance.json").write_text("{")
    with pytest.raises(ValueError, match="provenance.json cannot be read"):
        pannuke(nuke, tmp_path / "out")

def test_fingerprint_sees_names_sizes_and_both_ends(tmp_path):
    f = tmp_path/"a.bin"
    def of(content):
        f.write_bytes(content)
        return source_fingerprint(tmp_path, [f])["sha256"]
    n = 1 << 18
    assert of(b"x"*n) == of(b"x"*(n//2) + b"y" + b"x"*(n//2 - 1)), "only the ends are read"
    seen = [
        of(b"x" * n),
        of(b"y" + b"x" * (n - 1)),
        of(b"x" * (n - 1) + b"y"),
        of(b"x" * (n + 1)),
        of(b"x" * 5),
        of(b"x" * 4 + b"y"),
    ]
    f.rename(tmp_path/"b.bin")
    seen.append(source_fingerprint(tmp_path, [tmp_path/"b.bin"])["sha256"])
    assert len(set(seen)) == len(seen)

@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    root, out = write_pannuke(tmp_path/"p", folds=(1,), n=900), tmp_path/"out"
    code = f"from synthpi.data.nuclei_sets import pannuke; pannuke({str(root)!r}, {str(out)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(6000):
        if len(list(out.glob("privileged/*.png"))) > 20 or process.poll() is not None: break
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {p: s for p, s in stamps(out).items() if "/." not in p}
    assert 20 < len(left) < 2700, "not killed in the middle"
    assert json.loads((out/"provenance.json").read_text())["finished"] is False
    with pytest.raises(ValueError, match="no partner|do not match"): pair_folders(out)
    ds, after = pannuke(root, out), stamps(out)
    assert len(ds) == 900 and len(after) == 2700 and all(after[p] == s for p, s in left.items())
    assert check_images(ds)[1]["kept"] == 900 and not list(out.rglob(".*.png"))

# ---- MoNuSeg

A, B = "TCGA-18-5592-01Z-00-DX1", "TCGA-E2-A1B5-01Z-00-DX1"

def box(x, y, w=20, h=20): return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]

def write_xml(path, outlines):
    path.parent.mkdir(parents=True, exist_ok=True)
    regions = "".join(
        "<Region "
        f'Id="{i}"><Attributes/><Vertices>'
        f'{"".join(f"""<Vertex X="{x}" Y="{y}" Z="0"/>""" for x, y in xy)}</Vertices></Region>'
        for i, xy in enumerate(outlines, 1)
    )
    path.write_text(
        '<?xml version="1.0"?>\n<Annotations MicronsPerPixel="0.252"><Annotation '
        f'Id="1"><Regions><RegionAttributeHeaders/>{regions}</Regions><Plots/></Annotation></Annotations>'
    )

@pytest.fixture
def mono(tmp_path):
    root = tmp_path/"monuseg"
    for name, train in ((A, True), (B, False)):
        image, xml = (
            ("MoNuSeg 2018 Training Data/Tissue Images", "MoNuSeg 2018 Training Data/Annotations")
            if train
            else ("MoNuSegTestData",) * 2
        )
        save(root/image/f"{name}.tif", picture(ord(name[5]), 80, 100))
        write_xml(
            root / xml / f"{name}.xml",
            [box(10, 10), box(31, 10), box(60, 40, 10, 30), [(1, 1), (2, 2)]],
        )
    return root

def test_monuseg(mono, tmp_path):
    ds = monuseg(mono, tmp_path/"out")
    assert (ds["group"][:], ds["split"][:], ds["um_per_px"][:]) == (
        ["TCGA-18-5592", "TCGA-E2-A1B5"],
        ["train", "test"],
        [0.25] * 2,
    )
    assert np.array_equal(ds[0]["primary"], picture(ord("1"), 80, 100))
    mask, numbers = (
        np.array(ds[0]["privileged"]),
        np.array(Image.open(tmp_path / f"out/instances/{A}.png")),
    )
    assert (numbers.shape, set(np.unique(numbers))) == ((80, 100), {0, 1, 2, 3})
    # x is the column, y the row
    assert (
        numbers[20, 15] == 1
        and numbers[20, 40] == 2
        and numbers[60, 65] == 3
        and numbers[65, 60] == 3
    )
    assert (mask[20, 30], mask[20, 31], mask[20, 20], mask[0, 0]) == (128, 128, 255, 0)
    options = json.loads((tmp_path/"out/provenance.json").read_text())["options"]
    assert (options["regions"], options["regions_without_area"]) == (6, 2)

def test_monuseg_halved_and_cut(mono, tmp_path):
    ds = monuseg(mono, tmp_path/"out", side=24, downscale=2)
    assert (len(ds), set(ds["um_per_px"]), ds[0]["primary"].size, len(set(ds["group"]))) == (
        2 * 2 * 3,
        {0.5},
        (24, 24),
        2,
    )
    whole = draw_outlines(read_outlines(next(mono.rglob(f"{A}.xml")))[0], (40, 50), 2)
    full = np.asarray(
        Image.fromarray(picture(ord("1"), 80, 100)).resize((50, 40), Image.Resampling.LANCZOS)
    )
    seen = np.zeros((40, 50), bool)
    for path, image, mask in zip(ds["path"][:6], ds["primary"][:6], ds["privileged"][:6]):
        y, x = (int(part[1:]) for part in Path(path).stem.split("_")[-2:])
        assert np.array_equal(mask, nuclear_mask(whole)[y : y + 24, x : x + 24]) and np.array_equal(
            image, full[y : y + 24, x : x + 24]
        )
        seen[y:y + 24, x:x + 24] = True
    assert seen.all()

def test_outlines_keep_their_place_when_halved():
    "A square of 20 x 20 pixels, 2 to 21, is one of 10 x 10, 1 to 10."
    xy = np.array([(2, 2), (21, 2), (21, 21), (2, 21)], float)
    assert np.array_equal(
        np.argwhere(draw_outlines([xy], (16, 16), 2)),
        np.argwhere(np.pad(np.ones((10, 10)), (1, 5))),
    )
    assert draw_outlines([xy, xy + 10], (40, 40))[15, 15] == 2
    # no shift of half a pixel
    assert np.array_equal(
        draw_outlines([xy - 1], (16, 16), 2),
        draw_outlines([31 - (xy - 1)], (16, 16), 2)[::-1, ::-1],
    )

def edit_xml(outlines): return lambda p: write_xml(next(p.rglob(f"{A}.xml")), outlines)

@pytest.mark.parametrize(
    "damage, error, message",
    [
        (edit_xml([]), ValueError, "has 0 regions and no outline"),
        (edit_xml([[(1, 1), (2, 2)]]), ValueError, "has 1 regions and no outline"),
        (edit_xml([box(10, 10), box(700, 10)]), ValueError, "outlines 2 lie outside the 100x80"),
        (edit_xml([box(-50, 10)]), ValueError, "outlines 1 lie outside"),
        (
            lambda p: next(p.rglob(f"{A}.xml")).write_text(
                '<A><Region><Vertex X="a" Y="1"/></Region></A>'
            ),
            ValueError,
            "Vertex without numbers",
        ),
        (
            lambda p: next(p.rglob(f"{A}.xml")).write_text(
                '<A><Region><Vertex Y="1"/></Region></A>'
            ),
            ValueError,
            "Vertex without numbers",
        ),
        (
            lambda p: next(p.rglob(f"{A}.xml")).write_text("<Annotations><Annotation>"),
            ValueError,
            "not whole XML",
        ),
        (lambda p: next(p.rglob(f"{A}.xml")).unlink(), ValueError, f"no partner: .*{A}.tif"),
        (lambda p: next(p.rglob(f"{B}.tif")).unlink(), ValueError, f"no partner: .*{B}.xml"),
        (
            lambda p: shutil.copy(next(p.rglob(f"{B}.tif")), p / f"{B}.tif"),
            ValueError,
            "several files of one name",
        ),
        (lambda p: [f.unlink() for f in p.rglob("*.xml")], FileNotFoundError, "2 TIFF and 0 XML"),
        (
            lambda p: tifffile.imwrite(next(p.rglob(f"{A}.tif")), np.zeros((80, 100), np.uint16)),
            ValueError,
            "8-bit picture",
        ),
        (
            lambda p: [f.rename(f.with_stem("slide1")) for f in p.rglob(f"{A}.*")],
            ValueError,
            "TCGA patient",
        ),
    ],
)
def test_damaged_monuseg(mono, tmp_path, damage, error, message):
    damage(mono)
    with pytest.raises(error, match=message): monuseg(mono, tmp_path/"out")

@pytest.mark.parametrize(
    "options, message",
    [
        (dict(downscale=3), "downscale=3 does not divide"),
        (dict(downscale=0), "downscale=0"),
        (dict(side=90), "expected at most 80"),
    ],
)
def test_monuseg_options(mono, tmp_path, options, message):
    with pytest.raises(ValueError, match=message): monuseg(mono, tmp_path/"out", **options)

def test_a_nucleus_at_the_edge_is_cut(mono, tmp_path):
    edit_xml([box(90, 70)])(mono)
    monuseg(mono, tmp_path/"out")
    numbers = np.array(Image.open(tmp_path/f"out/instances/{A}.png"))
    assert numbers.sum() == 100 and numbers[70:, 90:].all()

@pytest.mark.skipif(not REAL.exists(), reason="the real images (shared/data beside the "
                                              "repository) are not here")
@pytest.mark.parametrize("name", ["he_nuclei_pairs", "nuclei_pairs"])
def test_masks_mean_what_those_of_the_real_pairs_mean(name):
    "The rim of a nucleus that a tile's edge cuts may differ there."
    for path in sorted((REAL/name/"instances").glob("*.png"))[::5]:
        ours, theirs = (
            nuclear_mask(np.array(Image.open(path)).astype(int)),
            np.array(Image.open(REAL / name / "privileged" / path.name)),
        )
        assert np.array_equal(ours > 0, theirs > 0) and (ours == theirs)[1:-1, 1:-1].mean() > .995

# ---- TIFF stacks

@pytest.fixture
def shift(tmp_path):
    for i in range(3):
        save(tmp_path/f"shift/HE/P{i//2}_t{i}.tif", picture(i, 24, 40))
        stack = np.stack([np.full((24, 40), 1000*(c + 1) + 100*i, np.uint16) for c in range(5)])
        stack[:, 0, 0], stack[:, 0, 1] = 0, 20000
        (tmp_path/"shift/IF").mkdir(exist_ok=True)
        tifffile.imwrite(
            tmp_path / f"shift/IF/P{i // 2}_t{i}.tif",
            stack,
            photometric="minisblack",
            metadata={"axes": "CYX"},
        )
    return tmp_path/"shift"

def test_tiff_window_in_units(shift, tmp_path):
    ds = tiff_pairs(
        shift,
        tmp_path / "out",
        0.5,
        channels=(4, 0),
        window=[(0, 10000), (1000, 1200)],
        group_pattern=r"^(P\d)_",
    )
    assert ds["group"][:] == ["P0", "P0", "P1"] and set(ds["um_per_px"]) == {.5}
    assert np.array_equal(ds[1]["primary"], picture(1, 24, 40))
    assert [tuple(np.array(p)[5, 5]) for p in ds["privileged"]] == [
        (128, 0, 0),
        (130, 128, 0),
        (133, 255, 0),
    ]

def test_tiff_windows_are_of_the_set(shift, tmp_path):
    """With the 2nd and 98th percentile the two odd pixels of each image are left out, and levels go
    from the darkest image to the brightest."""
    ds = tiff_pairs(shift, tmp_path/"set", .5, channels=(2,), percentiles=(2, 98))
    assert [np.array(p)[5, 5] for p in ds["privileged"]] == [0, 128, 255] and ds[0][
        "privileged"
    ].mode == "L"
    each = tiff_pairs(
        shift, tmp_path / "each", 0.5, channels=(2,), percentiles=(2, 98), per_image=True
    )
    assert len({int(np.array(p)[5, 5]) for p in each["privileged"]}) == 1
    assert json.loads((tmp_path / "set/provenance.json").read_text())["options"]["window"] == [
        [3000, 3200]
    ]

@pytest.mark.parametrize("percentiles", [(1, 99), (25, 75), (0, 100)])
def test_set_percentiles_are_those_of_numpy(tmp_path, percentiles):
    rng, pixels = np.random.default_rng(0), []
    for i in range(4):
        save(tmp_path/f"s/HE/{i}.png", picture(i))
        pixels.append((rng.gamma(2, 500*(i + 1), (32, 32))).astype(np.uint16))
        (tmp_path/"s/IF").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path/f"s/IF/{i}.tif", pixels[-1])
    tiff_pairs(tmp_path/"s", tmp_path/"out", .5, percentiles=percentiles)
    window = json.loads((tmp_path/"out/provenance.json").read_text())["options"]["window"][0]
    assert window == list(np.percentile(np.stack(pixels), percentiles, method="inverted_cdf"))

@pytest.mark.parametrize("kind, axis", [("rgb", None), ("last", 2), ("ome", None)])
def test_tiff_axes(tmp_path, kind, axis):
    save(tmp_path/"s/HE/a.png", picture(0, 24, 40))
    stack = np.random.default_rng(0).integers(0, 60000, (3, 24, 40)).astype(np.uint16)
    (tmp_path/"s/IF").mkdir()
    path, window = tmp_path/"s/IF/a.tif", [(0, 65535)]*3
    if kind == "last": tifffile.imwrite(path, np.moveaxis(stack, 0, 2), photometric="minisblack")
    elif kind == "ome":
        path = path.with_name("a.ome.tif")
        save(tmp_path / "s/HE/a.ome.png", picture(0, 24, 40))
        (tmp_path / "s/HE/a.png").unlink()
        tifffile.imwrite(path, stack[:, None], metadata={"axes": "CZYX"}, ome=True)
    else: tifffile.imwrite(path, np.moveaxis(stack, 0, 2), photometric="rgb")
    if axis is not None:
        with pytest.raises(ValueError, match="say which"):
            tiff_pairs(tmp_path / "s", tmp_path / "out", 0.5)
        with pytest.raises(ValueError, match="channel_axis"):
            tiff_pairs(tmp_path / "s", tmp_path / "out", 0.5, channels=(0, 1, 2), window=window)
    out = tiff_pairs(tmp_path/"s", tmp_path/"out", .5, window=window, channel_axis=axis)
    assert np.array_equal(
        np.array(out[0]["privileged"]),
        np.moveaxis((stack / 65535 * 255).round().astype(np.uint8), 0, 2),
    )

def rewrite(array, name="P0_t1.tif", side="IF"):
    return lambda p: tifffile.imwrite(
        p / side / name, array, photometric="rgb" if array.shape[-1] == 3 else "minisblack"
    )

@pytest.mark.parametrize(
    "damage, options, message",
    [
        (None, {}, "has 5 channels; say which"),
        (None, dict(channels=(5,)), r"channels=\[5\], expected one to three from 0 to 4"),
        (None, dict(channels=(0, 1, 2, 3)), "one to three"),
        (None, dict(channels=()), "one to three"),
        (None, dict(channels=(0,), window=[(0, 1), (0, 1)]), "for each of 1 channels"),
        (None, dict(channels=(0,), window=[(5, 5)]), "window"),
        (None, dict(channels=(0,), window=[(0, 5)], per_image=True), "expected one of them"),
        (None, dict(channels=(0,), percentiles=(99, 1)), "two that rise"),
        (
            None,
            dict(channels=(0,), percentiles=(50, 50.1)),
            "channels 0 are constant between the percentiles",
        ),
        (None, dict(channels=(0,), group_pattern=r"^(Q\d)"), "is not in 3 of 3 names"),
        (
            rewrite(np.zeros((5, 24, 41), np.uint16)),
            dict(channels=(0,)),
            "41x24 pixels and .* has 40x24",
        ),
        (
            rewrite(np.zeros((4, 24, 40), np.uint16)),
            dict(channels=(0,)),
            "has 4 channels and .* has 5",
        ),
        (rewrite(np.zeros((5, 24, 40), np.float32)), dict(channels=(0,)), "type float32"),
        (rewrite(np.zeros((2, 5, 24, 40), np.uint16)), dict(channels=(0,)), "one axis of channels"),
        (
            lambda p: os.truncate(p / "IF/P0_t1.tif", 300),
            dict(channels=(0,)),
            "P0_t1.tif cannot be read",
        ),
        (rewrite(np.zeros((24, 40), np.uint16), side="HE"), dict(channels=(0,)), "8-bit picture"),
        (
            rewrite(np.zeros((24, 40, 3), np.uint16), side="HE"),
            dict(channels=(0,)),
            "8-bit picture",
        ),
        (
            lambda p: os.truncate(p / "HE/P0_t1.tif", 300),
            dict(channels=(0,)),
            "HE/P0_t1.tif cannot be read",
        ),
        (lambda p: (p / "IF/P0_t1.tif").unlink(), dict(channels=(0,)), "no partner: HE/P0_t1.tif"),
        (lambda p: (p / "IF").rename(p / "DAPI"), dict(channels=(0,)), "holds DAPI, HE"),
    ],
)
def test_damaged_tiff(shift, tmp_path, damage, options, message):
    if damage: damage(shift)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tiff_pairs(shift, tmp_path / "out", 0.5, **options)

def test_constant_channel(shift, tmp_path):
    for p in (shift/"IF").iterdir(): tifffile.imwrite(p, np.full((24, 40), 7, np.uint16))
    with pytest.raises(ValueError, match="channels 0 are constant"):
        tiff_pairs(shift, tmp_path / "out", 0.5)

def test_window_clips_and_rounds():
    assert apply_window(np.array([[[0, 10, 15, 20, 99]]], np.uint16), [(10, 20)]).tolist() == [
        [0, 0, 128, 255, 255]
    ]

# ---- folders

def test_paired_folders(tmp_path):
    for split, i in (("train", 0), ("train", 1), ("val", 2)):
        save(tmp_path / f"A/{split}/p{i}_1_HE.png", picture(i))
        save(tmp_path / f"B/{split}/p{i}_1_Ki67.jpg", picture(i + 9))
    ds = paired_folders(
        tmp_path, "A", "B", suffixes=("_HE", "_Ki67"), um_per_px=0.5, group_pattern=r"(p\d)_"
    )
    assert (ds["path"][:], ds["split"][:], ds["group"][:], ds["um_per_px"][0]) == (
        ["A/train/p0_1_HE.png", "A/train/p1_1_HE.png", "A/val/p2_1_HE.png"],
        ["train", "train", "val"],
        ["p0", "p1", "p2"],
        0.5,
    )
    assert np.array_equal(ds[2]["primary"], picture(2)) and ds[2]["privileged"].format == "JPEG"
    with pytest.raises(ValueError, match="3 of 3 names do not end in '_IHC'"):
        paired_folders(tmp_path, "A", "B", suffixes=("_IHC", "_Ki67"))
    with pytest.raises(ValueError, match="6 of 3 . 3 files have no partner|no partner"):
        paired_folders(tmp_path, "A", "B")
    with pytest.raises(FileNotFoundError, match="C; expected C/ in .* which holds A, B"):
        paired_folders(tmp_path, "A", "C")
    with pytest.raises(ValueError, match="um_per_px=-1"):
        paired_folders(tmp_path, "A", "B", suffixes=("_HE", "_Ki67"), um_per_px=-1)
    save(tmp_path/"B/val/p2_1_Ki67.jpg", picture(0, 40))
    with pytest.raises(ValueError, match=r"val/p2_1 \(32x32 and 32x40\)"):
        paired_folders(tmp_path, "A", "B", suffixes=("_HE", "_Ki67"))

def test_both_sides_in_one_folder(tmp_path):
    for n in "ab":
        for s in ("he", "if"): save(tmp_path/f"x/{n}-{s}.png", picture(ord(n)))
    save(tmp_path/"x/overview.png", picture(1))
    assert paired_folders(tmp_path, "x", "x", suffixes=("-he", "-if"))["path"][:] == [
        "x/a-he.png",
        "x/b-he.png",
    ]
    assert paired_folders(tmp_path / "x", ".", ".", suffixes=("-he", "-if"))["path"][:] == [
        "a-he.png",
        "b-he.png",
    ]
    with pytest.raises(ValueError, match="both sides are x"): paired_folders(tmp_path, "x", "x")

def test_pick_takes_the_bracket_or_all():
    assert (_pick("a(b)", ["xab"], "x"), _pick("ab", ["xab"], "x")) == (["b"], ["ab"])

@pytest.mark.parametrize("layout", ["{side}/{split}/", "{side}/"])
def test_bci(tmp_path, layout):
    for i, (split, level) in enumerate(
        (("train", "0"), ("train", "1+"), ("test", "2+"), ("test", "3+"))
    ):
        for side in ("HE", "IHC"):
            save(
                tmp_path / layout.format(side=side, split=split) / f"{i:05d}_{split}_{level}.png",
                picture(i + 10 * (side == "IHC")),
            )
    ds = bci(tmp_path)
    assert dict(zip((Path(p).stem for p in ds["path"]), ds["split"])) == {
        "00000_train_0": "train",
        "00001_train_1+": "train",
        "00002_test_2+": "test",
        "00003_test_3+": "test",
    }
    assert ds.features["label"].names == ["0", "1+", "2+", "3+"] and set(ds["um_per_px"]) == {.46}
    assert all(
        p.stem.endswith("_" + ds.features["label"].int2str(k))
        for p, k in zip(map(Path, ds["path"]), ds["label"])
    )
    save(tmp_path / layout.format(side="HE", split="test") / "odd.png", picture(0))
    save(tmp_path / layout.format(side="IHC", split="test") / "odd.png", picture(0))
    with pytest.raises(ValueError, match="is not in 1 of 5 names: .*odd"): bci(tmp_path)
    with pytest.raises(FileNotFoundError, match="HE/ in"): bci(tmp_path/"IHC")

def write_nct(root, *parts):
    for part in parts:
        for k, c in enumerate(NCT_CLASSES):
            save(root / part / c / f"{c}-{part}.tif", picture(k + 100 * len(part)))
    return root

def test_nct(tmp_path):
    root = write_nct(tmp_path, "NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM", "CRC-VAL-HE-7K")
    ds = nct_crc(root)
    assert (len(ds), Counter(ds["split"]), check_labels(ds), set(ds["um_per_px"])) == (
        18,
        {"train": 9, "test": 9},
        list(NCT_CLASSES),
        {0.5},
    )
    assert all(
        ("7K" in p) == (s == "test") and "NONORM" not in p for p, s in zip(ds["path"], ds["split"])
    )
    assert any("NONORM" in p for p in nct_crc(root, nonorm=True)["path"])
    assert all(s == "" for s in nct_crc(root/"CRC-VAL-HE-7K")["split"])
    assert_disjoint(ds)
    assert np.array_equal(ds[0]["primary"], np.array(Image.open(root/ds[0]["path"])))

@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda p: shutil.rmtree(p / "CRC-VAL-HE-7K/MUS"),
            ValueError,
            "CRC-VAL-HE-7K: MUS are missing",
        ),
        (
            lambda p: save(p / "NCT-CRC-HE-100K/EXTRA/a.tif", picture(0)),
            ValueError,
            "EXTRA are missing or too many",
        ),
        (
            lambda p: save(p / "NCT-CRC-HE-100K/a.tif", picture(0)),
            ValueError,
            "a.tif are missing or too many",
        ),
        (
            lambda p: [f.rename(p / f"x{i}") for i, f in enumerate(sorted(p.iterdir()))],
            FileNotFoundError,
            "Found: x0, x1",
        ),
    ],
)
def test_damaged_nct(tmp_path, damage, error, message):
    damage(write_nct(tmp_path, "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"))
    with pytest.raises(error, match=message): nct_crc(tmp_path)

# ---- PatchCamelyon

@pytest.fixture
def cam(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path/"cam").mkdir()
    for s, (split, n) in enumerate((("train", 6), ("valid", 4), ("test", 2))):
        name = tmp_path/f"cam/camelyonpatch_level_2_split_{split}"
        with h5py.File(f"{name}_x.h5", "w") as f:
            f["x"] = np.random.default_rng(s).integers(0, 256, (n, 96, 96, 3), np.uint8)
        with h5py.File(f"{name}_y.h5", "w") as f:
            f["y"] = (np.arange(n) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
        pd.DataFrame(
            {"coord_y": range(n), "wsi": [f"camelyon16_{split}_{i // 2:03d}" for i in range(n)]}
        ).to_csv(f"{name}_meta.csv")
    return tmp_path/"cam"

def pack(folder, pattern):
    for p in folder.glob(pattern):
        with gzip.open(f"{p}.gz", "wb") as f: f.write(p.read_bytes())
        p.unlink()

@pytest.mark.parametrize("packed", [None, "*.h5", "*"])
def test_pcam(cam, tmp_path, packed):
    import h5py
    with h5py.File(cam/"camelyonpatch_level_2_split_valid_x.h5") as f: third = f["x"][2]
    if packed: pack(cam, packed)
    ds = pcam(cam, tmp_path/"out")
    assert (
        Counter(ds["split"]),
        ds.features["label"].names,
        len(set(ds["group"])),
        set(ds["um_per_px"]),
    ) == ({"train": 6, "val": 4, "test": 2}, ["normal", "tumor"], 6, {0.972})
    row = ds[ds["path"][:].index("val/normal/val_000002.png")]
    assert (
        np.array_equal(row["primary"], third)
        and row["group"] == "camelyon16_valid_001"
        and row["split"] == "val"
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "provenance.json",
        "test",
        "tiles.csv",
        "train",
        "val",
    ]
    assert_disjoint(ds)
    before = stamps(tmp_path/"out")
    pcam(cam, tmp_path/"out")
    assert stamps(tmp_path/"out") == before

def test_pcam_without_slides(cam, tmp_path):
    for p in cam.glob("*_meta.csv"): p.unlink()
    with pytest.warns(UserWarning, match="each image is its own group"):
        ds = pcam(cam, tmp_path / "out")
    assert len(set(ds["group"])) == 12

def h5(name, key, array):
    def write(p):
        import h5py
        with h5py.File(p/f"camelyonpatch_level_2_split_{name}.h5", "w") as f: f[key] = array
    return write

@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda p: (p / "camelyonpatch_level_2_split_test_y.h5").unlink(),
            FileNotFoundError,
            "split_test_y.h5 not found",
        ),
        (
            lambda p: [f.unlink() for f in p.glob("*.h5")],
            FileNotFoundError,
            "no camelyonpatch.* Found: camelyon",
        ),
        (
            lambda p: (p / "camelyonpatch_level_2_split_test_meta.csv").unlink(),
            FileNotFoundError,
            "train, valid of train, valid, test have a _meta.csv",
        ),
        (
            lambda p: os.truncate(p / "camelyonpatch_level_2_split_train_x.h5", 5000),
            ValueError,
            "not a whole HDF5 file",
        ),
        (
            h5("test_y", "y", np.zeros((3, 1, 1, 1), np.uint8)),
            ValueError,
            "split test has 2 images, 3 labels, 2 rows",
        ),
        (h5("test_y", "y", np.full((2, 1, 1, 1), 2, np.uint8)), ValueError, "labels 2"),
        (h5("test_x", "z", np.zeros(3)), ValueError, "holds z; expected a data set 'x'"),
        (
            h5("test_x", "x", np.zeros((2, 64, 64, 3), np.uint8)),
            ValueError,
            r"shape \(2, 64, 64, 3\)",
        ),
        (h5("test_x", "x", np.zeros((2, 96, 96, 3), np.uint16)), ValueError, "type uint16"),
        (
            lambda p: (p / "camelyonpatch_level_2_split_test_meta.csv").write_text(
                "a,b\n1,2\n3,4\n"
            ),
            ValueError,
            "expected 'wsi'",
        ),
    ],
)
def test_damaged_pcam(cam, tmp_path, damage, error, message):
    damage(cam)
    with pytest.raises(error, match=message): pcam(cam, tmp_path/"out")

def test_a_refused_pcam_can_be_repaired(cam, tmp_path):
    good = (cam/"camelyonpatch_level_2_split_test_y.h5").read_bytes()
    h5("test_y", "y", np.zeros((3, 1, 1, 1), np.uint8))(cam)
    with pytest.raises(ValueError): pcam(cam, tmp_path/"out")
    (cam/"camelyonpatch_level_2_split_test_y.h5").write_bytes(good)
    assert len(pcam(cam, tmp_path/"out")) == 12

def test_without_h5py_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for kind in "xy": (tmp_path/f"camelyonpatch_level_2_split_train_{kind}.h5").touch()
    with pytest.raises(ImportError, match="pip install h5py"):
        pcam(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")

# ---- hub

@pytest.fixture
def hub(tmp_path):
    "A local data set in the layout of the hub: three parquet files."
    (tmp_path/"hub/data").mkdir(parents=True)
    for s, (split, n) in enumerate((("train", 4), ("valid", 2), ("test", 2))):
        rows = {
            "image": [Image.fromarray(picture(10 * s + i)) for i in range(n)],
            "label": [i % 2 == 1 for i in range(n)],
            "slide": [f"{split}{i // 2}" for i in range(n)],
            "level": ["low", "high"] * (n // 2),
        }
        Dataset.from_dict(
            rows,
            features=Features(
                image=ImageFeature(),
                label=Value("bool"),
                slide=Value("string"),
                level=Value("string"),
            ),
        ).to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    return tmp_path/"hub"

@pytest.mark.parametrize("streaming", [False, True])
def test_hub(hub, tmp_path, streaming):
    ds = hub_tiles(
        hub,
        label_names=["normal", "tumor"],
        group_column="slide",
        um_per_px=0.972,
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    rows = list(ds)
    assert list(rows[0]) == [
        "primary",
        "path",
        "split",
        "group",
        "label",
        "um_per_px",
    ] and ds.features["label"].names == ["normal", "tumor"]
    by_path = {r["path"]: r for r in rows}
    assert len(by_path) == 8 and {
        p: (r["split"], r["group"], r["label"])
        for p, r in by_path.items()
        if p in ("train/000003", "val/000000", "val/000001")
    } == {
        "train/000003": ("train", "train1", 1),
        "val/000000": ("val", "valid0", 0),
        "val/000001": ("val", "valid0", 1),
    }
    assert (
        np.array_equal(by_path["val/000001"]["primary"], picture(11))
        and rows[5]["um_per_px"] == 0.972
    )

def test_hub_labels(hub, tmp_path):
    here = dict(cache_dir=str(tmp_path/"cache"))
    assert hub_tiles(hub, **here).features["label"].names == ["False", "True"]
    ds = hub_tiles(hub, label_column="level", **here)
    assert (ds.features["label"].names, ds["label"][:4]) == (["high", "low"], [1, 0, 1, 0])
    assert hub_tiles(hub, label_column="level", label_names=["low", "high"], **here)["label"][
        :4
    ] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="has the value True; expected one of normal"):
        hub_tiles(hub, label_names=["normal"], **here)
    with pytest.raises(ValueError, match="has the value 'high'"):
        hub_tiles(hub, label_column="level", label_names=["low"], **here)
    with pytest.warns(UserWarning, match="each image is its own group"):
        assert len(set(hub_tiles(hub, **here)["group"])) == 8

def test_hub_imagefolder_keeps_its_classes(tmp_path):
    for split in ("train", "test"):
        for k, c in enumerate("ab"): save(tmp_path/f"hub/{split}/{c}/{k}.png", picture(k))
    ds = hub_tiles(tmp_path/"hub", cache_dir=str(tmp_path/"cache"))
    assert (ds.features["label"].names, Counter(ds["split"]), check_labels(ds)) == (
        ["a", "b"],
        {"train": 2, "test": 2},
        ["a", "b"],
    )
    named = hub_tiles(tmp_path/"hub", label_names=["x", "y"], cache_dir=str(tmp_path/"cache"))
    assert named.features["label"].names == ["x", "y"] and named["label"][:] == ds["label"][:]
    with pytest.raises(ValueError, match="label_names has 3 names; 'label' has 2"):
        hub_tiles(tmp_path / "hub", label_names=["x", "y", "z"], cache_dir=str(tmp_path / "cache"))

def test_hub_splits_of_other_names(hub, tmp_path):
    here = dict(
        cache_dir=str(tmp_path / "cache"),
        data_files={
            "NCT_CRC_HE_100K": str(hub / "data/train*"),
            "CRC_VAL_HE_7K": str(hub / "data/test*"),
            "NONORM": str(hub / "data/valid*"),
        },
    )
    with pytest.raises(ValueError, match="split names CRC_VAL_HE_7K"): hub_tiles("parquet", **here)
    ds = hub_tiles("parquet", splits={"NCT_CRC_HE_100K": "train", "CRC_VAL_HE_7K": "test"}, **here)
    assert Counter(ds["split"]) == {"train": 4, "test": 2}

@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(splits={"holdout": "test"}), ValueError, "no split holdout; it has"),
        (dict(image_column="picture"), ValueError, "say image_column"),
        (dict(label_column="grade"), ValueError, "say label_column"),
        (dict(group_column="patient"), ValueError, "say group_column"),
        (dict(split="train"), TypeError, "expected splits="),
        (dict(um_per_px=0), ValueError, "um_per_px=0"),
        (dict(streaming=True), ValueError, "give label_names"),
    ],
)
def test_hub_is_asked_for_what_is_not_there(hub, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        hub_tiles(hub, cache_dir=str(tmp_path / "cache"), **options)

# ---- by name

def test_every_set_has_a_preset_and_all_that_must_be_known():
    assert PRESETS.keys() == SETS.keys()
    for p in PRESETS.values():
        assert (
            p.kind in ("pairs", "tiles")
            and callable(p.read)
            and all((p.title, p.licence, p.citation, p.layout, p.groups))
        )
    assert (PRESETS["nct_crc"].um_per_px, PRESETS["pannuke"].um_per_px) == (.5, .25)

def test_read_published_converts_and_says_what_it_found(nuke, tmp_path, capsys):
    with pytest.raises(ValueError, match="name an output folder"): read_published("pannuke", nuke)
    ds = read_published("pannuke", nuke, tmp_path/"out", masks="classes")
    said = capsys.readouterr().out
    assert (
        "PanNuke: 9 pairs (train 3, val 3, test 3), 0.25 um/px" in said
        and "CC BY-NC-SA" in said
        and f"--pairs {tmp_path / 'out'} --um-per-px-pairs 0.25" in said
    )
    assert pair_folders(tmp_path/"out")["split"][:] == ds["split"][:]
    with pytest.raises(ValueError, match="got set 'pan-nuke', expected one of pannuke"):
        read_published("pan-nuke", nuke)
    with pytest.raises(ValueError, match="read from its published files"):
        read_published("pannuke", "hub:x/y")

def test_folders_become_plain_byte_for_byte(tmp_path, capsys):
    root = write_nct(tmp_path/"nct", "NCT-CRC-HE-100K", "CRC-VAL-HE-7K")
    read_published("nct_crc", root)
    assert (
        "groups: each image its own; patients of the 100K are not published"
        in capsys.readouterr().out
    )
    ds = read_published("nct_crc", root, tmp_path/"out")
    assert (tmp_path / "out/train/ADI/ADI-NCT-CRC-HE-100K.tif").read_bytes() == (
        root / "NCT-CRC-HE-100K/ADI/ADI-NCT-CRC-HE-100K.tif"
    ).read_bytes()
    assert (Counter(ds["split"]), ds.features["label"].names, set(ds["um_per_px"])) == (
        {"train": 9, "test": 9},
        list(NCT_CLASSES),
        {0.5},
    )
    assert f"--tiles {tmp_path/'out'} --um-per-px-tiles 0.5" in capsys.readouterr().out
    one = read_published("nct_crc", root/"CRC-VAL-HE-7K", tmp_path/"one")
    assert set(one["split"]) == {""} and "no split 9" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another conversion"):
        read_published("nct_crc", root / "CRC-VAL-HE-7K", tmp_path / "out")

def test_relative_paths(nuke, tmp_path, monkeypatch):
    monkeypatch.chdir(nuke)
    assert len(pannuke(".", "../out")) == 9
    write_nct(tmp_path/"nct", "CRC-VAL-HE-7K")
    monkeypatch.chdir(tmp_path)
    assert (
        len(read_published("nct_crc", "nct", "plain")) == 9
        and (tmp_path / "plain/ADI/ADI-CRC-VAL-HE-7K.tif").exists()
    )
    monkeypatch.chdir(tmp_path/"nct")
    before = stamps(tmp_path/"plain")
    read_published("nct_crc", tmp_path/"nct", tmp_path/"plain")
    assert stamps(tmp_path/"plain") == before

def test_pairs_become_plain_with_their_patients(tmp_path):
    for i in range(4):
        save(tmp_path / f"s/he/P{i // 2}_{i}_a.jpg", picture(i))
        save(tmp_path / f"s/ihc/P{i // 2}_{i}_b.png", picture(i + 9))
    options = dict(primary="he", privileged="ihc", suffixes=("_a", "_b"), group_pattern=r"(P\d)_")
    ds, copy = (
        read_published("paired", tmp_path / "s", **options),
        read_published("paired", tmp_path / "s", tmp_path / "out", **options),
    )
    assert copy["group"][:] == ds["group"][:] == ["P0", "P0", "P1", "P1"]
    for a, b in zip(ds, copy):
        assert np.array_equal(a["primary"], b["primary"]) and np.array_equal(
            a["privileged"], b["privileged"]
        )
    assert "split" not in copy.column_names

def test_hub_becomes_plain(hub, tmp_path, capsys):
    ds = read_published(
        "pcam",
        f"hub:{hub}",
        tmp_path / "out",
        group_column="slide",
        cache_dir=str(tmp_path / "cache"),
    )
    assert (ds.features["label"].names, Counter(ds["split"]), len(set(ds["group"]))) == (
        ["normal", "tumor"],
        {"train": 4, "val": 2, "test": 2},
        4,
    )
    assert set(ds["um_per_px"]) == {.972}
    assert np.array_equal(
        image_folder(tmp_path / "out")[ds["path"][:].index("val/tumor/000001.png")]["primary"],
        picture(11),
    )
    before = stamps(tmp_path/"out")
    read_published(
        "pcam",
        f"hub:{hub}",
        tmp_path / "out",
        group_column="slide",
        cache_dir=str(tmp_path / "cache"),
    )
    assert stamps(tmp_path/"out") == before
    with pytest.raises(ValueError, match="streaming=True and an output folder"):
        read_published("pcam", f"hub:{hub}", tmp_path / "out", streaming=True)

def test_what_was_read_can_be_trained_on(mono, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ds = split_by_group(monuseg(mono, tmp_path/"out", side=40, downscale=2), val=0)
    assert_disjoint(ds)
    assert set(zip(ds["group"], ds["split"])) == {
        ("TCGA-18-5592", "train"),
        ("TCGA-E2-A1B5", "test"),
    }
