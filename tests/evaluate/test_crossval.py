"""Cross-validation: scikit-learn's optimum, folds without leaks, the AUC, intervals that cover,
tests and neighbours as in scipy and scikit-learn."""
import importlib.util
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    roc_auc_score,
)
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler

import synthpi.evaluate.budget
import synthpi.evaluate.logistic
from synthpi.evaluate.significance import compare_folds, holm, mcnemar, permutation_test
from synthpi.evaluate.crossval import (
    CrossValidation,
    auc_difference,
    auc_intervals,
    cross_validate,
)
from synthpi.evaluate.budget import label_budget
from synthpi.evaluate.scores import auc
from synthpi.core.groups import group_folds
from synthpi.evaluate.logistic import fit_logistic
from synthpi.evaluate.probes import knn_probe

CS = 10.**np.arange(-4, 5)

def blobs(n=300, n_classes=3, d=12, groups=20, spread=1.5, seed=0):
    rng = np.random.default_rng(seed)
    y, g = rng.integers(n_classes, size=n), rng.integers(groups, size=n)
    mix = rng.normal(size=(d, d))*np.logspace(0, -1.5, d)[:, None]
    return (
        (
            (
                rng.normal(size=(n_classes, d))[y]
                + spread * rng.normal(size=(n, d))
                + 0.5 * rng.normal(size=(groups, d))[g]
            )
            @ mix
            * np.logspace(-2, 2, d)
            + 5
        ).astype(np.float32),
        y,
        g,
    )

def reference(x, y, C, tol=1e-10):
    "scikit-learn's optimum: objective as a mean, and the model with its scaler"
    scaler = StandardScaler().fit(x)
    with warnings.catch_warnings():
        # line searches that end in rounding
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=C, tol=tol, max_iter=20_000).fit(scaler.transform(x), y)
    p = model.predict_proba(scaler.transform(x))
    return log_loss(y, p) + (model.coef_**2).sum()/(2*C*len(x)), scaler, model

# the solver

@pytest.mark.parametrize("path", [0, np.inf], ids=["along C", "every C by itself"])
@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_the_optimum_is_scikit_learns(monkeypatch, path, n_classes):
    monkeypatch.setattr(synthpi.evaluate.logistic, "PATH_FROM", path)
    x, y, g = blobs(n_classes=n_classes)
    x = x.astype(np.float64)
    train = np.stack([g % 3 != k for k in range(3)])
    Cs = np.array([1., 1e-4, 100., 1e-2])                                        # in any order
    fits = fit_logistic(x, y, train, Cs)
    assert fits.converged.all() and fits.coef.shape == (
        3,
        4,
        1 if n_classes == 2 else n_classes,
        12,
    )
    for k, c in itertools.product(range(3), range(4)):
        objective, scaler, model = reference(x[train[k]], y[train[k]], Cs[c])
        assert abs(fits.objective[k, c, 0]/objective - 1) < 1e-6
        z = fits.coef[k, c]*fits.scale[k]
        own = x[train[k]] @ fits.coef[k, c].T + fits.intercept[k, c]
        if n_classes == 2:
            mean_loss = np.logaddexp(0, -(2 * y[train[k]] - 1) * own[:, 0]).mean()
        else:
            mean_loss = (np.log(np.exp(own).sum(1)) - own[np.arange(len(own)), y[train[k]]]).mean()
        # the weights are those of the objective
        assert (
            abs(
                (mean_loss + (z**2).sum() / (2 * Cs[c] * train[k].sum())) / fits.objective[k, c, 0]
                - 1
            )
            < 1e-9
        )
        theirs = model.decision_function(scaler.transform(x)).reshape(len(x), -1)
        if n_classes > 2:
            own, theirs = own - own.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True)
        np.testing.assert_allclose(
            x @ fits.coef[k, c].T + fits.intercept[k, c]
            if n_classes == 2
            else fits.logits(x, k, c) - fits.logits(x, k, c).mean(1, keepdims=True),
            theirs,
            # an objective within 1e-8 leaves weights within about its root
            atol=5e-3 * np.abs(theirs).max(),
        )

@pytest.mark.parametrize("path", [0, np.inf], ids=["along C", "every C by itself"])
def test_many_targets_are_single_regressions_and_one_class_only_is_nan(monkeypatch, path):
    monkeypatch.setattr(synthpi.evaluate.logistic, "PATH_FROM", path)
    x, y, g = blobs(n_classes=5)
    Y = y[:, None] == np.arange(5)
    train = np.stack([g % 2 == 0, g % 2 == 1])
    Y[train[0], 3] = True
    Y[train[1], 1] = False
    fits = fit_logistic(x, Y, train, [.01, 1.])
    for k, t in itertools.product(range(2), range(5)):
        if (k, t) in ((0, 3), (1, 1)):
            assert (
                np.isnan(fits.objective[k, :, t]).all()
                and np.isnan(fits.coef[k, :, t]).all()
                and np.isnan(fits.intercept[k, :, t]).all()
            )
            continue
        for c, C in enumerate((.01, 1.)):
            assert (
                abs(
                    fits.objective[k, c, t]
                    / reference(x[train[k]].astype(float), Y[train[k], t], C)[0]
                    - 1
                )
                < 1e-6
            )
        alone = fit_logistic(x, Y[:, t], train[k], [.01, 1.])
        np.testing.assert_allclose(fits.objective[k, :, t], alone.objective[0, :, 0], rtol=1e-7)
    missing = fit_logistic(x, y, np.stack([y != 2, y >= 0]), [1.])
    assert np.isnan(missing.objective[0]).all() and np.isfinite(missing.objective[1]).all()

