"""The figures of position: shuffle and common bins, components against NumPy, what is drawn and
written, what is refused. (UMAP, slow to compile, is in the notebook.)"""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

import synthpi.explain.places as room
from synthpi.losses.geometry import distance_agreement
from synthpi.explain.places import (
    distance_errors,
    plot_distance_errors,
    plot_folds,
    plot_positions,
    plot_region_auc,
    position_components,
    shuffled_agreement,
)

RNG = np.random.default_rng(0)
MM = RNG.uniform(-100, 100, (60, 3))
VOLUME = np.repeat(list("abc"), 20)
Z = (MM/40 + RNG.normal(0, .3, MM.shape)).astype(np.float32)
MAP = {"coords": RNG.normal(size=(60, 2)), "trustworthiness": .876}


def texts(fig): return [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]

def readable(fig):
    fig.draw_without_rendering()
    assert min(t.get_fontsize() for t in texts(fig)) >= 8
    assert fig not in map(plt.figure, plt.get_fignums())                                   # closed
    return fig


# errors of distance
def test_the_shuffle_is_a_permutation_with_a_scale_of_its_own():
    for seed in (0, 1):
        rows = np.random.default_rng(seed).permutation(60)
        assert not (rows == np.arange(60)).all()
        a, b = (
            shuffled_agreement(Z, MM, VOLUME, seed),
            distance_agreement(Z[rows], MM, VOLUME, scale="fit"),
        )
        assert a[:6] == b[:6] and np.array_equal(a.counts, b.counts)
    assert (
        shuffled_agreement(Z, MM, seed=0).mean_abs_error
        != shuffled_agreement(Z, MM, seed=1).mean_abs_error
    )
    assert a.scale != pytest.approx(distance_agreement(Z, MM, scale="fit").scale)
    assert (
        shuffled_agreement(Z, MM, scale=40.0).scale == 40
        and shuffled_agreement(torch.from_numpy(Z), MM, VOLUME, pairs="within").pairs == 3 * 190
    )


def test_all_arms_are_judged_on_the_same_pairs_and_bins():
    other = RNG.normal(size=(60, 5))
    found = distance_errors(
        {"a": Z, "b": other}, MM, VOLUME, shuffle="b", bins=17, seed=3, pairs="cross"
    )
    assert list(found) == ["a", "b", "shuffled"] and {a.pairs for a in found.values()} == {3*400}
    # nothing beyond the last bin
    for a in found.values():
        assert (
            np.array_equal(a.edges, found["a"].edges)
            and a.counts.sum() == a.pairs
            and len(a.counts) == 17
            and a.edges[0] == 0
        )
    one = shuffled_agreement(other, MM, VOLUME, 3, pairs="cross")
    assert (
        found["shuffled"].mean_abs_error == one.mean_abs_error
        and found["a"].mean_abs_error
        == distance_agreement(Z, MM, VOLUME, "cross", "fit").mean_abs_error
    )
    errors = [
        np.abs(
            a.scale * np.linalg.norm(x[:, None] - x, axis=2)
            - np.linalg.norm(MM[:, None] - MM, axis=2)
        )[VOLUME[:, None] != VOLUME].max()
        for a, x in zip(found.values(), (Z.astype(float), other))
    ]
    assert found["a"].edges[-1] >= max(errors) - 1e-3
    assert {a.scale for a in distance_errors({"a": Z}, MM, scale=40.).values()} == {40.}
    with pytest.raises(ValueError, match="shuffle='c' with the arms a, b"):
        distance_errors({"a": Z, "b": other}, MM, shuffle="c")
    with pytest.raises(ValueError, match="none that is named 'shuffled'"):
        distance_errors({"shuffled": Z}, MM)
    with pytest.raises(ValueError, match="0 arms"): distance_errors({}, MM)


