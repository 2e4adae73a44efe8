"""Position probes: scikit-learn's numbers, subjects kept apart, intervals over subjects, baselines
that know what they should."""
import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score
from sklearn.model_selection import GroupKFold, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from synthpi.volumes.bodies import write_bodies
from synthpi.volumes.crop_lists import make_crop_list
from synthpi.evaluate.features import intensity_histogram, position_basis
from synthpi.evaluate.regression import position_probe, position_scores
from synthpi.volumes.scans import prepare_volumes

def data(n_subjects=12, each=30, r=8, noise=0., axes=3, seed=0, shift=0.):
    rng = np.random.default_rng(seed)
    c, g = (
        rng.uniform(-100, 100, (n_subjects * each, axes)) + [40, 0, -300][:axes],
        np.repeat([f"s{k}" for k in range(n_subjects)], each),
    )
    # each subject lies elsewhere
    if shift: c += np.repeat(rng.normal(0, shift, (n_subjects, axes)), each, 0)
    h = c @ rng.normal(size=(axes, r))/50 + rng.normal(5, 2, r) + noise*rng.normal(size=(len(c), r))
    return h, c, g, np.repeat(np.arange(n_subjects), each) < n_subjects*2//3

def probe(h, c, g, train, **kw):
    return position_probe(h[train], c[train], g[train], h[~train], c[~train], g[~train], **kw)

# ---- the scores

@pytest.mark.parametrize("axes", [1, 2, 3])
def test_golden_exact_linear_features_know_everything(axes):
    p = probe(*data(axes=axes))
    assert (
        p.r2["mean"] == pytest.approx(1, abs=1e-7)
        and p.mae_mm["mean"] < 2e-3
        and p.r2["ci"] == pytest.approx([1, 1], abs=1e-7)
        and p.alpha == 1e-3
    )
    assert (
        p.r2_axes.shape == p.mae_axes.shape == (axes,)
        and p.predicted.shape == (120, axes)
        and p.coef.shape == (axes, 8)
    )

def test_golden_shuffled_features_know_nothing():
    h, c, g, train = data(each=60)
    for seed in range(4):
        p = probe(np.random.default_rng(seed).permutation(h), c, g, train)
        assert (
            -0.05 < p.r2["mean"] <= 0.001
            and p.alpha >= 100
            and p.mae_mm["mean"]
            == pytest.approx(np.abs(c[~train] - c[train].mean(0)).mean(), rel=0.03)
        )

@pytest.mark.parametrize("noise", [.3, 3])
def test_scores_are_those_of_scikit_learn(noise):
    h, c, g, train = data(noise=noise)
    p = probe(h, c, g, train)
    true, got = c[~train], p.predicted
    assert p.r2["mean"] == pytest.approx(
        r2_score(true, got, multioutput="uniform_average"), abs=1e-12
    ) and np.allclose(p.r2_axes, r2_score(true, got, multioutput="raw_values"), atol=1e-12)
    assert p.mae_mm["mean"] == pytest.approx(
        mean_absolute_error(true, got), abs=1e-9
    ) and np.allclose(p.mae_axes, mean_absolute_error(true, got, multioutput="raw_values"))
    assert (
        p.r2["ci"][0] < p.r2["mean"] < p.r2["ci"][1]
        and p.mae_mm["ci"][0] < p.mae_mm["mean"] < p.mae_mm["ci"][1]
    )

@pytest.mark.parametrize("r, noise", [(8, 1.), (200, 3.), (400, 6.)])
def test_the_probe_is_scikit_learn_s_with_the_alpha_of_grouped_folds(r, noise):
    "Fewer features than crops, about as many, and more"
    h, c, g, train = data(8, 40, r, noise)
    alphas = 10.**np.arange(-3, 7)
    p = probe(h, c, g, train, alphas=alphas, folds=4)
    x, y = h[train], c[train]
    held = {a: np.empty_like(y) for a in alphas}
    for a in alphas:
        for fit, rest in GroupKFold(4).split(x, groups=g[train]):
            held[a][rest] = (
                make_pipeline(StandardScaler(), Ridge(alpha=a)).fit(x[fit], y[fit]).predict(x[rest])
            )
    r2 = [r2_score(y, held[a]) for a in alphas]
    assert (
        np.allclose(p.path.r2, r2, atol=1e-6)
        and p.path.alpha.tolist() == alphas.tolist()
        and p.alpha == alphas[np.argmax(r2)]
    )
    reference = make_pipeline(StandardScaler(), Ridge(alpha=p.alpha)).fit(x, y)
    assert np.allclose(p.predicted, reference.predict(h[~train]), atol=1e-6) and np.allclose(
        p.predict(h[~train]), p.predicted
    )

