"""Guided-GradCAM against its formula written out, in images and volumes; what coverage sees; the
model as it was found."""
import gc
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import MemoryEfficientSwish, Swish
from monai.networks.nets import DenseNet121, ResNet
from torch import nn

from synthpi.losses.distance import TwoHead
from synthpi.explain.saliency import (
    Dimension,
    Similarity,
    guided_gradcam,
    saliency_display,
    saliency_grid,
    saliency_maps,
    saliency_volume,
    strongest_voxel,
)
from synthpi.explain.activations import coverage
from synthpi.models.encoders import make_encoder
from synthpi.models.distances import DistanceEmbedding


class Guided(torch.autograd.Function):
    "r_in = 1[x > 0] * max(r_out, 0)"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)
    @staticmethod
    def backward(ctx, r): return (ctx.saved_tensors[0] > 0)*r.clamp(min=0)


class Rule(nn.Module):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule
    def forward(self, x): return self.rule(x.clone())


def with_rule(model, rule):
    "A copy in which every nn.ReLU module follows `rule`"
    model = deepcopy(model).eval()
    done = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU): setattr(parent, name, done.setdefault(child, Rule(rule)))
    return model


def by_hand(model, images, score, layer):
    "`score` is a function of the outputs, or a class for each image"
    if not callable(score):
        def score(y, c=score): return y[range(len(y)), c]
    plain, guided = with_rule(model, lambda x: x*(x > 0)), with_rule(model, Guided.apply)
    seen = []
    hook = plain.get_submodule(layer).register_forward_hook(
        lambda m, x, out: (seen.append(out), out.clone())[1]
    )
    x = images.clone().requires_grad_()
    dA, = torch.autograd.grad(score(plain(x)).sum(), seen[0])
    hook.remove()
    A, space = seen[0], tuple(range(2, images.ndim))
    alpha = dA.sum(space)/A[0, 0].numel()
    cam = sum(
        alpha[:, k].reshape(-1, *[1] * len(space)) * A[:, k] for k in range(A.shape[1])
    ).clamp(min=0)
    cam = F.interpolate(
        cam[:, None],
        size=images.shape[2:],
        mode="bilinear" if len(space) == 2 else "trilinear",
        align_corners=False,
    )
    x = images.clone().requires_grad_()
    g, = torch.autograd.grad(score(guided(x)).sum(), x)
    return (g*cam).detach()


def close(ours, expected):
    assert ours.shape == expected.shape and expected.abs().max() > 0
    # float32 sums in another order
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5*expected.abs().max().item())


class PreActivation(nn.Module):
    "The input of a ReLU is also read by a skip: a hook on that tensor would guide the skip too"
    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, stride=2),
        )
        self.act, self.head = nn.ReLU(), nn.Linear(8, 4)
    def forward(self, x):
        x = self.stem(x)
        x = x - self.conv1(self.act(x))
        return self.head(self.conv2(self.act(x)).mean((2, 3)))


class InPlace(nn.Module):
    "In-place everywhere, one shared module, and an MLP probe"
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1, stride=2),
        )
        self.act, self.head = (
            nn.ReLU(inplace=True),
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)),
        )
    def forward(self, x):
        y = self.conv1(x)
        y += x.mean(1, keepdim=True)
        y = self.conv2(self.act(self.norm(y)))
        y += 1
        return self.head(self.act(y).mean((2, 3)))


def resnet():
    return ResNet(
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[16, 32, 64, 128],
        n_input_channels=3,
        spatial_dims=2,
        feed_forward=False,
    )


def networks(seed=0):
    torch.manual_seed(seed)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AvgPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    nets = {
        "plain": (plain, "2"),
        "in-place": (InPlace(), "conv2"),
        "pre-activation": (PreActivation(), "conv2"),
        "resnet": (nn.Sequential(resnet(), nn.Linear(128, 4)), "0.layer4.0.conv2"),
    }
    for net, _ in nets.values():
        net(torch.rand(2, 3, 24, 24))
        # statistics away from their start, so that evaluation mode matters
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-0.2, 0.2), m.running_var.uniform_(0.5, 2)
    return nets


