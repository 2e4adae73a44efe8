"Layouts: which view takes which encoder and projector, and what is refused."
import pytest
import torch
from torch import nn

from synthpi.models.branches import Branches, Projector, make_branches, siamese, trident

def small(channels=3, width=6):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )

class Trace(nn.Module):
    "Adds its mark to whatever comes through"
    def __init__(self, mark):
        super().__init__()
        self.mark = mark
    def forward(self, x): return x + self.mark

@pytest.mark.parametrize("layout", [(0,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 0, 1, 2), (0, 1, 0, 2, 1)])
def test_each_view_takes_its_encoder_and_projector(layout):
    n = len(set(layout))
    model = Branches(
        [Trace(10**k) for k in range(n)], [Trace(10 ** (k + 4)) for k in range(n)], layout
    )
    zs = model(*(torch.tensor(float(v)/10) for v in range(len(layout))))
    for v, (k, z) in enumerate(zip(layout, zs)):
        assert z.item() == pytest.approx(v / 10 + 10**k + 10 ** (k + 4), rel=1e-6)

def test_several_sources_with_channels_and_networks_of_their_own():
    model = make_branches(
        (0, 0, 1, 2),
        ("resnet10_narrow", small, lambda: small(1, 4)),
        (8, 4),
        in_channels=(3, 3, 1),
        projector_norm="layer",
        norm="group",
    )
    zs = model(*torch.rand(3, 2, 3, 64, 64), torch.rand(2, 1, 64, 64))
    assert [z.shape for z in zs] == [(2, 4)]*4
    assert [p[0].in_features for p in model.projectors] == [128, 6, 4] and isinstance(
        model.projectors[0][1], nn.LayerNorm
    )
    # one training pass, none for the width
    assert (
        isinstance(model.encoders[0].bn1, nn.GroupNorm)
        and model.encoders[1][1].num_batches_tracked == 1
    )
    assert not {id(p) for p in model.encoders[0].parameters()} & {
        id(p) for e in model.encoders[1:] for p in e.parameters()
    }

def test_both_views_of_a_shared_encoder_add_to_its_gradient():
    torch.manual_seed(0)
    model = siamese(small, (32, 8)).eval()
    a, b = torch.rand(2, 5, 3, 16, 16)
    def grad(*parts):
        model.zero_grad()
        zs = model(a, b)
        sum(zs[k].square().sum() for k in parts).backward()
        return model.encoders[0][0].weight.grad.clone()
    torch.testing.assert_close(grad(0, 1), grad(0) + grad(1))
    assert grad(0).abs().sum() > 0 and grad(1).abs().sum() > 0

def test_volumes_and_channels_reach_the_encoders():
    model = siamese("resnet10_narrow", (4, 2), privileged=True, in_channels=(1, 2), spatial_dims=3)
    assert model(torch.rand(2, 1, 16, 16, 16), torch.rand(2, 2, 16, 16, 16))[1].shape == (2, 2)

@pytest.mark.parametrize("args, error, message", [
    (dict(layout=(0, 2)), ValueError, "layout that uses each of them"),
    (dict(layout=()), ValueError, "layout that uses each of them"),
    (dict(in_channels=(3, 1, 1)), ValueError, "3 values of in_channels for the 2 encoders"),
    (dict(encoder=small()), TypeError, "a Sequential as encoder"),
    (dict(encoder=[3, 4]), TypeError, "a int as encoder"),
    (dict(encoder=["resnet18"]), ValueError, "1 values of encoder"),
    (dict(encoder=lambda net=small(): net), ValueError, "the same module twice"),
    (dict(widths=()), ValueError, "one positive width"),
    (dict(widths=(8, 0)), ValueError, "one positive width"),
    (dict(projector_norm="group"), ValueError, "expected one of batch, layer, none"),
])
def test_make_branches_says_what_it_expects(args, error, message):
    with pytest.raises(error, match=message):
        make_branches(**{"encoder": small, "widths": (4, 2), **args})

def test_views_are_counted():
    with pytest.raises(ValueError, match="2 views for the 3 branches"):
        trident(small, (4, 2))(*torch.rand(2, 2, 3, 8, 8))

@pytest.mark.parametrize("norm, kind, bias", [
    ("batch", nn.BatchNorm1d, False), ("layer", nn.LayerNorm, False), ("none", None, True),
])
def test_projector_norms(norm, kind, bias):
    p = Projector(5, (4, 3, 2), norm)
    assert p(torch.rand(6, 5)).shape == (6, 2)
    assert [type(m) for m in p] == [nn.Linear, *([kind] if kind else []), nn.ReLU]*2 + [nn.Linear]
    assert [m.bias is not None for m in p if isinstance(m, nn.Linear)] == [bias, bias, True]
    assert [type(m) for m in Projector(5, (2,), norm)] == [nn.Linear]
