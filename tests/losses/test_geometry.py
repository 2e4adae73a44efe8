"Pairs, distances and their agreement against NumPy and SciPy."
import math

import numpy as np
import pytest
import scipy.stats
import torch
from placed_crops import VOLUME, allowed, draw

from synthpi.losses.distance import DistanceLoss
from synthpi.losses.geometry import (
    PAIRS, _choices, _mask, distance_agreement, mean_pair_distance, pair_distances,
)

@pytest.mark.parametrize("pairs", PAIRS)
def test_partners_are_drawn_evenly_among_those_allowed(pairs):
    n = len(VOLUME)
    count, partners = _choices(n, pairs, VOLUME, "cpu")
    mask = _mask(n, pairs, VOLUME, "cpu")
    assert sorted(map(tuple, mask.nonzero().tolist())) == allowed(pairs, VOLUME, n) and torch.equal(
        mask.sum(1), count
    )
    # a multiple of every possible count: each partner equally often
    uniform = (torch.arange(2520) + .5).div(2520).expand(n, -1)
    drawn = partners(torch.arange(n), uniform)
    for i in range(n):
        if count[i]:
            assert torch.equal(
                torch.bincount(drawn[i], minlength=n), mask[i].long() * 2520 // count[i]
            )
    assert torch.equal(partners(torch.tensor([4, 0]), uniform[:2]), drawn[[4, 0]])
    # the largest float32 below one
    largest = partners(torch.arange(n), torch.full((n, 1), 1 - 2**-24))
    assert all(mask[i, largest[i, 0]] for i in range(n) if count[i])

def test_distances_in_blocks_are_those_at_once():
    x = torch.randn(
        23, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()
    partner = torch.randint(0, 23, (23, 5), generator=torch.Generator().manual_seed(1))
    reference = (x[:, None] - x).square().sum(-1).detach().sqrt()
    weight = torch.randn(23, 23, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = []
    for block in (1, 6 * 23 * 4, 2**25):
        d = pair_distances(x, block=block)
        torch.testing.assert_close(d, reference)
        torch.testing.assert_close(pair_distances(x, partner, block), reference.gather(1, partner))
        x.grad = None
        (d * weight).sum().backward()
        grads.append(x.grad)
    for grad in grads[1:]: torch.testing.assert_close(grad, grads[0])

@pytest.mark.parametrize("pairs", PAIRS[:3])
def test_mean_pair_distance_of_all_pairs_and_of_a_sample(pairs):
    c = draw(60)[1]
    volume = torch.arange(60) % 7
    expected = np.mean([np.linalg.norm(c[i] - c[j]) for i, j in allowed(pairs, volume, 60)])
    assert (
        mean_pair_distance(c, volume, pairs)
        == pytest.approx(expected)
        == mean_pair_distance(c.numpy(), [f"scan {v}" for v in volume], pairs)
    )
    sample = [mean_pair_distance(c, volume, pairs, max_pairs=1000, seed=s) for s in range(30)]
    assert (
        abs(np.mean(sample) - expected) < 4 * np.std(sample) / 30**0.5
        and np.std(sample) > 0
        and sample[0] == mean_pair_distance(c, volume, pairs, max_pairs=1000, seed=0)
    )

def test_a_sample_of_pairs_gives_every_pair_the_same_chance():
    "One volume of 2 crops that are far apart, one of 38 at one point: 2 of 1408 pairs"
    c, volume = torch.zeros(40, 3), [0]*2 + [1]*38
    c[1] = 1000.
    expected = mean_pair_distance(c, volume, "within")
    sample = [mean_pair_distance(c, volume, "within", max_pairs=500, seed=s) for s in range(300)]
    assert abs(np.mean(sample) - expected) < 4*np.std(sample)/300**.5

@pytest.mark.parametrize("pairs", PAIRS[:3])
def test_agreement_against_scipy(pairs):
    z, c = draw(50, 6)
    volume = torch.arange(50) % 6
    a = distance_agreement(z, c, volume, pairs, scale=2.5, bins=[0, 1, 5, 100])
    index = [(i, j) for i, j in allowed(pairs, volume, 50) if i < j]
    dl, dp = (
        np.array([np.linalg.norm(x[i] - x[j]) for i, j in index]) for x in (z.numpy(), c.numpy())
    )
    error = np.abs(2.5*dl - dp)
    assert (
        a.pairs == len(index) and a.scale == 2.5 and a.mean_abs_error == pytest.approx(error.mean())
    )
    assert a.pearson == pytest.approx(
        scipy.stats.pearsonr(dl, dp)[0]
    ) and a.spearman == pytest.approx(scipy.stats.spearmanr(dl, dp)[0])
    assert a.stress == pytest.approx(math.sqrt((error**2).sum()/(dp**2).sum()))
    assert (
        a.counts.tolist() == np.histogram(error, [0, 1, 5, 100])[0].tolist()
        and a.counts.sum() == a.pairs
    )
    s = distance_agreement(z, c, volume, pairs, scale="fit")
    assert s.scale == pytest.approx((dl @ dp) / (dl @ dl)) and all(
        s.stress <= distance_agreement(z, c, volume, pairs, scale=s.scale * f).stress
        for f in (0.9, 0.99, 1.01, 1.1)
    )
    few = distance_agreement(
        z.float().numpy(), c.numpy(), volume.tolist(), pairs, scale=2.5, max_pairs=800
    )
    assert (
        few.pairs == (800 if len(index) > 800 or 50 * 49 / 2 > 800 else len(index))
        and abs(few.mean_abs_error / a.mean_abs_error - 1) < 0.15
    )
    again = distance_agreement(
        z.float().numpy(), c.numpy(), volume.tolist(), pairs, scale=2.5, max_pairs=800
    )
    assert (
        few.mean_abs_error
        == again.mean_abs_error
        != distance_agreement(z, c, volume, pairs, scale=2.5, max_pairs=800, seed=1).mean_abs_error
    )

def test_a_collapsed_encoder_has_no_correlation_and_no_error_of_arithmetic():
    a = distance_agreement(torch.ones(30, 8), draw(30)[1], scale="fit")
    assert (a.pearson, a.spearman, a.stress) == (0, 0, 1)
    _, terms = DistanceLoss()(torch.ones(10, 8), draw()[1].float())
    assert terms["pearson"] == 0