def test_alpha_is_chosen_on_subjects_that_the_fit_has_not_seen():
    """Features name the subject, and each subject has its place: folds that tear subjects would
    trust them"""
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(16), 40)
    c, h = (
        rng.normal(0, s, (16, k))[g] + rng.normal(0, s / 10, (640, k))
        for s, k in ((50, 3), (1, 30))
    )
    p, train = probe(h, c, g, g < 12), g < 12
    torn = cross_val_score(
        make_pipeline(StandardScaler(), Ridge(alpha=1)),
        h[train],
        c[train],
        cv=KFold(5, shuffle=True, random_state=0),
        scoring="r2",
    )
    assert torn.mean() > .9 and p.path.r2.max() < .3 and p.path.r2.iloc[0] < -.3 and p.alpha >= 100

def test_intervals_draw_subjects_not_crops():
    "Twelve crops of a subject that say the same are worth one"
    rng = np.random.default_rng(1)
    c, g = rng.uniform(-100, 100, (60, 3)), np.arange(60)
    h = c @ rng.normal(size=(3, 6)) + rng.normal(0, 60, (60, 6))
    train = g < 40
    one = probe(h, c, g, train)
    again = position_probe(
        h[train], c[train], g[train], *(np.repeat(x[~train], 12, 0) for x in (h, c, g))
    )
    many = position_probe(
        h[train],
        c[train],
        g[train],
        np.repeat(h[~train], 12, 0),
        np.repeat(c[~train], 12, 0),
        np.arange(100, 340),
    )
    def width(p): return p.r2["ci"][1] - p.r2["ci"][0]
    assert (
        again.r2["mean"] == pytest.approx(one.r2["mean"])
        and again.r2["ci"] == pytest.approx(one.r2["ci"])
        and again.mae_mm["ci"] == pytest.approx(one.mae_mm["ci"])
        and width(many) < 0.5 * width(one)
    )

@pytest.mark.parametrize("shift", [0, 150])
def test_intervals_are_those_of_a_plain_bootstrap(shift):
    h, c, g, train = data(noise=2., n_subjects=15, shift=shift)
    p = probe(h, c, g, train, n_boot=4000, seed=1)
    rng, scores = np.random.default_rng(7), []
    rows = [np.flatnonzero(g[~train] == s) for s in np.unique(g[~train])]
    for _ in range(1500):
        pick = np.concatenate([rows[k] for k in rng.integers(len(rows), size=len(rows))])
        scores.append(
            (
                r2_score(c[~train][pick], p.predicted[pick]),
                mean_absolute_error(c[~train][pick], p.predicted[pick]),
            )
        )
    low, high = np.quantile(scores, [.025, .975], axis=0)
    for ci, k in ((p.r2["ci"], 0), (p.mae_mm["ci"], 1)):
        assert ci == pytest.approx([low[k], high[k]], abs=0.12 * (high[k] - low[k]))
    assert (
        p.r2["ci"]
        == probe(h, c, g, train, n_boot=4000, seed=1).r2["ci"]
        != probe(h, c, g, train, n_boot=4000, seed=2).r2["ci"]
    )
    narrow = probe(h, c, g, train, level=.5)
    assert (
        narrow.r2["ci"][1] - narrow.r2["ci"][0] < 0.6 * (p.r2["ci"][1] - p.r2["ci"][0])
        and narrow.level == 0.5
    )

def test_several_training_seeds_are_averaged_and_drawn():
    h, c, g, train = data(noise=1., n_subjects=15)
    one = probe(h, c, g, train).predicted
    true, groups, worse = (
        c[~train],
        g[~train],
        one + np.random.default_rng(0).normal(0, 30, one.shape),
    )
    alone, both, same = (
        position_scores(true, one, groups),
        position_scores(true, np.stack([one, worse]), groups),
        position_scores(true, np.stack([one, one]), groups),
    )
    r2, mae = ([f(true, p) for p in (one, worse)] for f in (r2_score, mean_absolute_error))
    assert (
        both["r2"]["per_seed"] == pytest.approx(r2)
        and both["mae_mm"]["per_seed"] == pytest.approx(mae)
        and both["r2"]["mean"] == pytest.approx(np.mean(r2))
        and both["mae_mm"]["mean"] == pytest.approx(np.mean(mae))
    )
    assert both["r2_axes"] == pytest.approx(
        np.mean([r2_score(true, p, multioutput="raw_values") for p in (one, worse)], 0)
    ) and both["mae_axes_mm"] == pytest.approx(np.abs(np.stack([one, worse]) - true).mean((0, 1)))
    # both seeds are within it
    assert (
        same["r2"]["ci"] == pytest.approx(alone["r2"]["ci"])
        and both["r2"]["ci"][0] < r2[1] + 0.01
        and both["r2"]["ci"][1] > r2[0] - 0.01
    )
    with pytest.raises(ValueError, match=r"\(150, 3\) true and \(1, 150, 2\) predicted"):
        position_scores(true, one[:, :2], groups)

