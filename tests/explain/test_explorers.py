"""Neighbours, places and pictures of the explorers against NumPy; the same in JupyterLab and
Chromium with --browser."""
import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import traitlets
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from matplotlib import pyplot as plt
from nbconvert import HTMLExporter
from nibabel import Nifti1Image
from PIL import Image

from synthpi.volumes.bodies import write_bodies
from synthpi.volumes.crops import crops_at, grid_crops
from synthpi.explain.saliency import saliency_display
from synthpi.explain.volume_explorer import (
    PLANES,
    explore_volume,
    nearest_crop,
    neighbour_table,
    plot_neighbours,
    render_slice,
    voxel_at,
)
from synthpi.explain.neighbours import nearest_in_others
from synthpi.explain.map_explorer import explore_map, plot_point, plot_points, point_at
from synthpi.explain.pair_explorer import CAVEAT, explore_pairs, plot_pair, rank_pairs, score_table
from synthpi.explain.pictures import ClickablePicture, ComparePicture, picture_png, side_by_side
from synthpi.volumes.scans import prepare_volumes

RNG = np.random.default_rng(0)


def listing(store, size=6, stride=8):
    batches = [b for i in range(len(store)) for b in grid_crops(store, i, size, stride)]
    center, volume = (
        np.concatenate([b[k].numpy() for b in batches]) for k in ("center_mm", "volume_id")
    )
    return np.random.default_rng(1).normal(size=(len(center), 4)), center, volume


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("explore")
    return prepare_volumes(
        write_bodies(tmp / "bodies", n_subjects=4, shape=(24, 18, 24), spacing_mm=18.0),
        tmp / "store",
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Two scans of one subject and one of another, anisotropic, oblique offsets, without labels;
    every voxel has its own value"""
    tmp = tmp_path_factory.mktemp("odd")
    for k, name in enumerate(("a1", "a2", "b")):
        x = np.full((14, 11, 9), 20, np.int16)
        x[2:12, 2:9, 1:8] = 200 + np.arange(10 * 7 * 7).reshape(10, 7, 7)
        affine = np.diag([2.0, 3, 5, 1])
        affine[:3, 3] = -20 * k, 5, 30 * k
        (tmp / "in").mkdir(exist_ok=True)
        Nifti1Image(x, affine).to_filename(tmp / "in" / f"{name}.nii.gz")
    records = [
        {
            "name": n,
            "image": f"{n}.nii.gz",
            "label": None,
            "channel": None,
            "subject": n[0],
            "split": "all",
        }
        for n in ("a1", "a2", "b")
    ]
    return prepare_volumes(
        records, tmp / "store", root=tmp / "in", dtype="float32", percentiles=(0, 100), margin=2
    )


# neighbours
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("per_subject", [1, 2, None])
def test_neighbours_are_those_of_a_loop(metric, per_subject):
    z, subject = RNG.normal(size=(120, 5)), RNG.choice(list("abcdef"), 120)
    for query in (0, 57, 119):
        if metric == "euclidean": d = [np.sqrt(((a - z[query])**2).sum()) for a in z]
        else: d = [1 - a @ z[query]/np.sqrt((a @ a)*(z[query] @ z[query])) for a in z]
        expected, taken = [], {}
        for r in np.argsort(d, kind="stable"):
            if subject[r] == subject[query] or (
                per_subject and taken.get(subject[r], 0) == per_subject
            ):
                continue
            taken[subject[r]] = taken.get(subject[r], 0) + 1
            expected.append(r)
        rows, distance = nearest_in_others(z, subject, query, 7, per_subject, metric)
        assert rows.tolist() == expected[:7]
        assert np.allclose(distance, np.array(d)[rows], atol=1e-12)


def test_neighbours_at_the_edges():
    z = np.zeros((6, 3))
    # no direction: nothing divides by zero
    rows, distance = nearest_in_others(z, list("aabbcc"), 0, k=9, metric="cosine")
    assert rows.tolist() == [2, 4] and np.isfinite(distance).all()
    assert nearest_in_others(z, list("aabbcc"), 0, k=9, per_subject=None)[0].tolist() == [
        2,
        3,
        4,
        5,
    ]
    with pytest.raises(ValueError, match="all 6 crops are of the subject a"):
        nearest_in_others(z, ["a"] * 6, 0)
    with pytest.raises(ValueError, match="metric 'l1', expected one of euclidean, cosine"):
        nearest_in_others(z, list("aabbcc"), 0, metric="l1")
    for bad in ({"k": 0}, {"per_subject": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            nearest_in_others(z, list("aabbcc"), 0, **bad)
    with pytest.raises(ValueError, match=r"\(6, 3\) and 5 subjects"):
        nearest_in_others(z, list("aabbc"), 0)
    for row in (6, -1):
        with pytest.raises(IndexError, match=f"crop {row} of 6"):
            nearest_in_others(z, list("aabbcc"), row)


def test_scans_of_one_subject_are_not_each_others_neighbours(odd):
    z, c, v = listing(odd, 3, 3)
    # the second scan of subject a would be nearest
    z[v == 1] = z[v == 0][: (v == 1).sum()] if (v == 0).sum() == (v == 1).sum() else 0
    table = neighbour_table(odd, z, c, v, 0, k=5, per_subject=None)
    assert table.subject.tolist() == ["a"] + ["b"]*5 and "label" not in table


# places
def test_the_nearest_crop_is_of_this_volume_and_by_millimetres(odd):
    center = odd.position(0, [[3, 3, 3], [3, 5, 3], [3, 3, 4]])
    center = np.concatenate([center, odd.position(1, [[3, 3, 3]])])
    volume = np.array([0, 0, 0, 1])
    assert nearest_crop(odd, 0, (3, 3, 3), center, volume) == 0
    # 4.2 mm and 0.5 mm; the other: 1.8 mm and 4.5 mm
    assert nearest_crop(odd, 0, (3, 4.4, 3.9), center, volume) == 2
    # 4.2 and 2.5 against 1.8 and 2.5
    assert nearest_crop(odd, 0, (3, 4.4, 3.5), center, volume) == 1
    assert nearest_crop(odd, 1, (9, 9, 6), center, volume) == 3
    with pytest.raises(ValueError, match=r"no crop is of volume 2; there are crops of \[0, 1\]"):
        nearest_crop(odd, 2, (0, 0, 0), center, volume)


def test_frames_and_labels_of_the_table(odd, bodies):
    z, c, v = listing(odd, 3, 3)
    world, local = (neighbour_table(odd, z, c, v, 2, frame=f) for f in ("world_mm", "mm_local"))
    assert world.row.tolist() == local.row.tolist()
    for t, frame in ((world, "world_mm"), (local, "mm_local")):
        p = [odd.position(v[r], odd.voxel(v[r], c[[r]]), frame)[0] for r in t.row]
        assert np.allclose(t.distance_mm, [np.linalg.norm(x - p[0]) for x in p], atol=1e-4)
    # the scans lie elsewhere
    assert not np.allclose(world.distance_mm[1:], local.distance_mm[1:])
    for frame in ("box", "voxel_local"):
        with pytest.raises(ValueError, match=f"frame {frame!r}, expected one of world_mm"):
            neighbour_table(odd, z, c, v, 0, frame=frame)
    # crops of 6: the centre lies between voxels, and its voxel is start + 3
    z, c, v = listing(bodies)
    t = neighbour_table(bodies, z, c, v, 5, k=3, label_names={1: "<fat>"})
    for found in t.to_dict("records"):
        i = v[found["row"]]
        at = np.rint(bodies.voxel(i, c[found["row"]]) + .5).astype(int)
        number = bodies.array(i, "label")[tuple(at)]
        assert (
            found["label"] == {1: "<fat>"}.get(number, str(number))
            and found["volume"] == bodies.names[i]
        )
    assert t.distance_mm[0] == t.embedding_distance[0] == 0 and t.subject.nunique() == 4


# pictures
@pytest.mark.parametrize("plane", PLANES)
def test_a_picture_shows_the_voxels_where_voxel_at_finds_them(odd, plane):
    shape, axis = odd.items[1]["shape"], PLANES[plane]
    voxel = shape//2
    picture = render_slice(odd, 1, voxel, plane, side=700)
    h, w = picture.shape[:2]
    u, v = (k for k in range(3) if k != axis)
    mm = (shape*odd.spacing_mm(1))[[u, v]]
    assert max(h, w) == 700 and abs(w/h - mm[0]/mm[1]) < .02
    values = odd.array(1)
    seen = 0
    for y in (.2, .45, .7):
        for x in (.25, .4, .8):
            found = voxel_at(odd, 1, voxel, plane, x, y)
            assert found[axis] == voxel[axis]
            # the middle of that voxel
            cx, cy = (found[u] + .5)/shape[u], 1 - (found[v] + .5)/shape[v]
            pixel = picture[round(cy*h - .5), round(cx*w - .5)].astype(int)
            # under the cross
            if (
                abs(cx * w - w * (voxel[u] + 0.5) / shape[u]) < 14
                or abs(cy * h - h * (1 - (voxel[v] + 0.5) / shape[v])) < 14
            ):
                continue
            assert abs(pixel - 255*values[found]).max() <= 12
            seen += 1
    assert seen >= 4
    # upper left, lower right, inside
    assert (
        voxel_at(odd, 1, voxel, plane, 0, 0)[v] == shape[v] - 1
        and voxel_at(odd, 1, voxel, plane, 1, 1)[u] == shape[u] - 1
    )


def test_cross_frame_and_letters(odd, monkeypatch):
    voxel, yellow = odd.items[0]["shape"]//2, lambda p: np.argwhere((p == (255, 212, 0)).all(-1))
    plain, framed = (
        render_slice(odd, 0, voxel, "coronal"),
        render_slice(odd, 0, voxel, "coronal", (voxel, (4, 3, 2))),
    )
    assert 20 < len(yellow(plain)) < len(yellow(framed))
    n = odd.items[0]["shape"]
    cross = (plain.shape[0]*(1 - (voxel[2] + .5)/n[2]), plain.shape[1]*(voxel[0] + .5)/n[0])
    assert np.allclose(yellow(plain).mean(0), cross, atol=1.5)
    extent = np.ptp(yellow(framed), axis=0)
    assert np.allclose(extent, [plain.shape[0]*2/n[2], plain.shape[1]*4/n[0]], atol=4)
    # the slice does not meet this crop
    off = render_slice(odd, 0, voxel, "coronal", (voxel + [0, 3, 0], (4, 3, 2)))
    assert np.array_equal(off, plain)
    assert not np.array_equal(
        render_slice(odd, 0, voxel, "coronal", (voxel + [0, 1, 0], (4, 3, 2))), plain
    )
    assert not np.array_equal(render_slice(odd, 0, voxel + [0, 1, 0], "coronal"), plain)
    for plane, (left, right, top, bottom) in {
        "axial": "LRAP",
        "coronal": "LRSI",
        "sagittal": "PASI",
    }.items():
        written = {}
        monkeypatch.setattr(
            "PIL.ImageDraw.ImageDraw.text",
            lambda self, xy, letter, **style: written.update({letter: xy}),
        )
        h, w = render_slice(odd, 0, voxel, plane).shape[:2]
        monkeypatch.undo()
        assert (
            written[left][0] < 10
            and written[right][0] > w - 10
            and written[top][1] < 10
            and written[bottom][1] > h - 10
            and len(written) == 4
        )
    for bad in ((-1, 0, 0), odd.items[0]["shape"], (0, 0)):
        with pytest.raises(ValueError, match="expected one of the array"): render_slice(odd, 0, bad)
    with pytest.raises(ValueError, match="plane 'oblique', expected one of axial"):
        render_slice(odd, 0, voxel, "oblique")


def test_neighbour_figure(odd):
    z, c, v = listing(odd, 3, 3)
    table = neighbour_table(odd, z, c, v, 4, k=2, per_subject=None)
    fig = plot_neighbours(odd, table, c, v, (3, 4, 5))
    assert len(fig.axes) == 9 and [ax.get_title().split("\n")[0] for ax in fig.axes[:3]] == [
        "query",
        *(f"{k}. {d:.0f} mm away" for k, d in zip((1, 2), table.distance_mm[1:])),
    ]
    assert [ax.images[0].get_array().shape for ax in fig.axes[::3]] == [(4, 3), (5, 3), (5, 4)]
    for column, found in zip(range(3), table.row):
        crop = crops_at(odd, v[found], c[[found]], (3, 4, 5))["crop"][0, 0].numpy()
        for row, middle in enumerate((crop[:, :, 2], crop[:, 2], crop[1])):
            assert np.array_equal(fig.axes[3 * row + column].images[0].get_array(), middle.T[::-1])
    assert [ax.get_ylabel() for ax in fig.axes[::3]] == list(PLANES) and np.allclose(
        [ax.get_aspect() for ax in fig.axes[::3]], [1.5, 2.5, 5 / 3]
    )
    assert (
        min(
            t.get_fontsize()
            for t in fig.findobj(lambda a: hasattr(a, "get_fontsize"))
            if t.get_text()
        )
        >= 8
    )


# the widgets, without a browser
def test_a_clickable_picture_hears_clicks_and_nothing_else():
    p, heard = ClickablePicture(), []
    assert not p.clickable
    p.on_click(lambda x, y: heard.append((x, y)))
    assert p.clickable
    for message in ({"click": [0.5, 0.25]}, {"click": [-0.1, 2]}, {"other": 1}, "click", None):
        p._handle_custom_msg(message, [])
    assert heard == [(.5, .25), (0, 1)]


def test_places_have_names_and_thumbnails_are_asked_for(monkeypatch):
    p, asked, sent = ClickablePicture(), [], []
    monkeypatch.setattr(p, "send", lambda message, buffers: sent.append((message, buffers)))
    p.on_hover(["a", "b"])
    p._handle_custom_msg({"hover": 0}, [])
    assert not p.thumbnails and not sent and p.names == ["a", "b"]
    p.on_hover(["a", "b", "c"], lambda k: asked.append(k) or bytes([k]))
    for message in (
        {"hover": 2},
        {"hover": 3},
        {"hover": -1},
        {"hover": True},
        {"hover": None},
        {"click": [0, 0]},
        "hover",
        {"hover": 0},
    ):
        p._handle_custom_msg(message, [])
    assert (
        p.thumbnails
        and asked == [2, 0]
        and sent == [({"thumbnail": 2}, [b"\2"]), ({"thumbnail": 0}, [b"\0"])]
    )
    p.put(np.array([[0, .5], [np.nan, .1], [1, .25]]))
    assert np.array_equal(
        np.frombuffer(p.places, "<f4").reshape(3, 2),
        np.float32([[0, 0.5], [np.nan, 0.1], [1, 0.25]]),
        equal_nan=True,
    )
    for bad in ([[0, .5]], [[0, .5, 1]]*3):
        with pytest.raises(ValueError, match="for 3 names"): p.put(bad)


def test_two_pictures_are_mixed_within_bounds():
    p, steps = ComparePicture(first=b"1", second=b"2"), []
    p.on_step(steps.append)
    for message in ({"step": 1}, {"step": -1}, {"step": 0}, {"step": "1"}, {"step": [1]}, 1):
        p._handle_custom_msg(message, [])
    assert steps == [1, -1]
    for trait, bad in (
        ("share", -0.1),
        ("share", 1.1),
        ("mix", "fade"),
        ("names", ["one"]),
        ("width", 0),
    ):
        with pytest.raises(traitlets.TraitError):
            setattr(p, trait, bad)


def test_pictures_side_by_side():
    a, b = RNG.integers(0, 255, (10, 4, 3), np.uint8), RNG.integers(0, 255, (4, 6, 3), np.uint8)
    row = np.array(Image.open(io.BytesIO(side_by_side(picture_png(a), picture_png(b)))))
    assert (
        row.shape == (10, 4 + 8 + 6, 3)
        and np.array_equal(row[:, :4], a)
        and np.array_equal(row[3:7, 12:], b)
        and (row[:, 4:12] == 255).all()
        and (row[:3, 12:] == 255).all()
    )


def test_exploring(bodies):
    z, c, v = listing(bodies)
    e = explore_volume(bodies, z, c, v, volume=1, crop_size=6, k=3)
    shape = bodies.items[1]["shape"]
    assert (
        e.volume.value == 1
        and v[e.query] == 1
        and [s.max for s in e.sliders] == (shape - 1).tolist()
    )
    assert e.query == nearest_crop(bodies, 1, bodies.items[1]["box"].mean(0), c, v)
    assert len(e.table) == 4 and e.table.row[0] == e.query and "<table" in e.list.value
    for plane, axis in PLANES.items():
        e.plane.value = plane
        here = e.voxel
        e.click(.9, .1)
        assert e.voxel == voxel_at(bodies, 1, here, plane, .9, .1) and e.voxel[axis] == here[axis]
        assert (
            e.query == nearest_crop(bodies, 1, e.voxel, c, v)
            and plane in e.picture.alt
            and str(e.voxel) in e.picture.alt
        )
        assert np.array_equal(
            np.array(Image.open(io.BytesIO(e.picture.png))),
            render_slice(bodies, 1, e.voxel, plane, (bodies.voxel(1, c[[e.query]])[0], (6, 6, 6))),
        )
    picture, found = e.picture.png, e.found.png
    # the sagittal slice
    e.sliders[0].value = 2
    assert e.voxel[0] == 2 and e.picture.png != picture
    e.sliders[1].value = 0
    e.sliders[2].value = 0
    assert e.found.png != found and e.query == nearest_crop(bodies, 1, (2, 0, 0), c, v)
    same = e.found.png
    e.plane.value = "axial"
    assert e.found.png == same
    e.volume.value = 3
    assert (
        e.query == nearest_crop(bodies, 3, bodies.items[3]["box"].mean(0), c, v)
        and [s.max for s in e.sliders] == (bodies.items[3]["shape"] - 1).tolist()
        and bodies.names[3] in e.picture.alt
    )
    for n in e.table[1:].to_dict("records"):
        assert f"{n['subject']}, {n['distance_mm']:.0f} mm away, {n['label']}" in e.found.alt


def test_only_volumes_with_crops_are_offered(bodies):
    z, c, v = listing(bodies)
    keep = v != 0
    e = explore_volume(bodies, z[keep], c[keep], v[keep], crop_size=6)
    assert [i for _, i in e.volume.options] == [1, 2, 3] and e.volume.value == 1
    with pytest.raises(
        ValueError,
        match=r"volume=0, of which there is no crop; expected one of \[1, 2, 3\]",
    ):
        explore_volume(bodies, z[keep], c[keep], v[keep], volume=0)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda z, c, v: (z[0], c, v), "of the same crops"),
        (lambda z, c, v: (z, c[:, :2], v), "of the same crops"),
        (lambda z, c, v: (z, c, v[1:]), "of the same crops"),
        (lambda z, c, v: (z, c, v.astype(float)), "whole numbers"),
        (lambda z, c, v: (z[:0], c[:0], v[:0]), "of the same crops"),
        (lambda z, c, v: (z, c, v + 1), "0 to 4|1 to 4"),
        (lambda z, c, v: (z, c, v - 1), "-1 to 2"),
        (
            lambda z, c, v: (np.where(np.arange(len(z))[:, None] == 3, np.nan, z), c, v),
            "1 embeddings and 0 centres are not finite",
        ),
        (
            lambda z, c, v: (z, np.where(np.arange(len(z))[:, None] == 3, np.inf, c), v),
            "0 embeddings and 1 centres",
        ),
    ],
)
def test_what_does_not_fit_is_refused(bodies, change, words):
    with pytest.raises(ValueError, match=words):
        explore_volume(bodies, *change(*listing(bodies)), crop_size=6)


def three(bodies):
    z = np.random.default_rng(2).normal(size=(40, 6))
    return {
        "volume": lambda: explore_volume(bodies, *listing(bodies), crop_size=6),
        "map": lambda: explore_map(COORDS, IMAGES, LABEL, CLASSES, features=z, groups=GROUPS),
        "pairs": lambda: explore_pairs(PAIRS, SCORES, true="true", better=BETTER),
    }


# the widget, which a page cannot show
@pytest.mark.filterwarnings("ignore:Your element with mimetype")
@pytest.mark.parametrize(
    "which,words",
    [("volume", "nearest in other subjects"), ("map", "and its nearest"), ("pairs", CAVEAT)],
)
def test_a_still_picture_stays_without_a_kernel(bodies, monkeypatch, which, words):
    shown = []
    monkeypatch.setattr(
        "synthpi.explain.pictures.display", lambda data, **options: shown.append((data, options))
    )
    e = three(bodies)[which]()
    e._ipython_display_()
    (still, options), (widget, _) = shown
    assert (
        options["raw"]
        and options["metadata"]["image/png"]["alt"] == still["text/plain"]
        and words in still["text/plain"]
    )
    assert (
        widget is e.widget
        and "Run this cell" in repr(widget)
        and len(e.picture.fallback) == 64
        and e.picture.fallback in still["image/png"]
    )
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(still["image/png"]))).convert("RGB"))
    if which == "pairs":
        assert np.array_equal(
            picture, np.array(Image.open(io.BytesIO(picture_png(e._figure(2.4)))).convert("RGB"))
        )
    else:
        first = np.array(Image.open(io.BytesIO(e.picture.png)).convert("RGB"))
        top = (picture.shape[0] - first.shape[0]) // 2
        assert np.array_equal(picture[top : top + first.shape[0], : first.shape[1]], first)
    outputs = [
        nbformat.v4.new_output("display_data", still, metadata=options["metadata"]),
        nbformat.v4.new_output(
            "display_data",
            {
                "application/vnd.jupyter.widget-view+json": {
                    "model_id": "x",
                    "version_major": 2,
                    "version_minor": 0,
                }
            },
        ),
    ]
    html = HTMLExporter(template_name="classic").from_notebook_node(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("e", outputs=outputs)])
    )[0]
    # a page shows the picture, with its text
    assert f'alt="{still["text/plain"]}"' in html and e.picture.fallback in html


@pytest.mark.parametrize("name", ["pictures", "volume_explorer", "map_explorer", "pair_explorer"])
def test_pages_store_no_widgets(name):
    """A page that holds their state would fetch code from elsewhere, draw them as the lessons left
    them, and hide the still picture"""
    nb = json.loads(
        (Path(__file__).parents[2] / f"nbs/explain/{name}.ipynb").read_text(encoding="utf-8")
    )
    assert "widgets" not in nb["metadata"]
    assert any(
        "image/png" in o.get("data", {})
        for c in nb["cells"]
        for o in c.get("outputs", [])
        if o["output_type"] == "display_data"
    )


def test_colab_is_told_to_draw_widgets(monkeypatch):
    "Where google.colab is present, the first picture enables its manager of widgets"
    import anywidget._util as util
    called, colab = [], types.ModuleType("google.colab.output")
    colab.enable_custom_widget_manager = lambda: called.append(1)
    monkeypatch.setitem(sys.modules, "google.colab.output", colab)
    util.enable_custom_widget_manager_once.cache_clear()
    for picture in (ClickablePicture, ComparePicture, ClickablePicture): picture()
    util.enable_custom_widget_manager_once.cache_clear()
    assert called == [1]


# the map
COORDS, LABEL, CLASSES = RNG.normal(size=(40, 2)), np.arange(40) % 4 - 1, ["$a", "b", "c"]
IMAGES = RNG.integers(0, 255, (40, 8, 8, 3), np.uint8)
GROUPS = np.array(list("pqrs"))[np.arange(40)//10]


@pytest.mark.parametrize("style", [{}, {"savefig.bbox": "tight", "figure.dpi": 160}])
def test_a_click_on_a_point_of_the_picture_finds_that_point(style):
    with plt.rc_context(style):
        fig = plot_points(COORDS, LABEL, CLASSES, chosen=7, near=[1, 2])
        picture = np.array(Image.open(io.BytesIO(picture_png(fig))).convert("RGB"))
    black = np.argwhere((picture < 60).all(-1))
    h, w = picture.shape[:2]
    for p in range(40):
        x, y = fig.transFigure.inverted().transform(fig.axes[0].transData.transform(COORDS[p]))
        # not drawn yet: its layout is not settled
        if p % 8 == 0:
            assert point_at(plot_points(COORDS, LABEL, CLASSES, size=4.0), COORDS, x, 1 - y) == p
    found = [
        p
        for p in range(40)
        if point_at(
            fig,
            COORDS,
            *(
                (
                    place := fig.transFigure.inverted().transform(
                        fig.axes[0].transData.transform(COORDS[p])
                    )
                )[0],
                1 - place[1],
            ),
        )
        == p
    ]
    assert len(found) == 40
    x, y = fig.transFigure.inverted().transform(fig.axes[0].transData.transform(COORDS[7]))
    # the ring is drawn where a click is looked for
    assert np.linalg.norm(black - [(1 - y)*h, x*w], axis=1).min() < 14
    assert fig not in map(plt.figure, plt.get_fignums())                                   # closed


def test_what_is_filtered_out_is_gray_and_cannot_be_clicked():
    shown = LABEL == 1
    fig = plot_points(COORDS, LABEL, CLASSES, shown)
    gray, coloured = fig.axes[0].collections[:2]
    assert np.allclose(gray.get_offsets(), COORDS[~shown]) and np.allclose(
        coloured.get_offsets(), COORDS[shown]
    )
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["b"]
    assert {
        point_at(fig, COORDS, x, y, shown)
        for x in np.linspace(0, 1, 9)
        for y in np.linspace(0, 1, 9)
    } <= set(np.flatnonzero(shown))
    nothing = plot_points(COORDS, LABEL, CLASSES, np.zeros(40, bool))
    assert not nothing.legends and point_at(nothing, COORDS, .5, .5, np.zeros(40, bool)) is None
    every = plot_points(COORDS, LABEL, CLASSES)
    assert [t.get_text() for t in every.legends[0].get_texts()] == ["unlabelled", *CLASSES]
    looks = {
        (tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes())
        for c in every.axes[0].collections[:4]
    }
    assert len(looks) == 4
    every.draw_without_rendering()


def test_what_is_behind_a_point():
    maps = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fig = plot_point(
        5,
        [3, 0],
        [0.5, 1.25],
        IMAGES,
        LABEL,
        CLASSES,
        synthetic=lambda r: torch.arange(192).reshape(3, 8, 8) * r / 1000,
        saliency=maps,
        groups=GROUPS,
    )
    axes = [ax for ax in fig.axes if ax.images]
    expected = [
        IMAGES[5],
        np.round(
            255
            * np.arange(192).reshape(3, 8, 8).transpose(1, 2, 0)
            * np.float32(5)
            / np.float32(1000)
        ).astype(np.uint8),
        saliency_display(maps[5]),
        IMAGES[3],
        IMAGES[0],
    ]
    assert len(axes) == 5 and all(
        np.array_equal(ax.images[0].get_array(), e) for ax, e in zip(axes, expected)
    )
    assert [ax.get_title() for ax in axes] == [
        "point 5\n$a\np",
        "synthetic",
        "saliency",
        "1. at 0.5\nc\np",
        "2. at 1.2\nunlabelled\np",
    ]
    fig.draw_without_rendering()
    assert len([ax for ax in plot_point(5, [], [], IMAGES, LABEL, CLASSES).axes if ax.images]) == 1


def test_exploring_a_map():
    z = RNG.normal(size=(40, 6))
    e = explore_map(
        {"coords": COORDS, "trustworthiness": 1.0},
        IMAGES,
        LABEL,
        CLASSES,
        features=z,
        groups=GROUPS,
        k=3,
    )
    assert e.near.tolist() == nearest_in_others(z, GROUPS, 0, 3, None)[0].tolist() and not set(
        e.near
    ) & set(range(10))
    assert [o for o in e.filter.options] == [
        ("unlabelled", -1),
        ("$a", 0),
        ("b", 1),
        ("c", 2),
    ] and e.shown.all()
    first, found = e.picture.png, e.found.png
    e.point.value = 25
    assert (
        e.near.tolist() == nearest_in_others(z, GROUPS, 25, 3, None)[0].tolist()
        and e.picture.png != first
        and e.found.png != found
        and "point 25 is ringed" in e.picture.alt
    )
    assert (
        e.found.alt
        == "Point 25, $a, and its nearest: "
        + "; ".join(f"point {r}, {['$a', 'b', 'c', 'unlabelled'][LABEL[r]]}" for r in e.near)
        + "."
    )
    fig = e._fig
    x, y = fig.transFigure.inverted().transform(fig.axes[0].transData.transform(COORDS[12]))
    e.click(x, 1 - y)
    assert e.point.value == 12
    e.filter.value = [2]
    assert e.shown.tolist() == (LABEL == 2).tolist() and "10 of them in colour" in e.picture.alt
    e.click(x, 1 - y)
    assert LABEL[e.point.value] == 2
    e.filter.value = []
    before = e.point.value
    e.click(.5, .5)
    assert e.point.value == before
    plain = explore_map(COORDS, lambda r: IMAGES[r], k=2)
    near = np.argsort(np.linalg.norm(COORDS - COORDS[0], axis=1))[1:3]
    assert plain.near.tolist() == near.tolist() and plain.filter.value == (-1,)
    assert (
        explore_map(COORDS, IMAGES, features=z, metric="cosine").near.tolist()
        == nearest_in_others(z, np.arange(40), 0, 5, None, "cosine")[0].tolist()
        != nearest_in_others(z, np.arange(40), 0, 5, None)[0].tolist()
    )


def test_points_are_named_where_they_are_drawn_and_patients_filter():
    e = explore_map(COORDS, IMAGES, LABEL, CLASSES, groups=GROUPS)
    assert (
        e.picture.names[5] == "point 5: $a\np"
        and e.picture.names[4] == "point 4: unlabelled\np"
        and len(e.picture.names) == 40
    )
    assert (
        explore_map(COORDS, IMAGES, LABEL, CLASSES).picture.names[5] == "point 5: $a"
        and explore_map(COORDS, IMAGES).patients is None
    )
    def places(): return np.frombuffer(e.picture.places, "<f4").reshape(-1, 2)
    for r in (0, 13, 39): assert point_at(e._fig, COORDS, *places()[r]) == r
    e.patients.value, e.filter.value = [1, 3], [-1, 0, 1]                                  # q and s
    expected = np.isin(GROUPS, ["q", "s"]) & (LABEL < 2)
    assert (
        e.shown.tolist() == expected.tolist() == np.isfinite(places()).all(1).tolist()
        and f"{expected.sum()} of them in colour" in e.picture.alt
    )
    for x in np.linspace(0.1, 0.9, 5):
        e.click(x, 0.5)
        assert expected[e.point.value]
    e.filter.value = [2]
    assert (
        np.isfinite(places()).all(1).tolist()
        == (np.isin(GROUPS, ["q", "s"]) & (LABEL == 2)).tolist()
    )
    whole = np.array(Image.open(io.BytesIO(e._thumbnail(3))))
    assert np.array_equal(whole, IMAGES[3])
    assert Image.open(
        io.BytesIO(explore_map(COORDS, lambda r: np.zeros((300, 600, 3), np.uint8))._thumbnail(0))
    ).size == (192, 96)


def test_a_saliency_is_computed_once_for_points_that_are_chosen():
    asked = {"images": [], "synthetic": [], "saliency": []}
    def told(what, x): return lambda r: asked[what].append(r) or x[r]
    e = explore_map(
        COORDS,
        told("images", IMAGES),
        LABEL,
        CLASSES,
        synthetic=told("synthetic", IMAGES),
        saliency=told("saliency", np.zeros((40, 3, 8, 8))),
        groups=GROUPS,
    )
    for r in (7, 31, 7, 0): e.point.value = r
    e.filter.value, e.patients.value = [1], [0, 2]
    e._thumbnail(20)
    assert (
        asked["saliency"] == asked["synthetic"] == [0, 7, 31]
        and len(set(asked["images"])) == len(asked["images"])
        and 20 in asked["images"]
    )


@pytest.mark.parametrize(
    "change,words",
    [
        ({"coords": COORDS[:, :1]}, r"shape \(40, 1\)"),
        ({"coords": np.full((40, 2), np.nan)}, "finite"),
        ({"coords": COORDS[:1]}, "2 points or more"),
        ({"labels": LABEL + 1}, "up to 3 with 3 classes"),
        ({"labels": LABEL / 2}, "float64"),
        ({"images": IMAGES[1:]}, "39 images for 40"),
        ({"synthetic": IMAGES[1:], "groups": GROUPS[:3]}, "39 synthetic, 3 groups"),
        ({"features": COORDS[1:]}, "39 features"),
        ({"saliency": IMAGES[1:]}, "39 saliency"),
        ({"labels": LABEL[1:]}, "39 labels"),
    ],
)
def test_what_does_not_fit_on_a_map_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        explore_map(
            **{"coords": COORDS, "images": IMAGES, "labels": LABEL, "classes": CLASSES, **change}
        )


# pairs
def solid(*rgb): return np.full((12, 10, 3), rgb, np.uint8)


PAIRS = [
    {
        "primary": solid(200, i, 0),
        "privileged": solid(0, i, 200),
        "true": None if i == 4 else solid(0, 200, i),
        "group": "<ab>"[i % 4],
    }
    for i in range(9)
]
SCORES = pd.DataFrame(
    {
        "pair": [8, 0, 1, 2, 3, 4, 5, 6],
        "group": [PAIRS[i]["group"] for i in (8, 0, 1, 2, 3, 4, 5, 6)],
        "ssim": [0.5, 0.9, 0.1, 0.5, np.nan, 0.7, 0.3, 0.2],
        "l1": [0.4, 0.3, 0.9, 0.2, 0.1, 0.8, 0.05, 0.6],
        "nuclei": [3, 1, 4, 1, 5, 9, 2, 6],
        "said": list("abcdefgh"),
    }
)
BETTER = {"ssim": "higher", "l1": "lower"}


def test_pairs_are_ranked_as_by_hand():
    assert rank_pairs(SCORES).pair.tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    # 2 and 8 are equal, 3 has no value
    assert rank_pairs(SCORES, "ssim").pair.tolist() == [1, 6, 5, 2, 8, 4, 0, 3]
    assert rank_pairs(SCORES, "ssim", False).pair.tolist() == [0, 4, 2, 8, 5, 6, 1, 3]
    assert rank_pairs(SCORES, "l1", False, group="a").pair.tolist() == [1, 5]
    assert rank_pairs(SCORES, "said", False).said.tolist() == list("hgfedcba")
    with pytest.raises(
        ValueError, match="by 'psnr', expected one of pair, group, ssim"
    ):
        rank_pairs(SCORES, "psnr")
    t = score_table(SCORES, 5, BETTER)
    assert (
        t.measure.tolist() == ["ssim", "l1", "nuclei"]
        and t.value.tolist() == [0.3, 0.05, 2]
        and t.place[:2].tolist() == [5, 1]
        and t.place.isna().tolist() == [False, False, True]
        and t.of.tolist() == [7, 8, 8]
        and t.better.tolist() == ["higher", "lower", ""]
    )
    # equal values share a place
    assert (
        score_table(SCORES, 8, BETTER).place[0] == 3
        and score_table(SCORES, 2, BETTER).place[0] == 3
    )
    assert score_table(SCORES, 3, BETTER).place.isna().tolist() == [True, False, True]
    with pytest.raises(ValueError, match="0 rows of scores are of pair 7"): score_table(SCORES, 7)


def test_a_pair_beside_each_other():
    fig = plot_pair(*(PAIRS[1][k] for k in ("primary", "privileged", "true")), "$x")
    assert (
        [ax.get_title() for ax in fig.axes] == ["primary (real)", "synthetic", "true (real)"]
        and fig._suptitle.get_text() == f"$x\n{CAVEAT}"
        and "findings" in CAVEAT
    )
    for ax, k in zip(fig.axes, ("primary", "privileged", "true")):
        assert np.array_equal(ax.images[0].get_array(), PAIRS[1][k])
    fig.draw_without_rendering()
    assert (
        fig not in map(plt.figure, plt.get_fignums())
        and len(plot_pair(solid(1, 2, 3), solid(1, 2, 3)).axes) == 2
    )
    assert plot_pair(np.zeros((2000, 1000), np.uint8), solid(1, 2, 3)).axes[0].images[
        0
    ].get_array().shape == (960, 480, 3)


def colour(png): return tuple(int(v) for v in np.array(Image.open(io.BytesIO(png)))[5, 5])


def test_exploring_pairs():
    e = explore_pairs(PAIRS, SCORES, true="true", better=BETTER)
    assert (
        [v for _, v in e.sort.options] == ["pair", "ssim", "l1", "nuclei"]
        and e.sort.value == "ssim"
        and e.order.label == "worst first"
    )
    order = []
    for _ in range(9):
        order.append(e.pair)
        e.picture._handle_custom_msg({"step": 1}, [])
    assert (
        order == [1, 6, 5, 2, 8, 4, 0, 3, 3] and e.place.value == 8 and "(no value)" in e.info.value
    )
    for _ in range(9): e.step(-1)
    assert e.place.value == 1 and e.pair == 1
    assert (
        colour(e.picture.first) == (200, 1, 0)
        and colour(e.picture.second) == (0, 1, 200)
        and e.picture.names == ["primary (real)", "synthetic"]
    )
    assert (
        e.picture.alt == "Place 1 of 8 by ssim (0.1), worst first: pair 1, patient a."
        and "10 x 12 pixels" in e.info.value
        and e.table.equals(score_table(SCORES, 1, BETTER))
        and "<td>0.1</td>" in e.list.value
    )
    e.picture.share = 1.
    e.order.value = False
    # the share stays; names are escaped
    assert (
        e.order.label == "best first"
        and e.pair == 0
        and e.picture.share == 1
        and "&lt;" in e.info.value
    )
    # lower is better, and the worst comes first again
    e.sort.value = "l1"
    assert (
        e.order.label == "worst first"
        and e.pair == 1
        and [o for o, _ in e.order.options] == ["worst first", "best first"]
    )
    e.place.value = 3
    e.order.value = True
    assert e.place.value == 1 and e.pair == 5
    e.sort.value = "nuclei"
    assert [o for o, _ in e.order.options] == ["lowest first", "highest first"] and e.pair == 0
    assert [o for o, _ in e.group.options] == ["all (8)", "< (3)", "> (1)", "a (2)", "b (2)"]
    e.group.value = 2
    assert (
        e.ranking.pair.tolist() == [5, 1]
        and e.place.max == 2
        and "Place 1 of 2 of a by nuclei (2), lowest first: pair 5, patient a" in e.info.value
    )
    e.group.value = -1
    e.sort.value = "pair"
    e.place.value = 4                                                                       # pair 3
    assert e.pair == 3 and "by number of the pair, lowest first" in e.info.value
    e.compare.value = ("true", "privileged")
    assert colour(e.picture.first) == (0, 200, 3) and e.picture.names == [
        "true (real)",
        "synthetic",
    ]
    e.compare.value = ("primary", "true")
    assert colour(e.picture.second) == (0, 200, 3) and "true (real)" in e.found.alt
    found = e.found.png
    # no true image is known of pair 4
    e.step(1)
    assert (
        e.pair == 4
        and e.compare.value == ("primary", "privileged")
        and len(e.compare.options) == 1
        and e.found.png != found
        and "true" not in e.found.alt
    )
    e.step(1)
    assert len(e.compare.options) == 3


def test_exploring_pairs_without_scores_and_of_a_dataset(tmp_path):
    e = explore_pairs(
        [{"primary": solid(i, 0, 0), "privileged": np.zeros((24, 20), np.uint8)} for i in range(3)]
    )
    assert (
        [o for o in e.sort.options] == [("number of the pair", "pair")]
        and not e._groups
        and e.list.value == ""
        and "primary 10 x 12 pixels, synthetic 20 x 24 pixels" in e.info.value
        and "patient" not in e.info.value
    )
    alone = explore_pairs(PAIRS, SCORES.assign(group=range(8)), better=BETTER)
    # one pair of each: nothing to filter
    assert not alone._groups
    quality = types.SimpleNamespace(
        scores=SCORES,
        table=pd.DataFrame({"better": {"l1": "lower", "ssim": "higher", "kid": "lower"}}),
    )
    ds = Dataset.from_list(
        [
            {
                k: Image.fromarray(r[k]) if k != "group" else r[k]
                for k in ("primary", "privileged", "group")
            }
            for r in PAIRS
        ],
        features=Features(
            {"primary": ImageFeature(), "privileged": ImageFeature(), "group": Value("string")}
        ),
    )
    e = explore_pairs(ds, quality, true=[r["true"] for r in PAIRS], sort="l1", worst=False, width=8)
    assert (
        e.order.label == "best first"
        and e.pair == 5
        and e.better["ssim"] == "higher"
        and len(e._images()) == 3
        and e.picture.width == 8
    )
    assert colour(e.picture.second) == (0, 5, 200)
    assert explore_pairs(ds).group.options[1] == ("< (3)", 0)
    large = explore_pairs(
        [{"primary": np.zeros((300, 900), np.uint8), "privileged": np.zeros((300, 900), np.uint8)}],
        width=100,
    )
    assert Image.open(io.BytesIO(large.picture.first)).size == (200, 67)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"pairs": []}, "pairs=0, expected 1 or more"),
        ({"quality": SCORES.drop(columns="pair")}, "expected `pair`"),
        ({"quality": SCORES.assign(pair=1)}, "once at most"),
        ({"quality": SCORES.assign(pair=range(2, 10))}, "from 0 to 8"),
        ({"quality": SCORES[:0]}, "expected `pair`"),
        ({"true": "mask"}, "the pairs have no mask but primary"),
        ({"pairs": [{"primary": 0}] * 9}, "have no privileged but primary"),
        ({"true": [None] * 3}, "3 true images for 9 pairs"),
        ({"sort": "psnr"}, "sort 'psnr', expected one of pair, ssim, l1, nuclei"),
        ({"quality": None, "better": {}, "sort": "ssim"}, "no measure: give quality="),
        ({"better": {"ssim": "up"}}, r"better for ssim 'up', expected one of higher, lower"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        explore_pairs(**{"pairs": PAIRS, "quality": SCORES, "better": BETTER, **change})


# in a browser
CELLS = [
    """
import tempfile, numpy as np, pandas as pd
from pathlib import Path
from synthpi.volumes.bodies import write_bodies
from synthpi.volumes import grid_crops
from synthpi.explain import explore_volume
from synthpi.explain import explore_map
from synthpi.explain import explore_pairs
from synthpi.volumes import prepare_volumes
tmp = Path(tempfile.mkdtemp(dir="."))
store = prepare_volumes(write_bodies(tmp/"bodies", n_subjects=3, shape=(24, 18, 24), spacing_mm=18.), tmp/"store")
batches = [b for i in range(len(store)) for b in grid_crops(store, i, 6, 6)]
crop, center_mm, volume_id = (
    np.concatenate([b[k].numpy() for b in batches]) for k in ("crop", "center_mm", "volume_id")
)
explore_volume(store, crop.reshape(len(crop), -1), center_mm, volume_id, crop_size=6)
""",
    """
rng = np.random.default_rng(0)
coords = np.array([[0, 0], [1, 0], [0, 1], [1, 1.]])
tiles = rng.integers(0, 255, (4, 16, 16, 3), np.uint8)
explore_map(coords, tiles, [0, 1, 0, 1], ["round", "long"], groups=["p1", "p1", "p2", "p2"], k=2)
""",
    """
solid = lambda *rgb: np.full((40, 40, 3), rgb, np.uint8)
sides = dict(primary=solid(250, 0, 0), privileged=solid(0, 0, 250), true=solid(0, 250, 0))
pairs = [sides | dict(group=g) for g in ("p1", "p1", "p2", "p2")]
scores = dict(pair=range(4), group=[p["group"] for p in pairs], ssim=[.4, .1, .3, .2], l1=[.1, .2, .3, .4])
explore_pairs(pairs, pd.DataFrame(scores), true="true", better={"ssim": "higher", "l1": "lower"})
""",
]


@contextlib.contextmanager
def jupyter(folder):
    """JupyterLab on a free port, with settings of its own; gives a function that waits for it and
    gives its address"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name, settings in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        file = folder / ".lab/@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    env = {
        **os.environ,
        **{f"JUPYTER_{k}_DIR": str(folder / f".{k}") for k in ("CONFIG", "RUNTIME")},
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".lab"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".spaces"),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
        ),
    }
    log = open(folder/"lab.log", "w")
    lab = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            f"--port={port}",
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=test",
            f"--ServerApp.root_dir={folder}",
            "--LabApp.extension_manager=readonly",
        ],
        env=env,
        stdout=log,
        stderr=log,
    )
    def ready():
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
                return f"http://127.0.0.1:{port}"
            assert lab.poll() is None, (folder/"lab.log").read_text()[-2000:]
            time.sleep(.2)
        raise AssertionError((folder/"lab.log").read_text()[-2000:])
    try: yield ready
    finally:
        lab.terminate()
        try: lab.wait(20)
        except subprocess.TimeoutExpired: lab.kill()
        log.close()