@pytest.fixture
def images(): return torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["plain", "in-place", "pre-activation", "resnet"])
def test_equals_the_formula(name, images):
    net, layer = networks()[name]
    if name == "resnet": images = F.interpolate(images, size=64)
    target = [0, 1, 2, 3, 0]
    ours = guided_gradcam(net, images, torch.tensor(target))
    expected = by_hand(net, images, target, layer)
    close(ours, expected)
    # the default layer is the one named
    assert torch.equal(ours, guided_gradcam(net, images, torch.tensor(target), layer=layer))
    in_parts = guided_gradcam(net, images, torch.tensor(target), batch_size=2)
    close(in_parts, ours)


def volume_networks():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv3d(1, 6, 3),
        nn.ReLU(inplace=True),
        nn.Conv3d(6, 8, 3, stride=2),
        nn.BatchNorm3d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    narrow, dense = (
        make_encoder(name, in_channels=1, spatial_dims=3)
        for name in ("resnet10_narrow", "densenet121")
    )
    nets = {
        "plain": (plain, "2", (2, 1, 9, 10, 11)),
        "resnet10_narrow": (narrow, None, (2, 1, 20, 16, 24)),
        "densenet121": (dense, None, (1, 1, 32, 32, 32)),
    }
    for net, _, shape in nets.values():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm3d):
                m.running_mean.uniform_(-0.2, 0.2), m.running_var.uniform_(0.5, 2)
    return nets


@pytest.mark.parametrize(
    "name", ["plain", "resnet10_narrow", pytest.param("densenet121", marks=pytest.mark.slow)]
)
def test_equals_the_formula_in_volumes(name):
    net, layer, shape = volume_networks()[name]
    # a DenseNet adds so many float32 numbers in another order that little could be told
    net.double()
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if layer is None:
        kept, wide = (
            {},
            [
                (k, m)
                for k, m in net.named_modules()
                if isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1
            ],
        )
        hooks = [
            m.register_forward_hook(lambda m, x, out, k=k: kept.update({k: out.shape}))
            for k, m in wide
        ]
        net.eval()(x)
        for h in hooks: h.remove()
        layer = [k for k, shape in kept.items() if max(shape[2:]) > 1][-1]
    reference, found = torch.rand(net(x).shape[1], dtype=torch.float64), []
    # Grad-CAM of a dimension for which no channel speaks is zero
    k = next(k for k in range(9) if by_hand(net, x, lambda z: z[:, k], layer).any())
    for target, score in (
        (Dimension(k), lambda z: z[:, k]),
        (
            Similarity(-reference),
            lambda z: -(z * reference).sum(1) / z.norm(dim=1) / reference.norm(),
        ),
        (
            Similarity(reference),
            lambda z: (z * reference).sum(1) / z.norm(dim=1) / reference.norm(),
        ),
    ):
        ours = guided_gradcam(net, x, target)
        torch.testing.assert_close(
            ours, by_hand(net, x, score, layer), rtol=1e-6, atol=1e-9 * ours.abs().max().item()
        )
        assert ours.shape == x.shape
        found.append(ours.any())
    assert found[0] and sum(found) >= 2
    assert coverage(net, x[:1]).guided.all()


