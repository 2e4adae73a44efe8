"""Crop lists: a function of seed and volume, the same bytes when made again, refused for other
arrays, labels as counted by hand."""
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from synthpi.volumes.bodies import write_bodies
from synthpi.volumes.crop_lists import CropList, make_crop_list, read_crop_list
from synthpi.volumes.crops import crops_at, sample_crops
from synthpi.volumes.store import FRAMES, VolumeStore
from synthpi.volumes.scans import prepare_volumes

@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    return write_bodies(
        tmp_path_factory.mktemp("bodies"), n_subjects=4, shape=(40, 30, 36), spacing_mm=11.0, seed=4
    )

@pytest.fixture(scope="module")
def store(bodies, tmp_path_factory):
    return prepare_volumes(bodies, tmp_path_factory.mktemp("store") / "s")

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Two volumes, one smaller than a crop; the second without labels 1 and 2"
    folder, rng = tmp_path_factory.mktemp("tiny"), np.random.default_rng(1)
    for k, shape in enumerate([(5, 30, 12), (20, 20, 20)]):
        label = np.zeros(shape, np.uint8)
        if k == 0: label[0, 0, 0], label[2:4, 10:20, 5:9] = 1, 2
        else: label[5:9, 5:9, 5:9] = 7
        nib.save(
            nib.Nifti1Image(
                rng.uniform(50, 100, shape).astype(np.float32), np.diag([2.0, 1, 3, 1])
            ),
            folder / f"v{k}.nii.gz",
        )
        nib.save(nib.Nifti1Image(label, np.diag([2., 1, 3, 1])), folder/f"v{k}_label.nii.gz")
    return prepare_volumes(folder, folder/"store", foreground_above=1)

def whole(crops, store, **kw):
    batches = list(crops.batches(store, **kw))
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}

# ---- the draw

def test_a_volume_s_crops_depend_on_seed_and_name_alone(store):
    a, b = (
        make_crop_list(store, [2, 0], 20, 8, 0.5, seed=3),
        make_crop_list(store, [0, 1, 2, 3], 20, 8, 0.5, seed=3),
    )
    assert a.names == (store.names[2], store.names[0]) and len(a) == 40 and len(b) == 80
    assert np.array_equal(a.starts[0], b.starts[2]) and np.array_equal(a.starts[1], b.starts[0])
    assert not np.array_equal(b.starts[0], b.starts[1]) and not np.array_equal(
        a.starts[0], make_crop_list(store, [2], 20, 8, 0.5, seed=4).starts[0]
    )
    # not one crop many times
    assert len(np.unique(b.starts[1], axis=0)) > 18

