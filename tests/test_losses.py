"VICReg against the golden values, NumPy written from the equations, finite differences, and the ways it is misused."
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from synthpi.losses import VICReg, covariance_loss, invariance_loss, variance_loss

Z1 = torch.tensor([[1, 0, 2], [0, 1, -1], [2, 1, 0], [-1, -2, 1]], dtype=torch.float32)
Z2 = torch.tensor([[1, 1, 2], [0, 0, -1], [1, 1, 0], [-1, -1, 2]], dtype=torch.float32)
Z3 = torch.tensor([[0, 1, 1], [1, 1, 0], [2, 0, -1], [-1, -1, 1]], dtype=torch.float32)
GOLDEN = [  # mode, branches, factor on the inputs, invariance, variance, covariance, total; printed to six digits
    ("official", 2, 1., .416667, .014174, 2.495370, 13.266376),
    ("official", 2, .25, .026042, .691039, .009748, 17.936763),
    ("reference", 2, 1., .833333, .113892, 1.403646, 25.084275),
    ("reference", 2, .25, .052083, 1.465114, .005483, 37.935428),
    ("reference", 3, 1., 3.666667, .227784, 2.010417, 99.371676),
    ("reference", 3, .25, .229167, 2.233730, .007853, 61.580276)]

def batches(k, n, d, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(n, d, generator=g, dtype=dtype)
    return [.4*common + .3*torch.randn(n, d, generator=g, dtype=dtype) for _ in range(k)]

def numpy_vicreg(zs, mode, gamma=1., w=None):
    "The loss of the specification, in float64 and with explicit D x D covariances."
    zs, k = [z.numpy().astype(np.float64) for z in zs], len(zs)
    (n, d), pairs = zs[0].shape, list(combinations(range(k), 2))
    k_s, k_v, k_c, dd, eps = {"mean": (1/len(pairs), 1/k, 2/k, 1, 1e-4), "official": (1, .5, 1, 1, 1e-4), "reference": (2, 1, 1, 0, 1e-5)}[mode]
    s = sum((1 if w is None else w[i])*((zs[a] - zs[b])**2).sum()/(n*d) for i, (a, b) in enumerate(pairs))
    v = sum(np.maximum(0, gamma - np.sqrt(z.var(0, ddof=dd) + eps)).mean() for z in zs)
    c = 0
    for z in zs:
        cov = (z - z.mean(0)).T @ (z - z.mean(0))/(n - dd)
        c += sum(cov[j, l]**2 for j in range(d) for l in range(d) if j != l)/d
    return np.array([25*k_s*s + 25*k_v*v + k_c*c, k_s*s, k_v*v, k_c*c])

@pytest.mark.parametrize("mode, k, factor, inv, var, cov, total", GOLDEN)
def test_golden_values(mode, k, factor, inv, var, cov, total):
    loss, terms = VICReg(mode)(*(factor*z for z in (Z1, Z2, Z3)[:k]))
    for name, value in dict(invariance=inv, variance=var, covariance=cov).items():
        assert terms[name].item() == pytest.approx(value, abs=2e-6), name       # six printed digits and float32
    assert loss.item() == pytest.approx(total, abs=3e-5)                        # the same, times the weight of 25

@pytest.mark.parametrize("mode, k", [("official", 2), ("reference", 2), ("reference", 3), ("mean", 2), ("mean", 3), ("mean", 5)])
@pytest.mark.parametrize("n, d", [(2, 1), (2, 7), (7, 7), (20, 6), (6, 20)])    # both sides of the covariance, and the edge between them
def test_agrees_with_numpy(mode, k, n, d):
    zs = batches(k, n, d)
    loss, terms = VICReg(mode)(*zs)
    assert loss.dtype == torch.float64
    # float64 throughout: only the order of summation differs
    np.testing.assert_allclose([loss, *terms.values()], numpy_vicreg(zs, mode), rtol=1e-10, atol=1e-13)

def test_float32_keeps_both_sides_of_the_covariance():
    for n, d in [(64, 63), (64, 64), (64, 65), (64, 512), (32, 2048)]:
        z, = batches(1, n, d, dtype=torch.float32)
        exact = numpy_vicreg([z, z], "official")[3]/2
        assert covariance_loss(z).item() == pytest.approx(exact, rel=1e-5), (n, d)  # float32 sums of n*d terms, less a diagonal of the same size

def test_the_cheaper_side_is_computed():
    "The other side of either shape would be a matrix of 160 GB."
    for shape in ((200_000, 2), (2, 200_000)):
        z = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        covariance_loss(z).backward()
        assert torch.isfinite(z.grad).all()

def test_mean_equals_official_at_two_and_ignores_a_repeated_branch():
    z, other = batches(2, 12, 5)
    assert torch.allclose(VICReg("mean")(z, other)[0], VICReg("official")(z, other)[0], rtol=1e-12)
    two, three = VICReg()(z, z), VICReg()(z, z, z)
    for a, b in zip([two[0], *two[1].values()], [three[0], *three[1].values()]): assert torch.allclose(a, b, rtol=1e-12)
    assert not torch.allclose(VICReg("reference")(z, z)[0], VICReg("reference")(z, z, z)[0], rtol=.1)   # the balance that `mean` keeps

@pytest.mark.parametrize("mode", ["mean", "reference"])
def test_permutation_of_samples_and_branches(mode):
    zs, order = batches(3, 10, 14), torch.randperm(10, generator=torch.Generator().manual_seed(1))
    expected = VICReg(mode)(*zs)[0]
    for p in permutations(zs): assert torch.allclose(VICReg(mode)(*p)[0], expected, rtol=1e-12)
    assert torch.allclose(VICReg(mode)(*(z[order] for z in zs))[0], expected, rtol=1e-12)
    assert VICReg(mode)(zs[0][order], *zs[1:])[0] > expected*1.05               # one branch alone shuffled is another batch

def test_pair_weights_follow_their_pairs():
    zs, w = batches(3, 9, 4), [1., .5, 0.]
    np.testing.assert_allclose(VICReg(pair_weights=w)(*zs)[0], numpy_vicreg(zs, "mean", w=w)[0], rtol=1e-12)
    only_12 = VICReg(variance=0., covariance=0., pair_weights=[1., 0., 0.])
    assert torch.allclose(only_12(*zs)[0], 25*invariance_loss(zs[0], zs[1])/3, rtol=1e-12)

@pytest.mark.parametrize("mode, k", [("official", 2), ("mean", 3), ("reference", 3)])
@pytest.mark.parametrize("n, d", [(5, 3), (4, 6)])
def test_gradients(mode, k, n, d):
    zs = [z.requires_grad_() for z in batches(k, n, d)]
    assert torch.autograd.gradcheck(lambda *zs: VICReg(mode)(*zs)[0], zs)

def test_gradient_is_finite_where_the_batch_has_collapsed():
    zs = [torch.ones(8, 4, requires_grad=True) for _ in range(3)]
    loss, terms = VICReg()(*zs)
    loss.backward()
    assert terms["variance"].item() == pytest.approx(.99) and all(torch.isfinite(z.grad).all() for z in zs)

def test_terms_are_detached_and_unweighted():
    z1, z2 = (z.requires_grad_() for z in batches(2, 8, 5))
    heavy, light = VICReg(invariance=100., variance=3., covariance=7.)(z1, z2), VICReg()(z1, z2)
    assert not any(t.requires_grad for t in heavy[1].values()) and heavy[0].requires_grad
    for name in light[1]: assert torch.equal(heavy[1][name], light[1][name])
    inv, var, cov = (heavy[1][name] for name in ("invariance", "variance", "covariance"))
    assert torch.allclose(heavy[0], 100*inv + 3*var + 7*cov, rtol=1e-12)

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    zs = [(100*z).to(dtype).requires_grad_() for z in batches(3, 16, 64, dtype=torch.float32)]
    loss, terms = VICReg()(*zs)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and all(t.dtype == torch.float32 for t in terms.values())
    assert torch.equal(loss, VICReg()(*(z.detach().float() for z in zs))[0])

def test_autocast_does_not_reach_inside():
    zs = batches(2, 16, 64, dtype=torch.float32)
    plain = VICReg()(*zs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (zs[0] @ zs[0].T).dtype == torch.bfloat16                        # autocast is on here
        assert torch.equal(VICReg()(*zs)[0], plain)

def test_constants_are_the_callers():
    z, = batches(1, 30, 4)
    assert variance_loss(z, gamma=2.) > variance_loss(z, gamma=1.)
    assert VICReg(eps=1.)(z, z)[1]["variance"] == 0                             # sqrt(var + 1) is over gamma for any batch
    assert VICReg(gamma=0.)(z, z)[1]["variance"] == 0

@pytest.mark.parametrize("call, message", [
    (lambda z: VICReg()(z), "1 view arrived"),
    (lambda z: VICReg()(), "0 views? arrived"),
    (lambda z: VICReg()(z, z[:, :2]), r"view 1 has shape \(4, 2\) but view 0 has \(4, 3\)"),
    (lambda z: VICReg()(z, z, z[:3]), r"view 2 has shape \(3, 3\)"),
    (lambda z: VICReg()(z[:1], z[:1]), r"view 0 has shape \(1, 3\).*at least two rows"),
    (lambda z: VICReg()(z[None], z[None]), r"expected \(B, D\)"),
    (lambda z: VICReg()(z[:, :0], z[:, :0]), r"view 0 has shape \(4, 0\)"),
    (lambda z: VICReg("official")(z, z, z), "3 views arrived, but mode 'official' is defined for two"),
    (lambda z: VICReg("sum"), "mode 'sum' arrived"),
    (lambda z: VICReg(pair_weights=[1.])(z, z, z), "1 pair weights arrived for 3 views; expected 3, in the order 12, 13, 23")])
def test_errors_say_what_arrived(call, message):
    with pytest.raises(ValueError, match=message): call(Z1)
