"""Quantities from frozen features: against scikit-learn written out, groups never split, intervals
that cover."""
import numpy as np
import pytest
from scipy.stats import t
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from synthpi.evaluate.regression import cross_regress, r2_difference, r2_interval

RNG = np.random.default_rng(0)
PATIENT = np.repeat([f"p{i}" for i in range(12)], 7)
X = RNG.normal(size=(84, 6))
Y = np.stack([X[:, 0] + .5*RNG.normal(size=84), 100*X[:, 1] + RNG.normal(size=84)*200], 1)

def test_predictions_are_those_of_a_loop():
    alphas, found = (
        [0.1, 10.0, 1000.0],
        cross_regress(X, Y, PATIENT, folds=4, alphas=[0.1, 10.0, 1000.0], inner=3),
    )
    for k in range(4):
        rest = found.fold == k
        x, y = X[~rest], Y[~rest]
        for q in range(2):
            a = found.alpha[q, k]
            assert a in alphas
            s = StandardScaler().fit(x)
            assert np.allclose(
                found.predicted[rest, q],
                Ridge(alpha=a).fit(s.transform(x), y[:, q]).predict(s.transform(X[rest])),
            )
    assert np.allclose(found.r2, r2_score(Y, found.predicted, multioutput="raw_values"))

def test_the_penalty_is_the_best_of_the_inner_folds():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(84, 60))
    y = noise[:, 0]*.1 + rng.normal(size=84)
    found = cross_regress(np.hstack([noise]), y, PATIENT, folds=3, alphas=[1e-3, 1e5])
    # 60 features, hardly a signal: shrink
    assert (found.alpha == 1e5).all() and found.predicted.shape == y.shape
    assert (
        cross_regress(X, X @ np.arange(6.0), PATIENT, folds=3, alphas=[1e-3, 1e5]).alpha == 1e-3
    ).all()

def test_no_patient_is_in_two_folds_and_the_seed_decides_which_share_one():
    folds = [
        cross_regress(X, Y[:, 0], PATIENT, folds=4, alphas=[1.0], seed=s).fold for s in (0, 0, 1)
    ]
    for fold in folds:
        assert all(len(set(fold[PATIENT == p])) == 1 for p in set(PATIENT)) and set(fold) == {
            0,
            1,
            2,
            3,
        }
    assert (folds[0] == folds[1]).all() and (folds[0] != folds[2]).any()

def test_quantities_do_not_disturb_each_other():
    both, alone = cross_regress(X, Y, PATIENT, folds=4), cross_regress(X, Y[:, 1], PATIENT, folds=4)
    assert np.allclose(both.predicted[:, 1], alone.predicted)

def test_intervals_leave_out_patients_and_seeds():
    predicted = np.stack([Y[:, 0] + RNG.normal(size=84)*s for s in (.3, .5)])
    found = r2_interval(Y[:, 0], predicted, PATIENT)
    assert (
        np.allclose(found["per_seed"], [r2_score(Y[:, 0], p) for p in predicted])
        and found["ci"][0] < found["mean"] < found["ci"][1]
    )
    def log(rows, seeds):
        return np.log(1 - np.mean([r2_score(Y[rows, 0], predicted[s][rows]) for s in seeds]))
    full, names = log(np.arange(84), (0, 1)), np.unique(PATIENT)
    left, one = (
        np.array([log(np.flatnonzero(PATIENT != p), (0, 1)) for p in names]),
        np.array([log(np.arange(84), (s,)) for s in (0, 1)]),
    )
    half = t.ppf(0.975, 11) * np.sqrt(
        11 / 12 * ((left - left.mean()) ** 2).sum() + 1 / 2 * ((one - one.mean()) ** 2).sum()
    )
    assert np.allclose(found["ci"], [1 - np.exp(full + half), 1 - np.exp(full - half)])
    difference = r2_difference(Y[:, 0], predicted[1], predicted[0], PATIENT)
    assert (
        np.isclose(difference["mean"], found["per_seed"][0] - found["per_seed"][1])
        and difference["ci"][0] > 0
    )
    assert r2_difference(Y[:, 0], predicted, predicted, PATIENT)["ci"] == [0, 0]
    wide, narrow = (r2_interval(Y[:, 0], predicted, PATIENT, level=q)["ci"] for q in (.99, .8))
    assert wide[0] < found["ci"][0] < narrow[0] < narrow[1] < found["ci"][1] < wide[1]

@pytest.mark.parametrize("n", [10, 40])
def test_intervals_cover(n):
    """95 % intervals over patients that differ; 0.89 to 0.99 is what 400 simulations allow around
    the 0.92 to 0.95 that was found"""
    rng, hits = np.random.default_rng(2), np.zeros(2)
    def draw(n):
        g = np.repeat(np.arange(n), 12)
        def noise(): return .6*rng.normal(size=n)[g] + .8*rng.normal(size=12*n)
        y, scale = noise(), np.exp(.3*rng.normal(size=n))[g]
        return g, y, y + .8*scale*noise(), y + .65*scale*noise()
    g, y, a, b = draw(30000)
    true = r2_score(y, a), r2_score(y, b) - r2_score(y, a)
    for _ in range(400):
        g, y, a, b = draw(n)
        for k, ci in enumerate((r2_interval(y, a, g)["ci"], r2_difference(y, a, b, g)["ci"])):
            hits[k] += ci[0] <= true[k] <= ci[1]
    assert (.89 <= hits/400).all() and (hits/400 <= .99).all(), hits/400

@pytest.mark.parametrize("change, says", [
    ({"x": X[:, 0]}, "features of shape (84,)"),
    ({"y": Y[:5]}, "quantities of shape (5, 2)"),
    ({"groups": PATIENT[:5]}, "groups of shape (5,)"),
    ({"x": np.where(np.arange(84)[:, None] == 3, np.nan, X)}, "1 of 84 rows of features"),
                                          ({"y": np.where(np.arange(84) == 3, np.inf, Y[:, 0])},
                                           "1 of 84 rows of quantities"),
                                          ({"folds": 13}, "folds=13 for 12 groups"),
                                          ({"folds": 1}, "folds=1"),
                                          ({"groups": np.where(PATIENT == "p0", "a", "b")}, "2 groups"),
                                          ({"y": np.ones(84)}, "quantity 0 has the same value in all 84 rows")])
def test_what_cannot_be_answered_is_refused(change, says):
    with pytest.raises(ValueError) as error:
        cross_regress(**({"x": X, "y": Y, "groups": PATIENT} | change))
    assert says in str(error.value)

def test_one_patient_has_no_interval():
    with pytest.warns(UserWarning, match="one group"):
        assert np.isnan(r2_interval(Y[:, 0], Y[:, 0] + 0.1, np.zeros(84))["ci"]).all()

def test_one_quantity_at_a_time():
    with pytest.raises(ValueError, match=r"true values of shape \(84, 1\)"):
        r2_interval(Y[:, :1], Y[:, 0], PATIENT)