def test_separable_classes_and_many_features_converge():
    x, y, _ = blobs(60, 3, d=90, spread=.5)
    fits = fit_logistic(x, y, Cs=CS)
    assert (
        fits.converged.all()
        and (np.diff(fits.objective[0, :, 0]) < 0).all()
        and fits.objective[0, -1, 0] < 1e-4
    )
    tight = fit_logistic(x, y, Cs=CS, tol=1e-13)
    assert (fits.objective / tight.objective - 1).max() < 1e-6 and (
        fits.objective / tight.objective - 1
    ).min() > -1e-10

def test_own_values_of_C_for_every_training_set_and_target():
    x, y, g = blobs(n_classes=4)
    Y, train = y[:, None] == np.arange(4), np.stack([g % 2 == 0, g % 2 == 1])
    own = np.array([[[.1, 1, 10, .01]], [[3, .3, .1, 1]]])
    fits, all_ = fit_logistic(x, Y, train, own), fit_logistic(x, Y, train, np.unique(own))
    for k, t in itertools.product(range(2), range(4)):
        c = np.unique(own).tolist().index(own[k, 0, t])
        np.testing.assert_allclose(fits.objective[k, 0, t], all_.objective[k, c, t], rtol=1e-7)
    np.testing.assert_array_equal(fits.Cs, own)

def test_the_chunks_and_the_blocks_do_not_matter(monkeypatch):
    x, y, g = blobs()
    train = np.stack([g % 3 != k for k in range(3)])
    whole = fit_logistic(x, y, train, [.01, 1., 10.])
    np.testing.assert_allclose(
        fit_logistic(x, y, train, [0.01, 1.0, 10.0], memory=1).objective, whole.objective, rtol=1e-7
    )
    evaluate = synthpi.evaluate.logistic._evaluate
    # 64 rows at a time
    monkeypatch.setattr(
        synthpi.evaluate.logistic, "_evaluate", lambda p, w: evaluate(p, w, block=1)
    )
    np.testing.assert_allclose(
        fit_logistic(x, y, train, [0.01, 1.0, 10.0]).objective, whole.objective, rtol=1e-7
    )

