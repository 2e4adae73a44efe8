"Crops are a function of seed, epoch and volume."

import numpy as np
import pytest
import torch
from volume_files import ball, save

from synthpi.volumes.crops import crop_batches, crops_at, grid_crops, sample_crops
from synthpi.volumes.scans import prepare_volumes
from synthpi.volumes.sets import (
    find_volumes,
)

RNG = np.random.default_rng(0)

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
