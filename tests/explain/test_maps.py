"""Scores of maps against numbers worked out by hand and scikit-learn, alignment against SciPy,
files of maps, drawings. One UMAP is fitted, in a process whose compiler has to start anyway."""
import json

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from synthpi.core.figures import COLOURS, MARKERS
from synthpi.explain.maps import (
    align_maps,
    embedding_map,
    load_map,
    map_scores,
    plot_map,
    save_map,
)
from synthpi.explain.neighbours import agreement, separation


@pytest.fixture(scope="module")
def made():
    "Features, labels, groups, and the map of them: the only one of this file"
    rng = np.random.default_rng(0)
    labels, groups = np.repeat([0, 1, 2], 20), np.tile(np.repeat(np.arange(4), 5), 3)
    h = 4*rng.normal(size=(3, 8))[labels] + rng.normal(size=(60, 8))
    threads = torch.get_num_threads()
    found = embedding_map(torch.tensor(h), labels=labels, groups=groups)
    assert torch.get_num_threads() == threads
    return h, labels, groups, found


def test_a_map_says_how_it_was_made_and_what_it_kept(made):
    h, labels, groups, found = made
    assert (
        found["coords"].shape == (60, 2)
        and found["coords"].dtype == np.float32
        and np.isfinite(found["coords"]).all()
    )
    assert (
        found["params"] == {"seed": 0, "n_neighbors": 15, "min_dist": 0.1, "pca": 8}
        and found["scored"] == 60
    )
    assert {"umap-learn", "pynndescent", "numba", "scikit-learn", "numpy"} == found[
        "versions"
    ].keys()
    assert (
        found["trustworthiness"] > 0.7
        and found["classes"]["map"]["other_patients"] > 0.9
        and found["patients"]["features"].keys() == {"silhouette", "neighbours", "chance"}
    )
    assert found["classes"]["map"]["silhouette"] == pytest.approx(
        silhouette_score(found["coords"].astype(float), labels), abs=1e-5
    )
    json.dumps({k: v for k, v in found.items() if k != "coords"})


def test_agreement_is_the_share_of_neighbours():
    x = np.array([[0.], [1], [2.1], [10], [11], [12.1]])
    # 2 and 5 have the other label beside them
    assert agreement(x, [0, 0, 1, 1, 1, 0], k=1) == (
        pytest.approx(4 / 6),
        pytest.approx((3 * 2 + 3 * 2) / (6 * 5)),
    )
    rng = np.random.default_rng(0)
    # more rows than a block has
    x, y = rng.normal(size=(700, 3)), rng.integers(4, size=700)
    near = NearestNeighbors(n_neighbors=7).fit(x).kneighbors(return_distance=False)
    share, chance = agreement(x, y, k=7)
    counts = np.bincount(y)
    assert share == pytest.approx((y[near] == y[:, None]).mean()) and chance == pytest.approx(
        (counts * (counts - 1)).sum() / (700 * 699)
    )


def test_neighbours_of_the_same_patient_do_not_count():
    x = np.array([[0.], [.1], [5], [5.1], [5.2]])
    share, chance = agreement(x, ["a", "a", "b", "b", "a"], ["p", "p", "q", "q", "r"], k=1)
    # 0 and 1 see q first (b): no, no; 2 and 3 see r (a): no, no; 4 sees 3 (b): no
    assert share == 0 and chance == pytest.approx(np.mean([1/3, 1/3, 0, 0, 2/4]))
    rng = np.random.default_rng(0)
    x, y, g = rng.normal(size=(60, 3)), rng.integers(3, size=60), rng.integers(5, size=60)
    expected = [
        np.mean(y[o][np.argsort(((x[o] - x[i]) ** 2).sum(1))[:6]] == y[i])
        for i in range(60)
        for o in [np.flatnonzero(g != g[i])]
    ]
    assert agreement(x, y, g, 6)[0] == pytest.approx(np.mean(expected))
    # one patient: nobody has such a neighbour
    assert all(np.isnan(agreement(x, y, np.zeros(60, int))))
    few = agreement(np.arange(4.)[:, None], [0, 0, 0, 1], [0, 1, 1, 1], k=15)
    # fewer such neighbours than asked for
    assert few[0] == pytest.approx(np.mean([2/3, 1, 1, 0]))