def test_histograms_are_shares_with_marked_means():
    found = distance_errors({"isimed": Z, "random_encoder": RNG.normal(size=(60, 5))}, MM)
    fig = readable(plot_distance_errors(found))
    assert len(fig.axes) == 3
    for ax, (arm, a) in zip(fig.axes, found.items()):
        assert (
            np.allclose(ax.patches[0].get_data().values, a.counts / a.counts.sum())
            and ax.lines[0].get_xdata()[0] == a.mean_abs_error
        )
        assert (
            len(ax.patches) == 2 + (arm != "isimed")
            and ax.texts[0].get_text().startswith(f"{arm}\nmean {a.mean_abs_error:.3g} mm")
            and "beyond" not in ax.texts[0].get_text()
        )
        # told apart without colour
        if arm != "isimed":
            assert (
                np.allclose(
                    ax.patches[2].get_data().values, found["isimed"].counts / found["isimed"].pairs
                )
                and ax.patches[2].get_linestyle() != "-"
            )
    assert "dashed: isimed" in fig.axes[-1].get_xlabel()
    short = distance_agreement(Z, MM, scale="fit", bins=np.linspace(0, 5, 11))
    beyond = 1 - short.counts.sum()/short.pairs
    assert (
        beyond > 0.1
        and f"{beyond:.1%} of the pairs beyond 5 px"
        in plot_distance_errors({"a": short}, unit="px").axes[0].texts[0].get_text()
    )
    assert "dashed" not in plot_distance_errors({"a": short}).axes[0].get_xlabel()
    with pytest.raises(ValueError, match="b has 10 bins from 0 to 5 and a has 50"):
        plot_distance_errors({"a": distance_agreement(Z, MM), "b": short})
    with pytest.raises(ValueError, match="0 arms"): plot_distance_errors({})


# positions
def test_components_are_those_of_the_covariance():
    h = RNG.normal(size=(60, 7)) @ RNG.normal(size=(7, 7)) + 5
    parts, share = position_components(h, MM)
    values, vectors = np.linalg.eigh(np.cov(h.T))
    assert np.allclose(share, values[::-1][:3]/values.sum())
    expected = (h - h.mean(0)) @ vectors[:, ::-1][:, :3]
    for k in range(3):
        assert np.allclose(parts[:, k], expected[:, k]) or np.allclose(parts[:, k], -expected[:, k])
        r = [np.corrcoef(parts[:, k], MM[:, a])[0, 1] for a in range(3)]
        assert r[np.argmax(np.abs(r))] > 0
    assert np.allclose(position_components(torch.from_numpy(h), MM)[0], parts)


def test_components_of_odd_features():
    parts, share = position_components(np.ones((8, 4)), MM[:8])
    assert not parts.any() and not share.any()
    parts, share = position_components(MM[:8, :2], MM[:8])
    assert not parts[:, 2].any() and share[2] == 0 and share.sum() == pytest.approx(1)
    assert np.isfinite(position_components(Z, np.zeros((60, 3)))[0]).all()
    wide = RNG.normal(size=(60, 20_000))
    assert position_components(wide, MM)[1][0] == pytest.approx(
        np.linalg.svd(wide - wide.mean(0), compute_uv=False)[0] ** 2
        / ((wide - wide.mean(0)) ** 2).sum(),
        rel=0.02,
    )
    for bad in (Z[:4], Z[:, 0], np.where(np.arange(60)[:, None] == 2, np.nan, Z)):
        with pytest.raises(ValueError, match="at least 5 rows, all finite"):
            position_components(bad, MM[: len(bad)])


def test_one_arm_has_a_row_for_each_axis_of_the_body():
    fig = readable(plot_positions({"isimed": Z}, MM, maps={"isimed": MAP}))
    panels, bars = fig.axes[:12], fig.axes[12:]
    parts, share = position_components(Z, MM)
    for axis in range(3):
        row = panels[4*axis:4*axis + 4]
        for ax, xy in zip(
            row, (MAP["coords"], parts[:, [0, 1]], parts[:, [0, 2]], parts[:, [1, 2]])
        ):
            points = ax.collections[0]
            assert np.allclose(points.get_offsets(), xy) and np.allclose(
                points.get_array(), MM[:, axis]
            )
            assert (
                points.get_clim() == (MM[:, axis].min(), MM[:, axis].max())
                and points.get_cmap().name == "viridis"
            )
        assert (
            row[1].get_xlabel() == f"PC 1, {share[0]:.0%}"
            and row[3].get_ylabel() == f"PC 3, {share[2]:.0%}"
        )
    assert [b.get_ylabel() for b in bars] == [
        "left-right, mm",
        "posterior-anterior, mm",
        "inferior-superior, mm",
    ] and [b.get_ylim() for b in bars] == [(c.min(), c.max()) for c in MM.T]
    assert (
        panels[0].get_title() == "trustworthiness 0.88"
        and fig.get_suptitle() == "isimed · 60 crops"
    )


