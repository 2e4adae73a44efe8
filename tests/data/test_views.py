"""Views: the same for any number of workers and processes, registered where they shall be, faithful
to the stored pixels, and alike on both back ends."""
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from synthpi.data.device_views import BatchViews, GEOMETRY
from synthpi.data.phantoms import tissue_phantoms
from synthpi.data.recipes import (
    BackgroundNoise,
    HEDJitter,
    SideCrop,
    farndale,
    histology,
    strong,
    weak,
)
from synthpi.data.views import Branch, Images, StepBatches, Views, _one_thread, batches, epoch_steps
from synthpi.core.images import square, to_mask, to_raw

RECIPES = [weak, strong, histology, farndale]

@pytest.fixture(scope="module")
def tiles():
    tissue = tissue_phantoms(n_per_class=1, n_patients=1, size=48)
    return [
        {"primary": x, "privileged": m, "label": int(c)}
        for x, m, c in zip(tissue.image, tissue.mask, tissue.label)
    ]

def same(a, b):
    "Whether two batches hold the same"
    def parts(x): return x if isinstance(x, (tuple, list)) else (x,)
    return set(a) == set(b) and all(
        torch.equal(x, y) for k in a for x, y in zip(parts(a[k]), parts(b[k]), strict=True)
    )

# ---- randomness

@pytest.mark.parametrize("cls", [Views, BatchViews])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_views_do_not_know_their_worker(tiles, cls, context):
    branches = [
        ("primary", strong),
        ("primary", farndale),
        Branch("privileged", weak, "mask", geometry=0),
    ]
    views = cls(tiles, branches, size=32, seed=5)
    finish = views if cls is BatchViews else lambda b: b
    def run(**kw): return [finish(b) for b in batches(views, 4, steps=6, context=context, **kw)]
    whole = run()
    assert not same(whole[0], whole[1])
    # it takes seconds to start
    spawned = {"workers": 2 if cls is Views else 1, "start": 4}
    for kw in ({"workers": 2}, {"workers": 1, "start": 4}) if context == "fork" else (spawned,):
        assert all(
            same(a, b) for a, b in zip(whole[kw.get("start", 0) :], run(**kw), strict=True)
        ), kw

class Plain(Dataset):
    "A data set that leaves randomness to albumentations"
    def __init__(self, image, recipe): self.image, self.recipe = image, recipe
    def __len__(self): return 4
    def __getitem__(self, i): return torch.from_numpy(self.recipe(image=self.image)["image"])

