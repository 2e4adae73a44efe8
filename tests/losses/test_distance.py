"""The losses of positions against the golden values, NumPy written from the equations, finite
differences, and the ways they are misused. Two processes are in test_distributed."""
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from placed_crops import VOLUME, allowed, draw

from synthpi.losses.distance import (
    DistanceBarlow,
    DistanceLoss,
    TwoHead,
    TwoHeadLoss,
    gaussian_kl,
)
from synthpi.losses.position import PositionRegression, axis_scale
from synthpi.losses.geometry import (
    PAIRS,
    distance_agreement,
    mean_pair_distance,
    pair_distances,
)
from synthpi.losses.paired import BarlowTwins

Z1 = torch.tensor([[1, 0, 2], [0, 1, -1], [2, 1, 0], [-1, -2, 1]], dtype=torch.float32)
Z2 = torch.tensor([[1, 1, 2], [0, 0, -1], [1, 1, 0], [-1, -1, 2]], dtype=torch.float32)
VOXELS = torch.tensor([[16, 31, 35], [32, 36, 27], [28, 29, 22], [39, 21, 35]], dtype=torch.float32)
SPACING = torch.tensor([2.04, 2.04, 3])
OPTIONS = {
    "plain": {},
    "relative": {"relative": 0.05},
    "huber": {"huber": 0.4},
    "relative huber": {"relative": 0.05, "huber": 0.3},
    "kl": {"kl": 0.3},
    "scale": {"scale": 4.0},
}

def numpy_kl(z):
    total = 0
    for column in z.T:
        var, mean = ((column - column.mean())**2).mean() + 1e-6, column.mean()
        total += .5*(var + mean**2 - 1 - math.log(var))
    return total/z.shape[1]

def numpy_distance(z, c, volume, pairs="off-diagonal", scale=1., relative=None, huber=None, kl=0.):
    "Scalar, distance term, mean absolute error and correlation, pair by pair"
    z, c = z.detach().numpy().astype(np.float64), c.numpy().astype(np.float64)
    costs, latent, physical = [], [], []
    for i, j in allowed(pairs, volume, len(z)):
        dl, dp = (
            math.sqrt(((z[i] - z[j]) ** 2).sum()),
            math.sqrt(((c[i] - c[j]) ** 2).sum()) / scale,
        )
        r = dl - dp
        if relative is not None:
            r /= math.sqrt(dp**2 + relative)
        costs.append(r**2 if huber is None or abs(r) <= huber else 2 * huber * abs(r) - huber**2)
        latent.append(dl)
        physical.append(dp)
    value = np.mean(costs)
    return (
        value + kl * numpy_kl(z),
        value,
        scale * np.abs(np.subtract(latent, physical)).mean(),
        np.corrcoef(latent, physical)[0, 1],
    )

# Golden values and equations

@pytest.mark.parametrize("centers, pairs, expected", [
    (VOXELS, "all", 179.007489),
    (VOXELS, "off-diagonal", 238.676652),
    (VOXELS*SPACING, "all", 1178.656771),
])
def test_golden_values_of_the_distance_loss(centers, pairs, expected):
    # float32
    assert DistanceLoss(pairs=pairs)(Z1, centers)[0].item() == pytest.approx(expected, rel=1e-6)

def test_golden_values_of_combinations():
    loss = DistanceBarlow(DistanceLoss(pairs="all"), BarlowTwins(), 1e4)
    assert loss(Z1, Z2, center_mm=VOXELS)[0].item() == pytest.approx(470.0984, rel=1e-6)
    assert DistanceBarlow().weight == 1e4
    assert gaussian_kl(Z1).item() == pytest.approx(0.108041, abs=1e-6)

@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("axes", [3, 2])
def test_agrees_with_numpy_pair_by_pair(pairs, option, axes):
    z, c = draw(axes=axes)
    scalar, terms = DistanceLoss(pairs=pairs, **OPTIONS[option])(z, c, VOLUME)
    value, plain, error, r = numpy_distance(z, c, VOLUME, pairs, **OPTIONS[option])
    for found, expected in (
        (scalar, value),
        (terms["distance"], plain),
        (terms["abs_error"], error),
        (terms["pearson"], r),
    ):
        assert found.item() == pytest.approx(expected, rel=1e-11)
    assert set(terms) == {"distance", "abs_error", "pearson"} | (
        {"kl"} if option == "kl" else set()
    )
    if option == "kl": assert terms["kl"].item() == pytest.approx(numpy_kl(z.numpy()), rel=1e-11)
    assert not any(t.requires_grad for t in terms.values())