def test_the_gradient_is_that_of_the_objective():
    x, y, g = blobs(90, 3, d=4)
    for labels, L in ((y, 3), ((y[:, None] == [0, 1]).astype(float), 1)):
        train = torch.from_numpy(np.stack([g % 2 == 0, g >= 0])).double()
        shared, *_ = synthpi.evaluate.logistic._standardise(x.astype(float), train)
        p = synthpi.evaluate.logistic._Problems(
            **shared,
            y=torch.from_numpy(labels),
            train=train,
            fold=torch.tensor([0, 1]),
            target=torch.tensor([0, labels.ndim - 1]),
            penalty=torch.tensor([0.1, 0.02]).double(),
        )
        w = torch.randn(2, L, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        f, grad = synthpi.evaluate.logistic._evaluate(p, w)
        numeric = torch.zeros_like(w)
        for i in np.ndindex(*w.shape):
            e = torch.zeros_like(w)
            e[i] = 1e-5
            numeric[i] = (
                (
                    synthpi.evaluate.logistic._evaluate(p, w + e)[0]
                    - synthpi.evaluate.logistic._evaluate(p, w - e)[0]
                )
                / 2e-5
            )[i[0]]
        torch.testing.assert_close(grad, numeric, rtol=1e-5, atol=1e-8)

def test_features_that_do_not_vary_have_no_weight():
    x, y, g = blobs()
    x = x.astype(float)
    train = np.stack([g % 2 == 0, g >= 0])
    sometimes = np.where(
        train[0][:, None], 0.0, 1 + np.random.default_rng(0).normal(size=(len(x), 30))
    )
    # constant; constant in the first training set, where rounding leaves some of them a deviation
    x = np.concatenate([x, np.full((len(x), 1), 3.), sometimes], axis=1)
    fits = fit_logistic(x, y, train, [1.])
    assert (
        (fits.coef[:, :, :, 12] == 0).all()
        and (fits.coef[0, :, :, 13:] == 0).all()
        and (fits.coef[1, :, :, 13:] != 0).all()
        and (fits.scale[0, 12:] == 1).all()
    )
    np.testing.assert_allclose(
        fits.objective[0], fit_logistic(x[:, :12], y, train[0], [1.0]).objective[0], rtol=1e-7
    )

def test_a_fit_that_is_stopped_says_so():
    x, y, _ = blobs()
    with pytest.warns(UserWarning, match="1 of 2 fits stopped at 6 passes"):
        fits = fit_logistic(x, y, Cs=[1e-6, 1e3], max_iter=6)
    assert fits.converged.ravel().tolist() == [True, False]

@pytest.mark.parametrize("x, y, options, message", [
    (np.zeros((3, 2)), [0, 1], {}, "3 rows of features and 2 labels"),
    (np.zeros(3), [0, 1, 1], {}, r"shape \(3,\)"),
    (np.full((2, 2), np.inf), [0, 1], {}, "are not finite: rows 0"),
    (np.zeros((2, 2)), [1, 1], {}, "every label is .*1"),
    (np.zeros((2, 2)), [[0, 2], [1, 0]], {}, "other values than 0 and 1"),
    (np.zeros((2, 2)), np.zeros((2, 2, 2)), {}, r"\(2, 2, 2\)"),
    (np.zeros((2, 2)), [0, 1], dict(train=[0, 1]), "expected bool of shape"),
    (np.zeros((2, 2)), [0, 1], dict(train=[False, False]), "one row at least"),
    (np.zeros((2, 2)), [0, 1], dict(Cs=[0.]), "got C=0.0")])
def test_bad_input_of_the_solver(x, y, options, message):
    with pytest.raises(ValueError, match=message): fit_logistic(x, y, **options)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_optimum():
    x, y, g = blobs()
    np.testing.assert_allclose(
        fit_logistic(x, y, device="cuda").objective, fit_logistic(x, y).objective, rtol=1e-7
    )

# folds

@pytest.mark.parametrize("k, n_groups, labels", [
    (3, 3, None),
    (10, 10, "classes"),
    (5, 37, "classes"),
    (4, 30, "targets"),
    (10, 200, None)
])
def test_folds_hold_whole_groups_and_none_is_empty(k, n_groups, labels):
    rng = np.random.default_rng(k)
    groups = np.concatenate([np.arange(n_groups), rng.integers(n_groups, size=20*n_groups)])
    y = {
        "classes": rng.integers(4, size=len(groups)),
        "targets": rng.uniform(size=(len(groups), 3)) < 0.2,
    }.get(labels)
    fold = group_folds(groups, k, y)
    assert len(set(zip(groups, fold))) == n_groups and set(fold) == set(range(k))
    np.testing.assert_array_equal(
        fold, group_folds(groups.astype(str) if n_groups <= 10 else groups, k, y)
    )
    shuffled = rng.permutation(len(groups))
    np.testing.assert_array_equal(
        group_folds(groups[shuffled], k, None if y is None else y[shuffled]), fold[shuffled]
    )
    if n_groups > 2 * k:
        assert (
            np.bincount(fold).max() < 1.35 * len(fold) / k
            and np.bincount(fold).min() > 0.65 * len(fold) / k
        )

def test_folds_are_stratified_and_follow_the_seed():
    groups = np.repeat(np.arange(40), 10)
    # one group in five holds the class
    y = groups < 8
    assert np.bincount(group_folds(groups, 4, y), weights=y).tolist() == [20]*4
    three = np.where(groups < 8, "a", np.where(groups < 16, "b", "c"))
    for letter, n in (("a", 20), ("b", 20), ("c", 60)):
        assert (
            np.bincount(group_folds(groups, 4, three), weights=three == letter).tolist() == [n] * 4
        )
    # without labels it is left to chance
    assert np.ptp(np.bincount(group_folds(groups, 4, seed=2), weights=y)) > 0
    assert (group_folds(groups, 4, y, seed=0) != group_folds(groups, 4, y, seed=1)).any()

def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match="3 groups for 4 folds: give k=3 or less"):
        group_folds(["a", "b", "c", "a"], 4)
    with pytest.raises(ValueError, match="k=1, expected 2"): group_folds([1, 2], 1)
    with pytest.raises(ValueError, match="3 labels and 2 groups"): group_folds([1, 2], 2, [0, 1, 1])

# the AUC

def test_auc_is_scikit_learns_with_ties():
    rng = np.random.default_rng(0)
    for levels in (2, 5, 1000):
        y, s = rng.uniform(size=200) < .3, rng.integers(levels, size=200)
        np.testing.assert_allclose(auc(y, s), roc_auc_score(y, s), rtol=1e-12)
    assert np.isnan(auc([0, 0], [1, 2])) and auc([0, 1], [1, 1]) == .5

# cross-validation

def by_hand(x, y, fold, inner_parts, Cs):
    "Decision values and C per fold of two-class y, written out with scikit-learn"
    scores, chosen = np.empty(len(y)), []
    for k in range(fold.max() + 1):
        loss = []
        for C in Cs:
            total = 0
            for j in range(inner_parts[k].max() + 1):
                train, held = (inner_parts[k] >= 0) & (inner_parts[k] != j), inner_parts[k] == j
                _, scaler, model = reference(x[train], y[train], C)
                total += log_loss(
                    y[held],
                    model.predict_proba(scaler.transform(x[held])),
                    normalize=False,
                    labels=[0, 1],
                )
            loss.append(total)
        chosen.append(Cs[int(np.argmin(loss))])
        _, scaler, model = reference(x[fold != k], y[fold != k], chosen[-1])
        scores[fold == k] = model.decision_function(scaler.transform(x[fold == k]))
    return scores, np.array(chosen)

