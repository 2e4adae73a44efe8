"Layouts of published sets, tables, and splits by subject."
import json
import shutil

import numpy as np
import pytest
from volume_files import ball, save, series_of

from synthpi.volumes.scans import prepare_volumes
from synthpi.volumes.sets import (
    check_records, find_volumes, label_names, read_manifest, split_subjects, write_splits,
)
from synthpi.volumes.store import VolumeStore

RNG = np.random.default_rng(0)

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

# ---- who is who

def touch(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()
    return folder

def subjects(folder, *names, **kw):
    return {r["name"]: r["subject"] for r in find_volumes(touch(folder, *(f"{n}.nii.gz" for n in names)), **kw)}

@pytest.mark.parametrize("names, expected", [
    # BIDS
    (["sub-01/ses-1/anat/sub-01_ses-1_T1w", "sub-01/ses-2/anat/sub-01_ses-2_T1w", "sub-02/anat/sub-02_T1w"],
     ["sub-01", "sub-01", "sub-02"]),
    (["sub-01_T1w", "sub-02_T1w"], ["sub-01", "sub-02"]),
    # patients' folders, with visits, contrasts, dates and series
    (["p1/visit1/t1", "p1/visit2/t1", "p2/visit1/t1"], ["p1", "p1", "p2"]),
    (["p1/t1", "p1/flair", "p2/t1"], ["p1", "p1", "p2"]),
    (["P001/20240102/ct", "P001/20250203/ct", "P002/20240102/ct"], ["P001", "P001", "P002"]),
    (["set/P1/a", "set/P1/b", "set/P2/c"], ["P1", "P1", "P2"]),
    (["anna/scan_1", "anna/scan_2", "ben/scan_1"], ["anna", "anna", "ben"]),
    # names
    (["p1_baseline", "p1_followup", "p2_baseline"], ["p1", "p1", "p2"]),
    (["OAS1_0001_MR1", "OAS1_0001_MR2", "OAS1_0003_MR1"], ["OAS1_0001"]*2 + ["OAS1_0003"]),
    (["IXI002-Guys-0828-T1", "IXI002-Guys-0828-T2", "IXI012-HH-1211-T1"],
     ["IXI002-Guys-0828"]*2 + ["IXI012-HH-1211"]),
    (["P1_ses-01", "p1_ses-02", "p1_ses-03"], ["P1"]*3),
    (["T1/p1", "T1/p2", "T2/p1"], ["p1", "p2", "p1"]),
    # nobody twice: as ever
    (["hippocampus_001", "hippocampus_002"], ["hippocampus_001", "hippocampus_002"]),
    (["IXI002_T1", "IXI012_T1"], ["IXI002_T1", "IXI012_T1"]),
    (["AD/a7", "AD/b3", "CN/c5"], ["AD/a7", "AD/b3", "CN/c5"]),
])
def test_volumes_of_one_person_are_one_subject(tmp_path, names, expected):
    assert subjects(tmp_path, *names) == dict(zip(names, expected))
    (tmp_path/"subjects.csv").write_text("name,split\n" + "".join(
        f"{n},{'train' if k else 'test'}\n" for k, n in enumerate(names)))
    if expected.count(expected[0]) > 1:
        with pytest.raises(ValueError, match=f"more than one split.*{expected[0]}"): find_volumes(tmp_path)
    else: assert len({r["split"] for r in find_volumes(tmp_path)}) == 2

def test_dicom_says_whose_a_series_is_and_no_output_does(tmp_path, capsys):
    pytest.importorskip("pydicom")
    pixels = (ball((12, 12, 12), (6, 6, 6)) + 1).astype(np.uint16)
    for folder, patient in {"a/ct": "DOE^7", "b/ct": "DOE^7", "c/ct": "ROE^1", "d/ct": "ANONYMOUS"}.items():
        series_of(tmp_path/"in"/folder, pixels, np.eye(4), change=lambda k: {"PatientID": patient})
    found = [r["subject"] for r in find_volumes(tmp_path/"in")]
    assert found[0] == found[1] != found[2] and found[3] == "d/ct"
    store = prepare_volumes(tmp_path/"in", tmp_path/"out", window=(0, 200), foreground_above=1)
    assert store.subjects == found
    said = capsys.readouterr().out + "".join(p.read_text() for p in (tmp_path/"out").rglob("*.json"))
    assert "OE^" not in said and "3 series have their subject from DICOM's PatientID" in said

def test_masks_are_never_images(tmp_path):
    names = ("p0", "p0_seg", "images/p1", "labels/p1", "p2_t1", "p2_t2", "p2_label-tumour_mask")
    touch(tmp_path/"in", *(f"{n}.nii.gz" for n in names), "._p0.nii.gz", "images/._p1.nii.gz")
    found = {r["name"]: r["label"] for r in find_volumes(tmp_path/"in")}
    both = "p2_label-tumour_mask.nii.gz"
    assert found == {"p0": "p0_seg.nii.gz", "images/p1": "labels/p1.nii.gz", "p2_t1": both, "p2_t2": both}
    for odd in ("x_seg.nii.gz", "labels/y.nii.gz", "z_labels.nii"):
        touch(tmp_path/odd.replace("/", "_"), odd, "other.nii.gz")
        with pytest.raises(ValueError, match="labels without an image"): find_volumes(tmp_path/odd.replace("/", "_"))

@pytest.mark.parametrize("pairs", [
    {"volume-0": "segmentation-0", "volume-1": "segmentation-1", "volume-10": "segmentation-10"},
    {"img/img0001": "label/label0001", "img/img0002": "label/label0002"},
    {"case_0/imaging": "case_0/segmentation", "case_1/imaging": "case_1/segmentation"},
    {"p1/p1_frame01": "p1/p1_frame01_gt", "p1/p1_frame12": "p1/p1_frame12_gt"},
    {"train/images/a": "train/labels/a", "test/images/b": "test/labels/b"},
])
def test_published_sets_find_their_masks(tmp_path, pairs):
    touch(tmp_path, *(f"{n}.nii.gz" for n in [*pairs, *pairs.values()]))
    found = find_volumes(tmp_path)
    assert {r["name"]: r["label"] for r in found} == {n: f"{m}.nii.gz" for n, m in pairs.items()}
    assert {r["split"] for r in found} == ({"train", "test"} if "train/images/a" in pairs else {""})

def test_a_name_that_ends_in_t1_is_no_brats(tmp_path):
    touch(tmp_path, "p0_t1.nii.gz", "p0_label.nii.gz", "p1_t1.nii.gz", "p1_label.nii.gz")
    (tmp_path/"subjects.csv").write_text("name,split,subject\np0_t1,train,a\np1_t1,test,b\n")
    found = find_volumes(tmp_path)
    assert [(r["split"], r["subject"], r["label"]) for r in found] == [
        ("train", "a", "p0_label.nii.gz"), ("test", "b", "p1_label.nii.gz")]

def test_brats_with_the_files_of_macos_and_a_table(tmp_path):
    names = ("BraTS20_Training_001", "BraTS20_Training_002")
    for n in names:
        touch(tmp_path, *(f"{n}/{x}{n}_{s}.nii" for x in ("", "._") for s in ("t1", "t1ce", "t2", "flair", "seg")))
    touch(tmp_path, "BraTS20_Training_002/W39_1998.09.19_Segm.nii")
    (tmp_path/"subjects.csv").write_text("name,split\n" + "".join(f"{n},train\n" for n in names))
    found = find_volumes(tmp_path, sequence="t1ce")
    assert [r["split"] for r in found] == ["train"]*2 and [r["subject"] for r in found] == list(names)
    assert "1 other files are left out (BraTS20_Training_002/W39_1998.09.19_Segm.nii)" in found.decided
    assert "10 hidden files are left out" in found.decided

def test_a_folder_of_two_layouts_is_refused(tmp_path):
    touch(tmp_path, *(f"p1/p1_{s}.nii" for s in ("t1", "t1ce", "t2", "flair")), "p1/s1/CTres.nii.gz")
    with pytest.raises(ValueError, match="several layouts: autopet .CTres files., brats .*preset="):
        find_volumes(tmp_path)
    assert len(find_volumes(tmp_path, "brats", "t1")) == 1

@pytest.mark.parametrize("header", [
    "name, split, subject", "Name,Split,Patient_ID", "NAME , SPLIT , Patient", "name,split,patient id",
    "\ufeffname,split,participant_id",
])
def test_a_table_in_any_spelling(tmp_path, header):
    touch(tmp_path, "a.nii", "b.nii")
    (tmp_path/"Subjects.csv").write_text(f"{header}\na , train, 7\nb, test, 8\n", encoding="utf-8")
    assert [(r["split"], r["subject"]) for r in find_volumes(tmp_path)] == [("train", "7"), ("test", "8")]

@pytest.mark.parametrize("text, says", [
    ("name,split,pid\na,train,1\nb,test,2\n", "pid is not known; expected name, subject .or subject_id, .*patient"),
    ("name;split\na;train\nb;test\n", "separated by commas"),
    ("name,split\na,train\na,test\nb,test\n", "has a more than once"),
    ("name,patient,subject\na,1,1\nb,2,2\n", "say one thing twice"),
    ("name,split,split\na,train,test\nb,test,test\n", "say one thing twice"),
    ("name,split\na,left, train\nb,test\n", "line 2 of .* has 3 cells and the header 2"),
    ("name,patient\na,NA\nb,NA\n", "line 2 of .*subject 'NA'"),
    ("file,split\na,train\n", "expected name"),
    ("", "has the columns none"),
])
def test_a_table_that_is_not_understood_is_refused(tmp_path, text, says):
    touch(tmp_path, "a.nii", "b.nii")
    (tmp_path/"subjects.csv").write_text(text)
    with pytest.raises(ValueError, match=says) as e: find_volumes(tmp_path)
    assert "subjects.csv" in str(e.value)
    (tmp_path/"subjects.csv").write_bytes("name,split\nä,train\n".encode("utf-16"))
    with pytest.raises(ValueError, match="subjects.csv could not be read as a table"): find_volumes(tmp_path)

def test_a_missing_subject_is_nobody_s_name(tmp_path):
    records = [{"name": n, "image": f"{n}.nii", "subject": float("nan")} for n in ("a", "b")]
    assert [r["subject"] for r in check_records(records)] == ["a", "b"]
    with pytest.raises(ValueError, match="has the subject 'nan'"):
        check_records([{"name": "a", "image": "a.nii", "subject": "nan"}])
    (tmp_path/"t.csv").write_text("name,image,Patient\nx1_t1,x1.nii,\nx1_t2,x2.nii,\n")
    assert [r["subject"] for r in read_manifest(tmp_path/"t.csv")] == ["x1", "x1"]

def test_what_was_decided_is_printed_once_and_kept(tmp_path, capsys):
    for n in ("p1_t1", "p1_t2", "p2_t1"): save(tmp_path/f"in/{n}.nii", ball())
    touch(tmp_path/"in", "notes.txt", "._p1_t1.nii")
    store = prepare_volumes(tmp_path/"in", tmp_path/"out")
    said = capsys.readouterr().out
    assert store.decided == VolumeStore(tmp_path/"out").decided
    for line in ("in: 3 volumes of 2 subjects, 0 with labels", "plain layout (no sign of another)",
                 "1 other files are left out (notes.txt)", "1 hidden files are left out"):
        assert said.count(line) == 1 and line in store.decided
    divided = split_subjects(find_volumes(tmp_path/"in"), {"train": .5, "test": .5})
    assert divided.decided == find_volumes(tmp_path/"in").decided and divided[0]["split"] == divided[1]["split"]

# ---- dataset.json

def test_dataset_json_with_a_mark_and_with_regions(tmp_path):
    save(tmp_path/"imagesTr/a_0000.nii.gz", ball())
    save(tmp_path/"labelsTr/a.nii.gz", (ball() > 0).astype(np.uint8))
    facts = {
        "channel_names": {"0": "CT"}, "numTraining": 1, "file_ending": ".nii.gz",
        "labels": {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        "regions_class_order": [1, 2, 3],
    }
    (tmp_path/"dataset.json").write_text("\ufeff" + json.dumps(facts), encoding="utf-8")
    assert find_volumes(tmp_path)[0]["label"] == "labelsTr/a.nii.gz"
    assert label_names(tmp_path) == {
        0: "background", 1: "whole tumour only", 2: "whole tumour and core",
        3: "whole tumour and core and enhancing",
    }
    for wrong in ("[]", json.dumps({"training": [{"label": "x"}]})):
        (tmp_path/"dataset.json").write_text(wrong)
        with pytest.raises(ValueError, match="dataset.json is no dataset.json of"): find_volumes(tmp_path)

def test_a_4d_file_in_a_plain_folder(tmp_path):
    save(tmp_path/"in/a.nii", np.stack([ball(), 2*ball(seed=1)], -1))
    with pytest.raises(ValueError, match="a.nii holds 2 volumes .* sequence=0 to 1"):
        prepare_volumes(tmp_path/"in", tmp_path/"out")
    kw = dict(window=(0, 200), foreground_above=1, margin=100, dtype="float32")
    store = prepare_volumes(tmp_path/"in", tmp_path/"out", sequence=1, **kw)
    assert np.allclose(store.array(0), ball(seed=1)/100, atol=1e-6)
    with pytest.raises(ValueError, match="got channel 2 of .*a.nii"):
        prepare_volumes(tmp_path/"in", tmp_path/"out", sequence="2", **kw)

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
    with pytest.raises(ValueError, match="have no split"): write_splits(tmp_path/"t.json", records)
    with pytest.raises(ValueError, match="enough for one"): split_subjects(records[:2])
    with pytest.raises(ValueError, match="add to 1"):
        split_subjects(records, {"train": 0.5, "test": 0.6})