def test_combinations_agree_with_their_parts():
    (z1, c), (z2, _), (z3, _) = draw(), draw(seed=1), draw(seed=2)
    distance_, barlow = DistanceLoss(4., "within"), BarlowTwins(off_diagonal=.1)
    total, terms = DistanceBarlow(distance_, barlow, 7.)(z1, z2, center_mm=c, volume_id=VOLUME)
    torch.testing.assert_close(total, distance_((z1 + z2)/2, c, VOLUME)[0] + 7*barlow(z1, z2)[0])
    assert set(terms) == {"distance", "abs_error", "pearson", "on_diagonal", "off_diagonal"}
    three = DistanceBarlow(distance_, barlow, 7.)(z1, z2, z3, center_mm=c, volume_id=VOLUME)[0]
    torch.testing.assert_close(
        three, distance_((z1 + z2 + z3) / 3, c, VOLUME)[0] + 7 * barlow(z1, z2, z3)[0]
    )
    d, b = [z[:, :2] for z in (z1, z2)], [z[:, 2:] for z in (z1, z2)]
    total, terms = TwoHeadLoss(2, distance_, barlow, 7.)(z1, z2, center_mm=c, volume_id=VOLUME)
    torch.testing.assert_close(
        total,
        (distance_(d[0], c, VOLUME)[0] + distance_(d[1], c, VOLUME)[0]) / 2 + 7 * barlow(*b)[0],
    )
    torch.testing.assert_close(
        terms["abs_error"],
        (distance_(d[0], c, VOLUME)[1]["abs_error"] + distance_(d[1], c, VOLUME)[1]["abs_error"])
        / 2,
    )
    assert TwoHeadLoss().width == 512 and TwoHead(1024)(torch.zeros(3, 1024)).shape == (
        3,
        512 + 2048,
    )

# Gradients

@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pairs", PAIRS)
def test_gradient_against_finite_differences(pairs, option):
    z, c = draw(d=3)
    assert torch.autograd.gradcheck(
        lambda z: DistanceLoss(pairs=pairs, **OPTIONS[option])(z, c, VOLUME)[0], z.requires_grad_()
    )

@pytest.mark.parametrize("pairs", PAIRS)
def test_gradient_of_random_partners_against_finite_differences(pairs):
    z, c = draw(d=3)
    def value(z):
        # the same partners in every evaluation
        torch.manual_seed(3)
        return DistanceLoss(3., pairs, partners=4)(z, c, VOLUME)[0]
    assert torch.autograd.gradcheck(value, z.requires_grad_())

def test_gradients_of_the_others_against_finite_differences():
    (z1, c), (z2, _) = draw(d=4), draw(d=4, seed=1)
    z1.requires_grad_()
    z2.requires_grad_()
    for loss in (
        DistanceBarlow(DistanceLoss(4.0), weight=3.0),
        TwoHeadLoss(2, DistanceLoss(4.0), weight=3.0),
    ):
        assert torch.autograd.gradcheck(
            lambda a, b: loss(a, b, center_mm=c, volume_id=VOLUME)[0], (z1, z2)
        )
    z = draw(d=3, seed=2)[0].requires_grad_()
    regression = PositionRegression([1., 2, 3], [2., 3, 4])
    assert torch.autograd.gradcheck(lambda z: regression(z, c, VOLUME)[0], z)
    assert torch.autograd.gradcheck(gaussian_kl, z)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("partners", [0, 3])
def test_coincident_rows_have_distance_and_gradient_zero(partners, dtype):
    # more than 25 rows: where cdist would multiply
    x = (
        (10 * torch.randn(1, 1024, generator=torch.Generator().manual_seed(0), dtype=dtype))
        .repeat(40, 1)
        .requires_grad_()
    )
    partner = (
        torch.arange(40).add(1).remainder(40)[:, None].repeat(1, partners) if partners else None
    )
    d = pair_distances(x, partner)
    d.sum().backward()
    assert d.max() == 0 and x.grad.abs().max() == 0
    x.grad = None
    loss, terms = DistanceLoss(partners=partners)(
        x, 100 * torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    )
    loss.backward()
    # a collapse is a saddle: finite, without a direction
    assert loss > 0 and x.grad.abs().max() == 0 and all(t.isfinite() for t in terms.values())

