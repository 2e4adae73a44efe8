"Neighbours, places and pictures of the explorers against NumPy; the same in JupyterLab and Chromium with --browser."
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
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from nbconvert import HTMLExporter
from nibabel import Nifti1Image
from PIL import Image

from synthpi.bodies import write_bodies
from synthpi.crops import crops_at, grid_crops
from synthpi.explain import saliency_display
from synthpi.explore import PLANES, ClickablePicture, explore_volume, nearest_crop, nearest_in_others, neighbour_table, picture_png, plot_neighbours, render_slice, voxel_at
from synthpi.explore_map import explore_map, plot_point, plot_points, point_at
from synthpi.volumes import prepare_volumes

RNG = np.random.default_rng(0)


def listing(store, size=6, stride=8):
    batches = [b for i in range(len(store)) for b in grid_crops(store, i, size, stride)]
    center, volume = (np.concatenate([b[k].numpy() for b in batches]) for k in ("center_mm", "volume_id"))
    return np.random.default_rng(1).normal(size=(len(center), 4)), center, volume


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("explore")
    return prepare_volumes(write_bodies(tmp/"bodies", n_subjects=4, shape=(24, 18, 24), spacing_mm=18.), tmp/"store")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    "Two scans of one subject and one of another, anisotropic, oblique offsets, without labels; every voxel has its own value"
    tmp = tmp_path_factory.mktemp("odd")
    for k, name in enumerate(("a1", "a2", "b")):
        x = np.full((14, 11, 9), 20, np.int16)
        x[2:12, 2:9, 1:8] = 200 + np.arange(10*7*7).reshape(10, 7, 7)
        affine = np.diag([2., 3, 5, 1]); affine[:3, 3] = -20*k, 5, 30*k
        (tmp/"in").mkdir(exist_ok=True)
        Nifti1Image(x, affine).to_filename(tmp/"in"/f"{name}.nii.gz")
    records = [{"name": n, "image": f"{n}.nii.gz", "label": None, "channel": None, "subject": n[0], "split": "all"} for n in ("a1", "a2", "b")]
    return prepare_volumes(records, tmp/"store", root=tmp/"in", dtype="float32", percentiles=(0, 100), margin=2)


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
            if subject[r] == subject[query] or (per_subject and taken.get(subject[r], 0) == per_subject): continue
            taken[subject[r]] = taken.get(subject[r], 0) + 1
            expected.append(r)
        rows, distance = nearest_in_others(z, subject, query, 7, per_subject, metric)
        assert rows.tolist() == expected[:7]
        assert np.allclose(distance, np.array(d)[rows], atol=1e-12)


def test_neighbours_at_the_edges():
    z = np.zeros((6, 3))
    rows, distance = nearest_in_others(z, list("aabbcc"), 0, k=9, metric="cosine")            # no direction: nothing divides by zero
    assert rows.tolist() == [2, 4] and np.isfinite(distance).all()
    assert nearest_in_others(z, list("aabbcc"), 0, k=9, per_subject=None)[0].tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="all 6 crops are of the subject a"): nearest_in_others(z, ["a"]*6, 0)
    with pytest.raises(ValueError, match="metric='l1', k=5"): nearest_in_others(z, list("aabbcc"), 0, metric="l1")
    for bad in ({"k": 0}, {"per_subject": 0}):
        with pytest.raises(ValueError, match="1 or more"): nearest_in_others(z, list("aabbcc"), 0, **bad)
    with pytest.raises(ValueError, match=r"\(6, 3\) and 5 subjects"): nearest_in_others(z, list("aabbc"), 0)
    for row in (6, -1):
        with pytest.raises(IndexError, match=f"crop {row} of 6"): nearest_in_others(z, list("aabbcc"), row)


def test_scans_of_one_subject_are_not_each_others_neighbours(odd):
    z, c, v = listing(odd, 3, 3)
    z[v == 1] = z[v == 0][: (v == 1).sum()] if (v == 0).sum() == (v == 1).sum() else 0          # the second scan of subject a would be nearest
    table = neighbour_table(odd, z, c, v, 0, k=5, per_subject=None)
    assert table.subject.tolist() == ["a"] + ["b"]*5 and "label" not in table