def test_several_arms_have_a_row_each():
    other = {"coords": RNG.normal(size=(60, 2)), "trustworthiness": .5}
    features = {"a": Z, "$b": RNG.normal(size=(60, 9))}
    fig = readable(plot_positions(features, MM, maps={"a": MAP, "$b": other}))
    assert len(fig.axes) == 12 + 6
    for row, (arm, m) in enumerate({"a": MAP, "$b": other}.items()):
        panels = fig.axes[6*row:6*row + 6]
        for k in range(3):
            assert np.allclose(panels[k].collections[0].get_offsets(), m["coords"]) and np.allclose(
                panels[k].collections[0].get_array(), MM[:, k]
            )
            assert np.allclose(
                panels[3 + k].collections[0].get_offsets(),
                position_components(features[arm], MM)[0][:, :2],
            ) and np.allclose(panels[3 + k].collections[0].get_array(), MM[:, k])
        assert (
            panels[0].get_title(loc="left") == f"{arm}\ntrustworthiness {m['trustworthiness']:.2f}"
        )
    assert [b.get_xlabel() for b in fig.axes[12:]] == [
        f"{n}, mm"
        for n in (
            "left-right",
            "left-right",
            "posterior-anterior",
            "posterior-anterior",
            "inferior-superior",
            "inferior-superior",
        )
    ]


def test_maps_are_made_of_the_crops_that_are_drawn(monkeypatch):
    asked = []
    def fake(h, seed):
        asked.append((h, seed))
        return {"coords": np.asarray(h)[:, :2], "trustworthiness": 1.0}
    monkeypatch.setattr(room, "embedding_map", fake)
    fig = plot_positions(Z, MM[:, :2], most=25, seed=4)
    (h, seed), = asked
    rows = [int(np.flatnonzero((Z == x).all(1))[0]) for x in h]
    # two axes: tiles of a slide
    assert (
        seed == 4
        and len(set(rows)) == 25
        and rows == sorted(rows)
        and fig.get_suptitle() == "25 of 60 crops"
        and len(fig.axes) == 2 * 4 + 2
    )
    assert np.allclose(fig.axes[0].collections[0].get_array(), MM[rows, 0]) and np.allclose(
        fig.axes[0].collections[0].get_offsets(), Z[rows, :2]
    )
    assert np.allclose(
        fig.axes[1].collections[0].get_offsets(),
        position_components(Z[rows], MM[rows, :2])[0][:, :2],
    )
    # of all crops
    assert fig.axes[0].collections[0].get_clim() == (MM[:, 0].min(), MM[:, 0].max())
    given = plot_positions({"a": Z}, MM, maps={"a": MAP}, most=25, seed=4)
    assert len(asked) == 1 and np.allclose(
        given.axes[0].collections[0].get_offsets(), MAP["coords"][rows]
    )
    assert not np.array_equal(
        plot_positions(Z, MM, most=25, seed=5).axes[0].collections[0].get_array(),
        fig.axes[0].collections[0].get_array(),
    )