@pytest.mark.parametrize("partners", [0, 4])
def test_two_coincident_rows_among_others_push_only_against_the_others(partners):
    z, c = draw(6, 4)
    z[1] = z[0]
    z.requires_grad_()
    torch.manual_seed(0)
    DistanceLoss(partners=partners)(z, c)[0].backward()
    assert z.grad.isfinite().all() and z.grad[0].abs().sum() > 0
    z.grad = None
    DistanceLoss(pairs="within")(z, c, torch.tensor([0, 0, 1, 1, 2, 2]))[0].backward()
    assert z.grad[:2].abs().max() == 0 and z.grad[2:].abs().min() > 0

# Invariances

@pytest.mark.parametrize("pairs", PAIRS)
def test_order_of_crops_does_not_matter(pairs):
    z, c = draw()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for loss in (
        DistanceLoss(4.0, pairs, kl=0.1),
        PositionRegression([0.0] * 3, [1.0] * 3),
    ):
        z_ = z if isinstance(loss, DistanceLoss) else z[:, :3]
        torch.testing.assert_close(
            loss(z_, c, VOLUME)[0], loss(z_[order], c[order], VOLUME[order])[0], rtol=1e-12, atol=0
        )
        # nor does the number of a volume matter
        names = torch.tensor([5, 3, 9, 0, 0, 0, 0, 4])[VOLUME]
        torch.testing.assert_close(
            loss(z_, c, VOLUME)[0], loss(z_, c, names)[0], rtol=1e-12, atol=0
        )
    # but which crop is where is
    assert abs(DistanceLoss(4.)(z, c[order])[0] - DistanceLoss(4.)(z, c)[0]) > .01

def test_turns_and_shifts_of_either_space_do_not_matter():
    z, c = draw(d=4)
    def turn(d):
        return torch.linalg.qr(
            torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
        )[0]
    value = DistanceLoss(4.)(z, c)[0]
    for a, b in ((z @ turn(4) + 5, c), (z, c @ turn(3) - 80), (-z, c)):
        torch.testing.assert_close(DistanceLoss(4.0)(a, b)[0], value, rtol=1e-11, atol=0)
    assert abs(DistanceLoss(4.)(2*z, c)[0] - value) > .1

@pytest.mark.parametrize("options", [
    {}, {"relative": 1e-3}, {"huber": .1}, {"partners": 5},
    {"pairs": "all"}, {"pairs": "within"}, {"pairs": "cross"},
])
@pytest.mark.parametrize("axes", [2, 3])
def test_an_embedding_that_is_the_position_costs_nothing(options, axes):
    c = 1e4*draw(axes=axes, dtype=torch.float32)[1]
    loss, terms = DistanceLoss(37.3, **options)(c/37.3, c, VOLUME)
    assert (
        loss.item() == 0
        and terms["abs_error"].item() == 0
        and terms["pearson"].item() == pytest.approx(1)
    )

def test_local_frames_agree_within_volumes_only():
    c = draw()[1]
    # each volume counts from another corner
    moved = c + 50*torch.tensor([0, 0, 1, 2, 2, 2, 2, 7, 1, 0])[:, None]
    assert (
        DistanceLoss(pairs="within")(c, moved, VOLUME)[0] < 1e-20
        and DistanceLoss(pairs="cross")(c, moved, VOLUME)[0] > 100
        and DistanceLoss()(c, moved)[0] > 100
    )

def test_scale_divides_centres_and_error_stays_in_their_unit():
    z, c = draw()
    for s in (1.0, 25.0):
        loss, terms = DistanceLoss(s)(z / s, c)
        torch.testing.assert_close(loss * s**2, DistanceLoss()(z, c)[0])
        torch.testing.assert_close(terms["abs_error"], DistanceLoss()(z, c)[1]["abs_error"])

def test_millimetres_and_micrometres_of_a_slide_are_the_same_with_their_scale():
    z, tiles_mm = draw(30, 8, axes=2)
    mm, um = (
        DistanceLoss(mean_pair_distance(tiles_mm)),
        DistanceLoss(mean_pair_distance(1000 * tiles_mm)),
    )
    torch.testing.assert_close(um(z, 1000*tiles_mm)[0], mm(z, tiles_mm)[0])
    torch.testing.assert_close(
        um(z, 1000 * tiles_mm)[1]["abs_error"], 1000 * mm(z, tiles_mm)[1]["abs_error"]
    )
    # a slide is a plane of a volume
    flat = torch.cat([tiles_mm, torch.full((30, 1), 4., dtype=torch.float64)], 1)
    torch.testing.assert_close(mm(z, flat)[0], mm(z, tiles_mm)[0])
    mean, std = axis_scale(tiles_mm)
    assert PositionRegression(mean, std)(z[:, :2], tiles_mm)[0].isfinite()
    for loss in (DistanceBarlow(mm, weight=2.0), TwoHeadLoss(3, mm, weight=2.0)):
        assert loss(z, z + 0.1, center_mm=tiles_mm)[0].isfinite()