# places
def test_the_nearest_crop_is_of_this_volume_and_by_millimetres(odd):
    center = odd.position(0, [[3, 3, 3], [3, 5, 3], [3, 3, 4]])
    center = np.concatenate([center, odd.position(1, [[3, 3, 3]])])
    volume = np.array([0, 0, 0, 1])
    assert nearest_crop(odd, 0, (3, 3, 3), center, volume) == 0
    assert nearest_crop(odd, 0, (3, 4.4, 3.9), center, volume) == 2                         # 4.2 mm and 0.5 mm; the other: 1.8 mm and 4.5 mm
    assert nearest_crop(odd, 0, (3, 4.4, 3.5), center, volume) == 1                         # 4.2 and 2.5 against 1.8 and 2.5
    assert nearest_crop(odd, 1, (9, 9, 6), center, volume) == 3
    with pytest.raises(ValueError, match=r"no crop is of volume 2; there are crops of \[0, 1\]"): nearest_crop(odd, 2, (0, 0, 0), center, volume)


def test_frames_and_labels_of_the_table(odd, bodies):
    z, c, v = listing(odd, 3, 3)
    world, local = (neighbour_table(odd, z, c, v, 2, frame=f) for f in ("world_mm", "mm_local"))
    assert world.row.tolist() == local.row.tolist()
    for t, frame in ((world, "world_mm"), (local, "mm_local")):
        p = [odd.position(v[r], odd.voxel(v[r], c[[r]]), frame)[0] for r in t.row]
        assert np.allclose(t.distance_mm, [np.linalg.norm(x - p[0]) for x in p], atol=1e-4)
    assert not np.allclose(world.distance_mm[1:], local.distance_mm[1:])                    # the scans lie elsewhere
    for frame in ("box", "voxel_local"):
        with pytest.raises(ValueError, match="count in mm"): neighbour_table(odd, z, c, v, 0, frame=frame)
    z, c, v = listing(bodies)                                                               # crops of 6: the centre lies between voxels, and its voxel is start + 3
    t = neighbour_table(bodies, z, c, v, 5, k=3, label_names={1: "<fat>"})
    for found in t.to_dict("records"):
        i = v[found["row"]]
        at = np.rint(bodies.voxel(i, c[found["row"]]) + .5).astype(int)
        number = bodies.array(i, "label")[tuple(at)]
        assert found["label"] == {1: "<fat>"}.get(number, str(number)) and found["volume"] == bodies.names[i]
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
            cx, cy = (found[u] + .5)/shape[u], 1 - (found[v] + .5)/shape[v]                # the middle of that voxel
            pixel = picture[round(cy*h - .5), round(cx*w - .5)].astype(int)
            if abs(cx*w - w*(voxel[u] + .5)/shape[u]) < 14 or abs(cy*h - h*(1 - (voxel[v] + .5)/shape[v])) < 14: continue      # under the cross
            assert abs(pixel - 255*values[found]).max() <= 12
            seen += 1
    assert seen >= 4
    assert voxel_at(odd, 1, voxel, plane, 0, 0)[v] == shape[v] - 1 and voxel_at(odd, 1, voxel, plane, 1, 1)[u] == shape[u] - 1     # upper left, lower right, inside