def test_what_can_be_explained(images):
    net, layer = networks()["resnet"]
    encoder, images = net[0].eval(), F.interpolate(images, size=48)
    reference, each = torch.rand(128), torch.rand(5, 128)
    def unit(z): return z/z.norm(dim=1, keepdim=True)
    def hand(score): return by_hand(encoder, images, score, "layer4.0.conv2")
    close(
        guided_gradcam(encoder, images, Similarity(reference)),
        hand(lambda z: (unit(z) * unit(reference[None])).sum(1)),
    )
    close(
        guided_gradcam(encoder, images, Similarity(each, "distance"), batch_size=2),
        hand(lambda z: -(z - each).square().sum(1).sqrt()),
    )
    close(guided_gradcam(encoder, images, Dimension(7)), hand(lambda z: z[:, 7]))
    close(
        guided_gradcam(encoder, images, lambda z: (z[:, :3] * torch.tensor([1.0, -2, 0.5])).sum(1)),
        hand(lambda z: z[:, 0] - 2 * z[:, 1] + 0.5 * z[:, 2]),
    )
    heads = TwoHead(128, 6, 9)
    close(
        guided_gradcam(nn.Sequential(encoder, heads), images, Dimension(2)),
        by_hand(
            nn.Sequential(encoder, heads.distance), images, lambda z: z[:, 2], "0.layer4.0.conv2"
        ),
    )
    ball = DistanceEmbedding(encoder, nn.Linear(128, 4), 12.5)
    close(
        guided_gradcam(ball, images, Dimension(3)),
        by_hand(ball, images, lambda z: z[:, 3], "encoder.layer4.0.conv2"),
    )


def test_targets_that_do_not_fit_are_refused(images):
    net, _ = networks()["in-place"]
    for target, said in (
        (Dimension(4), "dimension 4"),
        (Dimension(-1), "dimension -1"),
        (Similarity(torch.ones(3)), r"\(3,\)"),
        (Similarity(torch.ones(4, 4)), r"\(4, 4\)"),
        (0.5, "float32"),
        (torch.ones(5), "float32"),
        ([0, 1], r"shape \(2,\)"),
        (torch.zeros(5, 1, dtype=torch.long), r"\(5, 1\)"),
        (lambda z: z.sum(), r"gave shape \(\) for 5"),
        (lambda z: z, r"\(5, 4\) for 5"),
    ):
        with pytest.raises(ValueError, match=said):
            guided_gradcam(net, images, target)
    with pytest.raises(ValueError, match="kind 'dot'"): Similarity(torch.ones(3), "dot")
    with pytest.raises(ValueError, match="1 of its values not finite"):
        Similarity(torch.tensor([1.0, float("nan")]))
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x): return self.net(x), x
    with pytest.raises(ValueError, match="got a tuple from the model"): guided_gradcam(Two(), images)
    with pytest.raises(ValueError, match=r"got shape \(1, 8, 22, 22\) from"):
        guided_gradcam(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), images)
    with pytest.raises(ValueError, match="uint8"): guided_gradcam(net, (images*255).byte())
    with pytest.raises(ValueError, match="batch_size=0"): guided_gradcam(net, images, batch_size=0)


def test_the_parts_of_the_product(images):
    net, _ = networks()["in-place"]
    maps = saliency_maps(net, images, 1, batch_size=2)
    assert (
        list(maps) == ["guided_gradcam", "gradcam", "guided_backprop", "gradient"]
        and maps["gradcam"].shape == (5, 1, 24, 24)
        and maps["gradcam"].min() >= 0
    )
    assert torch.equal(maps["guided_gradcam"], maps["guided_backprop"]*maps["gradcam"])
    x = images.clone().requires_grad_()
    close(maps["gradient"], torch.autograd.grad(deepcopy(net).eval()(x)[:, 1].sum(), x)[0])
    assert not torch.allclose(maps["gradient"], maps["guided_backprop"])
    gelu = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    # these do not need the rule
    assert saliency_maps(gelu, images, 0, methods=["gradcam", "gradient"]).keys() == {
        "gradcam",
        "gradient",
    }
    with pytest.raises(ValueError, match="gelu in 1"):
        saliency_maps(gelu, images, 0, methods=["guided_backprop"])
    with pytest.raises(ValueError, match="lime"): saliency_maps(gelu, images, 0, methods=["lime"])


