"Simulated bodies: the same for the same seed, and places known by shapes."

import numpy as np
import pytest
import torch

from synthpi.volumes.bodies import ORGANS, body_phantoms, write_bodies
from synthpi.volumes.crops import sample_crops

RNG = np.random.default_rng(0)

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
