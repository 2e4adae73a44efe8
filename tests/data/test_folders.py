"""Folders, manifests and pairs as people really have them: damaged in every way that must be named,
and the real sets where they are at hand."""
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from synthpi.core.images import to_rgb
from synthpi.data.splits import assert_disjoint, check_images, check_labels, split_by_group
from synthpi.data.folders import image_folder, pair_folders

REAL = Path(__file__).parents[3]/"shared/data"
real = pytest.mark.skipif(
    not REAL.exists(), reason="the real images (shared/data beside the repository) are not here"
)
no_group = pytest.mark.filterwarnings("ignore:.*no group is known")

def noise(seed=0, size=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))

def write(root, *paths):
    "One different image per path."
    for i, path in enumerate(paths):
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(root/path)
    return root

@pytest.fixture
def tiles(tmp_path):
    "Three patients in each of two classes, with a manifest."
    paths = [f"{c}/{p}_{i}.png" for c in "ab" for p in "xyz" for i in range(2)]
    write(tmp_path/"tiles", *paths)
    rows = pd.DataFrame(
        {"path": paths, "label": [p[0] for p in paths], "patient": [p[0] + p[2] for p in paths]}
    )
    rows.to_csv(tmp_path/"tiles/tiles.csv", index=False)
    return tmp_path/"tiles"

@pytest.fixture
def pairs(tmp_path):
    return write(
        tmp_path / "pairs", *(f"{side}/{n}.png" for side in ("image", "privileged") for n in "abc")
    )

def edit(folder, f, name="tiles.csv"):
    "Rewrite the table of a folder as `f` of it."
    f(pd.read_csv(folder/name)).to_csv(folder/name, index=False)
    return folder

# ---- layouts

@no_group
@pytest.mark.parametrize("paths, splits, labels", [
    (["train/a/1.png", "val/b/2.png", "test/a/deep/er/3.png"], ["test", "train", "val"], ["a", "a", "b"]),
    (["a/1.png", "b/2.png"], ["", ""], ["a", "b"]),
    (["train/1.png", "test/2.png"], ["test", "train"], None),
    (["1.png", "2.png"], ["", ""], None),
])
def test_layouts(tmp_path, paths, splits, labels):
    ds = image_folder(write(tmp_path, *paths))
    assert ds["split"][:] == splits and ds["path"][:] == sorted(paths)
    assert ("label" in ds.features) == (labels is not None)
    if labels: assert ds.features["label"].int2str(ds["label"][:]) == labels

@no_group
def test_names_suffixes_and_links(tmp_path):
    found = {"Tumör ä/bild 1.PNG", "Tumör ä/50% #2.JpEg", "正常/三.TIFF", "正常/a.b.c.tif"}
    write(tmp_path, *found, ".hidden/x.png", "__MACOSX/Tumör ä/y.png", "正常/._z.png")
    (tmp_path/"正常/notes.txt").write_text("no image")
    write(tmp_path.parent/"elsewhere", "linked.png")
    os.symlink(tmp_path.parent/"elsewhere/linked.png", tmp_path/"正常/link.png")
    os.symlink(tmp_path.parent/"elsewhere", tmp_path/"正常/folder")
    os.symlink(tmp_path, tmp_path/"正常/loop")
    ds, report = check_images(image_folder(tmp_path))
    assert set(ds["path"]) == found | {"正常/link.png", "正常/folder/linked.png"}
    assert (report["kept"], ds.features["label"].names) == (6, ["Tumör ä", "正常"])
    assert np.array_equal(
        to_rgb(ds[ds["path"][:].index("正常/link.png")]["primary"]), np.array(noise(0))
    )

@no_group
@pytest.mark.parametrize("name", ["valid", "validation", "VAL", "Train"])
def test_split_synonyms_are_said(tmp_path, name):
    with pytest.warns(UserWarning, match=f"split '{name}' is read as"):
        ds = image_folder(write(tmp_path, f"{name}/a/1.png", "test/a/2.png"))
    assert set(ds["split"]) == {"train" if name == "Train" else "val", "test"}

@pytest.mark.parametrize("paths, message", [
    (["a/1.png", "2.png"], "1 images in class folders"),
    (["train/a/1.png", "train/2.png"], "1 outside"),
    (["train/a/1.png", "holdout/a/2.png"], "beside them, holdout/a/2.png"),
    (["train/a/1.png", "2.png"], "beside them, 2.png"),
    (["image/1.png", "privileged/1.png"], "pair_folders"),
])
def test_mixed_layouts_are_refused(tmp_path, paths, message):
    with pytest.raises(ValueError, match=message): image_folder(write(tmp_path, *paths))

