"Layouts of published sets, tables, and splits by subject."
import json
import shutil

import numpy as np
import pytest
from volume_files import ball, save

from synthpi.volumes.scans import prepare_volumes
from synthpi.volumes.sets import (
    check_records, find_volumes, read_manifest, split_subjects, write_splits,
)

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