def test_cross_frame_and_letters(odd, monkeypatch):
    voxel, yellow = odd.items[0]["shape"]//2, lambda p: np.argwhere((p == (255, 212, 0)).all(-1))
    plain, framed = render_slice(odd, 0, voxel, "coronal"), render_slice(odd, 0, voxel, "coronal", (voxel, (4, 3, 2)))
    assert 20 < len(yellow(plain)) < len(yellow(framed))
    n = odd.items[0]["shape"]
    cross = (plain.shape[0]*(1 - (voxel[2] + .5)/n[2]), plain.shape[1]*(voxel[0] + .5)/n[0])
    assert np.allclose(yellow(plain).mean(0), cross, atol=1.5)
    extent = np.ptp(yellow(framed), axis=0)
    assert np.allclose(extent, [plain.shape[0]*2/n[2], plain.shape[1]*4/n[0]], atol=4)
    off = render_slice(odd, 0, voxel, "coronal", (voxel + [0, 3, 0], (4, 3, 2)))            # the slice does not meet this crop
    assert np.array_equal(off, plain)
    assert not np.array_equal(render_slice(odd, 0, voxel, "coronal", (voxel + [0, 1, 0], (4, 3, 2))), plain)
    assert not np.array_equal(render_slice(odd, 0, voxel + [0, 1, 0], "coronal"), plain)
    for plane, (left, right, top, bottom) in {"axial": "LRAP", "coronal": "LRSI", "sagittal": "PASI"}.items():
        written = {}
        monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, xy, letter, **style: written.update({letter: xy}))
        h, w = render_slice(odd, 0, voxel, plane).shape[:2]
        monkeypatch.undo()
        assert written[left][0] < 10 and written[right][0] > w - 10 and written[top][1] < 10 and written[bottom][1] > h - 10 and len(written) == 4
    for bad in ((-1, 0, 0), odd.items[0]["shape"], (0, 0)):
        with pytest.raises(ValueError, match="expected one of the array"): render_slice(odd, 0, bad)
    with pytest.raises(ValueError, match="plane='oblique' arrived; expected one of axial"): render_slice(odd, 0, voxel, "oblique")


def test_neighbour_figure(odd):
    z, c, v = listing(odd, 3, 3)
    table = neighbour_table(odd, z, c, v, 4, k=2, per_subject=None)
    fig = plot_neighbours(odd, table, c, v, (3, 4, 5))
    assert len(fig.axes) == 9 and [ax.get_title().split("\n")[0] for ax in fig.axes[:3]] == ["asked about", *(f"{k}. {d:.0f} mm away" for k, d in zip((1, 2), table.distance_mm[1:]))]
    assert [ax.images[0].get_array().shape for ax in fig.axes[::3]] == [(4, 3), (5, 3), (5, 4)]
    for column, found in zip(range(3), table.row):
        crop = crops_at(odd, v[found], c[[found]], (3, 4, 5))["crop"][0, 0].numpy()
        for row, middle in enumerate((crop[:, :, 2], crop[:, 2], crop[1])): assert np.array_equal(fig.axes[3*row + column].images[0].get_array(), middle.T[::-1])
    assert [ax.get_ylabel() for ax in fig.axes[::3]] == list(PLANES) and np.allclose([ax.get_aspect() for ax in fig.axes[::3]], [1.5, 2.5, 5/3])
    assert min(t.get_fontsize() for t in fig.findobj(lambda a: hasattr(a, "get_fontsize")) if t.get_text()) >= 8


# the widgets, without a browser
def test_a_clickable_picture_hears_clicks_and_nothing_else():
    p, heard = ClickablePicture(), []
    assert not p.clickable
    p.on_click(lambda x, y: heard.append((x, y)))
    assert p.clickable
    for message in ({"click": [.5, .25]}, {"click": [-.1, 2]}, {"other": 1}, "click", None): p._handle_custom_msg(message, [])
    assert heard == [(.5, .25), (0, 1)]


