"""Evaluation: the encoder is untouched, the probe is scikit-learn's, intervals cover, ratios and
ranks are right."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    recall_score,
)
from sklearn.preprocessing import StandardScaler
from torch import nn

from synthpi.evaluate.features import colour_histogram, extract_features, mean_rgb
from synthpi.evaluate.tables import compare
from synthpi.evaluate.budget import label_budget
from synthpi.evaluate.crossval import cross_validate
from synthpi.evaluate.regression import position_probe
from synthpi.evaluate.intervals import error_reduction, interval, score_intervals
from synthpi.core.optics import restain
from synthpi.evaluate.scores import scores
from synthpi.evaluate.probes import linear_probe
from synthpi.evaluate.ranks import rankme

Z1 = np.array([[1., 0, 2], [0, 1, -1], [2, 1, 0], [-1, -2, 1]])

def encoder(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 5),
        nn.BatchNorm1d(5),
    )

def pictures(n=11, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)

def blobs(n, n_classes, d=12, spread=1.5, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(n_classes, d))
    y = np.arange(n) % n_classes
    return (5 + (centres[y] + spread * rng.normal(size=(n, d))) * np.logspace(-2, 2, d)).astype(
        np.float32
    ), y

# features

def test_encoder_is_left_as_found():
    model = encoder()
    model.train()
    # a frozen layer inside a training model stays just that
    model[1].eval()
    model[6].weight.requires_grad_(False)
    model(torch.rand(4, 3, 16, 16)).sum().backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    needs = [
        (p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    extract_features(model, pictures(), batch_size=4)
    assert [m.training for m in model.modules()] == flags
    assert model.state_dict().keys() == state.keys() and all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )
    for p, (need, grad) in zip(model.parameters(), needs):
        assert (
            p.requires_grad == need
            and (grad is None) == (p.grad is None)
            and (grad is None or torch.equal(p.grad, grad))
        )

def test_buffers_that_move_even_in_evaluation_mode_and_errors_half_way():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
        def forward(self, x):
            self.calls = self.calls + 1
            if self.calls > 2: raise RuntimeError("third batch")
            return x.mean((2, 3))
    model = Counter()
    extract_features(model, pictures(8), batch_size=4)
    with pytest.raises(RuntimeError, match="third batch"):
        extract_features(model, pictures(12), batch_size=4)
    assert model.calls == 0 and model.training

def test_buffers_of_the_first_forward_pass_go_again():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("late", None)
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("grows", torch.zeros(1))
        def forward(self, x):
            if "table" not in self._buffers:
                self.register_buffer("table", x.new_ones(3), persistent=False)
            self.late, self.kept = x.new_ones(1), self.kept + 1
            self.grows.resize_(len(x)).fill_(3)
            if x.isnan().any(): raise RuntimeError("half way")
            return x.mean((2, 3))*self.table
    model = nn.Sequential(Lazy(), nn.BatchNorm1d(3))
    kept = model[0].kept
    extract_features(model, pictures(8), batch_size=4)
    with pytest.raises(RuntimeError, match="half way"):
        extract_features(model, torch.full((2, 3, 4, 4), torch.nan))
    assert (
        [*model[0]._buffers] == ["late", "kept", "grows"]
        and model[0].late is None
        and model[0].kept is kept
        and kept.tolist() == [1, 1]
        and model[0].grows.tolist() == [0]
    )
    assert not model[0]._non_persistent_buffers_set and model[1].num_batches_tracked == 0

@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_features_of_a_traced_encoder():
    model = encoder().eval()
    traced = torch.jit.trace(model, torch.rand(2, 3, 16, 16))
    np.testing.assert_allclose(
        extract_features(traced, pictures()), extract_features(model, pictures()), atol=1e-5
    )

@pytest.mark.parametrize("cached", [False, True])
def test_a_batchnorm_of_the_batch_is_refused(tmp_path, cached):
    bad = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    with pytest.raises(
        ValueError,
        match="BatchNorm 1 has no running statistics.*features depend on the images beside it",
    ):
        extract_features(bad, pictures(), cache=tmp_path if cached else None)
    good = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    np.testing.assert_allclose(
        extract_features(good, pictures(), batch_size=1),
        extract_features(good, pictures()),
        atol=1e-6,
    )

def test_features_are_those_of_evaluation_mode_and_do_not_depend_on_the_form_or_the_batch():
    model, x = encoder(), pictures()
    tensors = torch.from_numpy(x).permute(0, 3, 1, 2).float()/255
    with torch.no_grad(): expected = model.eval()(tensors).numpy()
    model.train()
    forms = dict(
        array=x,
        images=list(x),
        pil=[Image.fromarray(i) for i in x],
        tensor=tensors,
        tensors=list(tensors),
        batches=iter(tensors.split(3)),
    )
    for name, form in forms.items():
        h = extract_features(model, form, batch_size=4)
        assert h.dtype == np.float32 and h.shape == (11, 5)
        # float32 convolutions differ a little with the batch size
        np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-5, err_msg=name)

@pytest.mark.parametrize("images, error, message", [
    ([], ValueError, "0 images"),
    ([np.zeros((16, 16, 3), np.uint8)]*5 + [np.zeros((16, 8, 3), np.uint8)], ValueError,
     r"image 5 has shape \(3, 16, 8\) but image 4 has \(3, 16, 16\)"),
    (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "torch.uint8"),
    (torch.full((12, 3, 16, 16), torch.nan), ValueError, r"12 of 12 rows of features are not "
                                                         r"finite: rows 0, 1, .*7 and 4 more")])
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message): extract_features(encoder(), images, batch_size=4)

def test_bad_encoder():
    with pytest.raises(ValueError, match=r"features of shape \(4, 3, 16, 16\)"):
        extract_features(nn.Identity(), pictures(4))

def test_colour_baselines():
    x = pictures(5)
    np.testing.assert_allclose(mean_rgb(x), x.reshape(5, -1, 3).mean(1)/255, rtol=1e-6)
    h = colour_histogram(x, bins=16)
    joint, _ = np.histogramdd(x[0].reshape(-1, 3), bins=[np.arange(0, 257, 64)]*3)
    assert h.shape == (5, 3*16 + 64)
    for c in range(3):
        np.testing.assert_allclose(
            h[0, 16 * c : 16 * c + 16],
            np.histogram(x[0, ..., c], np.arange(0, 257, 16))[0] / 256,
            rtol=1e-6,
        )
    np.testing.assert_allclose(h[0, 48:], joint.ravel()/256, rtol=1e-6)

# probe

@pytest.mark.parametrize("n_classes", [2, 3, 9])
def test_probe_is_sklearn_at_the_chosen_C(n_classes):
    (x, y), (vx, vy) = blobs(720, n_classes), blobs(180, n_classes, seed=1)
    # unequal classes, so that the intercepts matter
    keep = (y > 0) | (np.arange(720) % 5 == 0)
    x, y = x[keep], y[keep]
    probe = linear_probe(x, y, vx, vy)
    scaler = StandardScaler().fit(x.astype(np.float64))
    model = LogisticRegression(C=probe.C, max_iter=5000, tol=1e-8).fit(
        scaler.transform(x.astype(np.float64)), y
    )
    proba, margin = (
        model.predict_proba(scaler.transform(vx.astype(np.float64))),
        model.decision_function(scaler.transform(vx.astype(np.float64))),
    )
    # the probe stops at a gradient of 1e-4
    np.testing.assert_allclose(probe.predict_proba(vx), proba, atol=5e-3)
    logits = probe.logits(vx)
    if n_classes == 2:
        np.testing.assert_allclose(
            logits[:, 1] - logits[:, 0], margin, atol=0.02 * np.abs(margin).max()
        )
    else:
        np.testing.assert_allclose(
            logits - logits.mean(1, keepdims=True),
            margin - margin.mean(1, keepdims=True),
            atol=0.02 * np.abs(margin).max(),
        )
    assert (
        probe.val_accuracy == pytest.approx((probe.predict(vx) == vy).mean())
        and probe.val_accuracy > 1.5 / n_classes
    )
    assert probe.C == probe.path.set_index("C").val_log_loss.idxmin()

@pytest.mark.parametrize("n_classes", [2, 5])
def test_module_gives_the_decision_function(n_classes):
    (x, y), (vx, vy) = blobs(200, n_classes), blobs(100, n_classes, seed=1)
    probe = linear_probe(x, y, vx, vy)
    layer = probe.module()
    out = layer(torch.from_numpy(vx)).numpy()
    assert (
        out.shape == (100, n_classes)
        and not layer.training
        and not any(p.requires_grad for p in layer.parameters())
    )
    # float32 weights on features of scale 1e-2 to 1e2
    np.testing.assert_allclose(out, probe.logits(vx), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(probe.classes[out.argmax(1)], probe.predict(vx))

def test_the_log_loss_chooses_where_accuracy_would_not():
    (x, y), (vx, vy) = blobs(120, 3, spread=.3), blobs(60, 3, spread=.3, seed=1)
    probe = linear_probe(x, y, vx, vy)
    path = probe.path.set_index("C")
    assert (
        probe.C == path.val_log_loss.idxmin() and probe.val_accuracy == path.val_accuracy[probe.C]
    )
    # accuracy alone leaves several
    assert (
        path.val_accuracy == path.val_accuracy.max()
    ).sum() > 2 and path.val_log_loss.nunique() > 2

def test_labels_may_be_names_and_test_data_plays_no_part():
    (x, y), (vx, vy) = blobs(120, 3), blobs(60, 3, seed=1)
    names = np.array(["TUM", "ADI", "LYM"])
    probe, plain = linear_probe(x, names[y], vx, names[vy]), linear_probe(x, y, vx, vy)
    assert probe.classes.tolist() == ["ADI", "LYM", "TUM"] and probe.C == plain.C
    # another class order, another path to the same optimum
    assert (probe.predict(vx) == names[plain.predict(vx)]).mean() > .98
    # the training features alone
    np.testing.assert_allclose(probe.mean, x.astype(np.float64).mean(0))

def test_constant_features_are_harmless():
    (x, y), (vx, vy) = blobs(120, 3), blobs(60, 3, seed=1)
    dead, dead_v = (
        np.concatenate(
            [a, np.full((len(a), 1), c, np.float32), np.zeros((len(a), 1), np.float32)], 1
        )
        for a, c in ((x, 0.1), (vx, 7.0))
    )
    probe, plain = linear_probe(dead, y, dead_v, vy), linear_probe(x, y, vx, vy)
    assert np.isfinite(probe.logits(dead_v)).all() and np.abs(probe.coef[:, -2:]).max() < 1e-6
    np.testing.assert_array_equal(probe.predict(dead_v), plain.predict(vx))
    # constant but for the last bit of float32
    jitter = np.where(
        np.arange(120) % 7, np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))
    )
    probe = linear_probe(
        np.concatenate([x, jitter[:, None]], 1),
        y,
        np.concatenate([vx, np.full((60, 1), 0.11, np.float32)], 1),
        vy,
    )
    np.testing.assert_array_equal(
        probe.predict(np.concatenate([vx, np.full((60, 1), 0.11, np.float32)], 1)),
        plain.predict(vx),
    )

def test_non_convergence_is_reported():
    (x, y), (vx, vy) = blobs(120, 3), blobs(60, 3, seed=1)
    with pytest.warns(UserWarning, match="stopped at 2 iterations"):
        probe = linear_probe(x, y, vx, vy, max_iter=2)
    assert not probe.path.converged.any() and (probe.path.iterations <= 2).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert linear_probe(x, y, vx, vy).path.converged.all()

@pytest.mark.parametrize("change, message", [
    (dict(train_y=np.zeros(60, int)), "every training label is"),
    (dict(val_y=np.full(30, 7)), r"validation labels \[7\] do not occur"),
    (dict(val_x=np.zeros((0, 12)), val_y=[]), "0 validation features"),
    (dict(train_y=np.zeros(59, int)), "60 training features and 59 labels"),
    (dict(val_x=np.full((30, 12), np.inf)), "30 of 30 rows of validation features are not finite")])
def test_probe_errors(change, message):
    (x, y), (vx, vy) = blobs(60, 3), blobs(30, 3, seed=1)
    with pytest.raises(ValueError, match=message):
        linear_probe(**dict(train_x=x, train_y=y, val_x=vx, val_y=vy) | change)

# scores and intervals

def predictions(n_classes=5, n=300, n_seeds=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(n_classes, size=n)
    return y, np.where(
        rng.uniform(size=(n_seeds, n)) < 0.7, y, rng.integers(n_classes, size=(n_seeds, n))
    )

def test_scores_agree_with_sklearn():
    y, (p, *_) = predictions()
    s = scores(y, p, 5)
    assert s["accuracy"] == pytest.approx(accuracy_score(y, p)) and s[
        "balanced_accuracy"
    ] == pytest.approx(balanced_accuracy_score(y, p))
    assert s["macro_f1"] == pytest.approx(f1_score(y, p, average="macro"))
    np.testing.assert_allclose(s["per_class_recall"], recall_score(y, p, average=None))
    np.testing.assert_array_equal(s["confusion"], confusion_matrix(y, p))

def test_classes_that_do_not_occur():
    # 2 is predicted but never true, 3 is neither
    y, p = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    s = scores(y, p, 4)
    assert s["per_class_recall"] == [.5, 1., None, None]
    assert s["balanced_accuracy"] == pytest.approx(.75)
    assert s["macro_f1"] == pytest.approx(f1_score(y, p, labels=[0, 1], average="macro"))

@pytest.mark.parametrize("y, p", [([0, 1], [0, 5]), ([0, -1], [0, 1]), ([0, 1], [0]), ([], []), ([0., 1.], [0, 1])])
def test_bad_labels(y, p):
    with pytest.raises(ValueError, match="expected"): scores(np.array(y), np.array(p), 3)

def test_score_intervals_agree_with_a_plain_loop():
    y, p = predictions(n=60, n_classes=3)
    groups = np.repeat([f"patient {i}" for i in range(12)], 5)
    result = score_intervals(y, p, 3, groups, n_boot=4000)
    metrics = dict(
        accuracy=accuracy_score,
        balanced_accuracy=balanced_accuracy_score,
        macro_f1=lambda a, b: f1_score(a, b, average="macro"),
    )
    rng, loop = np.random.default_rng(1), {name: [] for name in metrics}
    for _ in range(250):
        rows = np.concatenate(
            [np.flatnonzero(groups == g) for g in rng.choice(np.unique(groups), 12)]
        )
        draw = rng.integers(3, size=3)
        for name, metric in metrics.items():
            loop[name].append(np.mean([metric(y[rows], p[s, rows]) for s in draw]))
    for name, metric in metrics.items():
        exact = [metric(y, q) for q in p]
        np.testing.assert_allclose(result[name]["per_seed"], exact)
        assert result[name]["mean"] == pytest.approx(np.mean(exact))
        # 250 independent draws: a 2.5 % quantile has a standard error of about 2.7/sqrt(250)
        # standard deviations
        np.testing.assert_allclose(
            result[name]["ci"],
            np.quantile(loop[name], [0.025, 0.975]),
            atol=3.5 * 2.7 / 250**0.5 * np.std(loop[name]),
            err_msg=name,
        )
    alone = interval(p == y, groups, n_boot=4000)
    assert alone["mean"] == pytest.approx(result["accuracy"]["mean"])
    # the same draws, counted in another way
    np.testing.assert_allclose(alone["ci"], result["accuracy"]["ci"])
    np.testing.assert_allclose(
        result["per_class_recall"], np.mean([recall_score(y, q, average=None) for q in p], axis=0)
    )

def test_intervals_cover_when_patients_differ():
    """Nominal 95 %; the percentile bootstrap of 30 patients is known to be a little narrow. 400
    studies: a standard error of 1.2 %."""
    rng = np.random.default_rng(0)
    hit = {"patients": 0, "tiles": 0}
    groups = np.repeat(range(30), 15)
    for _ in range(400):
        correct = rng.uniform(size=(30, 15)) < rng.beta(4, 2, size=(30, 1))
        for name, g in (("patients", groups), ("tiles", None)):
            low, high = interval(correct.ravel(), g, n_boot=200, seed=int(rng.integers(1 << 30)))[
                "ci"
            ]
            hit[name] += low <= 4/6 <= high
    assert .90 <= hit["patients"]/400 <= .98
    assert hit["tiles"]/400 < .80

def test_interval_is_repeatable_and_follows_seeds_and_level():
    rng = np.random.default_rng(0)
    correct = rng.uniform(size=(3, 200)) < np.array([[.5], [.7], [.9]])
    a = interval(correct, seed=1)
    assert a == interval(correct, seed=1) and a["ci"] != interval(correct, seed=2)["ci"]
    assert a["per_seed"] == pytest.approx(correct.mean(1)) and a["mean"] == pytest.approx(
        correct.mean()
    )
    same = interval(np.repeat(correct[1:2], 3, 0), seed=1)["ci"]
    # training seeds that disagree widen it
    assert np.diff(a["ci"]) > 2*np.diff(same)
    assert np.diff(interval(correct, level=.5, seed=1)["ci"]) < np.diff(a["ci"])
    np.testing.assert_allclose(interval(np.ones(50))["ci"], [1, 1])

def test_one_group_has_no_interval():
    with pytest.warns(UserWarning, match="all images are of one group"):
        result = interval([1, 0, 1], ["patient"] * 3)
    assert np.isnan(result["ci"]).all() and result["mean"] == pytest.approx(2/3)
    with pytest.raises(ValueError, match="2 groups for 3 images"):
        interval([1, 0, 1], ["a", "b"])

# error reduction

def test_error_ratio_of_known_cases():
    base, model = np.arange(100) < 60, np.arange(100) < 90
    assert error_reduction(base, model)["ratio"] == pytest.approx(4)
    assert error_reduction(model, base)["ratio"] == pytest.approx(.25)
    same = error_reduction(base, base)
    assert same["ratio"] == 1 and same["ci"] == [1, 1] and same["text"] == "1.00 [1.00, 1.00]"
    # a baseline without seeds against three
    three = error_reduction(base, np.stack([model, base, model]))
    assert three["ratio"] == pytest.approx(.4/np.mean([.1, .4, .1])) and not three["at_least"]

def test_pairing_narrows_the_ratio():
    rng = np.random.default_rng(0)
    hard = rng.uniform(size=400)
    # whatever the model misses the baseline misses too
    base, model = hard < .6, hard < .8
    paired, broken = (
        error_reduction(base, model)["ci"],
        error_reduction(base, rng.permutation(model))["ci"],
    )
    assert np.diff(paired) < .8*np.diff(broken)

def test_no_errors_is_at_least():
    base = np.arange(50) < 40
    result = error_reduction(base, np.ones(50))
    assert result["at_least"] and result["ratio"] == pytest.approx(.2*51)
    assert result["text"].startswith(">= 10.20 [") and np.isfinite(result["ci"]).all()
    # one error: a third of the resamples have none
    rare = np.ones(50)
    rare[0] = 0
    assert (
        ", >= " in error_reduction(base, rare)["text"]
        and not error_reduction(base, rare)["at_least"]
    )
    assert ">=" not in error_reduction(base, base)["text"]
    both = error_reduction(np.ones(50), np.ones(50))
    assert both["ratio"] == 1 and both["at_least"]
    assert error_reduction(np.ones(50), base)["ratio"] == 0
    # one error in 150 answers: fewer than none is not possible
    one = np.ones((3, 50))
    one[0, 0] = 0
    none = error_reduction(np.stack([base]*3), np.ones((3, 50)))["ratio"]
    assert error_reduction(base, one)["ratio"] < none

@pytest.mark.parametrize("bad, message", [
    ([], "answers of shape \\(0,\\)"),
    (np.ones((3, 0)), "at least one image"),
    ([1, np.nan, 0, np.inf], "2 of 4 answers are not finite, the first nan for image 1"),
    ([[1, 0], [1, None]], "1 of 4 answers are not finite"),
    (np.ones((2, 2, 2)), "expected \\(N,\\)")
])
def test_answers_that_are_none_are_refused(bad, message):
    for call in (
        lambda: interval(bad),
        lambda: error_reduction(bad, bad),
        lambda: error_reduction(np.ones(np.shape(bad)[-1]), bad),
        lambda: compare(dict(a=dict(correct=bad), b=dict(correct=bad)), base="a"),
    ):
        with pytest.raises(ValueError, match="expected|not finite"):
            call()
    with pytest.raises(ValueError, match=message): interval(bad)

def test_unpaired_answers_are_refused():
    with pytest.raises(ValueError, match="the same images"): error_reduction(np.ones(5), np.ones(6))
    with pytest.raises(ValueError, match="as many seeds"):
        error_reduction(np.ones((2, 5)), np.ones((3, 5)))

# rank

def test_rankme_golden_value():
    z = Z1.copy()
    with pytest.warns(UserWarning, match="4 rows for 3 dimensions"):
        assert rankme(z) == pytest.approx(2.594468, abs=1e-6)
    assert np.array_equal(z, Z1)
    with pytest.warns(UserWarning):
        assert rankme(torch.from_numpy(Z1).float().requires_grad_()) == pytest.approx(
            2.594468, abs=1e-5
        )

def test_rankme_properties():
    z = np.random.default_rng(0).normal(size=(400, 8))
    dead = z*(np.arange(8) > 0)
    # a dead feature adds 1e-7 of probability
    assert rankme(dead) == pytest.approx(rankme(z[:, 1:]), rel=1e-4)
    assert rankme(z + 100) < 2 and rankme(z + 100, center=True) == pytest.approx(
        rankme(z, center=True)
    )
    assert rankme(np.zeros((40, 8))) == pytest.approx(1, abs=1e-4) and rankme(
        np.ones((40, 8))
    ) == pytest.approx(1, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rankme(z[:32])
    for bad in (np.nan, np.inf):
        z[5, 2] = bad
        with pytest.raises(ValueError, match="1 of 400 rows of embeddings are not finite: rows 5"):
            rankme(z)
    with pytest.raises(ValueError, match="expected"): rankme(np.zeros(5))

# stain

def test_restain():
    x = pictures(6)
    # rounding of the round trip
    assert np.abs(restain(x, strength=0).astype(int) - x).max() <= 1
    a = restain(x, seed=3)
    assert (
        a.shape == x.shape and a.dtype == np.uint8 and np.array_equal(a, restain(list(x), seed=3))
    )
    assert not np.array_equal(a, restain(x, seed=4)) and np.array_equal(
        a[:2], restain(x[:2], seed=3)
    )
    flat = np.full((4, 8, 8, 3), 150, np.uint8)
    own, shared = restain(flat), restain(flat, groups=["a", "a", "b", "b"])
    assert len(np.unique(own[:, 0, 0], axis=0)) == 4
    assert (
        np.array_equal(shared[0], shared[1])
        and np.array_equal(shared[2], shared[3])
        and not np.array_equal(shared[0], shared[2])
    )
    # a group's stain does not depend on the others
    assert np.array_equal(shared[2:], restain(flat[2:], groups=["b", "b"]))
    with pytest.raises(ValueError, match="1 groups for 4 images"):
        restain(flat, groups=["a"])

def test_restain_moves_only_the_two_stains():
    from skimage.color import hed_from_rgb
    # away from 0 and 255, where copies are clipped
    x = pictures(3)//2 + 80
    before, after = (-np.log((i + 1.)/256) @ hed_from_rgb for i in (x, restain(x, strength=.2)))
    for k in range(3):
        # half a gray level at 80, spread by the unmixing
        assert np.abs(after[k, ..., 2] - before[k, ..., 2]).max() < .03
        for stain in range(2):
            slope, shift = np.polyfit(
                before[k, ..., stain].ravel(), after[k, ..., stain].ravel(), 1
            )
            assert np.exp(-.2) <= slope <= np.exp(.2) and abs(shift) <= .06

# table

def test_compare():
    def score(m): return {"mean": m, "ci": [m - .1, m + .1], "per_seed": [m]}
    trident = {
        "accuracy": score(0.8),
        "accuracy_stain_shift": {"mean": 0.6, "ci": [None, None]},
        "steps": 300,
        "seconds": 61.7,
        "augmentation": "weak",
        "by_augmentation": {"weak": {"accuracy": score(0.8)}, "strong": score(0.7)},
    }
    table = compare({"mean_rgb": {"accuracy": score(.5), "rankme": 2.96}, "trident": trident})
    assert isinstance(table, pd.DataFrame) and table.index.tolist() == ["mean_rgb", "trident"]
    assert table.loc["trident"].to_dict() == {
        "accuracy": "0.800 [0.700, 0.900]",
        "accuracy, stain shift": "0.600",
        "augmentation": "weak",
        "steps": "300",
        "seconds": "62",
        "accuracy, weak augmentation": "0.800 [0.700, 0.900]",
        "accuracy, strong augmentation": "0.700 [0.600, 0.800]",
        "RankMe": "",
    }
    assert (
        table.loc["mean_rgb", "RankMe"] == "3.0"
        and table.loc["mean_rgb", "accuracy, stain shift"] == ""
    )


_X = np.random.default_rng(0).normal(size=(60, 4))
_Y = np.arange(60) % 2

@pytest.mark.parametrize("missing", (None, float("nan")))
@pytest.mark.parametrize("ask", (
    lambda who: interval(_Y, who),
    lambda who: score_intervals(_Y, _Y, 2, who),
    lambda who: error_reduction(_Y, 1 - _Y, who),
    lambda who: cross_validate(_X, _Y, who, 3),
    lambda who: label_budget(_X, _Y, who, _X, _Y),
    lambda who: position_probe(_X, _X, who, _X, _X, ["d"]*60),
))
def test_rows_without_a_patient_are_no_patient(ask, missing):
    who = [*["a"]*20, *["b"]*20, *[missing]*19, "c"]
    with pytest.raises(ValueError, match="19 of 60 rows have no group: rows 40, 41"): ask(who)


def test_three_groups_can_be_scored():
    assert cross_validate(_X, _Y, np.repeat([0, 1, 2], 20), 3).per_fold.shape == (3,)