def test_cross_validation_is_what_scikit_learn_gives_by_hand():
    x, y, g = blobs(240, 2, groups=12, spread=2.5)
    x, Cs = x.astype(float), np.array([1e-3, 1e-2, .1, 1.])
    fold = g % 4
    parts = np.stack(
        [
            np.where(
                fold == k, -1, (np.searchsorted([f for f in range(4) if f != k], fold) + k) % 3
            )
            for k in range(4)
        ]
    )
    scores, C = by_hand(x, y, fold, parts, Cs)
    result = cross_validate(x, y, g, fold, Cs=Cs)
    np.testing.assert_array_equal(result.C, C)
    np.testing.assert_allclose(result.scores, scores, atol=2e-3)
    np.testing.assert_allclose(
        result.per_fold,
        [roc_auc_score(y[fold == k], scores[fold == k]) for k in range(4)],
        atol=1e-3,
    )
    assert (
        result.mean == result.per_fold.mean()
        and result.n_train == 180
        and result.n_test == 60
        and result.missing == 0
    )

def test_classes_are_scored_as_scikit_learn_scores_them():
    x, y, g = blobs(300, 4, groups=15)
    names = np.array(["d", "a", "c", "b"])[y]
    result = cross_validate(x, names, g, 5, Cs=[.01, 1.], metric="balanced_accuracy")
    assert result.scores.shape == (300, 4) and result.predictions.dtype == names.dtype
    for k in range(5):
        t, p = names[result.fold == k], result.predictions[result.fold == k]
        expected = dict(
            accuracy=accuracy_score(t, p),
            balanced_accuracy=balanced_accuracy_score(t, p),
            macro_f1=f1_score(t, p, average="macro", labels=np.unique(t)),
        )
        for name, value in expected.items():
            np.testing.assert_allclose(result.by_metric[name][k], value)
    np.testing.assert_array_equal(result.per_fold, result.by_metric["balanced_accuracy"])
    assert result.mean > .4 and len(set(zip(g, result.fold))) == 15

def test_targets_are_cross_validated_one_by_one():
    x, y, g = blobs(240, 3, groups=12, spread=2.5)
    Y, fold = y[:, None] == np.arange(3), g % 4
    both = cross_validate(x, Y, g, fold, Cs=[.01, .1, 1.])
    assert (
        both.per_fold.shape == both.C.shape == (3, 4)
        and both.scores.shape == (240, 3)
        and both.predictions.shape == (240, 3)
    )
    for t in range(3):
        one = cross_validate(x, Y[:, t], g, fold, Cs=[.01, .1, 1.])
        np.testing.assert_array_equal(both.C[t], one.C)
        np.testing.assert_allclose(both.per_fold[t], one.per_fold, atol=1e-3)
    np.testing.assert_allclose(both.mean, both.per_fold.mean())
    np.testing.assert_allclose(both.fold_means, both.per_fold.mean(axis=0))

def test_the_evaluation_fold_takes_no_part_in_its_own_fit_or_choice():
    x, y, g = blobs(240, 2, groups=12, spread=2.5)
    # inner folds of whole outer ones, and fresh ones
    for fold in (g % 4, g % 2):
        before = cross_validate(x, y, g, fold, Cs=[0.01, 1.0])
        x2, y2 = x.copy(), y.copy()
        hit = fold == 1
        x2[hit] = 100 * np.random.default_rng(0).normal(size=x2[hit].shape)
        y2[hit] = 1 - y2[hit]
        after = cross_validate(x2, y2, g, fold, Cs=[0.01, 1.0])
        assert before.C[1] == after.C[1]
        x2[hit] = x[hit]
        # only the labels of fold 1 differ: its own scores must not
        again = cross_validate(x2, y2, g, fold, Cs=[0.01, 1.0])
        np.testing.assert_allclose(again.scores[hit], before.scores[hit], atol=1e-3)
        assert np.abs(again.scores[~hit] - before.scores[~hit]).max() > 0.1

def test_inner_folds_hold_whole_groups_of_the_training_part():
    _, y, g = blobs(240, 2, groups=12)
    for fold, K in ((g % 4, 4), (g % 2, 2), (g % 6, 6)):
        for k in range(K):
            part = synthpi.evaluate.crossval._inner_folds(fold, k, g, y, 3, 0)
            assert (
                ((part == -1) == (fold == k)).all()
                and set(part) == {-1, 0, 1, 2}
                and len(set(zip(g, part))) == 12
            )

def test_a_fold_with_one_class_is_nan_and_counted():
    x, y, g = blobs(200, 2, groups=10)
    Y = np.stack([y == 1, y == 1], axis=1)
    Y[g % 5 == 2, 1] = False
    # one group alone holds the second target
    only = np.stack([Y[:, 0], (g == 3) & (y == 1)], axis=1)
    result = cross_validate(x, Y, g, g % 5, Cs=[.1])
    assert (
        np.isnan(result.per_fold[1]).tolist() == [False, False, True, False, False]
        and result.missing == 1
    )
    np.testing.assert_allclose(
        result.mean, (result.per_fold[0].mean() + np.nanmean(result.per_fold[1])) / 2
    )
    lone = cross_validate(x, only, g, g % 5, Cs=[.1, 1.])
    assert (
        np.isnan(lone.per_fold[1]).all()
        and lone.missing == 5
        and np.isnan(lone.C[1, 3])
        and np.isfinite(lone.C[1, [0, 1, 2, 4]]).all()
    )
    np.testing.assert_allclose(lone.mean, lone.per_fold[0].mean())