def test_exploring(bodies):
    z, c, v = listing(bodies)
    e = explore_volume(bodies, z, c, v, volume=1, crop_size=6, k=3)
    shape = bodies.items[1]["shape"]
    assert e.volume.value == 1 and v[e.query] == 1 and [s.max for s in e.sliders] == (shape - 1).tolist()
    assert e.query == nearest_crop(bodies, 1, bodies.items[1]["box"].mean(0), c, v)
    assert len(e.table) == 4 and e.table.row[0] == e.query and "<table" in e.list.value
    for plane, axis in PLANES.items():
        e.plane.value = plane
        here = e.voxel
        e.click(.9, .1)
        assert e.voxel == voxel_at(bodies, 1, here, plane, .9, .1) and e.voxel[axis] == here[axis]
        assert e.query == nearest_crop(bodies, 1, e.voxel, c, v) and plane in e.picture.alt and str(e.voxel) in e.picture.alt
        assert np.array_equal(np.array(Image.open(io.BytesIO(e.picture.png))), render_slice(bodies, 1, e.voxel, plane, (bodies.voxel(1, c[[e.query]])[0], (6, 6, 6))))
    picture, found = e.picture.png, e.found.png
    e.sliders[0].value = 2                                                                  # the sagittal slice
    assert e.voxel[0] == 2 and e.picture.png != picture
    e.sliders[1].value = 0; e.sliders[2].value = 0
    assert e.found.png != found and e.query == nearest_crop(bodies, 1, (2, 0, 0), c, v)
    same = e.found.png
    e.plane.value = "axial"
    assert e.found.png == same
    e.volume.value = 3
    assert e.query == nearest_crop(bodies, 3, bodies.items[3]["box"].mean(0), c, v) and [s.max for s in e.sliders] == (bodies.items[3]["shape"] - 1).tolist() and bodies.names[3] in e.picture.alt
    for n in e.table[1:].to_dict("records"): assert f"{n['subject']}, {n['distance_mm']:.0f} mm away, {n['label']}" in e.found.alt


def test_only_volumes_with_crops_are_offered(bodies):
    z, c, v = listing(bodies)
    keep = v != 0
    e = explore_volume(bodies, z[keep], c[keep], v[keep], crop_size=6)
    assert [i for _, i in e.volume.options] == [1, 2, 3] and e.volume.value == 1
    with pytest.raises(ValueError, match=r"volume=0 arrived, of which there is no crop; expected one of \[1, 2, 3\]"): explore_volume(bodies, z[keep], c[keep], v[keep], volume=0)


@pytest.mark.parametrize("change,words", [
    (lambda z, c, v: (z[0], c, v), "of the same crops"), (lambda z, c, v: (z, c[:, :2], v), "of the same crops"), (lambda z, c, v: (z, c, v[1:]), "of the same crops"),
    (lambda z, c, v: (z, c, v.astype(float)), "whole numbers"), (lambda z, c, v: (z[:0], c[:0], v[:0]), "of the same crops"), (lambda z, c, v: (z, c, v + 1), "0 to 4|1 to 4"), (lambda z, c, v: (z, c, v - 1), "-1 to 2"),
    (lambda z, c, v: (np.where(np.arange(len(z))[:, None] == 3, np.nan, z), c, v), "1 embeddings and 0 centres are not finite"), (lambda z, c, v: (z, np.where(np.arange(len(z))[:, None] == 3, np.inf, c), v), "0 embeddings and 1 centres")])
def test_what_does_not_fit_is_refused(bodies, change, words):
    with pytest.raises(ValueError, match=words): explore_volume(bodies, *change(*listing(bodies)), crop_size=6)


