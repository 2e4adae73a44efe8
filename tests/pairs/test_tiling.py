"Large images: the result of one call away from tile borders, seams below those of hard borders."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthpi.pairs import makers
from synthpi.pairs.generators import ModuleGenerator
from synthpi.pairs.measures import seam_score
from synthpi.pairs.tiling import translate_large

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

@pytest.fixture(scope="module")
def image(): return torch.rand(1, 3, 200, 260, generator=torch.Generator().manual_seed(1))

def test_away_from_tile_borders_the_result_is_that_of_one_call(image):
    "Reach 12: with an overlap of 64 a pixel 12 from a border has a weight of sin^2(pi/2*12/64)"
    whole = Convolutions().translate(image)
    blended, hard = (
        translate_large(Convolutions(), image, tile=t, overlap=o) for t, o in ((128, 64), (64, 0))
    )
    assert (blended - whole).abs().max() < .1*(hard - whole).abs().max()
    # float32 rounding
    assert (blended - whole)[..., 14:50, 14:50].abs().max() < 1e-6

def test_seams_are_far_below_those_of_hard_borders(image):
    whole = Convolutions().translate(image)[0]
    def seam(tile, overlap):
        made = translate_large(Convolutions(), image, tile=tile, overlap=overlap)[0]
        return seam_score(made, 64, width=8, reference=whole)
    assert abs(seam(128, 64)) < .05*seam(64, 0)

def test_any_number_of_channels_and_tiles_at_once(image):
    one, three = (
        translate_large(Convolutions(1), image, .25, tile=96, overlap=32, batch_size=n)
        for n in (1, 3)
    )
    assert one.shape == (1, 1, 200, 260) and torch.allclose(one, three, atol=1e-6)

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

class Convolved(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.all, self.sizes = Convolutions(), []
    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return self.all.translate(x)

def test_the_pairs_of_large_images_are_made_in_tiles(monkeypatch):
    """More pixels than a generator is given at once, and a side above that of a tile: the same
    result away from borders, from smaller images"""
    image = np.random.default_rng(0).integers(0, 256, (32, 1100, 3), dtype=np.uint8)
    whole, tiled = (ModuleGenerator(Convolved(), activation=lambda y: y) for _ in range(2))
    expected = makers._translate(whole, [image], None)
    assert whole.module.sizes == [(32, 1104)]
    monkeypatch.setattr(makers, "_PIXELS", 32*1099)
    made = makers._translate(tiled, [image, image], None)
    assert {w for _, w in tiled.module.sizes} == {1024} and made.shape == (2, 32, 1100, 3)
    assert (made[0] == made[1]).all()
    # the tiles are 0 to 1024 and 76 to 1100; 1024 - 76 of their pixels overlap, and rise over 128
    far = [*range(0, 76), *range(1024, 1088)]
    assert abs(made[0, :, far].astype(int) - expected[0, :, far]).max() <= 1