# Random partners

@pytest.mark.parametrize("option", ["plain", "relative huber"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_random_partners_estimate_loss_and_gradient_without_bias(pairs, option):
    z, c = draw()
    z.requires_grad_()
    def gradient(loss): return torch.autograd.grad(loss, z)[0]
    exact = DistanceLoss(3., pairs, **OPTIONS[option])(z, c, VOLUME)
    torch.manual_seed(0)
    draws = [
        DistanceLoss(3.0, pairs, partners=3, **OPTIONS[option])(z, c, VOLUME) for _ in range(500)
    ]
    for values, expected in (
        (torch.stack([d[0] for d in draws]).detach()[:, None], exact[0].detach()),
        (torch.stack([d[1]["abs_error"] for d in draws])[:, None], exact[1]["abs_error"]),
        (torch.stack([gradient(d[0]) for d in draws]).flatten(1), gradient(exact[0]).flatten()),
    ):
        error = (values.mean(0) - expected) / (values.std(0) / 500**0.5 + 1e-12)
        # 50 standard errors at most: four and a half by chance once in 3000
        assert error.abs().max() < 4.5 and values.std(0).max() > 0

def test_many_rows_meet_random_partners_by_default():
    g = torch.Generator().manual_seed(0)
    z, c = torch.randn(2048, 8, generator=g), 100*torch.rand(2048, 3, generator=g)
    a, b = (DistanceLoss(60.)(z, c)[0] for _ in range(2))
    exact = DistanceLoss(60., partners=0)(z, c)[0]
    assert a != b and abs(a/exact - 1) < .02 and abs(b/exact - 1) < .02
    assert (
        DistanceLoss(60.0)(z[:2047], c[:2047])[0]
        == DistanceLoss(60.0)(z[:2047], c[:2047])[0]
        == DistanceLoss(60.0, partners=0)(z[:2047], c[:2047])[0]
    )
    # as many as there are: all of them
    assert DistanceLoss(60., partners=5000)(z, c)[0] == exact

class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that any operation made"
    most = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max(
            [self.most]
            + [
                t.untyped_storage().nbytes() // t.element_size()
                for t in tree_leaves(out)
                if isinstance(t, torch.Tensor)
            ]
        )
        return out

@pytest.mark.parametrize("pairs", ["off-diagonal", "within"])
def test_memory_with_random_partners_grows_with_rows_not_their_square(pairs):
    def largest(n, p):
        z, c = torch.randn(n, 2, requires_grad=True), torch.rand(n, 3)
        with Largest() as seen:
            DistanceLoss(partners=p, pairs=pairs)(z, c, torch.arange(n) // 8)[0].backward()
        return seen.most
    # one difference of three axes for every pair
    assert largest(1024, 8) <= 1024*8*3 and largest(4096, 8) <= 4*1024*8*3
    assert largest(1024, 0) >= 1024**2

@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(half):
    z, c = draw(40, 64, dtype=torch.float32)
    z, c = (100*z).to(half), 100*c
    volume = torch.arange(40)//8
    cases = [
        (loss, (z,))
        for loss in (
            DistanceLoss(),
            DistanceLoss(kl=0.1),
            DistanceLoss(relative=0.1, pairs="within"),
            DistanceLoss(partners=5),
        )
    ]
    cases.append((PositionRegression([0.] * 3, [9.] * 3), (z[:, :3] / 300,)))
    cases += [(loss, (z, z + 1)) for loss in (DistanceBarlow(), TwoHeadLoss(16))]
    for loss, zs in cases:
        values = []
        for autocast in (True, False):
            leaves = (
                [z.detach().clone().requires_grad_() for z in zs]
                if autocast
                else [z.detach().float().requires_grad_() for z in zs]
            )
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value, terms = loss(*leaves, center_mm=c, volume_id=volume)
            value.backward()
            assert (
                value.dtype == torch.float32
                and value.isfinite()
                and all(t.isfinite() for t in terms.values())
                and all(z.grad.isfinite().all() for z in leaves)
            )
            values.append(value.detach())
        torch.testing.assert_close(*values, rtol=1e-6, atol=0)

def test_centres_of_any_number_type_are_taken():
    z = Z1.clone()
    expected = DistanceLoss()(z, VOXELS)[0]
    for c in (VOXELS.double(), VOXELS.long(), VOXELS.half()):
        torch.testing.assert_close(DistanceLoss()(z, c)[0], expected)
    assert DistanceLoss()(z.double(), VOXELS)[0].dtype == torch.float64

def test_volumes_are_looked_at_where_they_matter_only():
    z, c = draw()
    # names, as a batch of records may hold
    for pairs in ("off-diagonal", "all"):
        assert (
            DistanceLoss(pairs=pairs)(z, c, ["scan a"] * 10)[0]
            == DistanceLoss(pairs=pairs)(z, c)[0]
        )

def test_nothing_leaves_the_device(monkeypatch):
    "No loss copies to the CPU"
    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("a copy to the CPU"))
    z, c = draw(d=3)
    for loss in (
        DistanceLoss(kl=0.1),
        DistanceLoss(partners=3),
        DistanceLoss(pairs="within"),
        PositionRegression([0.0] * 3, [1.0] * 3),
    ):
        loss(z, c, VOLUME)

# Misuse

BAD = [
    (lambda z, c: DistanceLoss()(z[0], c), ValueError, r"shape \(5,\)"),
    (lambda z, c: DistanceLoss()(z.long(), c), ValueError, "int64"),
    (lambda z, c: DistanceLoss()(z[:, :0], c), ValueError, "at least one column"),
    (lambda z, c: DistanceLoss()((z, z), c), TypeError, "a tuple as embeddings"),
    (lambda z, c: DistanceLoss()(z, c.tolist()), TypeError, "center_mm is a list"),
    (
        lambda z, c: DistanceLoss()(z, c[:9]),
        ValueError,
        r"shape \(9, 3\) for 10 embeddings",
    ),
    (lambda z, c: DistanceLoss()(z, c[:, 0]), ValueError, r"shape \(10,\)"),
    (lambda z, c: DistanceLoss()(z, torch.cat([c, c], 1)), ValueError, r"\(10, 6\)"),
    (lambda z, c: DistanceLoss()(z[:1], c[:1]), ValueError, "1 row"),
    (lambda z, c: DistanceLoss()(z[:0], c[:0]), ValueError, "0 rows"),
    (lambda z, c: DistanceLoss(pairs="within")(z, c), ValueError, "needs volume_id"),
    (
        lambda z, c: DistanceLoss(pairs="within")(z, c, torch.arange(10)),
        ValueError,
        "no pair among 10 rows of 10 volumes",
    ),
    (
        lambda z, c: DistanceLoss(pairs="within", partners=3)(z, c, torch.arange(10)),
        ValueError,
        "no pair among",
    ),
    (
        lambda z, c: DistanceLoss(pairs="cross")(z, c, torch.zeros(10, dtype=torch.long)),
        ValueError,
        "10 rows of 1 volume:",
    ),
    (
        lambda z, c: DistanceLoss(pairs="cross")(z, c, VOLUME[:4]),
        ValueError,
        r"\(4,\) int64",
    ),
    (
        lambda z, c: DistanceLoss(pairs="within")(z, c, VOLUME.float()),
        ValueError,
        "float32",
    ),
    (
        lambda z, c: DistanceLoss(pairs="within")(z, c, ["a"] * 10),
        ValueError,
        "volume_id: got a list",
    ),
    (
        lambda z, c: DistanceLoss()(z, c.index_fill(0, torch.tensor([3, 6]), math.inf)),
        ValueError,
        "2 of 10 rows of centres are not finite, the first is row 3",
    ),
    (
        lambda z, c: DistanceLoss(partners=3)(z, c.index_fill(1, torch.tensor([1]), math.nan)),
        ValueError,
        "10 of 10 rows",
    ),
    (
        lambda z, c: PositionRegression([0.0] * 3, [1.0] * 3)(z[:, :3], c * math.nan),
        ValueError,
        "not finite",
    ),
    (
        lambda z, c: PositionRegression([0.0] * 3, [1.0] * 3)(z, c),
        ValueError,
        "5 outputs, 3 axes of centres and 3",
    ),
    (lambda z, c: PositionRegression([0.0] * 3, [1.0, 0, 1]), ValueError, "above zero"),
    (lambda z, c: PositionRegression([0.0] * 3, [1.0] * 2), ValueError, "one of each"),
    (lambda z, c: DistanceLoss(0.0), ValueError, "scale=0.0"),
    (lambda z, c: DistanceLoss(math.inf), ValueError, "scale=inf"),
    (lambda z, c: DistanceLoss(math.nan), ValueError, "scale=nan"),
    (lambda z, c: DistanceLoss(relative=0.0), ValueError, "relative=0.0"),
    (lambda z, c: DistanceLoss(huber=-1.0), ValueError, "huber=-1.0"),
    (
        lambda z, c: DistanceLoss(kl=-1.0),
        ValueError,
        "kl=-1.0, expected a finite number of zero or more",
    ),
    (lambda z, c: DistanceLoss(partners=-1), ValueError, "partners=-1"),
    (lambda z, c: DistanceLoss(partners=2.5), ValueError, "partners=2.5"),
    (
        lambda z, c: DistanceLoss(pairs="diagonal"),
        ValueError,
        "pairs='diagonal', expected one of 'off-diagonal', 'within', 'cross', 'all'",
    ),
    (lambda z, c: DistanceBarlow()(z, center_mm=c), ValueError, "1 view"),
    (lambda z, c: DistanceBarlow(weight=-1), ValueError, "weight=-1"),
    (lambda z, c: DistanceBarlow("isimed"), TypeError, "distance is a str"),
    (
        lambda z, c: TwoHeadLoss(5)(z, z, center_mm=c),
        ValueError,
        "got 5 columns, of which the first 5",
    ),
    (lambda z, c: TwoHeadLoss(2)(z, center_mm=c), ValueError, "1 view"),
    (lambda z, c: TwoHeadLoss(2)(center_mm=c), ValueError, "0 view"),
    (lambda z, c: axis_scale(c * torch.tensor([1.0, 0, 1])), ValueError, "every axis to vary"),
    (lambda z, c: axis_scale(c[:1]), ValueError, "1 centres"),
    (
        lambda z, c: mean_pair_distance(c, pairs="all"),
        ValueError,
        "expected one of 'off-diagonal', 'within', 'cross'",
    ),
    (lambda z, c: mean_pair_distance(c.T), ValueError, r"\(3, 10\)"),
    (lambda z, c: mean_pair_distance(c[:1]), ValueError, "no pair among 1 rows"),
    (lambda z, c: mean_pair_distance(c, pairs="within"), ValueError, "without volume_id"),
    (lambda z, c: mean_pair_distance(c, ["a"] * 9), ValueError, r"volume_id of shape \(9,\)"),
    (lambda z, c: mean_pair_distance(c * math.nan), ValueError, "not finite"),
    (
        lambda z, c: distance_agreement(z * math.nan, c),
        ValueError,
        "rows of embeddings are not finite",
    ),
    (
        lambda z, c: distance_agreement(z, c[:9]),
        ValueError,
        r"\(9, 3\), expected \(10, 2\)",
    ),
    (lambda z, c: distance_agreement(z, c, scale="best"), ValueError, "scale='best'"),
    (lambda z, c: distance_agreement(z, c, scale=-2.0), ValueError, "scale=-2.0"),
    (lambda z, c: distance_agreement(z, c, list(range(10)), "within"), ValueError, "10 volumes"),
]

@pytest.mark.parametrize("case", range(len(BAD)))
def test_misuse_says_what_was_given_and_what_was_expected(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message): call(*draw())

def test_heads_of_two_head_are_linear_and_apart():
    torch.manual_seed(0)
    head, h = TwoHead(4, 3, 6), torch.randn(5, 4)
    z = head(h)
    torch.testing.assert_close(z[:, :3], h @ head.distance.weight.T + head.distance.bias)
    torch.testing.assert_close(z[:, 3:], h @ head.barlow.weight.T + head.barlow.bias)

def test_anisotropic_spacing_changes_distances():
    z, spacing = VOXELS, torch.tensor([2.04, 2.04, 3.])
    assert DistanceLoss()(z, z)[0] == 0 and DistanceLoss()(z, z*spacing)[0] > 10
    torch.testing.assert_close(DistanceLoss()(z*spacing, z*spacing)[0], torch.tensor(0.))
