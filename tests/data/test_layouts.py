"Who is who: which level of folders, and which column of a table, is the class, the split, the patient."
import os
import warnings

import pytest
from PIL import Image

from synthpi.data.folders import image_folder, pair_folders

no_group = pytest.mark.filterwarnings("ignore:.*no group is known", "ignore:.*is read as")

def write(root, *paths):
    "One different image of 8 pixels per path."
    for i, path in enumerate(paths):
        (root/path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root/path)
    return root

def files(*folders): return [f"{folder}/{i}.png" for folder in folders for i in range(2)]

LC25000 = [
    *(f"lung_image_sets/lung_{c}" for c in ("aca", "n", "scc")),
    *(f"colon_image_sets/colon_{c}" for c in ("aca", "n")),
]

@no_group
@pytest.mark.parametrize("folders, splits, labels, groups", [
    (["Training/a", "Training/b", "Testing/a", "Testing/b"], {"train", "test"}, ["a", "b"], None),
    (["train_set/a", "train_set/b", "test_set/a"], {"train", "test"}, ["a", "b"], None),
    (["set/Train/a", "set/Test/b"], {"train", "test"}, ["a", "b"], None),
    (["a/train", "a/test", "b/train", "b/test"], {"train", "test"}, ["a", "b"], None),
    (["10253/0", "10253/1", "8863/0", "9181/1"], {""}, ["0", "1"], ["10253", "8863", "9181"]),
    (["p1/tumour", "p2/normal", "p2/tumour"], {""}, ["normal", "tumour"], ["p1", "p2"]),
    (["tumour/TCGA-A1-A0SK-01Z", "tumour/TCGA-A1-A0SK-02A", "normal/TCGA-A2-A04P"], {""}, ["normal", "tumour"],
     ["TCGA-A1-A0SK", "TCGA-A2-A04P"]),
    (["0/10253", "1/10253", "1/8863"], {""}, ["0", "1"], ["10253", "8863"]),
    (["patient_1", "patient_2"], {""}, None, ["patient_1", "patient_2"]),
    (["siteA/x", "siteA/y", "siteB/x", "siteB/y"], {""}, ["x", "y"], ["siteA", "siteB"]),
    (LC25000, {""}, ["colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"], None),
    ([f"lung_colon_image_set/{f}" for f in LC25000], {""},
     ["colon_aca", "colon_n", "lung_aca", "lung_n", "lung_scc"], None),
    (["train/p1/a", "train/p2/b", "test/p3/a"], {"train", "test"}, ["a", "b"], ["p1", "p2", "p3"]),
    (["benign/SOB/adenosis/SOB_B_A_14-22549AB/40X", "malignant/SOB/ductal/SOB_M_DC-14-2523/40X"],
     {""}, ["benign", "malignant"], ["SOB_B_A_14-22549AB", "SOB_M_DC-14-2523"]),
    (["benign/cyst", "malignant/ductal"], {""}, ["benign", "malignant"], None),
    (["benign/40X", "benign/100X", "malignant/40X"], {""}, ["benign", "malignant"], None),
    (["G1", "G2", "G3"], {""}, ["G1", "G2", "G3"], None),
])
def test_which_level_is_what(tmp_path, folders, splits, labels, groups):
    ds = image_folder(write(tmp_path, *files(*folders)))
    assert set(ds["split"]) == splits
    assert (ds.features["label"].names if "label" in ds.features else None) == labels
    assert (sorted(set(ds["group"])) if ds["group"][:] != ds["path"][:] else None) == groups
    for path, label in zip(ds["path"], ds["label"] if labels else []):
        assert labels[label] in path.split("/")

@no_group
@pytest.mark.parametrize("folders, words", [
    (["fold1/a", "fold2/a"], "fold1, fold2, which are parts"), (["trainA", "trainB"], "trainA, trainB"),
    (["part1/a", "part2/a"], "part1, part2"), (["dev/a", "holdout/a"], "dev, holdout"),
    (["tumour_train", "normal_train"], "normal_train, tumour_train, which are parts"),
    (["Training/a", "extra/a"], "beside them, extra/a"), (["images", "masks"], "masks beside others"),
    (["a/images", "a/masks", "b/images", "b/masks"], "masks beside others"),
])
def test_parts_and_masks_are_no_classes(tmp_path, folders, words):
    with pytest.raises(ValueError, match=words): image_folder(write(tmp_path, *files(*folders)))