@pytest.mark.parametrize("change, message", [
    (dict(folds=lambda g: np.arange(len(g)) % 4), "12 groups are in more than one fold: 0, 1, 2, "
                                                  "3, 4, and 7 more"),
     (dict(folds=lambda g: np.where(np.arange(len(g)) == 7, 1 - g % 2, g % 2)),
                                                  "1 groups are in more than one fold: "),
    (dict(folds=13), "12 groups for 13 folds"),
    (dict(folds=lambda g: g[:5]), r"folds of shape \(5,\)"),
    (dict(folds=lambda g: 0*g), "every row is in fold"),
    (dict(metric="f1"), "got metric 'f1'"),
    (dict(metric="auc", y=lambda y: np.arange(len(y)) % 3), "does not fit labels of shape .* with 3 classes"),
    (dict(metric="accuracy", y=lambda y: y[:, None] == [0, 1]), "does not fit labels"),
    (dict(inner=1), "got inner=1"),
    (dict(groups=lambda g: g[:-1]), "groups of shape"),
    (dict(y=lambda y: y[:-1]), "240 rows of features and 239 labels"),
    (dict(metric="accuracy", folds=lambda g: g % 4, y=lambda y: np.where(np.arange(len(y)) == 0, "z", "ab")), None)])
def test_bad_input_of_cross_validation(change, message):
    x, y, g = blobs(240, 2, groups=12)
    y = change.get("y", lambda v: v)(y)
    if message is None:
        y = np.array(list("ab"))[np.arange(240) % 2].astype("U1")
        y[3] = "z"
        message = "class 'z' lies in fold"
    options = {k: v for k, v in change.items() if k not in ("y", "groups", "folds")}
    folds = change.get("folds", 4)
    with pytest.raises(ValueError, match=message):
        cross_validate(
            x,
            y,
            change.get("groups", lambda v: v)(g),
            folds(g) if callable(folds) else folds,
            Cs=[1.0],
            **options,
        )

# intervals

def made(y, scores, fold, groups):
    "A cross-validation as if it had given these decision values"
    per_fold = np.array([auc(y[fold == k], scores[fold == k]) for k in range(fold.max() + 1)])
    return CrossValidation(
        "auc",
        per_fold,
        scores,
        np.ones(len(per_fold)),
        fold,
        y,
        groups,
        np.array([False, True]),
        {},
    )

def study(rng, n_groups=40, rows=20, K=10, between=.8):
    """Subjects that differ in how many positives they have, in their scores, and in how difficult
    they are"""
    g = np.repeat(np.arange(n_groups), rows)
    y = rng.uniform(size=len(g)) < rng.beta(2, 2, n_groups)[g]
    s = (
        rng.normal(size=len(g))
        + (1 + 0.5 * between * rng.normal(size=n_groups))[g] * y
        + between * rng.normal(size=n_groups)[g]
    )
    return made(y, s, (rng.permutation(n_groups) % K)[g], g)

def test_replicates_are_those_of_drawing_subjects_one_by_one():
    cv = study(np.random.default_rng(0), 12, 8, 4)
    replicates = synthpi.evaluate.crossval._replicates(cv, 20, seed=3)[:, 0]
    draws = np.random.default_rng(synthpi.core.seeds.seed_for(3, "subjects")).multinomial(
        12, np.full(12, 1 / 12), size=20
    )
    for w, value in zip(draws, replicates):
        folds = []
        for k in range(4):
            copies = [a for a in range(12) for _ in range(w[a]) if cv.fold[cv.groups == a][0] == k]
            good = pairs = 0
            for i, a in enumerate(copies):
                for j, b in enumerate(copies):
                    # not with its own copy
                    if a == b and i != j: continue
                    positive, negative = (
                        cv.scores[(cv.groups == a) & cv.y],
                        cv.scores[(cv.groups == b) & ~cv.y],
                    )
                    good += (positive[:, None] > negative).sum() + 0.5 * (
                        positive[:, None] == negative
                    ).sum()
                    pairs += len(positive)*len(negative)
            if pairs:
                folds.append((good / pairs, len(copies) / len(np.unique(cv.groups[cv.fold == k]))))
        np.testing.assert_allclose(
            value, np.average([a for a, _ in folds], weights=[w for _, w in folds]), rtol=1e-12
        )

@pytest.mark.slow
def test_intervals_cover_at_their_nominal_rate():
    rng = np.random.default_rng(0)
    truth = np.mean([study(rng).mean for _ in range(600)])
    ci = np.array([auc_intervals(study(rng), n_boot=300, seed=i)["ci"] for i in range(200)])
    covered = ((ci[:, 0] <= truth) & (truth <= ci[:, 1])).mean()
    # nominal 0.95; 200 studies have a standard error of 0.015
    assert .9 <= covered <= .985, covered

@pytest.mark.slow
def test_paired_intervals_of_no_difference_cover_zero_and_are_narrower():
    rng, covered, narrower = np.random.default_rng(1), 0, 0
    for i in range(100):
        a = study(rng)
        b = made(a.y, a.scores + .5*rng.normal(size=len(a.y)), a.fold, a.groups)
        c = made(a.y, a.scores + .5*rng.normal(size=len(a.y)), a.fold, a.groups)
        r = auc_difference(b, c, n_boot=200, seed=i)
        covered += r["ci"][0] <= 0 <= r["ci"][1]
        narrower += np.ptp(r["ci"]) < np.ptp(auc_intervals(b, n_boot=200, seed=i)["ci"])
    assert covered >= 88 and narrower == 100

