"""Large images: exact partition of unity, the same bits in any order, seams below the generator's
noise, bounded memory."""
import itertools
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from synthpi.pairs.tiling import grid_noise, translate_large
from synthpi.pairs.measures import seam_score

class Convolutions:
    """Three 9 x 9 convolutions with zeros outside: border effects of 12 pixels on purpose; `scale`
    gives more or fewer channels out"""
    def __init__(self, out=3, sizes=None):
        draw = torch.Generator().manual_seed(0)
        self.weights = [
            torch.rand(a, b, 9, 9, generator=draw) / (81 * b) * 2
            for a, b in ((8, 3), (8, 8), (out, 8))
        ]
        self.calls = [] if sizes is None else sizes

    def translate(self, x, um_per_px=None):
        self.calls.append((tuple(x.shape), um_per_px))
        for w in self.weights: x = F.conv2d(x, w, padding=4)
        return x.clamp(0, 1)

class Interior(Convolutions):
    "The same without borders: it is given its surroundings, so every pixel has one true value"
    def translate(self, x, um_per_px=None):
        return super().translate(F.pad(x, (12,) * 4, mode="reflect"))[..., 12:-12, 12:-12]

class Same:
    def translate(self, x, um_per_px=None): return x

@pytest.fixture(scope="module")
def image(): return torch.rand(3, 200, 260, generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize("size", [(1, 1), (1, 50), (33, 200), (64, 64), (65, 63), (130, 47)])
def test_identity_gives_the_image_back(size):
    x = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for (tile, overlap), shift, order in itertools.product(
        [(64, 32), (64, 16), (32, 0)], (0, 1, 31), (None, 0)
    ):
        assert np.array_equal(
            translate_large(
                Same(),
                x,
                tile=tile,
                overlap=overlap,
                shift=min(shift, tile - overlap - 1),
                order=order,
            ),
            x,
        )

@pytest.mark.parametrize("out", [1, 3, 5])
def test_same_bits_for_any_order_and_batch(image, out):
    first = translate_large(Convolutions(out), image, tile=96, overlap=32, batch_size=2)
    assert first.shape == (out, 200, 260) and first.dtype == torch.float32
    for order, batch_size in ((0, 2), (1, 2), (list(range(20))[::-1], 2), (2, 3), (None, 5)):
        assert torch.equal(
            first,
            translate_large(
                Convolutions(out), image, tile=96, overlap=32, batch_size=batch_size, order=order
            ),
        )

def test_float_sums_would_not_have_been_the_same():
    "The reason for whole numbers: three values whose float sum depends on their order"
    a = np.random.default_rng(0).uniform(size=(3, 10_000))
    assert not np.array_equal((a[0] + a[1]) + a[2], a[0] + (a[1] + a[2]))

def test_away_from_tile_borders_the_result_is_that_of_one_call(image):
    """Reach 12: with an overlap of 64 a pixel that is 12 from a tile's border is right, nearer ones
    have weight sin^2(pi/2*12/64) at most, here 0.084"""
    whole = Convolutions().translate(image[None])[0][:, 12:-12, 12:-12]
    blended, hard = (
        translate_large(Convolutions(), image, tile=t, overlap=o)[:, 12:-12, 12:-12]
        for t, o in ((128, 64), (64, 0))
    )
    assert (blended - whole).abs().max() < .1*(hard - whole).abs().max()
    inner = (slice(None), slice(44, 84), slice(44, 84))
    # float32 rounding
    assert (
        translate_large(Convolutions(), image, tile=128, overlap=64)
        - Convolutions().translate(image[None])[0]
    )[inner].abs().max() < 1e-6

def test_seams_are_below_the_generators_noise(image):
    for generator in (Convolutions(), Interior()):
        blended, moved = (
            translate_large(generator, image, tile=128, overlap=64, shift=s) for s in (0, 32)
        )
        noise = grid_noise(generator, image, tile=128, overlap=64)
        assert noise > 0
        for offset in (0, 32):                                  # where ramps meet, and their middle
            assert seam_score(blended, 64, offset, reference=moved) < noise
            # 15 steps: the mean excess of one
            assert seam_score(blended, 64, offset, 8, reference=moved)/15 < noise
    hard, moved = (
        translate_large(Convolutions(), image, tile=64, overlap=0, shift=s) for s in (0, 32)
    )
    assert seam_score(hard, 64, width=8, reference=moved) / 15 > 10 * grid_noise(
        Convolutions(), image, tile=128, overlap=64
    )

def test_memory_map_to_memory_map_with_bounded_memory(tmp_path):
    x = np.memmap(tmp_path/"in.raw", np.uint8, "w+", shape=(8000, 70, 3))
    x[:] = np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8)
    out = np.memmap(tmp_path/"out.raw", np.uint8, "w+", shape=x.shape)
    tracemalloc.start()
    assert translate_large(Same(), x, tile=96, overlap=16, out=out) is out
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # the sum of the whole, in 8 bytes a value, would be 8*x.size
    assert np.array_equal(out, x) and peak < 3*x.size

def test_kinds_of_images_and_what_the_generator_is_told():
    calls = []
    gray = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
    assert translate_large(
        Convolutions(1, calls), gray, um_per_px=0.25, tile=32, overlap=8, batch_size=4
    ).shape == (40, 50, 1)
    assert {c for c in calls} == {((4, 3, 32, 32), .25)}        # the last batch is filled up
    out = np.zeros((40, 50, 3), np.float32)
    translate_large(Convolutions(), gray, tile=32, overlap=8, out=out)
    assert 0 < out.max() <= 1

@pytest.mark.parametrize("arguments, message", [
    ({"tile": 32, "overlap": 18}, "at most half a tile"), ({"tile": 32, "overlap": 7}, "even overlap"), ({"tile": 32, "overlap": 8, "shift": 24}, "a shift from 0"),
    ({"batch_size": 0}, "at least 1"), ({"tile": 32, "overlap": 8, "order": [0, 0]}, "no permutation"), ({"out": np.zeros((3, 3, 3))}, "expected the same")])
def test_wrong_arguments_are_refused(image, arguments, message):
    with pytest.raises(ValueError, match=message): translate_large(Same(), image, **arguments)

def test_wrong_images_and_generators_are_refused(image):
    class Half:
        def translate(self, x, um_per_px=None): return x[..., ::2]
    class Broken:
        def translate(self, x, um_per_px=None): return x*float("nan")
    with pytest.raises(ValueError, match="of the same size"): translate_large(Half(), image)
    with pytest.raises(ValueError, match="not finite"): translate_large(Broken(), image)
    with pytest.raises(ValueError, match="one image"): translate_large(Same(), image[None])
    with pytest.raises(ValueError, match="at least one pixel"):
        translate_large(Same(), np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="do not overlap"): seam_score(image, 8)

def test_seam_score_finds_the_right_grid():
    "The score over all offsets peaks where the borders are, and by their height"
    rng = np.random.default_rng(0)
    x = (
        0.5
        + 0.02 * rng.standard_normal((160, 160))
        + 0.1 * (np.add.outer(np.arange(160) // 32, np.arange(160) // 32) % 2)
    )
    scores = [seam_score(x, 32, offset) for offset in range(32)]
    # noise of 0.02 adds to a step of 0.1 less than it adds to no step: mean |N(0, 0.028)| = 0.0226,
    # so the excess is about 0.077
    assert (
        np.argmax(scores) == 0
        and abs(scores[0] - 0.0774) < 0.01
        and max(map(abs, scores[1:])) < 0.02
    )
