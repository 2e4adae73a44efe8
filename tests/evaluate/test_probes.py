"""Probes: three protocols, each as written down; ranks: their formulae, and what they do with dead
features."""
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import nn

from synthpi.explain.activations import coverage
from synthpi.explain.saliency import guided_gradcam
from synthpi.evaluate.probes import NetworkProbe, Probe, linear_probe
from synthpi.evaluate.ranks import alpha_req, lidar, rankme

def blobs(n, n_classes, d=12, spread=1.5, seed=0):
    "Classes on axes of scale 1e-2 to 1e2, away from the origin"
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(n_classes, d))
    y = np.arange(n) % n_classes
    return (5 + (centres[y] + spread * rng.normal(size=(n, d))) * np.logspace(-2, 2, d)).astype(
        np.float32
    ), y

SPLIT = (*blobs(240, 4), *blobs(120, 4, seed=1))

# protocols

@pytest.mark.parametrize("protocol, kind", [("linear", Probe), ("farndale", NetworkProbe)])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_every_protocol_predicts_and_gives_its_module(protocol, kind, n_classes):
    (x, y), (vx, vy) = blobs(240, n_classes), blobs(120, n_classes, seed=1)
    names = np.array(["TUM", "ADI", "LYM", "MUC"])
    state = torch.get_rng_state()
    probe = linear_probe(x, names[y], vx, names[vy], protocol=protocol, epochs=20)
    assert type(probe) is kind and probe.classes.tolist() == sorted(names[:n_classes])
    logits, p = probe.logits(vx), probe.predict_proba(vx)
    assert logits.dtype == np.float64 and logits.shape == (120, n_classes)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_allclose(p, np.exp(logits)/np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_array_equal(probe.predict(vx), probe.classes[logits.argmax(1)])
    assert (
        probe.val_accuracy == pytest.approx((probe.predict(vx) == names[vy]).mean())
        and probe.val_accuracy > 0.5 / n_classes + 0.45
    )
    assert torch.equal(torch.get_rng_state(), state) or protocol == "linear"
    module = probe.module()
    out = module(torch.from_numpy(vx)).numpy()
    assert (
        out.dtype == np.float32
        and not module.training
        and not any(p.requires_grad for p in module.parameters())
    )
    # float32 weights on features of scale 1e-2 to 1e2
    np.testing.assert_allclose(out, logits, rtol=1e-3, atol=3e-3)
    # the module is a copy
    assert np.array_equal(probe.logits(vx), logits)

@pytest.mark.parametrize("protocol", ["linear", "farndale"])
def test_features_without_an_answer_are_refused(protocol):
    probe = linear_probe(*SPLIT, protocol=protocol, epochs=2)
    x = SPLIT[2][:5].copy()
    x[3, 2], x[4, 0] = np.nan, np.inf
    for answer in (probe.logits, probe.predict, probe.predict_proba):
        with pytest.raises(ValueError, match="2 of 5 rows of features are not finite: rows 3, 4"):
            answer(x)
        for bad, shape in (
            (x[:3, :11], r"\(3, 11\)"),
            (x[0], r"\(12,\)"),
            (x[:3, :1], r"\(3, 1\)"),
            (x[None], r"\(1, 5, 12\)"),
        ):
            with pytest.raises(
                ValueError, match=rf"features of shape {shape}, expected \(N, 12\)"
            ):
                answer(bad)
    assert len(probe.predict(x[:0])) == 0

def test_farndale_is_the_network_of_the_papers():
    probe = linear_probe(*SPLIT, protocol="farndale")
    for network in (probe.network, probe.module()):
        assert [type(m) for m in network] == [
            nn.BatchNorm1d,
            nn.Linear,
            nn.ReLU,
            nn.BatchNorm1d,
            nn.Linear,
        ] and not network[2].inplace
        assert (network[1].in_features, network[1].out_features, network[4].out_features) == (
            12,
            256,
            4,
        )
    assert (
        probe.path.epoch.tolist() == list(range(1, 101))
        and probe.path.loss.iloc[-1] < 0.2 * probe.path.loss.iloc[0]
    )
    # the last epoch, not the best
    assert (
        probe.val_accuracy == probe.path.val_accuracy.iloc[-1]
        and probe.path.val_log_loss.idxmin() < 99
    )

def test_farndale_by_hand():
    "Three epochs written out with torch's own layers and Adam on standardised features"
    x, y, vx, vy = SPLIT
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)
    z, g = torch.from_numpy((x - mean)/std).float(), torch.Generator().manual_seed(5)
    net = nn.Sequential(
        nn.BatchNorm1d(12), nn.Linear(12, 256), nn.ReLU(), nn.BatchNorm1d(256), nn.Linear(256, 4)
    )
    for layer in (net[1], net[4]):
        nn.init.xavier_uniform_(layer.weight, generator=g)
        nn.init.zeros_(layer.bias)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-3), []
    for _ in range(3):
        losses.append(0.)
        # batches of at most 100, even: 80
        for rows in torch.randperm(240, generator=g).chunk(3):
            loss = F.cross_entropy(net(z[rows]), torch.from_numpy(y[rows.numpy()]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1] += loss.item() / 3
    probe = linear_probe(*SPLIT, protocol="farndale", epochs=3, batch_size=100, seed=5)
    np.testing.assert_allclose(probe.path.loss, losses, rtol=1e-5)
    expected = net.eval()(torch.from_numpy((vx - mean)/std).float()).detach().numpy()
    np.testing.assert_allclose(probe.logits(vx), expected, rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize("protocol", ["farndale"])
def test_the_seed_decides(protocol):
    a, b, c = (
        linear_probe(*SPLIT, protocol=protocol, epochs=3, batch_size=50, seed=s).logits(SPLIT[2])
        for s in (0, 0, 1)
    )
    assert np.array_equal(a, b) and not np.allclose(a, c)

@pytest.mark.parametrize("protocol", ["linear", "farndale"])
def test_constant_features_are_not_read_and_scales_do_not_matter(protocol):
    x, y, vx, vy = SPLIT
    options = dict(protocol=protocol, epochs=5)
    plain = linear_probe(*SPLIT, **options)
    dead, dead_v = (
        np.concatenate([a, np.full((len(a), 1), c, np.float32)], 1)
        for a, c in ((x, 0.1), (vx, 700.0))
    )
    probe = linear_probe(dead, y, dead_v, vy, **options)
    other = dead_v.copy()
    other[:, -1] = -3
    np.testing.assert_allclose(probe.logits(dead_v), probe.logits(other), atol=1e-6)
    np.testing.assert_allclose(
        probe.module()(torch.from_numpy(dead_v)), probe.logits(dead_v), rtol=1e-3, atol=3e-3
    )
    # the network has other initial weights
    if protocol != "farndale":
        np.testing.assert_allclose(probe.logits(dead_v), plain.logits(vx), atol=2e-2)
    shift = linear_probe(1000*x.astype(float) - 7, y, 1000*vx.astype(float) - 7, vy, **options)
    np.testing.assert_allclose(
        shift.logits(1000 * vx.astype(float) - 7), plain.logits(vx), rtol=1e-3, atol=1e-3
    )

@pytest.mark.parametrize("n, batch_size", [(2, 2), (3, 2), (5, 2), (257, 256), (3, 256)])
def test_no_batch_has_a_single_row(n, batch_size):
    x, y = blobs(n, 2)
    assert np.isfinite(
        linear_probe(x, y, x, y, protocol="farndale", epochs=2, batch_size=batch_size).logits(x)
    ).all()
    from synthpi.evaluate.probes import _batches
    parts = _batches(n, batch_size, torch.Generator().manual_seed(0))
    assert (
        min(map(len, parts)) >= 2
        and max(map(len, parts)) <= max(batch_size, 3)
        and sorted(torch.cat(parts).tolist()) == list(range(n))
    )

def test_the_network_is_guided_behind_an_encoder():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(encoder, linear_probe(*SPLIT, protocol="farndale", epochs=2).module())
    images = torch.rand(3, 3, 16, 16)
    table = coverage(model, images)
    assert table.guided.all() and len(table) == 2
    guided = guided_gradcam(model, images)
    assert guided.abs().sum() > 0 and torch.isfinite(guided).all()
    # without its ReLU the map is another one
    model[1][2] = nn.Identity()
    assert not torch.allclose(guided_gradcam(model, images), guided)

def test_training_works_where_gradients_are_off():
    plain = linear_probe(*SPLIT, protocol="farndale", epochs=1).logits(SPLIT[2])
    with torch.no_grad():
        assert np.array_equal(
            linear_probe(*SPLIT, protocol="farndale", epochs=1).logits(SPLIT[2]), plain
        )
    with torch.inference_mode():
        assert np.array_equal(
            linear_probe(*SPLIT, protocol="farndale", epochs=1).logits(SPLIT[2]), plain
        )

@pytest.mark.parametrize("options, message", [
    (dict(protocol="mlp"), "got protocol 'mlp', expected one of linear, farndale"),
    (dict(protocol="farndale", epochs=0), "got epochs=0, expected 1 or more"),
    (dict(protocol="farndale", batch_size=1), "got batch_size=1, expected 2 or more"),
    (dict(Cs=[]), r"got Cs=\[\]"), (dict(Cs=[0.]), "got C=0.0, expected a finite number above 0"),
    (dict(protocol="farndale", val_x=np.full((120, 12), np.nan)),
     "120 of 120 rows of validation features are not finite"),
    (dict(train_y=np.zeros(240)), "every training label is"),
    (dict(protocol="farndale", val_y=np.full(120, 9)), r"validation labels \[9\] do not occur"),
    (dict(val_x=np.zeros((120, 3))), r"\(240, 12\) and validation features of shape \(120, 3\)")])
def test_bad_input_of_probes(options, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(**dict(zip(("train_x", "train_y", "val_x", "val_y"), SPLIT)) | options)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("protocol", ["farndale"])
def test_cuda_gives_the_same_probe(protocol):
    a, b = (linear_probe(*SPLIT, protocol=protocol, epochs=5, device=d) for d in ("cpu", "cuda"))
    # float32 sums in another order, over 5 epochs
    np.testing.assert_allclose(a.logits(SPLIT[2]), b.logits(SPLIT[2]), rtol=1e-2, atol=1e-2)
    assert all(p.device.type == "cpu" for p in b.module().parameters())

# ranks

def entropy(values):
    p = values/values.sum() + 1e-7
    return np.exp(-(p*np.log(p)).sum())

def test_lidar_is_its_formula():
    z = np.random.default_rng(0).normal(size=(30, 5, 7)) * np.arange(1, 8) + np.random.default_rng(
        1
    ).normal(size=(30, 1, 7))
    means = z.mean(1)
    between, within = (
        np.cov(means, rowvar=False),
        np.mean([np.cov(o, rowvar=False) for o in z], axis=0) + 1e-4 * np.eye(7),
    )
    whiten = np.linalg.inv(sqrtm(within).real)
    expected = entropy(np.linalg.eigvalsh(whiten @ between @ whiten))
    assert lidar(z) == pytest.approx(expected, rel=1e-9)
    assert lidar(torch.from_numpy(z).requires_grad_()) == pytest.approx(expected, rel=1e-9)
    assert lidar(z + 50) == pytest.approx(expected, rel=1e-6)
    # delta is larger than what augmentation changes
    tight = 1e-3*z
    assert lidar(tight) != pytest.approx(expected, rel=0.02) and lidar(
        tight, delta=1e-10
    ) == pytest.approx(expected, rel=1e-4)

def test_alpha_req_is_minus_the_slope():
    z = (
        np.random.default_rng(0).normal(size=(300, 20))
        @ np.random.default_rng(1).normal(size=(20, 20))
        + 3
    )
    value, k = np.sort(np.linalg.eigvalsh(np.cov(z, rowvar=False)))[::-1], np.arange(1, 21)
    for first, last in ((1, 20), (3, 12), (3, 100)):
        use = slice(first - 1, min(last, 20))
        slope = np.polyfit(np.log(k[use]), np.log(value[use]), 1)[0]
        assert alpha_req(z, (first, last)) == pytest.approx(-slope, rel=1e-9)
    assert alpha_req(torch.from_numpy(z)) == alpha_req(z) == alpha_req(z, (3, 20))
    few = z[:10]
    # nine directions of ten rows
    assert alpha_req(few) == alpha_req(few, (3, 9))

def test_dead_features_and_collapse_stay_defined():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 4, 8))
    dead = z.copy()
    dead[..., 5] = 3
    flat, rest = dead.reshape(-1, 8), np.delete(dead, 5, axis=-1)
    assert lidar(dead) == pytest.approx(lidar(rest), rel=1e-4) and rankme(
        flat, center=True
    ) == pytest.approx(rankme(rest.reshape(-1, 7), center=True), rel=1e-4)
    with pytest.warns(
        UserWarning,
        match="7 of 8 directions have any variance: alpha is fitted to ranks 1 to 7, in place of 8",
    ):
        a = alpha_req(flat, (1, 8))
    assert a == pytest.approx(alpha_req(rest.reshape(-1, 7), (1, 7)), rel=1e-9)
    for same in (np.zeros((40, 4, 8)), np.full((40, 4, 8), 1/3)):
        assert lidar(same) == pytest.approx(1, abs=1e-4)
        with pytest.warns(UserWarning, match="0 of 8 directions"):
            assert alpha_req(same.reshape(-1, 8)) == math.inf
    line = rng.normal(size=(100, 1))*np.ones(8)
    with pytest.warns(UserWarning, match="1 of 8 directions"):
        assert alpha_req(line, (1, 8)) == math.inf

def test_warnings_of_few_rows_come_where_they_should():
    z = np.random.default_rng(0).normal(size=(9, 3, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lidar(z)
        alpha_req(z[:, 0])
        rankme(np.random.default_rng(0).normal(size=(32, 8)), center=True)
    with pytest.warns(UserWarning, match="8 objects for 8 dimensions: LiDAR is at most 7"):
        assert lidar(z[:8]) < 7
    with pytest.warns(UserWarning, match="31 rows for 8 dimensions"): rankme(np.ones((31, 8)))

@pytest.mark.parametrize("call, message", [
    (lambda: lidar(np.ones((4, 3))), r"shape \(4, 3\), expected \(n, q, D\)"),
    (lambda: lidar(np.ones((4, 1, 3))), "4 objects with 1 views"),
    (lambda: lidar(np.ones((1, 4, 3))), "1 objects with 4 views"),
    (lambda: lidar(np.where(np.arange(24).reshape(4, 2, 3) == 7, np.nan, 1.)),
     "1 of 8 rows of embeddings are not finite: rows 2"),
    (lambda: alpha_req(np.full((9, 4), np.inf)), "9 of 9 rows"),
    (lambda: alpha_req(np.eye(9, 4), (0, 4)), r"ranks \(0, 4\)"),
    (lambda: alpha_req(np.eye(9, 4), (4, 9)), "two ranks or more, from 1 to 4"),
    (lambda: alpha_req(np.zeros(4)), r"expected \(N, D\)")])
def test_bad_input_of_ranks(call, message):
    with pytest.raises(ValueError, match=message): call()