def test_intervals_of_several_targets_and_of_bad_arms():
    x, y, g = blobs(240, 3, groups=12, spread=2.5)
    Y = y[:, None] == np.arange(3)
    Y[g % 4 == 1, 2] = False
    cv = cross_validate(x, Y, g, g % 4, Cs=[.1])
    r = auc_intervals(cv, n_boot=300)
    assert (
        r["missing"] == 1
        and len(r["per_target"]) == 3
        and len(r["per_fold"]) == 4
        and all(p["ci"][0] < p["mean"] < p["ci"][1] for p in r["per_target"] + [r])
    )
    np.testing.assert_allclose([p["mean"] for p in r["per_target"]], cv.per_target)
    assert (
        auc_intervals(cv, n_boot=300)["ci"]
        == r["ci"]
        != auc_intervals(cv, n_boot=300, seed=1)["ci"]
    )
    wide = auc_intervals(cv, n_boot=300, level=.99)["ci"]
    assert wide[0] < r["ci"][0] and wide[1] > r["ci"][1]
    other = cross_validate(x[:, :3], Y, g, g % 4, Cs=[.1])
    d, back = auc_difference(cv, other, n_boot=300), auc_difference(other, cv, n_boot=300)
    np.testing.assert_allclose(
        [d["difference"], *d["ci"]], [cv.mean - other.mean, -back["ci"][1], -back["ci"][0]]
    )
    with pytest.raises(ValueError, match="differ in fold"):
        auc_difference(cv, cross_validate(x, Y, g, g % 3, Cs=[0.1]))
    with pytest.raises(ValueError, match="scored by accuracy"):
        auc_intervals(cross_validate(x, y, g, g % 4, Cs=[0.1], metric="accuracy"))

# label budget

@pytest.mark.parametrize("unit", ["rows", "groups"])
def test_label_budget(unit):
    x, y, g = blobs(600, 4, groups=20, spread=1.)
    train = g < 14
    names = np.array(list("wxyz"))[y]
    table = label_budget(
        x[train],
        names[train],
        g[train],
        x[~train],
        names[~train],
        g[~train],
        shares=(0.02, 0.2, 1.0),
        repeats=3,
        unit=unit,
        Cs=[0.01, 1.0],
    )
    assert (
        table.groupby("share").size().tolist() == [3, 3, 1]
        and table.rows.iloc[-1] == train.sum()
        and table.groups.iloc[-1] == 14
    )
    if unit == "rows":
        assert (
            (table.rows >= 8) & (abs(table.rows - np.maximum(8, table["share"] * train.sum())) <= 4)
        ).all()
    else:
        assert (
            table.groups >= np.maximum(1, np.round(table["share"] * 14))
        ).all() and table.groups.iloc[0] < 4
    full = fit_logistic(x[train], names[train], Cs=[table.C.iloc[-1]])
    assert (
        table.accuracy.iloc[-1]
        == (full.classes[full.logits(x[~train], 0).argmax(1)] == names[~train]).mean()
    )
    assert (
        table.accuracy.iloc[-1] > table.accuracy[:3].mean()
        and set(table.inner) <= {"groups", "rows"}
        and table.inner.iloc[-1] == "groups"
    )
    again = label_budget(
        x[train],
        names[train],
        g[train],
        x[~train],
        names[~train],
        shares=(0.02, 0.2, 1.0),
        repeats=3,
        unit=unit,
        Cs=[0.01, 1.0],
    )
    assert table.equals(again)
    # repeats are different draws
    assert table.accuracy[:3].nunique() > 1

def test_every_class_is_drawn_and_in_training_of_every_kind_of_inner_fold():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [300, 20, 2])
    for groups in (rng.integers(10, size=322), np.repeat([0, 1, 2], [300, 20, 2])):
        for draw in (synthpi.evaluate.budget._draw_rows, synthpi.evaluate.budget._draw_groups):
            for seed in range(5):
                rows = draw(np.random.default_rng(seed), codes, groups, .01)
                assert np.bincount(codes[rows], minlength=3).min() >= 2 and len(set(rows)) == len(
                    rows
                )
                part, how = synthpi.evaluate.budget._budget_folds(
                    codes[rows], groups[rows], 3, seed
                )
                assert any(len(set(codes[rows][part != j])) == 3 for j in range(part.max() + 1))
                assert how == "rows" or len(set(zip(groups[rows], part))) == len(set(groups[rows]))
    # a class in one group alone cannot be held out by group
    assert how == "rows"

def test_label_budget_of_two_classes_has_an_auc():
    x, y, g = blobs(300, 2, groups=10, spread=3.)
    table = label_budget(x[g < 7], y[g < 7], g[g < 7], x[g >= 7], y[g >= 7], shares=(1.,), Cs=[.1])
    full = fit_logistic(x[g < 7], y[g < 7], Cs=[.1])
    np.testing.assert_allclose(
        table.auc[0], roc_auc_score(y[g >= 7], full.logits(x[g >= 7], 0)[:, 0])
    )

