"The regression of positions against NumPy."

import numpy as np
import pytest
import torch
from placed_crops import draw

from synthpi.losses.position import PositionHead, PositionRegression, axis_scale

def test_regression_is_that_of_standardised_positions():
    z, c = draw(d=3)
    mean, std = axis_scale(c)
    np.testing.assert_allclose((mean, std), (c.numpy().mean(0), c.numpy().std(0)))
    loss, terms = PositionRegression(mean, std)(z, c)
    error = z.numpy() - (c.numpy() - np.float32(mean))/np.float32(std)
    assert loss.item() == pytest.approx((error**2).mean(), rel=1e-12) == terms["mse"].item()
    assert terms["mae_mm"].item() == pytest.approx(np.abs(error*np.float32(std)).mean(), rel=1e-12)
    torch.testing.assert_close(
        PositionRegression(mean, std).to_mm(z),
        z * torch.tensor(std) + torch.tensor(mean),
        rtol=1e-6,
        atol=1e-6,
    )

def test_the_head_of_the_regression_is_linear_at_its_end():
    torch.manual_seed(0)
    head = PositionHead(6, axes=2, hidden=16).eval()
    h = torch.randn(50, 6)
    torch.testing.assert_close(
        head(h), torch.relu(h @ head[1].weight.T + head[1].bias) @ head[3].weight.T + head[3].bias
    )
    assert (head(h) < 0).any() and head[0].p == .25 and PositionHead(6)[1].out_features == 2048
    with torch.no_grad(): assert not torch.equal(head.train()(h), head(h))