@pytest.mark.filterwarnings("ignore:Your element with mimetype")                           # the widget, which a page cannot show
def test_a_still_picture_stays_without_a_kernel(bodies, monkeypatch):
    shown = []
    monkeypatch.setattr("synthpi.explore.display", lambda data, **options: shown.append((data, options)))
    e = explore_volume(bodies, *listing(bodies), crop_size=6)
    e._ipython_display_()
    (still, options), (widget, _) = shown
    assert options["raw"] and options["metadata"]["image/png"]["alt"] == still["text/plain"] and "nearest in other subjects" in still["text/plain"]
    assert widget is e.widget and "Run this cell" in repr(widget) and len(e.picture.fallback) == 64 and e.picture.fallback in still["image/png"]
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(still["image/png"]))))
    first = np.array(Image.open(io.BytesIO(e.picture.png)))
    top = (picture.shape[0] - first.shape[0])//2
    assert np.array_equal(picture[top:top + first.shape[0], :first.shape[1]], first)
    outputs = [nbformat.v4.new_output("display_data", still, metadata=options["metadata"]), nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "x", "version_major": 2, "version_minor": 0}})]
    html = HTMLExporter(template_name="classic").from_notebook_node(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("e", outputs=outputs)]))[0]
    assert f'alt="{still["text/plain"]}"' in html and e.picture.fallback in html           # a page shows the picture, with its text


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
        if p % 8 == 0: assert point_at(plot_points(COORDS, LABEL, CLASSES, size=4.), COORDS, x, 1 - y) == p      # not drawn yet: its layout is not settled
    found = [p for p in range(40) if point_at(fig, COORDS, *((place := fig.transFigure.inverted().transform(fig.axes[0].transData.transform(COORDS[p])))[0], 1 - place[1])) == p]
    assert len(found) == 40
    x, y = fig.transFigure.inverted().transform(fig.axes[0].transData.transform(COORDS[7]))
    assert np.linalg.norm(black - [(1 - y)*h, x*w], axis=1).min() < 14                      # the ring is drawn where a click is looked for
    assert fig not in map(plt.figure, plt.get_fignums())                                   # closed


def test_what_is_filtered_out_is_gray_and_cannot_be_clicked():
    shown = LABEL == 1
    fig = plot_points(COORDS, LABEL, CLASSES, shown)
    gray, coloured = fig.axes[0].collections[:2]
    assert np.allclose(gray.get_offsets(), COORDS[~shown]) and np.allclose(coloured.get_offsets(), COORDS[shown])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["b"]
    assert {point_at(fig, COORDS, x, y, shown) for x in np.linspace(0, 1, 9) for y in np.linspace(0, 1, 9)} <= set(np.flatnonzero(shown))
    nothing = plot_points(COORDS, LABEL, CLASSES, np.zeros(40, bool))
    assert not nothing.legends and point_at(nothing, COORDS, .5, .5, np.zeros(40, bool)) is None
    every = plot_points(COORDS, LABEL, CLASSES)
    assert [t.get_text() for t in every.legends[0].get_texts()] == ["unlabelled", *CLASSES]
    looks = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in every.axes[0].collections[:4]}
    assert len(looks) == 4
    every.draw_without_rendering()


def test_what_is_behind_a_point():
    maps = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    fig = plot_point(5, [3, 0], [.5, 1.25], IMAGES, LABEL, CLASSES, synthetic=lambda r: torch.arange(192).reshape(3, 8, 8)*r/1000, saliency=maps, groups=GROUPS)
    axes = [ax for ax in fig.axes if ax.images]
    expected = [IMAGES[5], np.round(255*np.arange(192).reshape(3, 8, 8).transpose(1, 2, 0)*np.float32(5)/np.float32(1000)).astype(np.uint8), saliency_display(maps[5]), IMAGES[3], IMAGES[0]]
    assert len(axes) == 5 and all(np.array_equal(ax.images[0].get_array(), e) for ax, e in zip(axes, expected))
    assert [ax.get_title() for ax in axes] == ["point 5\n$a\np", "synthetic", "saliency", "1. at 0.5\nc\np", "2. at 1.2\nunlabelled\np"]
    fig.draw_without_rendering()
    assert len([ax for ax in plot_point(5, [], [], IMAGES, LABEL, CLASSES).axes if ax.images]) == 1