def test_missing_and_empty(tmp_path):
    for read in (image_folder, pair_folders):
        with pytest.raises(FileNotFoundError, match="nowhere; expected"): read(tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError, match="gone.csv"): image_folder(tmp_path/"gone.csv")
    (tmp_path/"slides").mkdir()
    with pytest.raises(ValueError, match="holds no image.*Found: nothing"):
        image_folder(tmp_path / "slides")
    (tmp_path/"slides/a.svs").touch()
    with pytest.raises(ValueError, match="Found: 1 .svs"): image_folder(tmp_path/"slides")
    with pytest.raises(ValueError, match="is a file"): image_folder(tmp_path/"slides/a.svs")
    with pytest.raises(FileNotFoundError, match="image; expected"): pair_folders(tmp_path/"slides")
    for side in ("image", "privileged"): (tmp_path/"slides"/side).mkdir()
    with pytest.raises(ValueError, match="holds no pairs"): pair_folders(tmp_path/"slides")

@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder_is_not_passed_by(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png")
    (tmp_path/"b").chmod(0)
    with pytest.raises(PermissionError): image_folder(tmp_path)

# ---- manifests

def test_manifest(tiles, recwarn):
    ds = image_folder(tiles, um_per_px=.5)
    assert (
        ds.column_names == ["primary", "path", "split", "group", "label", "um_per_px"]
        and not recwarn.list
    )
    assert (set(ds["split"]), len(set(ds["group"])), ds[0]["um_per_px"]) == ({""}, 6, .5)
    assert image_folder(tiles/"tiles.csv")["path"][:] == ds["path"][:]
    assert "group from column patient, 6 groups" in ds.info.description
    assert not ds.cache_files
    with pytest.raises(ValueError, match="um_per_px=0"): image_folder(tiles, um_per_px=0)

def test_manifest_columns_can_be_chosen(tiles):
    edit(tiles, lambda t: t.assign(Slide=t.path, stage="I"))
    ds = image_folder(tiles, group_column="slide", label_column="stage")
    assert (len(set(ds["group"])), ds.features["label"].names) == (12, ["I"])
    for wrong in ({"group_column": "doctor"}, {"label_column": "doctor"}):
        with pytest.raises(ValueError, match="no column 'doctor'.*path, label, patient, slide"):
            image_folder(tiles, **wrong)

def test_columns_need_a_manifest(tmp_path):
    write(tmp_path, "a/1.png")
    with pytest.raises(ValueError, match="group_column='patient'"):
        image_folder(tmp_path, group_column="patient")

@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda t: t.replace("a/x_0.png", "a/gone.png"),
            FileNotFoundError,
            "1 of 12 files do not exist: a/gone.png",
        ),
        (lambda t: t.replace("a/x_0.png", "./a/x_1.png"), ValueError, "a/x_1.png more than once"),
        (lambda t: t.assign(split="dev"), ValueError, "split names dev"),
        (
            lambda t: t.assign(split=["train"] * 11 + [None]),
            ValueError,
            "1 of 12 rows have an empty 'split', first in line 13",
        ),
        (
            lambda t: t.assign(patient=t.patient.where(t.patient != "ax")),
            ValueError,
            "2 of 12 rows have an empty 'patient'",
        ),
        (
            lambda t: t.assign(label=t.label.where(t.label != "a")),
            ValueError,
            "6 of 12 rows have an empty 'label'",
        ),
        (lambda t: t.rename(columns={"path": "file"}), ValueError, "one called 'path'"),
        (lambda t: t.assign(Path=t.path), ValueError, "expected each once"),
        (lambda t: t[:0], ValueError, "no rows"),
    ],
)
def test_wrong_manifests(tiles, change, error, message):
    with pytest.raises(error, match=message): image_folder(edit(tiles, change))