def test_the_target(images):
    net, _ = networks()["in-place"]
    with torch.no_grad(): predicted = deepcopy(net).eval()(images).argmax(1)
    assert torch.equal(guided_gradcam(net, images), guided_gradcam(net, images, predicted))
    assert torch.equal(
        guided_gradcam(net, images, 2), guided_gradcam(net, images, torch.full((5,), 2))
    )
    for bad in (-1, 4):
        with pytest.raises(ValueError, match="classes 0 to 3"): guided_gradcam(net, images, bad)
    with pytest.raises(ValueError, match=r"\(3, 24, 24\)"): guided_gradcam(net, images[0])
    assert guided_gradcam(net, images[:0]).shape == (0, 3, 24, 24)


def state(net):
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        [getattr(m, "inplace", None) for m in net.modules()],
        [
            {
                k: list(v.items()) if isinstance(v, dict) else v
                for k, v in vars(m).items()
                if "hook" in k
            }
            for m in net.modules()
        ],
        [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()],
    )


def same(a, b):
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1:3] == b[1:3] and a[4:] == b[4:]
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(a[3], b[3]))


class Restless(nn.Module):
    "Draws random numbers, counts its calls in a buffer, and may end any of them"
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.at, self.error = None, None
    def forward(self, x):
        # another tensor in its place, as well as other values
        self.calls = self.calls + 1
        torch.rand(3)
        if self.at is not None and self.calls >= self.at: raise self.error
        return x + 0*F.dropout(x, .5, training=True)


def backward_error(error):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): raise error
    return Stop.apply


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_found(images, frozen):
    net, _ = networks()["in-place"]
    restless = Restless()
    net.head.insert(0, restless)
    net.train()
    net.norm.eval()
    net(images).sum().backward()
    net.conv1.register_forward_hook(lambda m, x, out: None)      # the owner's hooks stay
    net.act.register_forward_pre_hook(lambda m, x: None)
    net.norm.register_full_backward_hook(lambda m, gin, gout: None)
    if frozen: net.requires_grad_(False)
    before, pixels, own = state(net), images.clone(), restless.calls
    with torch.no_grad(): maps = guided_gradcam(net, images, 1)
    same(before, state(net))
    assert restless.calls is own
    with pytest.raises(ValueError): guided_gradcam(net, images, 9)
    same(before, state(net))
    # fails in the middle of a forward pass
    with pytest.raises(RuntimeError): guided_gradcam(net, images[:, :2], 0)
    same(before, state(net))
    for error in (KeyboardInterrupt, RuntimeError("no room")):
        # while the network is watched, in Grad-CAM, in guided back-propagation, in the next batch
        for at in (2, 3, 4, 5, 6):
            restless.at, restless.error = at, error
            with pytest.raises(error if isinstance(error, type) else RuntimeError):
                guided_gradcam(net, images, 1, batch_size=3)
            restless.at = None
            same(before, state(net))
    assert torch.equal(images, pixels) and not images.requires_grad and not maps.requires_grad
    with torch.inference_mode(): assert torch.equal(guided_gradcam(net, images, 1), maps)


def test_an_interrupt_in_the_backward_pass_leaves_the_model(images):
    class Stopped(Uses): pass
    net = Stopped(backward_error(KeyboardInterrupt()))
    before = state(net)
    with pytest.raises(KeyboardInterrupt): guided_gradcam(net, images, 0)
    same(before, state(net))


def live(): return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def test_memory_does_not_grow_with_the_number_of_images():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    images, seen, calls = torch.rand(200, 1, 10, 10), [], []
    hook = net[2].register_forward_hook(
        lambda m, x, out: (
            (calls.append(1), len(calls) % 20 == 10 and seen.append(live()))[:0] or None
        )
    )
    gc.collect()
    start = live()
    maps = guided_gradcam(net, images, 0, batch_size=4)
    hook.remove()
    gc.collect()
    # no batch leaves a tensor behind
    assert len(calls) == 1 + 2*50 and len(seen) == 5 and max(seen[1:]) <= seen[0]
    # only the maps are left
    assert live() == start + 1
    some = [0, 3, 101, 199]
    # batched as one by one
    close(torch.cat([guided_gradcam(net, images[i:i + 1], 0) for i in some]), maps[some])