@pytest.mark.parametrize("change, message", [
    (dict(test_y=[0, 5]), r"test labels \[5\]"),
    (dict(test_groups=[3, 99]), "1 groups are in training and test, the first is 3"),
    (dict(shares=[0.]), "got shares="),
    (dict(shares=[1.5]), "got shares="),
    (dict(unit="tiles"), "got unit 'tiles'"),
    (dict(test_x=np.zeros((2, 3))), "12 training and 3 test features"),
    (dict(y=np.arange(100) == 0), "one training row"),
    (dict(y=np.eye(100, 2)), "one target at a time"),
    (dict(groups=[1, 2]), "groups of shape")])
def test_bad_input_of_label_budget(change, message):
    x, y, g = blobs(100, 2)
    with pytest.raises(ValueError, match=message):
        label_budget(**(dict(x=x, y=y, groups=g, test_x=x[:2], test_y=y[:2]) | change))

# comparisons

def test_plain_t_is_scipys_and_corrected_t_is_the_formula():
    rng = np.random.default_rng(0)
    a = rng.uniform(.7, .9, 10)
    b = a - rng.normal(.02, .03, 10)
    r, plain = compare_folds(a, b, 900, 100), stats.ttest_rel(a, b)
    np.testing.assert_allclose(
        [r.t_plain, r.p_plain, r.df], [plain.statistic, plain.pvalue, plain.df], rtol=1e-12
    )
    d = a - b
    t = d.mean()/np.sqrt((1/10 + 100/900)*d.var(ddof=1))
    np.testing.assert_allclose(
        [r.t, r.p, r.difference], [t, 2 * (1 - stats.t.cdf(abs(t), 9)), d.mean()], rtol=1e-9
    )
    back = compare_folds(b, a, 900, 100)
    assert back.t == -r.t and back.p == r.p and r.p > r.p_plain