def test_one_test_subject_has_no_interval():
    h, c, g, train = data(noise=1., n_subjects=5)
    keep = train | (g == "s4")
    with pytest.warns(UserWarning, match="one subject"):
        p = probe(h[keep], c[keep], g[keep], train[keep])
    assert np.isnan(p.r2["ci"]).all() and np.isnan(p.mae_mm["ci"]).all() and p.r2["mean"] > .5

def test_far_places_and_dead_features():
    """World coordinates a metre away, a constant feature, one that is constant up to float32's
    rounding, tensors of float32"""
    h, c, g, train = data(noise=.5)
    odd = np.concatenate(
        [
            h,
            np.full((len(h), 1), 3.0),
            1000 * (1 + 1e-8 * np.random.default_rng(0).normal(size=(len(h), 1))),
        ],
        1,
    )
    a, b = probe(h, c, g, train), probe(odd, c + 1000, g, train)
    assert b.r2["mean"] == pytest.approx(a.r2["mean"], abs=1e-6) and b.mae_mm[
        "ci"
    ] == pytest.approx(a.mae_mm["ci"], rel=1e-6)
    t = torch.from_numpy(h).float()
    assert probe(t, torch.from_numpy(c), g, torch.from_numpy(train)).r2["mean"] == pytest.approx(
        a.r2["mean"], abs=1e-5
    )
    assert a.r2["mean"] == pytest.approx(probe(h*1e4 - 7, c, g, train).r2["mean"], abs=1e-7)
    assert json.loads(json.dumps(a.facts()))["mae_axes_mm"] == a.mae_axes.tolist()

# ---- what is refused

def test_a_subject_in_training_and_test_is_named():
    h, c, g, train = data()
    g = g.copy()
    g[-1] = "s2"
    with pytest.raises(ValueError, match="1 subjects are in training and in test: s2. Divide"):
        probe(h, c, g, train)
    with pytest.raises(ValueError, match="in training and in test: 1"):
        position_probe(h, c, np.arange(len(h)), h[:4], c[:4], ["a", "b", "1", "d"])