def test_unlabelled_points_are_left_out():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), rng.integers(2, size=40)
    more = np.r_[x, rng.normal(size=(10, 2))]
    assert separation(more, np.r_[y, [-1]*10], k=5) == separation(x, y, k=5)
    names = np.array(["b", "a"])[y].tolist()
    assert separation(more, names + [None]*5 + [""]*5, k=5) == separation(x, y, k=5)
    assert (
        np.isnan(separation(x, np.zeros(40, int))["silhouette"])
        and separation(x, np.zeros(40, int))["neighbours"] == 1
    )
    assert all(np.isnan(v) for v in separation(x, [-1]*40).values())
    with pytest.raises(ValueError, match="one for each"): separation(x, y[:-1])
    with pytest.raises(ValueError, match="float64"): separation(x, rng.normal(size=40))


def test_scores_of_many_points_are_those_of_a_sample(monkeypatch):
    import synthpi.explain.maps as room
    monkeypatch.setattr(room, "_SCORED", 50)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y, g = rng.integers(2, size=200), np.arange(200) % 9
    found = map_scores(x, x[:, :2], y, g)
    assert (
        found["scored"] == 50
        and 0.5 < found["trustworthiness"] < 1
        and found == map_scores(x, x[:, :2], y, g)
    )
    rows = np.sort(np.random.default_rng(0).choice(200, 50, replace=False))
    assert found["classes"]["map"] == separation(x[rows, :2], y[rows], g[rows], 15) and found[
        "patients"
    ]["features"] == separation(x[rows], g[rows], None, 15)


def test_alignment():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 2))
    b = a + .4*rng.normal(size=(50, 2))
    found = align_maps(
        {"a": {"coords": a + 3, "trustworthiness": 0.9}, "b": {"coords": 5 * b[:, ::-1]}}
    )
    assert (
        np.allclose(found["a"]["coords"], a + 3, atol=1e-5)
        and found["a"]["trustworthiness"] == 0.9
        and found["a"]["alignment"]["disparity"] < 1e-9
    )
    one, two, disparity = procrustes(a, b[:, ::-1])
    assert found["b"]["alignment"]["disparity"] == pytest.approx(disparity)
    moved, unit = found["b"]["coords"] - found["b"]["coords"].mean(0), two/np.linalg.norm(two)
    assert np.allclose(
        moved / np.linalg.norm(moved),
        unit @ np.linalg.lstsq(one, (a - a.mean(0)) / np.linalg.norm(a - a.mean(0)), rcond=None)[0],
        atol=1e-5,
    )
    # the same spread
    assert np.linalg.norm(moved) == pytest.approx(np.linalg.norm(a - a.mean(0)), rel=1e-5)
    r = np.array(found["b"]["alignment"]["rotation"])
    assert np.allclose(r @ r.T, np.eye(2)) and found["b"]["alignment"]["onto"] == "a"
    with pytest.raises(ValueError, match=r"b has coordinates of shape \(49, 2\)"):
        align_maps({"a": {"coords": a}, "b": {"coords": a[:-1]}})
    with pytest.raises(ValueError, match="0 maps"): align_maps({})
    assert (
        align_maps({"a": {"coords": a}, "flat": {"coords": 0 * a}})["flat"]["alignment"][
            "disparity"
        ]
        == 1
    )