def test_t_tests_of_equal_arms_and_of_missing_folds():
    a = np.array([.8, .9, np.nan, .7])
    same = compare_folds(a, a, 3, 1)
    assert (same.t, same.p, same.t_plain, same.p_plain, same.left_out, same.folds, same.df) == (
        0,
        1,
        0,
        1,
        1,
        3,
        2,
    )
    constant = compare_folds(a, a - .1, 3, 1)
    assert constant.t == np.inf and constant.p == 0
    b = np.array([.7, np.nan, .6, .5])
    assert compare_folds(a, b, 3, 1).folds == 2 and compare_folds(a, b, 3, 1).left_out == 2
    for bad, message in (
        ((a[:2], a[:2] * np.nan, 3, 1), "0 of 2 folds"),
        ((a, a[:3], 3, 1), "expected"),
        ((a, a, 0, 1), "n_train=0"),
        ((a[None], a[None], 3, 1), "fold_means"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_folds(*bad)

def test_mcnemar_is_the_binomial_formula():
    for only_a, only_b in ((0, 0), (6, 0), (3, 9), (25, 30), (5, 5)):
        a, b = (
            np.repeat([1, 0, 1, 0], [only_a, only_b, 40, 7]),
            np.repeat([0, 1, 1, 0], [only_a, only_b, 40, 7]),
        )
        r, n = mcnemar(a, b), only_a + only_b
        # as in statsmodels, exact=True
        expected = min(1, 2*sum(stats.binom.pmf(i, n, .5) for i in range(min(only_a, only_b) + 1)))
        np.testing.assert_allclose(r.p, expected, rtol=1e-9)
        assert (r.only_a, r.only_b) == (only_a, only_b) and r.exact
        np.testing.assert_allclose(r.difference, (only_a - only_b)/len(a))
    with pytest.raises(ValueError, match="right .1. and wrong"): mcnemar([.5, 1], [0, 1])
    with pytest.raises(ValueError, match="expected"): mcnemar([1, 0], [1])

def test_permutation_test_is_scipys():
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(9), rng.integers(3, 12, 9))
    a = rng.uniform(size=len(g)) < .8
    b = rng.uniform(size=len(g)) < .6
    sums = [np.bincount(g, weights=v.astype(float)) for v in (a, b)]
    theirs = stats.permutation_test(
        sums,
        lambda x, y, axis: (x - y).sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
    )
    ours = permutation_test(a, b, g)
    assert ours.exact
    np.testing.assert_allclose(ours.p, theirs.pvalue, rtol=1e-12)
    by_hand = [
        abs(np.dot(s, sums[0] - sums[1])) >= abs((sums[0] - sums[1]).sum()) - 1e-9
        for s in itertools.product([1, -1], repeat=9)
    ]
    assert ours.p == np.mean(by_hand)
    drawn = permutation_test(a, b, g, n_resamples=500, seed=1)
    assert (
        not drawn.exact
        and abs(drawn.p - ours.p) < 4 * np.sqrt(ours.p * (1 - ours.p) / 500) + 0.004
        and drawn == permutation_test(a, b, g, n_resamples=500, seed=1)
    )
    assert permutation_test(np.ones(100), np.zeros(100), n_resamples=99).p == .01
    assert permutation_test(a, a, g).p == 1
    np.testing.assert_allclose(ours.difference, a.mean() - b.mean())

def test_permutation_p_is_uniform_without_a_difference():
    rng = np.random.default_rng(0)
    p = [
        permutation_test(
            *rng.normal(size=(2, 120)) + rng.normal(size=(2, 30))[:, np.repeat(np.arange(30), 4)],
            np.repeat(np.arange(30), 4),
            n_resamples=199,
            seed=i,
        ).p
        for i in range(400)
    ]
    assert .025 < np.mean(np.array(p) <= .05) < .08 and abs(np.mean(p) - .5) < .05

def test_holm_is_the_procedure_step_by_step():
    rng = np.random.default_rng(0)
    for m in (1, 2, 5, 12):
        p = rng.uniform(size=m)**3
        adjusted = holm(p)
        for level in (.01, .05, .2, .5):
            rejected, order = np.zeros(m, bool), np.argsort(p)
            for step, i in enumerate(order):
                if p[i] > level/(m - step): break
                rejected[i] = True
            np.testing.assert_array_equal(adjusted <= level, rejected)
    np.testing.assert_allclose(holm([.02, np.nan, .5, .01]), [.04, np.nan, .5, .03])
    assert holm([]).shape == (0,) and (holm([.6, .7, .8]) == 1).all()

# neighbours

@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbours_are_scikit_learns(metric, dtype):
    x, y, _ = blobs(500, 4, d=16)
    x, q, y = x[:400].astype(dtype), x[400:].astype(dtype), np.array(list("wxyz"))[y]
    model = KNeighborsClassifier(7, algorithm="brute", metric=metric).fit(
        x.astype(np.float64), y[:400]
    )
    distance, index = model.kneighbors(q.astype(np.float64))
    for memory in (2**28, 1, 4*8*400*30):
        near = knn_probe(x, y[:400], q, k=7, metric=metric, memory=memory)
        np.testing.assert_array_equal(near.index, index)
        np.testing.assert_allclose(near.distance, distance, rtol=1e-6, atol=1e-12)
        np.testing.assert_array_equal(near.predictions, model.predict(q.astype(np.float64)))
        np.testing.assert_allclose(near.votes, model.predict_proba(q.astype(np.float64)))
    with torch.inference_mode():
        np.testing.assert_array_equal(
            knn_probe(torch.from_numpy(x), y[:400], torch.from_numpy(q), k=7, metric=metric).index,
            index,
        )

@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_ties_go_to_the_lower_row_and_near_ties_to_the_nearer(metric):
    rng = np.random.default_rng(0)
    base = 1e3 + rng.normal(size=(10, 32))
    # exact copies, far from the origin: the product alone would tell them apart
    x = base[rng.integers(10, size=200)]
    near = knn_probe(x, np.arange(200), base, k=30, metric=metric)
    for row, b in zip(near.index, base):
        copies = np.flatnonzero((x == b).all(axis=1))
        np.testing.assert_array_equal(row[:len(copies)], copies[:30])
    assert (np.diff(near.distance) >= 0).all()
    tie = (np.diff(near.distance) == 0)
    assert tie.any() and (np.diff(near.index)[tie] > 0).all()
    if metric == "euclidean":
        # in millionths, 1e4 from the origin: far below what the product can tell apart
        offset = rng.permutation(50) + 1.
        close = np.full((50, 4), 1e4) + 1e-6*offset[:, None]*[1, 0, 0, 0]
        np.testing.assert_array_equal(
            knn_probe(close, np.arange(50), np.full((1, 4), 1e4), k=3, metric="euclidean").index[0],
            np.argsort(offset)[:3],
        )

def test_rows_of_zeros_have_no_direction():
    x = np.array([[0., 0], [1, 0], [0, 1], [-1, 0], [0, 0]])
    near = knn_probe(x, list("abcde"), np.array([[2., 0], [0, 0]]), k=5)
    np.testing.assert_array_equal(near.index, [[1, 0, 2, 4, 3], [0, 1, 2, 3, 4]])
    np.testing.assert_allclose(near.distance, [[0, 1, 1, 1, 2], [1]*5], atol=1e-12)
    distance, _ = (
        NearestNeighbors(n_neighbors=5, algorithm="brute", metric="cosine")
        .fit(x)
        .kneighbors([[2.0, 0], [0, 0]])
    )
    np.testing.assert_allclose(near.distance, distance, atol=1e-12)

@pytest.mark.parametrize("change, message", [
    (dict(k=0), "got k=0"),
    (dict(k=7), "got k=7, expected 1 to 6"),
    (dict(metric="l1"), "got metric 'l1'"),
    (dict(train_y=[1, 2]), "6 training features and 2 labels"),
    (dict(test_x=np.zeros((2, 3))), "2 training and 3 test"),
    (dict(test_x=np.full((2, 2), np.nan)), "2 of 2 rows of test features"),
    (dict(train_x=np.zeros(6)), r"training features of shape \(6,\)")])
def test_bad_input_of_neighbours(change, message):
    with pytest.raises(ValueError, match=message):
        knn_probe(
            **(
                dict(train_x=np.zeros((6, 2)), train_y=np.arange(6), test_x=np.zeros((2, 2)), k=2)
                | change
            )
        )

# the benchmark

@pytest.mark.slow
def test_the_benchmark_solves_the_same_problems():
    spec = importlib.util.spec_from_file_location(
        "benchmark_crossval", Path(__file__).parents[1] / "benchmarks" / "crossval.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    r = benchmark.run(quick=True)
    assert (
        r["objective_above_best"]["batch"] < 1e-6
        and r["objective_above_best"]["plain loop, tolerance 1e-6"] < 1e-6
        and r["times_faster"]["plain loop, tolerance 1e-6"]["min"] > 0
    )