def test_positions_that_do_not_fit():
    for bad, words in (
        (MM[:, 0], r"shape \(60,\)"),
        (np.c_[MM, MM], r"shape \(60, 6\) with names for 3 axes"),
        (np.where(np.arange(60)[:, None] == 0, np.inf, MM), "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            plot_positions(Z, bad)
    with pytest.raises(ValueError, match="b has 59 rows of features and there are 60"):
        plot_positions({"a": Z, "b": Z[1:]}, MM)
    for maps in ({}, {"a": {**MAP, "coords": MAP["coords"][1:]}}):
        with pytest.raises(ValueError, match="no map of 60 points for a"):
            plot_positions({"a": Z}, MM, maps=maps)
    with pytest.raises(ValueError, match="0 arms"): plot_positions({}, MM)


# folds and regions
def test_folds():
    record = {"mean": .9, "ci": [.85, .97], "per_fold": [.8, None, 1., .95]}
    fig = readable(
        plot_folds(
            {
                "isimed": record,
                "raw": [0.5, np.nan, 0.7],
                "mean only": {"mean": 0.6},
                "no interval": {"mean": 0.5, "ci": None, "per_fold": [0.4, 0.6]},
            }
        )
    )
    ax = fig.axes[0]
    dots = [line for line in ax.lines if line.get_marker() == "o" and line.get_markersize() == 4]
    assert [sorted(d.get_xdata()) for d in dots] == [[.8, .95, 1.], [.5, .7], [], [.4, .6]]
    bars = [line for line in ax.lines if line.get_linewidth() == 2.5]
    assert [list(b.get_xdata()) for b in bars] == [[.85, .97]]
    means = [line.get_xdata()[0] for line in ax.lines if line.get_markersize() == 7.5]
    assert means == pytest.approx([.9, .6, .6, .5])
    written = [t.get_text() for t in ax.texts]
    assert (
        "0.900 [0.850, 0.970]\n3 of 4 folds" in written
        and "0.600\n2 of 3 folds" in written
        and "0.600" in written
        and "chance" in written
    )
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "isimed",
        "raw",
        "mean only",
        "no interval",
    ] and ax.yaxis_inverted()
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [.5]
    assert ax.get_xlabel() == "AUC (symbol: mean, bar: 95 % interval, dots: folds)"
    plain = plot_folds({"a": [.2, .4]}, metric="accuracy", chance=.25).axes[0]
    assert plain.get_xlabel() == "accuracy (symbol: mean, dots: folds)" and 0.25 in [
        line.get_xdata()[0] for line in plain.lines
    ]
    assert plot_folds({"a": torch.tensor([.2, .4])}).axes and "95" not in plain.get_xlabel()
    with pytest.raises(ValueError, match=r"b has no fold with an AUC \(2 folds\)"):
        plot_folds({"a": [0.5], "b": [np.nan, None]})
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"): plot_folds({"a": np.full((2, 2), .5)})
    with pytest.raises(ValueError, match="from 0.5 to 90"): plot_folds({"a": [.5, 90]})
    with pytest.raises(ValueError, match="0 arms"): plot_folds({})


def test_regions():
    table = pd.DataFrame(
        [[0.9, 0.8, np.nan], [0.6, 0.3, 0.71]], ["isimed", "$x"], ["liver", "heart", "spine"]
    )
    for given in (
        table,
        {arm: {r: v for r, v in row.items() if v == v} for arm, row in table.T.to_dict().items()},
    ):
        ax = readable(plot_region_auc(given)).axes[0]
        written = np.array([t.get_text() for t in ax.texts]).reshape(4, 2)
        # the mean is over the two regions that both have
        assert written.tolist() == [
            ["0.90", "0.60"],
            ["0.80", "0.30"],
            ["–", "0.71"],
            ["0.85", "0.45"],
        ]
        assert [t.get_text() for t in ax.get_yticklabels()] == [
            "liver",
            "heart",
            "spine",
            "mean of the 2 that all have",
        ] and [t.get_text() for t in ax.get_xticklabels()] == ["isimed", "$x"]
        shade = ax.images[0].get_array()
        assert np.allclose(shade[:2], [[0.8, 0.2], [0.6, 0]]) and shade.mask.tolist() == [
            [False] * 2,
            [False] * 2,
            [True, False],
            [False] * 2,
        ]
    whole = plot_region_auc(table.drop(columns="spine"))
    assert whole.axes[0].get_yticklabels()[-1].get_text() == "mean"
    # one region is its mean
    assert len(plot_region_auc(table[["liver"]]).axes[0].texts) == 2
    # no region in common, no mean
    assert (
        len(
            plot_region_auc(pd.DataFrame([[0.5, np.nan], [np.nan, 0.6]], list("ab"), list("cd")))
            .axes[0]
            .texts
        )
        == 4
    )
    dark = plot_region_auc(pd.DataFrame([[1., .5]], ["a"], ["x", "y"])).axes[0].texts
    assert [t.get_color() for t in dark[:2]] == ["white", "#1A1A1A"]
    for empty in (pd.DataFrame(), {}, {"a": {}}):
        with pytest.raises(ValueError, match="expected at least one of each"):
            plot_region_auc(empty)