@pytest.fixture(scope="module")
def page(request, tmp_path_factory):
    "One notebook in JupyterLab, each of its cells an explorer, all of them run"
    if not request.config.getoption("--browser", False):
        pytest.skip("drives a browser: pytest --browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    folder = tmp_path_factory.mktemp("lab")
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c.strip()) for c in CELLS],
            metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
            },
        ),
        folder / "try.ipynb",
    )
    with jupyter(folder) as ready, sync_api.sync_playwright() as p:
        # None: the one of `playwright install chromium`
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(90_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(f"{ready()}/doc/tree/try.ipynb?token=test")
        page.locator(".jp-Notebook .cm-content").first.click()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(
            state="attached"
        )
        for _ in CELLS: page.keyboard.press("Shift+Enter")
        yield page
        browser.close()


@pytest.fixture
def cell(request, page):
    "The output of a cell, once its pictures are there"
    output = (
        page.locator(".jp-Notebook .jp-CodeCell").nth(request.param).locator(".jp-OutputArea").first
    )
    output.locator("img[src^='blob:']:visible").nth(1).wait_for()
    still = output.locator("img[src^='data:image/png']")
    # the live one took its place
    still.wait_for(state="hidden")
    assert still.count() == 1 and all(
        i.get_attribute("alt") is not None for i in output.locator("img[src^='blob:']").all()
    )
    yield output
    assert not [p for p in page.problems if "widget" in p.lower() or "render" in p.lower()], (
        page.problems
    )


def other(page, locator, attribute, before):
    "The attribute of an element once it is another than before"
    for _ in range(900):
        now = locator.get_attribute(attribute)
        if now != before: return now
        page.wait_for_timeout(50)
    raise AssertionError(f"{attribute} is still {before}")


@pytest.mark.parametrize("cell", [0], indirect=True)
def test_a_click_in_the_browser_moves_the_explorer(page, cell):
    pictures = cell.locator("img[src^='blob:'][alt]:not([alt=''])")
    assert pictures.count() == 2
    slice_, found = pictures.nth(0), pictures.nth(1)
    assert (
        slice_.evaluate("i => i.complete && i.naturalWidth") == 360
        and found.evaluate("i => i.naturalWidth") > 300
    )
    alt, near, url, table = (
        slice_.get_attribute("alt"),
        found.get_attribute("alt"),
        slice_.get_attribute("src"),
        cell.locator("table").inner_text(),
    )
    box = slice_.bounding_box()
    slice_.click(position={"x": .8*box["width"], "y": .3*box["height"]})
    clicked = other(page, slice_, "alt", alt)
    other(page, found, "alt", near)
    assert slice_.get_attribute("src") != url and cell.locator("table").inner_text() != table
    x, y, z = json.loads(clicked.split("voxel (")[1].split(")")[0].join("[]"))
    x0, y0, z0 = json.loads(alt.split("voxel (")[1].split(")")[0].join("[]"))
    # to the right and to the front
    assert z == z0 and x > x0 and y > y0
    cell.get_by_role("button", name="sagittal").click()
    turned = other(page, slice_, "alt", clicked)
    assert "sagittal" in turned
    cell.locator(".widget-slider [role=slider]").first.focus()
    page.keyboard.press("ArrowRight")
    assert f"({x + 1}, {y}, {z})" in other(page, slice_, "alt", turned)


@pytest.mark.parametrize("cell", [1], indirect=True)
def test_a_click_in_the_browser_chooses_a_point_of_the_map(page, cell):
    pictures = cell.locator("img[src^='blob:'][alt]:not([alt=''])")
    map_, found, tip = (
        pictures.nth(0),
        pictures.nth(1),
        cell.locator("div[aria-hidden=true]:has(img)").first,
    )
    alt, behind = map_.get_attribute("alt"), found.get_attribute("alt")
    assert "point 0 is ringed" in alt and not tip.is_visible()
    box = map_.bounding_box()
    corner = {"x": .93*box["width"], "y": .07*box["height"]}
    # the upper right corner
    map_.hover(position=corner)
    tip.wait_for()
    assert tip.inner_text() == "point 3: long\np2"
    tip.locator("img").wait_for()
    assert (
        tip.locator("img").evaluate("i => i.decode().then(() => i.naturalWidth)") == 16
        and map_.get_attribute("alt") == alt
    )
    # near to none
    map_.hover(position={"x": .5*box["width"], "y": .4*box["height"]})
    tip.wait_for(state="hidden")
    map_.click(position=corner)
    clicked = other(page, map_, "alt", alt)
    assert "point 3 is ringed" in clicked and "Point 3, long" in other(page, found, "alt", behind)
    cell.locator("select").nth(0).select_option(label="round")
    filtered = other(page, map_, "alt", clicked)
    assert "2 of them in colour" in filtered
    map_.hover(position={"x": .5*box["width"], "y": .4*box["height"]})
    map_.hover(position=corner)
    page.wait_for_timeout(200)
    # its point is gray now
    assert not tip.is_visible()
    map_.click(position=corner)
    nearest = other(page, map_, "alt", filtered)
    assert "point 2" in nearest
    cell.locator("select").nth(1).select_option(label="p1")
    alone = other(page, map_, "alt", nearest)
    assert "1 of them in colour" in alone
    cell.locator("input[type=number]").fill("1")
    page.keyboard.press("Enter")
    assert "point 1 is ringed" in other(
        page, map_, "alt", alone
    ) and "Point 1, long" in found.get_attribute("alt")


def pixel(locator, x, y):
    "The colour at a place of what is on the screen"
    shot = np.array(Image.open(io.BytesIO(locator.screenshot())).convert("RGB"))
    return tuple(round(int(v)/50)*50 for v in shot[int(y*len(shot)), int(x*shot.shape[1])])


@pytest.mark.parametrize("cell", [2], indirect=True)
def test_pairs_flip_in_the_browser(page, cell):
    stage, caption, info = (
        cell.locator("[role=button][tabindex='0']").first,
        cell.locator(".synthpi-caption"),
        cell.locator("b:has-text('Place')"),
    )
    from playwright.sync_api import expect
    expect.set_options(timeout=45_000)
    expect(caption).to_have_text("primary (real)")
    expect(info).to_have_text("Place 1 of 4 by ssim (0.1), worst first: pair 1, patient p1")
    assert cell.get_by_text(CAVEAT).first.is_visible() and cell.locator("table tr").nth(
        1
    ).inner_text().split() == ["ssim", "0.1", "4", "4", "higher"]
    red, blue, green = (250, 0, 0), (0, 0, 250), (0, 250, 0)
    assert pixel(stage, .5, .5) == red
    stage.click()
    expect(caption).to_have_text("synthetic")
    assert pixel(stage, .5, .5) == blue and "Shown: synthetic" in stage.get_attribute("aria-label")
    cell.get_by_role("button", name="flip", exact=True).click()
    expect(caption).to_have_text("primary (real)")
    stage.focus()
    for key, text in (("Enter", "synthetic"), ("Space", "primary (real)")):
        page.keyboard.press(key)
        expect(caption).to_have_text(text)
    cell.locator("input[type=range]").fill("50")
    expect(caption).to_have_text("left synthetic, right primary (real)")
    assert pixel(stage, .25, .5) == blue and pixel(stage, .75, .5) == red
    cell.get_by_label("how the two are mixed").select_option("blend")
    expect(caption).to_have_text("50 % synthetic, 50 % primary (real)")
    assert (
        pixel(stage, 0.25, 0.5) == pixel(stage, 0.75, 0.5)
        and pixel(stage, 0.5, 0.5)[1] == 0
        and 100 <= pixel(stage, 0.5, 0.5)[0] <= 150
    )
    stage.focus()
    page.keyboard.press("ArrowRight")
    expect(info).to_have_text("Place 2 of 4 by ssim (0.2), worst first: pair 3, patient p2")
    # stays from pair to pair
    expect(caption).to_have_text("50 % synthetic, 50 % primary (real)")
    cell.get_by_role("button", name="previous").click()
    expect(info).to_have_text("Place 1 of 4 by ssim (0.1), worst first: pair 1, patient p1")
    cell.get_by_role("button", name="best first").click()
    expect(info).to_have_text("Place 1 of 4 by ssim (0.4), best first: pair 0, patient p1")
    cell.get_by_label("patient", exact=True).select_option(label="p2 (2)")
    expect(info).to_have_text("Place 1 of 2 of p2 by ssim (0.3), best first: pair 2, patient p2")
    cell.get_by_label("sort by", exact=True).select_option(label="l1")
    expect(info).to_have_text("Place 1 of 2 of p2 by l1 (0.4), worst first: pair 3, patient p2")
    cell.get_by_label("compare", exact=True).select_option(label="true and synthetic")
    expect(caption).to_have_text("50 % synthetic, 50 % true (real)")
    cell.locator("input[type=range]").fill("0")
    expect(caption).to_have_text("true (real)")
    assert pixel(stage, .5, .5) == green


@pytest.mark.parametrize("cell", [0, 1, 2], indirect=True)
def test_explorers_fit_a_narrow_window(page, cell):
    page.set_viewport_size({"width": 400, "height": 900})
    try:
        page.wait_for_timeout(300)
        right = page.locator(".jp-WindowedPanel-outer").first.evaluate(
            "e => e.getBoundingClientRect().left + e.clientWidth"
        )
        for part in cell.locator(
            "img[src^='blob:']:visible, select:visible, button:visible, input:visible, "
            "table:visible"
        ).all():
            box = part.bounding_box()
            assert box["x"] + box["width"] <= right + 1, (
                part.evaluate("e => e.outerHTML.slice(0, 120)"),
                box,
                right,
            )
    finally: page.set_viewport_size({"width": 1280, "height": 1000})