@pytest.mark.parametrize("what, index, message", [("h", 3, "1 of 240 rows of the training "
                                                           "features are not finite: rows 3\\."), ("c",
                                                           5,
                                                           "training positions are not finite: rows 5\\."), ("h",
                                                           -1,
                                                           "test features are not finite: rows 119"), ("c",
                                                           -2,
                                                           "test positions")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(what, index, message, value):
    h, c, g, train = data()
    {"h": h, "c": c}[what][index, 1] = value
    with pytest.raises(ValueError, match=message): probe(h, c, g, train)

@pytest.mark.parametrize("change, message", [
    (lambda a: a.update(train_h=a["train_h"][:-1]), r"training features of shape \(239, 8\)"),
    (lambda a: a.update(train_h=a["train_h"][:, 0]), r"\(240,\)"),
    (lambda a: a.update(test_mm=a["test_mm"][:, :2]), "8 and 3 columns, test ones 8 and 2"),
    (lambda a: a.update(test_h=a["test_h"][:, :5]), "test ones 5 and 3"),
    (lambda a: a.update(test_groups=a["test_groups"][:3]), r"groups of shape \(3,\)"),
    (lambda a: a.update(train_groups=["p"]*240), "all training crops are of the subject 'p'"),
    (lambda a: a.update(test_h=a["test_h"][:0], test_mm=a["test_mm"][:0], test_groups=[]), "N and R at least 1"),
    (lambda a: a["test_mm"].__setitem__((slice(None), 1), 4.), "the test positions are all the same along axis 1"),
    (lambda a: a["train_mm"].__setitem__((slice(None), 0), 4.),
     "the training positions are all the same along axis 0"),
    (lambda a: a.update(alphas=[0, 1]), "alpha=0.0, expected a finite number above 0"),
    (lambda a: a.update(alphas=[]), "penalties above 0"),
    (lambda a: a.update(folds=1), "folds=1"),
    (lambda a: a.update(n_boot=0), "n_boot=0"),
    (lambda a: a.update(level=95), "level=95")])
def test_wrong_arguments(change, message):
    h, c, g, train = data()
    a = {
        "train_h": h[train],
        "train_mm": c[train],
        "train_groups": g[train],
        "test_h": h[~train],
        "test_mm": c[~train],
        "test_groups": g[~train],
    }
    change(a)
    with pytest.raises(ValueError, match=message): position_probe(**a)

# ---- baselines

@pytest.mark.parametrize("bins", [1, 8, 32])
def test_histograms_are_numpy_s(bins):
    x = np.random.default_rng(0).random((5, 1, 4, 6, 3)).astype(np.float32)
    x[0, 0, 0, 0] = [0, 1, 1]
    got = intensity_histogram(torch.from_numpy(x), bins)
    assert got.shape == (5, bins) and got.dtype == np.float32 and np.allclose(got.sum(1), 1)
    assert np.allclose(got, [np.histogram(c, bins, (0, 1))[0] / 72 for c in x]) and np.array_equal(
        got, intensity_histogram(x, bins)
    )

@pytest.mark.parametrize("x, message", [
    (np.full((2, 1, 3, 3, 3), 1.2), "values 1.2 to 1.2"),
    (np.full((2, 1, 3, 3, 3), -.1), r"values -0.1"),
    (np.full((2, 1, 3, 3, 3), np.nan), "nan"),
    (np.zeros((2, 1, 3, 3, 3), np.uint8), "uint8"),
    (np.zeros((0, 1, 3, 3, 3)), "shape"),
    (np.zeros(3), "shape")
])
def test_crops_that_are_not_in_the_unit_interval(x, message):
    with pytest.raises(ValueError, match=message): intensity_histogram(x)
    with pytest.raises(ValueError, match="bins=0"):
        intensity_histogram(np.zeros((2, 1, 3, 3, 3)), 0)

@pytest.mark.parametrize("axes, grid", [(2, 6), (3, 6), (3, (2, 3, 4)), (2, [5, 2]), (1, 4)])
def test_the_basis_as_written_from_the_equation(axes, grid):
    rng = np.random.default_rng(0)
    ref, center = (
        rng.uniform(-50, 80, (40, axes)) * [1, 3, 0.2][:axes],
        rng.uniform(-60, 90, (7, axes)),
    )
    got = position_basis(center, ref, grid)
    ticks = [
        np.linspace(ref[:, a].min(), ref[:, a].max(), n)
        for a, n in enumerate(np.broadcast_to(grid, axes))
    ]
    places = np.stack(np.meshgrid(*ticks, indexing="ij"), -1).reshape(-1, axes)
    widths = np.array([t[1] - t[0] for t in ticks])
    assert got.shape == (7, np.prod(np.broadcast_to(grid, axes))) and np.allclose(
        got, np.exp(-0.5 * (((center[:, None] - places) / widths) ** 2).sum(-1))
    )
    assert np.allclose(np.diag(position_basis(places, places, grid)), 1)

def test_the_basis_of_test_positions_is_that_of_the_training_range():
    ref = np.random.default_rng(0).random((30, 3))
    a, b = position_basis(ref[:4], ref), position_basis(np.concatenate([ref[:4], [[9, 9, 9]]]), ref)
    assert np.array_equal(a, b[:4]) and b[4].max() < 1e-9

@pytest.mark.parametrize("args, message", [
    ((np.zeros((3, 3)), np.zeros((4, 2))), r"\(3, 3\) and reference positions of shape \(4, 2\)"),
    ((np.zeros((3, 2)), np.array([[0, 1], [0, 2.]])), "all 0 along axis 0"),
    ((np.zeros((3, 2)), np.array([[np.nan, 1]])), "not finite"),
    ((np.zeros((3, 2)), np.eye(2), 1), "grid=1"),
    ((np.zeros((3, 2)), np.eye(2), (3, 3, 3)), "one for each of 2 axes"),
    ((np.zeros((3, 2)), np.zeros((0, 2))), "M at least 1")])
def test_wrong_positions_of_the_basis(args, message):
    with pytest.raises(ValueError, match=message): position_basis(*args)

def test_the_atlas_finds_organs_and_no_coin(tmp_path):
    store = prepare_volumes(
        write_bodies(
            tmp_path / "b", 6, shape=(40, 30, 36), spacing_mm=11.0, seed=4, test_share=1 / 3
        ),
        tmp_path / "s",
    )
    lists = {
        s: make_crop_list(store, store.indices(s), 150, 8, 0.6, seed=1) for s in ("train", "test")
    }
    at = {s: x.positions(store) for s, x in lists.items()}
    basis = {s: position_basis(x, at["train"], 5) for s, x in at.items()}
    def auc(y):
        score = (
            make_pipeline(StandardScaler(), Ridge(alpha=100))
            .fit(basis["train"], y["train"])
            .predict(basis["test"])
        )
        order = score[y["test"]][:, None] - score[~y["test"]]
        return (order > 0).mean() + .5*(order == 0).mean()
    values, _ = lists["train"].labels(store)
    inside = {s: x.labels(store)[1] for s, x in lists.items()}
    organs = [auc({s: inside[s][:, k] for s in inside}) for k, r in enumerate(values) if r > 2]
    coins = [
        auc({s: np.random.default_rng(k).permutation(inside[s][:, 4]) for s in inside})
        for k in range(10)
    ]
    assert np.mean(organs) > .85 and abs(np.mean(coins) - .5) < .06