@pytest.mark.parametrize(
    "content",
    [
        "",
        "path;label\na/x_0.png;a\n",
        'path,label\n"a',
        "path,label\na/ä.png,a\n".encode("latin-1"),
    ],
)
def test_what_is_no_table(tiles, content):
    (tiles/"tiles.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="xpected.*commas|separated by commas"): image_folder(tiles)

def test_two_manifests(tiles):
    (tiles/"manifest.csv").write_text((tiles/"tiles.csv").read_text())
    with pytest.raises(ValueError, match="both"): image_folder(tiles)
    assert len(image_folder(tiles/"manifest.csv")) == 12

def test_unlisted_images_are_counted(tiles):
    edit(tiles, lambda t: t[3:])
    with pytest.warns(UserWarning, match="leaves out 3 images"):
        assert len(image_folder(tiles)) == 9

def test_table_over_split_folders(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    pd.DataFrame(
        {"path": ["train/b/2.png", "test/a/3.png", "train/a/1.png"], "patient_id": [1, 2, 1]}
    ).to_csv(tmp_path / "manifest.csv", index=False)
    ds = image_folder(tmp_path)
    assert (ds["split"][:], ds["label"][:], ds["group"][:]) == (
        ["train", "test", "train"],
        [1, 0, 0],
        ["1", "2", "1"],
    )

def test_windows_paths_and_byte_order_mark(tiles):
    text = (tiles/"tiles.csv").read_text().replace("a/", "a\\").replace("\n", "\r\n")
    (tiles/"tiles.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert image_folder(tiles)["path"][0] == "a/x_0.png"

@pytest.mark.filterwarnings("ignore:Length of header")
def test_trailing_commas_do_not_shift_columns(tiles):
    lines = (tiles/"tiles.csv").read_text().splitlines()
    (tiles/"tiles.csv").write_text("\n".join(lines[:1] + [l + "," for l in lines[1:]]))
    assert image_folder(tiles)["path"][0] == "a/x_0.png"

def test_absent_groups_are_said(tiles):
    edit(tiles, lambda t: t.drop(columns="patient"))
    with pytest.warns(UserWarning, match="no group is known"): ds = image_folder(tiles)
    assert ds["group"][:] == ds["path"][:]

# ---- pairs

@no_group
def test_pairs(pairs):
    ds = pair_folders(pairs)
    assert (ds.column_names, ds["path"][:]) == (
        ["primary", "privileged", "path", "group"],
        [f"image/{n}.png" for n in "abc"],
    )
    assert np.array_equal(to_rgb(ds[1]["privileged"]), np.array(noise(4)))

@pytest.mark.parametrize("lost, named", [("image/b.png", "privileged/b.png"), ("privileged/b.png", "image/b.png")])
def test_pair_without_partner(pairs, lost, named):
    (pairs/lost).unlink()
    with pytest.raises(ValueError, match=f"no partner: {named}"): pair_folders(pairs)

def test_pair_names_and_sizes(pairs):
    noise(9, 40).save(pairs/"privileged/c.png")
    with pytest.raises(ValueError, match=r"1 of 3 pairs.*c \(32x32 and 40x40\)"):
        pair_folders(pairs)
    noise(9).save(pairs/"privileged/c.tif")
    with pytest.raises(ValueError, match="several files of one name: c.png, c.tif"):
        pair_folders(pairs)

@pytest.mark.parametrize(
    "rows, message",
    [
        (["a", "b"], "do not match: c"),
        (["a", "b", "c", "d"], "do not match: d"),
        (["a", "b", "c", "c"], "do not match: c"),
        (["a", "b", "c"], None),
    ],
)
def test_pairs_table(pairs, rows, message):
    pd.DataFrame({"name": rows, "patient": ["P"]*len(rows)}).to_csv(pairs/"pairs.csv", index=False)
    if message is None: assert pair_folders(pairs)["group"][:] == ["P"]*3
    else:
        with pytest.raises(ValueError, match=message): pair_folders(pairs)

@pytest.mark.filterwarnings("ignore:.*is read as 'val'")
def test_pairs_table_says_split_label_and_scale(pairs):
    rows = pd.DataFrame(
        {
            "name": list("cab"),
            "patient": ["R", "P", "Q"],
            "split": ["test", "train", "valid"],
            "class": ["z", "x", "y"],
            "um_per_px": [0.3, 0.1, 0.2],
        }
    )
    rows.to_csv(pairs/"pairs.csv", index=False)
    with pytest.warns(UserWarning, match="split 'valid' is read as 'val'"): ds = pair_folders(pairs)
    assert [(r["path"], r["group"], r["split"], r["um_per_px"]) for r in ds] == [
        ("image/a.png", "P", "train", 0.1),
        ("image/b.png", "Q", "val", 0.2),
        ("image/c.png", "R", "test", 0.3),
    ]
    assert (
        ds.features["label"].int2str(ds["label"][:]) == ["x", "y", "z"]
        and "group from column patient, 3 groups; label from column class" in ds.info.description
    )
    with pytest.raises(
        ValueError, match="um_per_px=0.2, but the table in .* says 0.1, 0.3"
    ):
        pair_folders(pairs, um_per_px=0.2)
    for wrong, message in (
        (0, "no number above 0"),
        ("half", "no number above 0"),
        ("", "empty 'um_per_px', first in line 3"),
    ):
        rows.assign(um_per_px=["1", wrong, "1"]).to_csv(pairs / "pairs.csv", index=False)
        with pytest.raises(ValueError, match=message):
            pair_folders(pairs)

@no_group
def test_pairs_have_a_scale_if_it_is_given(pairs):
    assert (
        pair_folders(pairs, um_per_px=0.972)["um_per_px"][:] == [0.972] * 3
        and "um_per_px" not in pair_folders(pairs).column_names
    )
    with pytest.raises(ValueError, match="um_per_px=0"): pair_folders(pairs, um_per_px=0)

def test_a_manifest_may_say_the_scale(tiles):
    edit(tiles, lambda t: t.assign(um_per_px=.25))
    assert (
        set(image_folder(tiles)["um_per_px"])
        == set(image_folder(tiles, um_per_px=0.25)["um_per_px"])
        == {0.25}
    )
    with pytest.raises(ValueError, match="um_per_px=0.5, but the table in .* says 0.25"):
        image_folder(tiles, um_per_px=0.5)

# ---- every image, once

@no_group
def test_modes_and_sizes(tmp_path):
    rgb, gray = noise(), noise().convert("L")
    for mode in ("RGB", "L", "LA", "RGBA", "P", "1"): rgb.convert(mode).save(tmp_path/f"{mode}.png")
    rgb.convert("CMYK").save(tmp_path/"CMYK.jpg")
    Image.fromarray(np.array(gray).astype(np.uint16)*257).save(tmp_path/"16.png")
    noise(1, 48).save(tmp_path/"large.tif")
    ds, report = check_images(image_folder(tmp_path))
    assert report["modes"] == Counter(
        {"RGB": 2, "L": 1, "LA": 1, "RGBA": 1, "P": 1, "1": 1, "CMYK": 1, "I;16": 1}
    )
    assert report["sizes"] == Counter({"32x32": 8, "48x48": 1})
    assert report["bytes"] == sum(p.stat().st_size for p in tmp_path.iterdir())
    by_path = dict(zip(ds["path"], ds["primary"]))
    assert np.array_equal(to_rgb(by_path["16.png"]), to_rgb(by_path["L.png"]))

BROKEN = {
    "torn.jpg": "OSError",
    "zero.png": "UnidentifiedImageError",
    "text.png": "UnidentifiedImageError",
    "tiny.png": "4x4 pixels",
    "float.tif": "rescale it first",
    "dangling.png": "FileNotFoundError",
}

@pytest.fixture
def damaged(tmp_path):
    "One image for each way of being unusable, and two good ones."
    write(tmp_path, "good.png", "torn.jpg", "zero.png", "text.png", "also good.png")
    (tmp_path/"torn.jpg").write_bytes((tmp_path/"torn.jpg").read_bytes()[:700])
    (tmp_path/"zero.png").write_bytes(b"")
    (tmp_path/"text.png").write_text("path,label\n")
    noise(5, 4).save(tmp_path/"tiny.png")
    Image.fromarray(np.linspace(-500, 500, 1024, dtype=np.float32).reshape(32, 32)).save(
        tmp_path / "float.tif"
    )
    os.symlink(tmp_path/"nowhere.png", tmp_path/"dangling.png")
    return tmp_path

@no_group
def test_unusable_images_are_named(damaged):
    ds = image_folder(damaged)
    with pytest.raises(ValueError, match="6 of 8 images") as error: check_images(ds)
    assert all(name in str(error.value) for name in BROKEN) and "good.png" not in str(error.value)
    with pytest.warns(UserWarning, match="6 of 8 images cannot be used and are left out"):
        kept, report = check_images(ds, on_bad="skip")
    assert kept["path"][:] == ["also good.png", "good.png"]
    assert (
        all(BROKEN[name] in why for name, why in report["bad"].items()) and len(report["bad"]) == 6
    )
    assert (report["n"], report["kept"], sum(report["sizes"].values())) == (8, 2, 2)
    assert str(damaged) not in report["bad"]["text.png"]

@no_group
def test_only_ten_names_are_spelled_out(tmp_path):
    for i in range(13): (tmp_path/f"{i:02}.png").touch()
    ds = image_folder(tmp_path)
    with pytest.raises(ValueError, match="13 of 13 images.*09.png.* and 3 more"): check_images(ds)
    with pytest.raises(ValueError, match="none is left"): check_images(ds, on_bad="skip")
    with pytest.raises(ValueError, match="on_bad 'ignore'"): check_images(ds, on_bad="ignore")

@no_group
def test_a_bad_side_drops_the_pair(pairs):
    (pairs/"privileged/b.png").write_bytes(b"")
    ds = pair_folders(pairs)
    with pytest.raises(ValueError, match=r"image/b.png \(privileged image: Unidentified"):
        check_images(ds)
    with pytest.warns(UserWarning, match="left out"): kept, report = check_images(ds, on_bad="skip")
    assert kept["path"][:] == ["image/a.png", "image/c.png"] and report["privileged_sizes"] == {
        "32x32": 2
    }

# ---- classes and splits

@no_group
def test_labels(tmp_path, tiles):
    assert check_labels(image_folder(tiles)) == ["a", "b"]
    one = image_folder(write(tmp_path/"one", "a/1.png", "a/2.png"))
    with pytest.raises(
        ValueError, match="all 2 images have the label a; a probe needs two classes"
    ):
        check_labels(one)
    new = image_folder(write(tmp_path/"new", "train/a/1.png", "train/b/2.png", "val/c/3.png"))
    with pytest.raises(ValueError, match="split 'val' has the classes c"): check_labels(new)
    with pytest.warns(UserWarning, match="split 'test' has no image of b"):
        check_labels(
            image_folder(write(tmp_path / "few", "train/a/1.png", "train/b/2.png", "test/a/3.png"))
        )

def table(n=300, n_groups=40, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    # low numbers are frequent
    groups = [f"P{g}" for g in rng.integers(0, n_groups, n)**2//n_groups]
    columns = {
        "group": groups,
        "label": rng.integers(0, n_classes, n),
        "path": [f"{i}.png" for i in range(n)],
    }
    return Dataset.from_dict(
        columns,
        features=Features(
            group=Value("string"), path=Value("string"), label=ClassLabel(num_classes=n_classes)
        ),
    )

@pytest.mark.parametrize("seed", range(5))
def test_split_is_whole_stratified_and_repeatable(seed):
    ds = table(seed=seed)
    done = split_by_group(ds, seed=seed).to_pandas()
    assert done.groupby("group")["split"].nunique().max() == 1
    share = pd.crosstab(done["label"], done["split"], normalize="index")[
        ["train", "val", "test"]
    ].to_numpy()
    assert abs(share - [.65, .15, .2]).max() < .08      # the largest group holds 16 % of the images
    again = split_by_group(ds.shuffle(seed=1), seed=seed).to_pandas()
    assert dict(zip(again["path"], again["split"])) == dict(zip(done["path"], done["split"]))

def test_seed_decides_between_equal_groups():
    equal = Dataset.from_dict(
        {"group": [f"P{i}" for i in range(20)], "path": [str(i) for i in range(20)]}
    )
    splits = {tuple(split_by_group(equal, seed=seed)["split"]) for seed in range(4)}
    assert len(splits) == 4 and all(
        Counter(s) == {"train": 13, "val": 3, "test": 4} for s in splits
    )

def test_val_comes_out_of_train_and_test_stays():
    ds = split_by_group(table(), val=0)
    assert set(ds["split"]) == {"train", "test"}
    done = split_by_group(ds, val=.2, test=.5)
    before, after = ds["split"][:], done["split"][:]
    assert all((a == "test") == (b == "test") for a, b in zip(before, after)) and set(after) == {
        "train",
        "val",
        "test",
    }
    assert after.count("val")/before.count("train") == pytest.approx(.2, abs=.08)
    assert split_by_group(done) is done

def test_scarce_classes_reach_every_split():
    """Three groups of a rare class beside many of a common one: one for each split; a class in one
    group stays in train, and that is said."""
    groups = (
        [(f"c{i}", 0, 10) for i in range(20)] + [(f"r{i}", 1, 3) for i in range(3)] + [("u", 2, 5)]
    )
    rows = [(g, l, f"{g}_{i}") for g, l, n in groups for i in range(n)]
    ds = Dataset.from_dict(
        dict(zip(("group", "label", "path"), map(list, zip(*rows)))),
        features=Features(
            group=Value("string"),
            label=ClassLabel(names=["common", "rare", "unique"]),
            path=Value("string"),
        ),
    )
    with pytest.warns(UserWarning, match=r"gets no image of unique \(in 1 of 24 groups\)"):
        done = split_by_group(ds).to_pandas()
    assert set(done["split"][done["label"] == 1]) == {"train", "val", "test"} and set(
        done["split"][done["label"] == 2]
    ) == {"train"}

def test_too_few_groups():
    ds = table(n_groups=2)
    with pytest.raises(
        ValueError, match=r"to be divided into train, val, test; expected 3"
    ):
        split_by_group(ds)
    one_each = Dataset.from_dict(
        {"group": list("abc"), "label": [0, 1, 2], "path": list("abc")}, features=table().features
    )
    with pytest.raises(ValueError, match="none of 3 groups is left for 'val'"):
        split_by_group(one_each)
    for shares in ({"val": .6, "test": .4}, {"val": -.1}, {"test": float("nan")}):
        with pytest.raises(ValueError, match="leave something to train on"):
            split_by_group(table(), **shares)
    with pytest.raises(ValueError, match="1 of 300 images have no split"):
        split_by_group(table().add_column("split", ["train"] * 299 + [""]))

def test_skip_then_split_keeps_rows_and_is_silent(tiles, capfd):
    (tiles/"a/x_1.png").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept, _ = check_images(image_folder(tiles), on_bad="skip")
        done = split_by_group(kept, val=.3, test=.3)
    assert done["path"][:] == kept["path"][:] and "a/x_1.png" not in done["path"][:]
    assert [
        np.array_equal(a, b)
        for a, b in zip(map(np.array, done["primary"]), map(np.array, kept["primary"]))
    ] == [True] * 11
    assert (done.features["label"], done.info.description, done.cache_files) == (
        kept.features["label"],
        kept.info.description,
        [],
    )
    said = capfd.readouterr()       # one line says how the folder was read
    assert said.out == "" and said.err.count("\n") == 1 and "classes a 6, b 6" in said.err

# ---- no leak

def test_group_in_two_splits(tiles):
    edit(
        tiles,
        lambda t: t.assign(split=["test" if p in ("ax", "bx") else "train" for p in t.patient]),
    )
    assert_disjoint(image_folder(tiles))
    edit(tiles, lambda t: t.assign(split=["test"] + list(t.split[1:-1]) + ["test"]))
    with pytest.raises(
        ValueError, match=r"1 groups are in two splits: bz \(train: b/z_0.png, test: b/z_1.png\)"
    ):
        assert_disjoint(image_folder(tiles))

def test_copies_in_two_splits(tiles):
    (tiles/"b/y_0.png").write_bytes((tiles/"a/x_0.png").read_bytes())
    # within one split: no leak
    (tiles/"a/x_1.png").write_bytes((tiles/"a/x_0.png").read_bytes())
    edit(
        tiles,
        lambda t: t.assign(split=["test" if p in ("by", "ay") else "train" for p in t.patient]),
    )
    with pytest.raises(
        ValueError,
        match=r"1 files have the same content in two splits: \(train: a/x_0.png, test: b/y_0.png\)",
    ):
        assert_disjoint(image_folder(tiles))
    with pytest.raises(ValueError, match="no split"):
        assert_disjoint(image_folder(edit(tiles, lambda t: t.drop(columns="split"))))

# ---- real images

@real
def test_real_tissue(recwarn):
    ds = image_folder(REAL/"tissue")
    assert (
        Counter(ds["split"]) == {"train": 985, "val": 86, "test": 237}
        and len(set(ds["group"])) == 83
    )
    assert check_labels(ds) == ["colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"]
    assert_disjoint(ds)
    some, report = check_images(ds.select(range(0, len(ds), 20)))
    assert len(some) == 66 and report["sizes"] == {"224x224": 66} and report["modes"] == {"RGB": 66}
    assert not recwarn.list
    # one look-alike group holds the whole class
    with pytest.warns(UserWarning, match=r"'val' gets no image of colon_n \(in 1 of"):
        done = split_by_group(ds.filter(lambda s: s != "val", input_columns="split"))
    assert_disjoint(done)

@real
def test_real_pairs(recwarn):
    ds = pair_folders(REAL/"he_nuclei_pairs")
    assert len(ds) == 120 and len(set(ds["group"])) == 30 and not recwarn.list
    assert check_images(ds)[1]["privileged_modes"] == {"L": 120}
    splits = split_by_group(ds, test=0)
    assert Counter(splits["split"]) == {"train": 104, "val": 16}
    with pytest.raises(ValueError, match="pair_folders"): image_folder(REAL/"he_nuclei_pairs")