def test_files_of_maps(made, tmp_path):
    *_, groups, found = made
    file = save_map(
        tmp_path / "new" / "m.npz",
        found,
        patient=groups,
        path=[f"{i}.png" for i in range(60)],
        size=np.arange(60.0),
    )
    again, columns = load_map(file)
    assert np.array_equal(again.pop("coords"), found["coords"]) and again == {
        k: v for k, v in found.items() if k != "coords"
    }
    assert (
        columns["patient"].tolist() == groups.tolist()
        and columns["path"][7] == "7.png"
        and columns["size"].dtype == float
    )
    arms, _ = load_map(save_map(tmp_path/"arms.npz", align_maps({"b/x": found, "a": found})))
    assert list(arms) == ["b/x", "a"] and arms["a"]["alignment"]["onto"] == "b/x"
    # nothing that would need a pickle
    with np.load(file, allow_pickle=False) as raw:
        assert all(raw[k].dtype.kind in "uifU" for k in raw.files)
    whole = file.read_bytes()
    for damage in (whole[:200], whole[:-60], b"", b"PK" + whole[2:50]):
        (tmp_path/"bad.npz").write_bytes(damage)
        with pytest.raises(ValueError, match="Pickles are not opened"): load_map(tmp_path/"bad.npz")
    np.savez(tmp_path/"pickle.npz", about=np.array([{"format": "synthpi-map-1"}], dtype=object))
    with pytest.raises(ValueError, match="Pickles are not opened"): load_map(tmp_path/"pickle.npz")
    np.savez(tmp_path/"other.npz", about=np.frombuffer(b'{"format": "x"}', np.uint8))
    with pytest.raises(ValueError, match="format is 'x'"): load_map(tmp_path/"other.npz")
    with pytest.raises(FileNotFoundError, match="no file of maps"): load_map(tmp_path/"none.npz")
    with pytest.raises(ValueError, match="ends in .npz"): save_map(tmp_path/"m.pkl", found)
    with pytest.raises(ValueError, match="patient has 3 values"):
        save_map(tmp_path / "m2.npz", found, patient=[1, 2, 3])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "arms.npz",
        "bad.npz",
        "new",
        "other.npz",
        "pickle.npz",
    ]


def test_input_is_checked_before_the_compiler_starts():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"\(4, 8\)"): embedding_map(np.zeros((4, 8)))
    with pytest.raises(ValueError, match="not finite"): embedding_map(np.full((9, 3), np.nan))
    with pytest.raises(ValueError, match=r"groups of shape \(3,\)"):
        embedding_map(rng.normal(size=(9, 3)), groups=[1, 2, 3])


def titles(fig): return [ax.get_title() for ax in fig.axes]


def test_map_shows_every_class_once_in_the_legend_with_its_own_look():
    labels = np.r_[np.arange(14), -1]
    coords = {
        "a": np.random.rand(15, 2),
        "b": {"coords": np.random.rand(15, 2), "trustworthiness": 0.876},
    }
    fig = plot_map(coords, labels, [f"${i}" for i in range(14)])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["unlabelled"] + [
        f"${i}" for i in range(14)
    ]
    looks = {
        (tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes())
        for c in fig.axes[0].collections
    }
    assert len(looks) == 15 and "0.88" in fig.axes[1].get_title()
    fig.draw_without_rendering()
    with pytest.raises(ValueError, match="b has 3 points"):
        plot_map({"b": np.zeros((3, 2))}, labels, ["x"] * 14)
    with pytest.raises(ValueError, match="labels up to 13"): plot_map(coords, labels, ["x"])
    with pytest.raises(ValueError, match="labels or values"): plot_map(coords)
    with pytest.raises(ValueError, match="labels or values"):
        plot_map(coords, labels, values=labels)


def shown(fig):
    "Legend entry to the points that have its look"
    ax, = [a for a in fig.axes if a.collections]
    return {
        c.get_label(): sorted(c.get_offsets()[:, 0].astype(int).tolist()) for c in ax.collections
    }