def test_layer_choice(images):
    torch.manual_seed(0)
    ones = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    # not "5": its map is one pixel
    assert torch.equal(guided_gradcam(ones, images, 0), guided_gradcam(ones, images, 0, layer="2"))
    flat = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3))
    flat(images)
    with pytest.raises(ValueError, match="0 convolutions"): guided_gradcam(flat, images, 0)
    with pytest.raises(ValueError, match="its convolutions are 0, 2, 5"):
        guided_gradcam(ones, images, 0, layer="nowhere")
    with pytest.raises(ValueError, match="'7' gave shape"):
        guided_gradcam(ones, images, 0, layer="7")
    with pytest.raises(ValueError, match="ran 0 times"):
        guided_gradcam(ones, images, 0, layer=nn.Conv2d(3, 3, 3))
    twice = nn.Conv2d(4, 4, 3)
    again = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        twice,
        nn.ReLU(),
        twice,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    with pytest.raises(ValueError, match="'2' ran 2 times"): guided_gradcam(again, images, 0)


def put_zeros(x):
    y = x.clone()
    y[y < 0] = 0
    return y


class Uses(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.conv, self.act, self.head, self.f = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 3), f
    def forward(self, x):
        h = self.f(self.act(self.conv(x))).mean((2, 3))
        return self.head(F.pad(h, (0, 4 - h.shape[1])))  # a gated unit halves the channels