def test_masks_beside_their_images_are_refused(tmp_path):
    write(tmp_path, "benign/b (1).png", "benign/b (1)_mask.png", "benign/b (1)_mask_1.png")
    with pytest.raises(ValueError, match="2 files that look like masks"): image_folder(tmp_path)

@no_group
def test_what_is_not_read_is_said_with_counts(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png")
    for name in ("c/1.bmp", "c/2.bmp", "metadata.csv"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text("x")
    (tmp_path/"d").mkdir()
    with pytest.warns(UserWarning, match=r"2 \.bmp, 1 metadata.csv, the folder c \(2 \.bmp\), the folder d \(empty\)"):
        image_folder(tmp_path)

def test_what_was_decided_is_printed_once(tmp_path, capsys):
    write(tmp_path, *files("p1/x", "p2/x", "p2/y"))
    for _ in range(2): ds = image_folder(tmp_path)
    said = capsys.readouterr().err
    note = "6 images: layout <group>/<class>/*; group from the folders p1, p2"
    assert said == f"{tmp_path}: {note}; classes x 4, y 2\n" and ds.info.description == note

# ---- tables

def table(root, text):
    write(root, "1.png", "2.png")
    (root/"tiles.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root

@pytest.mark.parametrize("text, words", [
    ("path,label,patient\n1.png,lobular, in situ,P1\n2.png,x,P2\n", "line 2 has 4 values for 3 columns"),
    ("path,label\n1.png,a\n2.png,b,c,d\n", "line 3 has 4 values"),
    ("path,label,patient,\n1.png,lobular, in situ,P1\n2.png,x,P2\n", "line 2 has 4 values for 3 columns"),
    ("path,label,Label\n1.png,a,b\n2.png,a,b\n", "expected each once"),
    ("path,label\n1.png,\n2.png,a\n", "1 of 2 rows have an empty 'label', first in line 2"),
    ("path,patient\n1.png\n2.png,P1\n", "1 of 2 rows have an empty 'patient', first in line 2"),
    *((f"path,label\n1.png,a\n2.png,{w}\n", "1 of 2 rows say NA.* in 'label', first in line 3")
      for w in ("NA", "NaN", "None", "null")),
    ("path,patient,label\n1.png,NA,a\n2.png,NA,b\n", "2 of 2 rows say NA.* in 'patient'"),
    ("path,label\n1.png,größe\n".encode("cp1252"), "not UTF-8: byte 0xf6 in line 2, perhaps Windows-1252"),
    ("path,label\n1.png,a\n".encode("utf-16"), "tiles.csv is UTF-16"),
    ("path,label\n1.png,a\n".encode("utf-16-le"), "tiles.csv is UTF-16"),
])
def test_tables_shift_and_invent_nothing(tmp_path, text, words):
    with pytest.raises(ValueError, match=words): image_folder(table(tmp_path, text))

def test_quoted_commas_spaces_and_spellings(tmp_path, recwarn):
    ds = image_folder(table(tmp_path, ' Path ,"Class", Patient ID,\n1.png,"a, b",P1,\n\n2.png, c ,P2,,\n'))
    assert ds.features["label"].names == ["a, b", "c"] and ds["group"][:] == ["P1", "P2"]
    assert not recwarn.list and "group from column patient id, 2 groups" in ds.info.description

def test_a_table_that_pandas_wrote_with_its_index(tmp_path):
    ds = image_folder(table(tmp_path, ",path,subject\n0,1.png,7\n1,2.png,8\n"))
    assert ds["group"][:] == ["7", "8"]

# ---- entries that are no images

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipes_are_refused(tmp_path):
    for side in ("image", "privileged"): write(tmp_path, f"{side}/1.png")
    os.mkfifo(tmp_path/"image/2.png")
    os.mkfifo(tmp_path/"privileged/2.png")
    for read in (image_folder, pair_folders):
        with pytest.raises(ValueError, match=r"named pipes\): .*2.png"):
            read(tmp_path/"image" if read is image_folder else tmp_path)

def test_names_that_are_no_utf8_are_refused(tmp_path):
    write(tmp_path, "a/1.png")
    try: os.link(tmp_path/"a/1.png", os.fsencode(tmp_path) + b"/a/\xe9.png")
    except OSError: pytest.skip("this file system has only UTF-8 names")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="1 names that are not UTF-8"): image_folder(tmp_path)