@pytest.mark.parametrize(
    "labels, expected",
    [
        (
            np.array([2, 10, 10, 2, None, 2], object),
            {"unlabelled": [4], "2": [0, 3, 5], "10": [1, 2]},
        ),
        (
            np.array([2, 10, 10, 2, np.nan, -1], object),
            {"unlabelled": [4, 5], "2": [0, 3], "10": [1, 2]},
        ),
        (
            np.array(["2", "10", "10", "2", "", "2"]),
            {"unlabelled": [4], "2": [0, 3, 5], "10": [1, 2]},
        ),
        (np.array([7, 3, 3, 7, -1, 7]), {"unlabelled": [4], "7": [0, 3, 5], "3": [1, 2]}),
        (
            ["b", None, "a", 10, 9, "a"],
            {"unlabelled": [1], "a": [2, 5], "b": [0], "10": [3], "9": [4]},
        ),
        (np.array([True, False, True, True, False, True]), {"True": [0, 2, 3, 5], "False": [1, 4]}),
    ],
)
def test_the_legend_names_the_points_that_it_names(labels, expected):
    fig = plot_map({"a": np.c_[np.arange(6), np.zeros(6)]}, labels)
    assert (
        shown(fig) == expected
        and {t.get_text() for t in fig.legends[0].get_texts()} == expected.keys()
    )


def test_class_indices_beside_missing_ones_are_indices():
    coords = {"a": np.c_[np.arange(4), np.zeros(4)]}
    assert shown(
        plot_map(coords, np.array([10, 2, None, 2], object), [f"c{i}" for i in range(11)])
    ) == {"unlabelled": [2], "c10": [0], "c2": [1, 3]}
    with pytest.raises(ValueError, match="labels such as 'b' together with classes"):
        plot_map(coords, np.array(["b", "a", "a", "b"]), ["b", "a"])
    assert agreement(np.arange(4.)[:, None], np.array([0, 0, -1, None], object), k=1) == (1, 1)


def test_map_by_patient_and_by_position(made):
    h, labels, groups, found = made
    fig = plot_map({"a": found}, [f"P{g}" for g in groups])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["P0", "P1", "P2", "P3"]
    assert (
        titles(fig)[0].count("chance") == 2
        and "same patient" in titles(fig)[0]
        and "silhouette" in titles(fig)[0]
    )
    many = plot_map({"a": {"coords": np.random.rand(60, 2)}}, [f"P{i}" for i in range(60)])
    assert not many.legends and "60 groups" in many.texts[0].get_text()
    where = np.c_[np.arange(60.), np.arange(60.)[::-1]]
    where[3, 0] = np.nan
    fig = plot_map(
        {"a": found, "b": found}, values={"left-right": where[:, 0], "up": where[:, 1]}, unit="mm"
    )
    bars = [ax.get_ylabel() for ax in fig.axes[4:]]
    assert (
        bars == ["left-right, mm", "up, mm"] * 2
        and len(fig.axes[0].collections) == 2
        and len(fig.axes[1].collections) == 1
    )
    assert fig.axes[0].collections[1].get_array().tolist() == np.delete(where[:, 0], 3).tolist()
    assert plot_map({"a": found}, values=where[:, 1], unit="mm").axes[1].get_ylabel() == "mm"
    with pytest.raises(ValueError, match="no finite value"):
        plot_map({"a": found}, values=np.full(60, np.nan))
    fig.draw_without_rendering()


def test_aligned_maps_have_common_axes(made):
    found = made[-1]
    aligned = plot_map(
        align_maps({"a": found, "b": {**found, "coords": found["coords"][:, ::-1] * 9}}),
        made[1],
        ["x", "y", "z"],
    )
    assert (
        aligned.axes[0].get_xlim() == aligned.axes[1].get_xlim()
        and "differs from a by 0.00" in titles(aligned)[1]
        and "differs" not in titles(aligned)[0]
    )
    free = plot_map({"a": found, "b": {"coords": found["coords"]*9}}, made[1], ["x", "y", "z"])
    assert free.axes[0].get_xlim() != free.axes[1].get_xlim()


def test_looks_are_all_different():
    assert len(set(COLOURS)) == len(COLOURS) == 12 == len(set(MARKERS))