@pytest.mark.parametrize(
    "f",
    [
        F.relu,
        torch.relu,
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: x.clamp(min=0),
        lambda x: torch.clamp_min(x, 0),
        lambda x: F.threshold(x, 0, 0),
        F.gelu,
        F.silu,
        F.leaky_relu,
        F.relu6,
        nn.ReLU6(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.PReLU(),
        nn.ELU(),
        nn.SELU(),
        nn.Hardswish(),
        nn.Mish(),
        nn.SiLU(inplace=True),
        nn.Softplus(),
        Swish(),
        MemoryEfficientSwish(),
        lambda x: x * torch.sigmoid(1.7 * x),
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
        lambda x: x * (x > 0),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: x.masked_fill(x < 0, 0),
        lambda x: torch.maximum(x, torch.zeros(())),
        lambda x: torch.clamp(x, min=torch.zeros(())),
        lambda x: x.clip(0),
        lambda x: F.glu(x, 1),
        lambda x: x[:, :2] * x[:, 2:].sigmoid(),
        lambda x: x.clamp(0, 6),
        lambda x: x.clip(0, float("inf")),
        lambda x: -(-x).clamp(max=0),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: torch.where(x < 0, torch.zeros_like(x), x),
        lambda x: torch.fmax(x, torch.zeros(())),
        lambda x: -torch.fmin(-x, torch.zeros(())),
        lambda x: torch.stack([x, torch.zeros_like(x)]).amax(0),
        lambda x: torch.stack([x, 0.1 * x], -1).max(-1).values,
        lambda x: -torch.minimum(-x, torch.zeros_like(x)),
        lambda x: put_zeros(x),
        lambda x: torch.maximum(x, 0.1 * x),
        lambda x: torch.logaddexp(x, torch.zeros(())),
        lambda x: torch.addcmul(torch.zeros_like(x), x, torch.sigmoid(x)),
    ],
)
def test_unguided_activations_are_seen_and_refused(f, images):
    net = Uses(f)
    table = coverage(net, images)
    assert table.guided.tolist() == [True, False] and table.calls.tolist() == [1, 1]
    with pytest.raises(ValueError, match="1 activations would not be guided"):
        guided_gradcam(net, images, 0)


@pytest.mark.parametrize(
    "f",
    [
        nn.ReLU(),
        torch.sigmoid,
        lambda x: F.normalize(x),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(max=3),
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        lambda x: x * torch.sigmoid(x.flip(1)),
        lambda x: torch.tanh(x),
        lambda x: F.layer_norm(x, x.shape[1:]),
        lambda x: x * x,
        lambda x: torch.softmax(x, 1) * x,
        lambda x: torch.maximum(x[..., ::2], x[..., 1::2]),
        lambda x: torch.maximum(x, x.flip(1)),
        lambda x: torch.stack([x, x.flip(1)]).amax(0),
        lambda x: torch.where(x.flip(1) > 0, x, torch.zeros_like(x)),
        lambda x: torch.addcmul(x, x, torch.sigmoid(x.flip(1))),
        lambda x: torch.stack([x, torch.zeros_like(x)]).amax((1, 2)).permute(1, 0, 2)[..., None],
        lambda x: torch.cat([x, torch.zeros_like(x)], 1)[:, :4],
    ],
)
def test_what_is_no_rectifier_is_not_held_against_a_model(f, images):
    assert coverage(Uses(f), images).guided.all()
    assert torch.isfinite(guided_gradcam(Uses(f), images, 0)).all()


def test_pixels_may_be_brought_to_their_range(images):
    class Clamps(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.net, self.f = Uses(nn.ReLU()), f
        def forward(self, x): return self.net(self.f(x))
    for f in (lambda x: x.clamp(0, 1), lambda x: ((x - 0.1) / 0.9).clamp(0, 1)):
        assert coverage(Clamps(f), images).guided.all()
    assert (
        not coverage(Clamps(lambda x: F.avg_pool2d(x, 2).clamp(0, 1)), images).guided.all()
        and not coverage(Clamps(lambda x: x.clamp(min=0)), images).guided.all()
    )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformers_are_refused_although_their_fused_path_hides_the_activation(
    activation, images
):
    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 3)
            self.layer = nn.TransformerEncoderLayer(
                8, 2, 16, activation=activation, batch_first=True
            )
        def forward(self, x): return self.head(self.layer(self.patch(x).flatten(2).mT).mean(1))
    net = ViT().eval().requires_grad_(False)
    assert coverage(net, images)[["operation", "guided"]].values.tolist() == [[activation, False]]
    with pytest.raises(ValueError, match=f"{activation} in layer"): guided_gradcam(net, images, 0)


def test_activations_that_only_look_like_modules_of_relu_are_refused(images):
    class Concatenated(nn.ReLU):
        def forward(self, x): return torch.relu(x) + torch.relu(-x)
    with pytest.raises(ValueError, match="would not be guided"):
        guided_gradcam(Uses(Concatenated()), images, 0)
    for ask in (lambda net: guided_gradcam(net, images, 0), lambda net: coverage(net, images)):
        with pytest.raises(ValueError, match="TorchScript at f"):
            ask(Uses(torch.jit.script(nn.ReLU())))
    class Renamed(nn.ReLU): pass
    assert coverage(Uses(Renamed()), images).guided.all()
    with pytest.raises(ValueError, match="DataParallel"):
        guided_gradcam(nn.DataParallel(Uses(nn.ReLU())), images, 0)


def test_attention_alone_is_no_rectifier(images):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.norm, self.mix, self.act, self.head = (
                nn.Conv2d(3, 8, 4, 4),
                nn.LayerNorm(8),
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.ReLU(),
                nn.Linear(8, 3),
            )
        def forward(self, x):
            t = self.norm(self.act(self.patch(x)).flatten(2).mT)
            return self.head((t + self.mix(t, t, t)[0]).mean(1))
    net = Attends().eval()
    assert coverage(net, images)[["module", "guided"]].values.tolist() == [["act", True]]
    close(guided_gradcam(net, images, 1), by_hand(net, images, [1]*5, "patch"))


def test_a_model_without_rectifiers_is_refused(images):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with pytest.raises(ValueError, match="0 ReLUs"): guided_gradcam(net, images, 0)


def test_monai_networks_are_covered(images):
    table = coverage(resnet(), F.interpolate(images[:1], size=32))
    assert table.guided.all() and table.calls.tolist() == [1, 2, 2, 2, 2]
    assert coverage(
        DenseNet121(spatial_dims=2, in_channels=3, out_channels=2),
        F.interpolate(images[:1], size=32),
    ).guided.all()


def test_display_of_odd_maps():
    # its 99th percentile is zero
    sparse = np.zeros((3, 100, 100))
    sparse[0, 0, 0] = -5
    assert saliency_display(sparse)[0, 0].tolist() == [1, 128, 128]
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        saliency_display(np.zeros((2, 3, 4, 4)))
    with pytest.raises(ValueError, match="not finite"): saliency_display(np.full((4, 4), np.nan))


def test_grid_has_a_row_per_class_present_and_literal_names():
    x = torch.rand(4, 3, 8, 8)
    fig = saliency_grid(
        x,
        {"a": x, "b": x},
        [2, 0, 2, 0],
        {"a": [2, 0, 2, 0], "b": torch.tensor([1, 0, 0, 0])},
        ["$x", "<b>", "c_$"],
    )
    assert [ax.get_ylabel() for ax in fig.axes[::3]] == ["$x", "c_$"]
    assert [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()] == [
        "✓ $x / $x",
        "✓ $x / $x",
        "✓ c_$ / c_$",
        "✗ <b> / c_$",
    ]
    fig.draw_without_rendering()               # an unpaired $ would stop mathtext
    with pytest.raises(ValueError, match="0 of 2 images"):
        saliency_grid(x[:2], {"a": x}, [-1, -1], {"a": [0, 0]}, ["c"])


def test_planes_of_a_volume():
    m = torch.zeros(1, 6, 7, 8)
    m[0, 2, 4, 5], m[0, 2, 1, 1], m[0, 5, 4, 5] = -3., 1., 1.
    assert strongest_voxel(m) == strongest_voxel(m[0].numpy()) == (2, 4, 5)
    volume = torch.rand(1, 6, 7, 8)
    fig = saliency_volume(volume, m, spacing_mm=(1, 2, 4))
    def titles(fig): return [ax.get_title() for ax in fig.axes[:3]]
    assert (
        titles(fig)
        == ["left-right: voxel 2", "posterior-anterior: voxel 4", "inferior-superior: voxel 5"]
        and "0% of" in fig._suptitle.get_text()
    )
    gray, drawn = fig.axes[0].images
    assert (
        np.array_equal(gray.get_array(), volume[0, 2].T)
        and drawn.get_array().shape == (8, 7)
        and fig.axes[0].get_aspect() == 2
        and fig.axes[2].get_aspect() == 2
        and fig.axes[1].get_aspect() == 4
    )
    assert drawn.get_array()[5, 4] == -1 and (drawn.get_alpha() > 0).sum() == 2
    assert (
        titles(saliency_volume(volume, m, "centre"))[0].endswith("voxel 3")
        and "82% of" not in saliency_volume(volume, m, "centre")._suptitle.get_text()
    )
    assert (
        saliency_volume(volume, m, (0, 0, 0))._suptitle.get_text().startswith("100%")
        and "zero everywhere" in saliency_volume(volume, 0 * m)._suptitle.get_text()
    )
    for at in ("middle", (1, 2), (6, 0, 0), (-1, 0, 0)):
        with pytest.raises(ValueError, match="expected 'strongest'"): saliency_volume(volume, m, at)
    with pytest.raises(ValueError, match="show one at a time"): saliency_volume(volume, m[0, 0])
    with pytest.raises(ValueError, match="not finite"): strongest_voxel(m/0)
    assert saliency_display(torch.ones(1, 4, 5)).shape == (4, 5)