def test_albumentations_repeats_itself_across_workers_and_views_do_not(tiles):
    image = tiles[6]["primary"]
    # or the fork would hang for reasons of OpenCV's
    _one_thread()
    plain = list(
        DataLoader(
            Plain(image, strong(32)), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
    )
    assert torch.equal(plain[0], plain[1]) and torch.equal(plain[2], plain[3]), (
        "the fault is gone from albumentations: this library need not work around it any longer"
    )
    views = Views([{"primary": image}]*4, [("primary", strong)], 32)
    # two epochs of four copies of one tile
    served = [b["views"][0] for b in batches(views, 1, steps=8, workers=2, context="fork")]
    assert len({v.numpy().tobytes() for v in served}) == 8

def test_recorded_runs_keep_their_views():
    """The digest of what the first release of this module made of these records: a run is resumed
    with the views it was started with"""
    import hashlib
    rng = np.random.default_rng(0)
    ds = [
        {
            "primary": rng.integers(0, 256, (70, 90, 3), dtype=np.uint8),
            "privileged": rng.integers(0, 256, (80, 80), dtype=np.uint8),
            "label": 1,
        }
        for _ in range(5)
    ]
    views = Views(ds, [("primary", weak), ("privileged", weak)], 64, seed=3)
    # geometry in whole pixels only: interpolated values may differ in the last bit between versions
    # of OpenCV, crops and flips may not
    drawn = []
    for e in range(4):
        views[e, 1]
        drawn.append(
            [
                t.params.get("crop_coords", t.params.get("factor", bool(t.params)))
                for r in views.recipes
                for t in r.transforms
            ]
        )
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "ee6150d8bdb554c2"

@pytest.mark.slow
def test_a_worker_is_not_stopped_by_threads_of_its_parent():
    """OpenCV's threads do not survive a fork, and a worker that changes their number waits for
    them for ever. In a process of its own, with a time limit, for the
    fault is a hang; the first loop is what starts the threads."""
    code = """if True:
    import cv2, numpy as np
    from synthpi.data.recipes import farndale, strong
    from synthpi.data import Views, batches
    image = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    views = Views([{'x': image}], [('x', strong), ('x', farndale)], 512)
    for batch in batches(views, 1, steps=6): pass
    print(len(list(batches(views, 1, steps=6, workers=1, context='fork'))), cv2.getNumThreads())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["6", "1"], done.stderr

# ---- steps and shares

@pytest.mark.parametrize("n, batch_size, world", [(9, 4, 1), (9, 4, 2), (9, 4, 3), (5, 7, 3), (3, 8, 3)])
def test_shares_in_the_order_of_ranks_are_the_joined_batch(n, batch_size, world):
    joined = list(StepBatches(n, batch_size, 7, start=2, seed=1))
    parts = [
        list(StepBatches(n, batch_size, 7, start=2, seed=1, rank=r, world=world))
        for r in range(world)
    ]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == joined
    assert [len(p[0]) for p in parts] == [
        len(x) for x in np.array_split(np.arange(batch_size), world)
    ]

def test_batches_of_a_rank_are_rows_of_the_joined_batch(tiles):
    views = Views(tiles, [("primary", strong)], 32)
    whole = list(batches(views, 5, steps=3))
    parts = [list(batches(views, 5, steps=3, rank=r, world=2)) for r in range(2)]
    for k in range(3):
        assert torch.equal(torch.cat([p[k]["views"][0] for p in parts]), whole[k]["views"][0])

def test_batches_ask_torch_distributed_for_their_share(tiles, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        assert (
            len(next(iter(batches(Views(tiles, [("primary", weak)], 16), 4, steps=1)))["index"])
            == 4
        )
    finally:
        torch.distributed.destroy_process_group()

@pytest.mark.parametrize(
    "n, batch_size, epochs, steps",
    [(100, 10, 3, 30), (100, 32, 1, 4), (30, 1, 0.1, 3), (10, 100, 1, 1)],
)
def test_an_epoch_is_a_number_of_records(n, batch_size, epochs, steps):
    assert epoch_steps(n, batch_size, epochs) == steps

# ---- shared geometry

@pytest.mark.parametrize("cls", [Views, BatchViews])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("height, width", [(64, 64), (64, 100), (150, 96)])
def test_a_shared_geometry_keeps_a_landmark_in_its_place(cls, recipe, height, width):
    """A bright spot, off the centre, drawn on both images, stays where it is in the other view;
    with an own geometry it does not."""
    y, x = np.mgrid[:height, :width]
    s = min(height, width)
    spot = 40 + 200*np.exp(-((y - height/2 + s/9)**2 + (x - width/2 - s/12)**2)/(s/12)**2)
    image = np.repeat(spot.astype(np.uint8)[..., None], 3, 2)
    ds = [{"primary": image, "privileged": (spot > 140).astype(np.uint8)*255}]
    def distance(geometry, n=24):
        "Of the spot's centre in the two views, pixels"
        views = cls(
            ds,
            [
                (
                    "primary",
                    lambda size: A.Compose(
                        [t for t in recipe(size).transforms if isinstance(t, A.DualTransform)]
                    ),
                ),
                Branch("privileged", weak, "mask", geometry=geometry),
            ],
            48,
            seed=1,
        )
        batch = default_collate([views[e, 0] for e in range(n)])
        if cls is BatchViews: batch = views(batch)
        at = torch.stack(torch.meshgrid(torch.arange(48.), torch.arange(48.), indexing="ij"))
        def centre(w): return (w[:, None]*at).sum((2, 3))/w.sum((1, 2))[:, None]
        first, second = (v[:, 0] for v in batch["views"])
        seen = (second > 0).sum((1, 2)) > 20               # a crop may have lost the spot
        assert seen.sum() > n/2
        return (centre((first > 140/255).float()) - centre(second))[seen].norm(dim=1)
    # pixels: the two outlines differ by an interpolation at the edge
    assert distance(0).max() < 1
    assert distance(None).mean() > 2

def test_a_branch_that_shares_geometry_keeps_pixel_transforms_of_its_own(tiles):
    def flat(size):
        return A.Compose([t for t in histology(size).transforms if isinstance(t, A.DualTransform)])
    for cls in (Views, BatchViews):
        views = cls(
            tiles,
            [
                ("primary", flat),
                Branch("primary", weak, geometry=0),
                Branch("primary", histology, geometry=1),
                Branch("primary", histology, geometry=0),
            ],
            32,
        )
        batch = default_collate([views[3, i] for i in range(9)])
        a, b, c, d = (views(batch) if cls is BatchViews else batch)["views"]
        assert torch.equal(a, b)
        assert (c - d).abs().mean() > .02 and (c - a).abs().mean() > .02

def test_a_recipe_of_mixed_order_cannot_be_shared(tiles):
    def mixed(size): return A.Compose([A.ColorJitter(), A.RandomResizedCrop((size, size))])
    Views(tiles, [("primary", mixed)], 32)[0]              # on its own it may
    with pytest.raises(ValueError, match="all geometric transforms stand before"):
        Views(tiles, [("primary", mixed), Branch("privileged", weak, geometry=0)], 32)
    with pytest.raises(ValueError, match="expected the number of an earlier branch, 0 to 0"):
        Views(tiles, [("primary", weak), Branch("privileged", weak, geometry=1)], 32)

# ---- pixels

@pytest.mark.parametrize("cls", [Views, BatchViews])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_mask_never_holds_a_value_between_labels(cls, recipe, dtype):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    labels = (np.random.default_rng(0).choice([0, .2, 1], (75, 90))*top).astype(dtype)
    views = cls([{"mask": labels}], [Branch("mask", recipe, "mask")], 40)
    batch = default_collate([views[e, 0] for e in range(12)])
    view = (views(batch) if cls is BatchViews else batch)["views"][0]
    assert view.shape == (12, 3, 40, 40)
    assert set(view.unique().tolist()) == set(
        (np.unique(labels).astype(np.float32) / np.float32(top)).tolist()
    )

@pytest.mark.parametrize("cls", [Views, BatchViews])
def test_one_hot_masks(cls):
    labels = np.random.default_rng(0).integers(0, 5, (64, 64)).astype(np.uint8)
    views = cls([{"mask": labels}], [Branch("mask", weak, "mask", classes=5)], 32)
    batch = default_collate([views[0]])
    view = (views(batch) if cls is BatchViews else batch)["views"][0]
    assert (
        view.shape == (1, 5, 32, 32)
        and (view.sum(1) == 1).all()
        and set(view.unique().tolist()) == {0.0, 1.0}
    )
    share = torch.tensor(np.bincount(labels.ravel())/labels.size)
    # four standard errors; twice, for magnified pixels repeat
    assert (view.mean((0, 2, 3)) - share).abs().max() < 4*np.sqrt(.2*.8/1024)*2

@pytest.mark.parametrize("cls", [Views, BatchViews])
def test_sixteen_bits_are_kept(cls):
    steps = (30000 + np.arange(32*32).reshape(32, 32) % 512).astype(np.uint16)
    def still(size): return A.Compose([A.HorizontalFlip(p=.5)])
    views = cls(
        [{"dapi": Image.fromarray(steps)}], [Branch("dapi", still, "raw"), ("dapi", still)], 32
    )
    batch = default_collate([views[0]])
    raw, rgb = (views(batch) if cls is BatchViews else batch)["views"]
    assert raw.shape == (1, 1, 32, 32) and len(raw.unique()) == 512 and len(rgb.unique()) <= 4
    assert np.array_equal(np.unique(np.rint(raw.numpy()*65535)), np.unique(steps))

@pytest.mark.parametrize("cls", [Views, BatchViews])
@pytest.mark.parametrize("channels", [1, 2, 5, 7])
def test_any_number_of_channels(cls, channels):
    x = np.zeros((60, 50, channels), np.uint8)
    for c in range(channels): x[..., c] = 20*(c + 1)
    views = cls([{"x": x[..., 0] if channels == 1 else x}], [Branch("x", weak, "raw")], 32)
    batch = default_collate([views[0]])
    view = (views(batch) if cls is BatchViews else batch)["views"][0][0]
    torch.testing.assert_close(
        view, (torch.arange(channels)[:, None, None] + 1).expand(-1, 32, 32) * 20 / 255
    )
    if channels > 1:
        bad = cls([{"x": x}], [Branch("x", strong, "raw")], 32)
        with pytest.raises(
            ValueError, match=f"column 'x'.* cannot take an image of {channels} channels"
        ):
            for e in range(20):  # its jitter has a probability of 0.8
                batch = default_collate([bad[e, 0]])
                if cls is BatchViews:
                    bad(batch)

def test_what_a_file_may_hold():
    assert to_raw(Image.fromarray(np.full((4, 4), 65535, np.uint16))).max() == 1
    assert to_raw(np.ones((4, 4), bool)).tolist() == np.ones((4, 4, 1)).tolist()
    indexed = Image.new("P", (4, 4), 3)
    indexed.putpalette([10, 20, 30]*256)
    assert to_mask(indexed, classes=4).tolist() == [[3]*4]*4 and to_raw(indexed).shape == (4, 4, 3)
    assert set(to_mask(Image.new("1", (2, 2), 1)).ravel()) == {255} and set(
        to_mask(Image.new("1", (2, 2), 1), classes=2).ravel()
    ) == {1}
    bad = [
        (to_raw, np.full((4, 4), 3.0), "floats in .0, 1."),
        (to_raw, np.full((4, 4), np.nan), "floats in .0, 1."),
        (to_raw, np.zeros(4), r"shape \(4,\)"),
        (to_raw, np.zeros((4, 4), int), "with_format"),
        (
            to_mask,
            np.random.default_rng(0).integers(0, 9, (4, 4, 3), dtype=np.uint8),
            "map colours to labels",
        ),
    ]
    for read, image, message in bad:
        with pytest.raises(ValueError, match=message): read(image)
    assert square(np.zeros((9, 20, 7), np.float32), 4).shape == (4, 4, 7)

def test_the_cache_is_counted_in_bytes():
    ds = [{"x": np.zeros((8, 8, 4), np.float32)}]*5
    images = Images(ds, "x", 8, cache_mb=2.5*8*8*4*4/2**20, kind="raw")
    list(images)
    assert len(images._kept) == 2 and images[4].nbytes == 1024

@pytest.mark.parametrize(
    "branches, message",
    [
        ([("nothing", weak)], "no column 'nothing'"),
        ([Branch("primary", weak, "gray")], "expected one of rgb, raw, mask"),
        ([Branch("primary", weak, classes=3)], "only a mask has classes"),
        ([Branch("primary", weak, geometry=0)], "the first branch has its own"),
        ([], "no branches"),
    ],
)
def test_branches_that_cannot_be(tiles, branches, message):
    with pytest.raises(ValueError, match=message): Views(tiles, branches, 32)

# ---- the device

def given(recipe):
    "The parameters that albumentations has just drawn, as the device wants them"
    drawn = []
    for t in recipe.transforms:
        p, one = t.params, lambda v: np.array([v], float)
        wanted = {
            A.RandomResizedCrop: lambda: {"crop_coords": np.array([p["crop_coords"]])},
            A.RandomRotate90: lambda: {"factor": one(p["factor"])},
            A.Rotate: lambda: {
                "angle": np.rad2deg(np.arctan2(p["matrix"][1, 0], p["matrix"][0, 0]))[None] * SIGN
            },
            A.ColorJitter: lambda: {
                **{k: one(p[k]) for k in ("brightness", "contrast", "saturation", "hue")},
                "order": np.array([p["order"]]),
            },
            A.RandomBrightnessContrast: lambda: {
                "alpha": one(p["alpha"]),
                "beta": one(p["beta"] / 255),
            },
            A.Solarize: lambda: {"threshold": one(p["threshold"])},
            A.GaussianBlur: lambda: {
                "sigma": one(
                    1
                    / np.sqrt(
                        2 * np.log(p["kernel"].max() / p["kernel"][len(p["kernel"]) // 2 - 1])
                    )
                    if len(p["kernel"]) > 1
                    else 0.05
                )
            },
            HEDJitter: lambda: {"factor": p["factor"][None], "shift": p["shift"][None]},
        }
        wanted[SideCrop] = wanted[A.RandomResizedCrop]
        drawn.append(
            {"on": np.array([bool(p)]), **(wanted[type(t)]() if p and type(t) in wanted else {})}
        )
    return drawn
SIGN = -1       # albumentations turns by -angle in the direction of the pixel axes

ONE = [
    *weak(64).transforms,
    *strong(64).transforms[4:],
    *histology(64).transforms[4:5],
    *(t for t in farndale(64).transforms if not isinstance(t, BackgroundNoise)),
]

@pytest.mark.parametrize("transform", ONE, ids=lambda t: type(t).__name__)
def test_the_device_makes_the_picture_of_albumentations_from_the_same_parameters(transform):
    """8-bit steps. Interpolation and each of up to four colour operations round to bytes on the
    processor, and its hue moves in steps of two degrees."""
    x, y = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64))
    # smooth, of every hue, and without symmetry
    picture = (
        255 * np.stack([0.1 + 0.85 * x, 0.9 - 0.6 * y * x, 0.5 + 0.4 * np.sin(6 * x + 4 * y)], -1)
    ).astype(np.uint8)
    transform.p = 1
    def alone(size): return A.Compose([transform])
    cpu, device = (
        Views([{"x": picture}], [("x", alone)], 64),
        BatchViews([{"x": picture}], [("x", alone)], 64),
    )
    batch, moved, worst, typical = default_collate([device[0]]), 0, 0, 0
    for e in range(20):
        wanted = cpu[e, 0]["views"][0]
        drawn = given(cpu.recipes[0])
        device.draw = lambda k, epoch, index, drawn=drawn: drawn
        difference = (device(batch)["views"][0][0] - wanted).abs()*255
        moved = max(
            moved, (wanted - torch.from_numpy(picture).permute(2, 0, 1) / 255).abs().mean() * 255
        )
        worst, typical = (
            max(worst, difference.quantile(0.97).item()),
            max(typical, difference.mean().item()),
        )
    assert moved > (.1 if isinstance(transform, A.GaussianBlur) else 3), "the transform did nothing"
    # two degrees of hue are 8.5 steps of a pure colour; a byte at the threshold of Solarize may
    # fall on either side
    limit = {A.ColorJitter: 12, A.Solarize: 256, A.Rotate: 3}.get(type(transform), 2)
    assert worst < limit and typical < (3 if isinstance(transform, A.ColorJitter) else 1), (
        worst,
        typical,
    )

def drawn_on_the_processor(recipe, n, size):
    "Per transform, what was applied, and the parameters"
    views = Views([{"x": np.zeros((size, size, 3), np.uint8)}], [("x", recipe)], size, seed=11)
    out = []
    for e in range(n):
        views[e, 0]
        out.append([dict(t.params) for t in views.recipes[0].transforms])
    return views.recipes[0].transforms, list(zip(*out))

def facts(transforms, on, params):
    "Named samples, one number per view: what a recipe is about"
    facts = {}
    for k, t in enumerate(transforms):
        name = f"{k} {type(t).__name__}"
        facts[f"{name} applied"] = on[k].astype(float)
        if type(t) in (A.RandomResizedCrop, SideCrop):
            x0, y0, x1, y1 = params[k]["crop_coords"].T
            facts |= {
                f"{name} area": (x1 - x0) * (y1 - y0),
                f"{name} ratio": np.log((x1 - x0) / (y1 - y0)),
                f"{name} x": x0,
                f"{name} y": y0,
            }
        for key in (
            "factor",
            "shift",
            "brightness",
            "contrast",
            "saturation",
            "hue",
            "threshold",
            "beta",
        ):
            if key in params[k]:
                values = params[k][key].reshape(len(params[k][key]), -1)
                facts |= {f"{name} {key} {c}": values[:, c] for c in range(values.shape[1])}
        if "order" in params[k]:
            facts |= {
                f"{name} first is {c}": (params[k]["order"][:, 0] == c).astype(float)
                for c in range(4)
            }
    return facts

def surprises(a, b):
    """What differs between two sets of samples by more than 4.5 standard errors, in mean or in
    standard deviation: by chance once in 10^5 comparisons"""
    out = []
    for name in a:
        x, y = (np.asarray(v, float) for v in (a[name], b[name]))
        def z(p, q):
            return abs(p.mean() - q.mean())/np.sqrt(p.var()/len(p) + q.var()/len(q) + 1e-12)
        if z(x, y) > 4.5 or z((x - x.mean())**2, (y - y.mean())**2) > 4.5: out.append(name)
    return out

def both(cpu_recipe, device_recipe, n=1500, size=48):
    transforms, drawn = drawn_on_the_processor(cpu_recipe, n, size)
    on = [np.array([bool(p) for p in per]) for per in drawn]
    kept = (
        "crop_coords",
        "factor",
        "shift",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "order",
        "threshold",
        "beta",
    )
    params = [
        {
            key: np.stack([np.asarray(p[key], float) for p in per if p])
            for key in kept
            if key in next(p for p in per if p)
        }
        for per in drawn
    ]
    for k, t in enumerate(transforms):
        if isinstance(t, A.RandomBrightnessContrast): params[k]["beta"] = params[k]["beta"]/255
    device = BatchViews(
        [{"x": np.zeros((size, size, 3), np.uint8)}], [("x", device_recipe)], size, seed=12
    )
    other = device.draw(0, list(range(n)), [0]*n)
    return facts(transforms, on, params), facts(
        transforms, [p["on"] for p in other], [{k: v[p["on"]] for k, v in p.items()} for p in other]
    )

@pytest.mark.parametrize("recipe", RECIPES)
def test_both_back_ends_draw_from_the_same_distributions(recipe):
    assert surprises(*both(recipe, recipe)) == []

def with_(recipe, kind, **changes):
    "A recipe with other attributes on one kind of transform"
    def changed(size):
        out = recipe(size)
        for t in out.transforms:
            if isinstance(t, kind):
                for name, value in changes.items(): setattr(t, name, value)
        return out
    return changed

WRONG = [
    (weak, with_(weak, A.RandomResizedCrop, scale=(0.4, 1)), "area"),
    (weak, with_(weak, A.VerticalFlip, p=0.35), "applied"),
    (weak, with_(weak, A.RandomRotate90, p=1), "applied"),
    (histology, with_(histology, HEDJitter, factor=0.25), "factor"),
    (strong, lambda size: strong(size, 0.5), "brightness"),
    (farndale, with_(farndale, SideCrop, side=(0.7, 1.0)), "area"),
]

@pytest.mark.parametrize("recipe, wrong, what", WRONG)
def test_the_comparison_finds_a_wrong_recipe(recipe, wrong, what):
    assert any(what in name for name in surprises(*both(recipe, wrong)))

def pixels(cls, recipe, ds, n):
    "Mean and standard deviation of each channel, per view"
    views = cls(ds, [("primary", recipe)], 32, seed=cls is BatchViews)
    items = default_collate([views[e, i] for e in range(n) for i in range(len(ds))])
    x = (views(items) if cls is BatchViews else items)["views"][0]
    return {
        f"{f} {c}": getattr(x[:, c].flatten(1), f)(1).numpy()
        for c in range(3)
        for f in ("mean", "std")
    }

@pytest.mark.parametrize("recipe", RECIPES)
def test_both_back_ends_make_pixels_alike(recipe, tiles):
    """Means and spreads of the pixels over 600 views of three tissues. The tiles are smooth
    (blurred by half), for the processor resamples twice where it rotates
    and the device once, which leaves it a little sharper: a true difference, which this test is
    not about."""
    import cv2
    ds = [{"primary": cv2.GaussianBlur(tiles[i]["primary"], (0, 0), 2)} for i in (0, 6, 8)]
    one, two = pixels(Views, recipe, ds, 200), pixels(BatchViews, recipe, ds, 200)
    assert surprises(one, two) == []
    if recipe is histology:
        assert (
            surprises(one, pixels(BatchViews, with_(histology, HEDJitter, shift=0.15), ds, 200))
            != []
        )

def test_a_view_on_the_device_is_a_function_of_its_key(tiles):
    views = BatchViews(
        tiles, [("primary", farndale), Branch("privileged", weak, "mask", geometry=0)], 32, seed=2
    )
    batch = default_collate([views[1, i] for i in range(9)])
    alone = default_collate([views[1, 7], views[1, 2]])
    for a, b in zip(views(batch)["views"], views(alone)["views"], strict=True):
        torch.testing.assert_close(a[[7, 2]], b)
    assert not torch.equal(
        views(batch)["views"][0],
        views(default_collate([views[2, i] for i in range(9)]))["views"][0],
    )

def test_autocast_does_not_reach_the_views(tiles):
    views = BatchViews(tiles, [("primary", histology)], 32)
    batch = default_collate([views[i] for i in range(4)])
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = views(batch)["views"][0]
    assert (
        inside.dtype == torch.float32
        and torch.equal(inside, views(batch)["views"][0])
        and set(views(batch)) == {"views", "epoch", "index", "label"}
    )

@pytest.mark.parametrize(
    "recipe, message",
    [
        (lambda s: A.Compose([A.CLAHE()]), "holds CLAHE, which has no counterpart"),
        (lambda s: A.Compose([A.GaussianBlur(blur_limit=(3, 5))]), "settings that the device"),
        (lambda s: A.Compose([A.RandomResizedCrop((s + 1, s))]), "settings that the device"),
        (lambda s: A.Compose([A.HorizontalFlip()], p=0.5), "a recipe of probability 0.5"),
        (
            lambda s: A.Compose([A.Transpose()]),
            "Transpose, which has no counterpart on the device; expected HorizontalFlip",
        ),
    ],
)
def test_recipes_the_device_refuses(tiles, recipe, message):
    with pytest.raises(ValueError, match=message): BatchViews(tiles, [("primary", recipe)], 32)
    assert len(GEOMETRY) == 6

def test_noise_fills_what_a_rotation_leaves_empty():
    """The corners of a rotated view: black without the noise, uniform in [0, 1] with it, on both
    back ends"""
    def corner(p): return lambda size: A.Compose([A.Rotate((45, 45), p=1), BackgroundNoise(p=p)])
    for cls in (Views, BatchViews):
        for p in (0, 1):
            views = cls([{"x": np.full((64, 64, 3), 200, np.uint8)}], [("x", corner(p))], 64)
            batch = default_collate([views[e, 0] for e in range(4)])
            x = (views(batch) if cls is BatchViews else batch)["views"][0][:, :, :8, :8]
            # four standard errors; 1/sqrt(12) = 0.29
            assert (
                (x == 0).all()
                if p == 0
                else abs(x.mean() - 0.5) < 4 * 0.29 / np.sqrt(x.numel())
                and abs(x.std() - 0.29) < 0.02
            )

def test_random_sources_are_not_asked_twice():
    "A recipe that uses NumPy's generator draws what an eagerly seeded one draws"
    from synthpi.core.seeds import seed_for
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    views, key, recipe = (
        Views([{"x": image}], [("x", strong)], 32),
        seed_for(0, 4, 0, 0),
        strong(32),
    )
    recipe.set_random_state(np.random.default_rng(key), random.Random(key))
    assert torch.equal(
        views[4, 0]["views"][0],
        torch.from_numpy(recipe(image=image)["image"]).permute(2, 0, 1) / 255,
    )

def test_the_loader_benchmark_runs():
    "Small and short: its form, and that it counts what it says; its numbers mean little"
    spec = importlib.util.spec_from_file_location(
        "loader", Path(__file__).parents[1] / "benchmarks/loader.py"
    )
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    done = loader.run(quick=True)
    assert json.loads(json.dumps(done)) == done and {
        r["decoded images"] for r in done["results"]
    } == {"not kept", "in memory"}
    for r in done["results"]:
        assert (
            0.2 < r["ratio"] < 5
            and r["ratio, 10 and 90 %"][0] <= r["ratio"] <= r["ratio, 10 and 90 %"][1]
        )
    # the cache is one
    assert (
        done["results"][1]["Views, images per core-second"]
        > done["results"][0]["Views, images per core-second"]
    )