def test_exploring_a_map():
    z = RNG.normal(size=(40, 6))
    e = explore_map({"coords": COORDS, "trustworthiness": 1.}, IMAGES, LABEL, CLASSES, features=z, groups=GROUPS, k=3)
    assert e.near.tolist() == nearest_in_others(z, GROUPS, 0, 3, None)[0].tolist() and not set(e.near) & set(range(10))
    assert [o for o in e.filter.options] == [("unlabelled", -1), ("$a", 0), ("b", 1), ("c", 2)] and e.shown.all()
    first, found = e.picture.png, e.found.png
    e.point.value = 25
    assert e.near.tolist() == nearest_in_others(z, GROUPS, 25, 3, None)[0].tolist() and e.picture.png != first and e.found.png != found and "point 25 is ringed" in e.picture.alt
    assert e.found.alt == "Point 25, $a, and its nearest: " + "; ".join(f"point {r}, {['$a', 'b', 'c', 'unlabelled'][LABEL[r]]}" for r in e.near) + "."
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
    assert explore_map(COORDS, IMAGES, features=z, metric="cosine").near.tolist() == nearest_in_others(z, np.arange(40), 0, 5, None, "cosine")[0].tolist() != nearest_in_others(z, np.arange(40), 0, 5, None)[0].tolist()


@pytest.mark.parametrize("change,words", [
    ({"coords": COORDS[:, :1]}, r"shape \(40, 1\)"), ({"coords": np.full((40, 2), np.nan)}, "finite"), ({"coords": COORDS[:1]}, "2 points or more"), ({"labels": LABEL + 1}, "up to 3 arrived with 3 classes"), ({"labels": LABEL/2}, "float64"),
    ({"images": IMAGES[1:]}, "39 images arrived for 40"), ({"synthetic": IMAGES[1:], "groups": GROUPS[:3]}, "39 synthetic, 3 groups"), ({"features": COORDS[1:]}, "39 features"), ({"saliency": IMAGES[1:]}, "39 saliency"), ({"labels": LABEL[1:]}, "39 labels")])
def test_what_does_not_fit_on_a_map_is_refused(change, words):
    with pytest.raises(ValueError, match=words): explore_map(**{"coords": COORDS, "images": IMAGES, "labels": LABEL, "classes": CLASSES, **change})


# in a browser
CELL = """
import tempfile, numpy as np
from pathlib import Path
from synthpi.bodies import write_bodies
from synthpi.crops import grid_crops
from synthpi.explore import explore_volume
from synthpi.volumes import prepare_volumes
tmp = Path(tempfile.mkdtemp(dir="."))
store = prepare_volumes(write_bodies(tmp/"bodies", n_subjects=3, shape=(24, 18, 24), spacing_mm=18.), tmp/"store")
batches = [b for i in range(len(store)) for b in grid_crops(store, i, 6, 6)]
crop, center_mm, volume_id = (np.concatenate([b[k].numpy() for b in batches]) for k in ("crop", "center_mm", "volume_id"))
e = explore_volume(store, crop.reshape(len(crop), -1), center_mm, volume_id, crop_size=6)
e
"""