@pytest.mark.parametrize("size", [8, 9, (5, 8, 7)])
@pytest.mark.parametrize("share", [.25, 1.])
def test_labels_have_equal_shares_of_the_positives(store, size, share):
    # lung, bowel, bladder: all deep enough for no crop to be moved
    wanted = [3, 9, 12]
    crops = make_crop_list(store, [0, 3], 24, size, share, wanted)
    values, center = crops.labels(store, "center")
    n = round(24*share)
    for part in center.reshape(2, 24, -1):
        assert [part[:n, values.index(r)].sum() for r in wanted] == [n // 3] * 3
    if share < 1:
        assert (
            not center.reshape(2, 24, -1)[:, n:][..., [values.index(r) for r in wanted]]
            .any(-1)
            .all()
        )
    assert crops.rule == {
        "n_crops": 24,
        "positive_share": share,
        "positive_labels": wanted,
        "seed": 0,
    }

def test_random_crops_hold_tissue_and_no_crop_leaves_a_volume_that_is_large_enough(store):
    crops = make_crop_list(store, range(4), 60, 10, .5)
    for i, starts in enumerate(crops.starts):
        assert (
            (starts >= 0).all()
            and (starts + 10 <= store.items[i]["shape"]).all()
            and starts.dtype.kind == "i"
        )
        mask = store.array(i, "foreground")
        assert all(mask[x:x+10, y:y+10, z:z+10].any() for x, y, z in starts.tolist())

def test_a_label_of_few_voxels_and_one_at_the_corner(tiny):
    crops = make_crop_list(tiny, [0], 10, (3, 8, 5), 1., [1])
    # one voxel, in the corner: the crop is moved into the array
    assert len(crops.starts[0]) == 10 and (crops.starts[0] == 0).all()
    assert (
        crops.labels(tiny, "any")[1][:, 0].all() and not crops.labels(tiny, "center")[1][:, 0].any()
    )

def test_a_volume_without_the_labels_gives_random_crops(tiny):
    crops = make_crop_list(tiny, [0, 1], 12, 4, .5, [2])
    assert [len(s) for s in crops.starts] == [12, 12] and crops.labels(tiny)[1][:6, 1].all()

def test_small_volumes_are_padded_as_by_crops(tiny):
    crops = make_crop_list(tiny, [0, 1], 12, 16, .5)
    batch, drawn = whole(crops, tiny, labels=True), sample_crops(tiny, [0], 5, 16)
    assert (crops.starts[0][:, 0] == (5 - 16) // 2).all() and batch["crop"].shape == (
        24,
        1,
        16,
        16,
        16,
    )
    assert torch.equal(
        batch["crop"][:12].amax((1, 3, 4)) > 0,
        (drawn["crop"][:1].amax((1, 3, 4)) > 0).expand(12, -1),
    )
    values, held = crops.labels(tiny, "any")
    assert np.array_equal(
        held, torch.stack([(batch["label"] == r).flatten(1).any(1) for r in values], 1).numpy()
    )
    assert np.array_equal(
        crops.labels(tiny)[1],
        torch.stack([batch["label"][:, 8, 8, 8] == r for r in values], 1).numpy(),
    )

# ---- what comes from it

@pytest.mark.parametrize("batch", [1, 7, 20, 64, 1000])
def test_batches_are_the_crops_in_order(store, batch):
    crops = make_crop_list(store, [3, 0, 1], 20, (6, 7, 8), .4)
    got = whole(crops, store, batch=batch, labels=True)
    assert [len(b["crop"]) for b in crops.batches(store, batch)] == [
        min(batch, 60 - k) for k in range(0, 60, batch)
    ]
    assert got["volume_id"].tolist() == crops.volume_ids(store).tolist() == [3]*20 + [0]*20 + [1]*20
    assert crops.subjects(store).tolist() == [store.subjects[i] for i in got["volume_id"]]
    k = 0
    for i, starts in zip((3, 0, 1), crops.starts):
        for x, y, z in starts:
            assert np.allclose(
                got["crop"][k, 0],
                store.array(i)[x : x + 6, y : y + 7, z : z + 8] * np.float32(1 / 255),
            ) and np.array_equal(
                got["label"][k], store.array(i, "label")[x : x + 6, y : y + 7, z : z + 8]
            )
            k += 1
    assert "label" not in next(crops.batches(store))

@pytest.mark.parametrize("frame", FRAMES)
def test_positions_are_the_centres_in_every_frame(store, frame):
    crops = make_crop_list(store, [1, 2], 10, (6, 7, 8), .4)
    at = crops.positions(store, frame)
    assert at.shape == (20, 3) and at.dtype == np.float64
    assert np.allclose(at, whole(crops, store, frame=frame)["center_mm"], atol=1e-3)
    for k, (i, p) in enumerate(
        (i, s + [2.5, 3, 3.5]) for i, starts in zip((1, 2), crops.starts) for s in starts
    ):
        assert np.allclose(at[k], store.position(i, [p], frame)[0])
    if frame == "world_mm":
        for k in (0, 7, 13):
            assert torch.equal(
                crops_at(store, 1 + (k > 9), at[k : k + 1], (6, 7, 8))["crop"][0],
                whole(crops, store)["crop"][k],
            )

def test_labels_as_counted_by_hand(store):
    crops = make_crop_list(store, [0, 2], 30, (6, 7, 9), .5, seed=8)
    voxels = whole(crops, store, labels=True)["label"].numpy()
    values, center = crops.labels(store)
    same, held = crops.labels(store, "any")
    assert (
        values
        == same
        == sorted(
            set(np.unique(store.array(0, "label"))) | set(np.unique(store.array(2, "label"))) - {0}
        )[1:]
        and center.dtype == held.dtype == bool
        and center.shape == (60, len(values))
    )
    for t, r in enumerate(values):
        assert np.array_equal(center[:, t], voxels[:, 3, 3, 4] == r) and np.array_equal(
            held[:, t], (voxels == r).any((1, 2, 3))
        )
    assert center.any(0).sum() > 8 and (held & ~center).any()

# ---- the file

def test_the_file_is_the_same_when_made_again_and_holds_no_path(bodies, store, tmp_path):
    for name in "ab": make_crop_list(store, [1, 3], 9, 8, .3, seed=2).write(tmp_path/f"{name}.json")
    text = (tmp_path/"a.json").read_text()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes() and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["a.json", "b.json"]
    assert str(store.folder) not in text and str(bodies) not in text and len(text.splitlines()) == 4
    assert json.loads(text)["rule"]["seed"] == 2 and [
        v["name"] for v in json.loads(text)["volumes"]
    ] == [store.names[1], store.names[3]]
    shutil.copytree(store.folder, tmp_path/"moved")
    crops, moved = make_crop_list(store, [1, 3], 9, 8, .3, seed=2), VolumeStore(tmp_path/"moved")
    again = read_crop_list(tmp_path/"a.json", moved)
    assert (
        again.size == crops.size == (8, 8, 8)
        and again.rule == crops.rule
        and all(map(np.array_equal, again.starts, crops.starts))
        and "18 crops of 8x8x8 in 2 volumes, seed 2" in repr(again)
    )
    assert torch.equal(whole(again, moved)["crop"], whole(crops, store)["crop"])

def test_a_list_for_other_arrays_is_refused(bodies, store, tmp_path):
    crops = make_crop_list(store, [0, 2], 5, 8)
    crops.write(tmp_path/"c.json")
    for k, kw in enumerate(({"spacing_mm": 14}, {"margin": 2}, {"percentiles": (1, 99)})):
        with pytest.raises(
            ValueError, match="made for other arrays of body_000, body_002.*draw a new list"
        ):
            read_crop_list(tmp_path / "c.json", prepare_volumes(bodies, tmp_path / f"s{k}", **kw))
    other = VolumeStore(tmp_path/"s0")
    for use in (
        lambda: crops.positions(other),
        lambda: crops.volume_ids(other),
        lambda: next(crops.batches(other)),
        lambda: crops.labels(other),
        lambda: crops.subjects(other),
    ):
        with pytest.raises(ValueError, match="made for other arrays"):
            use()
    assert len(read_crop_list(tmp_path/"c.json")) == 10
    records = [{"name": "body_000", "image": "body_000.nii.gz"}]
    with pytest.raises(ValueError, match="has no body_002"):
        read_crop_list(tmp_path / "c.json", prepare_volumes(records, tmp_path / "one", root=bodies))

def test_more_volumes_in_another_order_do_not_matter(bodies, store, tmp_path):
    names = ["body_003", "body_001"]
    records = [{"name": n, "image": f"{n}.nii.gz", "label": f"{n}_label.nii.gz"} for n in names]
    fewer = prepare_volumes(records, tmp_path/"s", root=bodies)
    crops = make_crop_list(fewer, [1], 6, 8, .5)
    assert (
        all(map(np.array_equal, crops.starts, make_crop_list(store, [1], 6, 8, 0.5).starts))
        and fewer.names[1] == store.names[1]
    )
    crops, same = make_crop_list(fewer, [0], 6, 8, .5), make_crop_list(store, [3], 6, 8, .5)
    assert (
        np.array_equal(crops.starts, same.starts)
        and crops.keys == same.keys
        and crops.volume_ids(store).tolist() == [3] * 6
        and np.array_equal(crops.positions(store), crops.positions(fewer))
    )

@pytest.mark.parametrize("change, message", [
    (lambda d: d.update(format="synthpi-crop-list-9"), "no file of CropList.write"),
    (lambda d: d.pop("size"), "damaged"),
    (lambda d: d.update(volumes=[]), "damaged"),
    (lambda d: d["volumes"][0].pop("key"), "damaged"),
    (lambda d: d["volumes"][0]["starts"].append([1, 2]), "damaged"),
    (lambda d: d["volumes"][0].update(starts=[[1.5, 2, 3]]), "three whole numbers"),
    (lambda d: d["volumes"].append(d["volumes"][0]), "each once"),
    (lambda d: d.update(size=[8, 8]), "damaged"),
    (lambda d: d["volumes"][0]["starts"].append([900, 0, 0]), "middle outside the volume"),
    (lambda d: d["volumes"][0]["starts"].append([0, -5, 0]), "middle outside the volume"),
])
def test_damaged_files(store, tmp_path, change, message):
    make_crop_list(store, [0, 1], 3, 8).write(tmp_path/"c.json")
    facts = json.loads((tmp_path/"c.json").read_text())
    change(facts)
    (tmp_path/"c.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message): read_crop_list(tmp_path/"c.json", store)

def test_files_that_are_none(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="make one with make_crop_list"):
        read_crop_list(tmp_path / "c.json", store)
    for text, message in (("{", "is not JSON"), ("[]", "no file of CropList.write")):
        (tmp_path/"c.json").write_text(text)
        with pytest.raises(ValueError, match=message): read_crop_list(tmp_path/"c.json", store)

@pytest.mark.parametrize("wrong, message", [
    ({"volumes": []}, "number of volumes=0"),
    ({"n_crops": 0}, "n_crops=0"),
    ({"volumes": [1, 1]}, "each of them once"),
    ({"positive_share": 1.2}, "positive_share=1.2"),
    ({"size": 0}, "size=0"),
    ({"positive_share": .5, "positive_labels": [77]}, "list has 77; the labels there are 1, 2"),
    ({"positive_share": .5, "positive_labels": []}, "positive_labels"),
])
def test_wrong_arguments(store, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_crop_list(**{"store": store, "volumes": [0], "n_crops": 4, "size": 8, **wrong})

def test_wrong_uses(bodies, store, tmp_path):
    with pytest.raises(IndexError, match="volume 9 of 4"): make_crop_list(store, [9], 4, 8)
    crops = make_crop_list(store, [0], 4, 8)
    with pytest.raises(ValueError, match="got rule 'middle'"): crops.labels(store, "middle")
    with pytest.raises(ValueError, match="batch=0"): next(crops.batches(store, 0))
    with pytest.raises(ValueError, match="got frame 'mm'"): crops.positions(store, "mm")
    bare = prepare_volumes(
        [{"name": "body_000", "image": "body_000.nii.gz"}], tmp_path / "s", root=bodies
    )
    with pytest.raises(ValueError, match="labels there are none"):
        make_crop_list(bare, [0], 4, 8, 0.5)
    with pytest.raises(ValueError, match="with their labels"):
        make_crop_list(bare, [0], 4, 8).labels(bare)
    assert isinstance(make_crop_list(bare, [0], 4, 8), CropList)