@contextlib.contextmanager
def jupyter(folder):
    "JupyterLab on a free port, with settings of its own; gives its address"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, **{f"JUPYTER_{k}_DIR": str(folder/f".{k}") for k in ("CONFIG", "RUNTIME")}, "JUPYTERLAB_SETTINGS_DIR": str(folder/".lab"), "JUPYTERLAB_WORKSPACES_DIR": str(folder/".spaces"),
           "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))}
    log = open(folder/"lab.log", "w")
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=test", f"--ServerApp.root_dir={folder}"],
                           env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
                break
            assert lab.poll() is None, (folder/"lab.log").read_text()[-2000:]
            time.sleep(.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        lab.terminate()
        try: lab.wait(20)
        except subprocess.TimeoutExpired: lab.kill()
        log.close()


@pytest.fixture
def page(request, tmp_path):
    "A page of a notebook with one cell, run in JupyterLab"
    if not request.config.getoption("--browser", False): pytest.skip("drives a browser: pytest --browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(request.param)], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), tmp_path/"try.ipynb")
    with jupyter(tmp_path) as address, sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])          # None: the one of `playwright install chromium`
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(90_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(f"{address}/lab/tree/try.ipynb?token=test")
        page.locator(".jp-Notebook .cm-content").first.click()
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(state="attached")
        page.keyboard.press("Shift+Enter")
        yield page
        browser.close()


def other(page, locator, attribute, before):
    "The attribute of an element once it is another than before"
    for _ in range(300):
        now = locator.get_attribute(attribute)
        if now != before: return now
        page.wait_for_timeout(100)
    raise AssertionError(f"{attribute} is still {before}")


@pytest.mark.parametrize("page", [CELL], indirect=True)
def test_a_click_in_the_browser_moves_the_explorer(page):
    pictures = page.locator(".jp-OutputArea img[src^='blob:']")
    pictures.nth(1).wait_for()
    assert pictures.count() == 2
    still = page.locator(".jp-OutputArea img[src^='data:image/png']")
    assert still.count() == 1 and not still.is_visible()                                   # the live one took its place
    slice_, found = pictures.nth(0), pictures.nth(1)
    assert slice_.evaluate("i => i.complete && i.naturalWidth") == 360 and found.evaluate("i => i.naturalWidth") > 300
    alt, near, url, table = slice_.get_attribute("alt"), found.get_attribute("alt"), slice_.get_attribute("src"), page.locator(".jp-OutputArea table").inner_text()
    box = slice_.bounding_box()
    slice_.click(position={"x": .8*box["width"], "y": .3*box["height"]})
    clicked = other(page, slice_, "alt", alt)
    other(page, found, "alt", near)
    assert slice_.get_attribute("src") != url and page.locator(".jp-OutputArea table").inner_text() != table
    x, y, z = json.loads(clicked.split("voxel (")[1].split(")")[0].join("[]"))
    x0, y0, z0 = json.loads(alt.split("voxel (")[1].split(")")[0].join("[]"))
    assert z == z0 and x > x0 and y > y0                                                   # to the right and to the front
    page.get_by_role("button", name="sagittal").click()
    turned = other(page, slice_, "alt", clicked)
    assert "sagittal" in turned
    page.locator(".widget-slider [role=slider]").first.focus()
    page.keyboard.press("ArrowRight")
    assert f"({x + 1}, {y}, {z})" in other(page, slice_, "alt", turned)
    assert not [p for p in page.problems if "widget" in p.lower() or "render" in p.lower()], page.problems


MAP = """
import numpy as np
from synthpi.explore_map import explore_map
rng = np.random.default_rng(0)
coords = np.array([[0, 0], [1, 0], [0, 1], [1, 1.]])
e = explore_map(coords, rng.integers(0, 255, (4, 16, 16, 3), np.uint8), [0, 1, 0, 1], ["round", "long"], k=2)
e
"""


@pytest.mark.parametrize("page", [MAP], indirect=True)
def test_a_click_in_the_browser_chooses_a_point_of_the_map(page):
    map_, found = page.locator(".jp-OutputArea img[src^='blob:']").nth(0), page.locator(".jp-OutputArea img[src^='blob:']").nth(1)
    found.wait_for()
    still = page.locator(".jp-OutputArea img[src^='data:image/png']")
    assert still.count() == 1 and not still.is_visible()
    alt, behind = map_.get_attribute("alt"), found.get_attribute("alt")
    assert "point 0 is ringed" in alt
    box = map_.bounding_box()
    map_.click(position={"x": .9*box["width"], "y": .1*box["height"]})                     # the upper right corner
    clicked = other(page, map_, "alt", alt)
    assert "point 3 is ringed" in clicked and "Point 3, long" in other(page, found, "alt", behind)
    page.locator(".jp-OutputArea select").select_option(label="round")
    filtered = other(page, map_, "alt", clicked)
    assert "2 of them in colour" in filtered
    map_.click(position={"x": .9*box["width"], "y": .1*box["height"]})                     # its point is gray now
    assert "point 3" not in other(page, map_, "alt", filtered)
    page.locator(".jp-OutputArea input[type=number]").fill("2")
    page.keyboard.press("Enter")
    for _ in range(100):
        if "point 2 is ringed" in map_.get_attribute("alt"): break
        page.wait_for_timeout(100)
    assert "Point 2, round" in found.get_attribute("alt")
