"Guided-GradCAM against its formula written out; what coverage sees; the model as it was found. (UMAP, slow to compile, is in the notebook.)"
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import DenseNet121, ResNet
from torch import nn

from synthpi.explain import coverage, guided_gradcam, plot_map, saliency_display, saliency_grid


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


def by_hand(model, images, target, layer):
    plain, guided = with_rule(model, lambda x: x*(x > 0)), with_rule(model, Guided.apply)
    seen = []
    hook = plain.get_submodule(layer).register_forward_hook(lambda m, x, out: (seen.append(out), out.clone())[1])
    x = images.clone().requires_grad_()
    score = plain(x)[range(len(x)), target].sum()
    dA, = torch.autograd.grad(score, seen[0])
    hook.remove()
    alpha = dA.sum((2, 3))/(dA.shape[2]*dA.shape[3])
    cam = torch.einsum("bk,bkuv->buv", alpha, seen[0]).clamp(min=0)
    cam = F.interpolate(cam[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)
    x = images.clone().requires_grad_()
    g, = torch.autograd.grad(guided(x)[range(len(x)), target].sum(), x)
    return (g*cam).detach()


class PreActivation(nn.Module):
    "The input of a ReLU is also read by a skip: a hook on that tensor would guide the skip too"
    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.act, self.head = nn.ReLU(), nn.Linear(8, 4)
    def forward(self, x):
        x = self.stem(x)
        x = x - self.conv1(self.act(x))
        return self.head(self.conv2(self.act(x)).mean((2, 3)))


class InPlace(nn.Module):
    "In-place everywhere, one shared module, and an MLP probe"
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.act, self.head = nn.ReLU(inplace=True), nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    def forward(self, x):
        y = self.conv1(x)
        y += x.mean(1, keepdim=True)
        y = self.conv2(self.act(self.norm(y)))
        y += 1
        return self.head(self.act(y).mean((2, 3)))


def resnet():
    return ResNet(block="basic", layers=[1, 1, 1, 1], block_inplanes=[16, 32, 64, 128], n_input_channels=3, spatial_dims=2, feed_forward=False)


def networks(seed=0):
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    nets = {"plain": (plain, "2"), "in-place": (InPlace(), "conv2"), "pre-activation": (PreActivation(), "conv2"),
            "resnet": (nn.Sequential(resnet(), nn.Linear(128, 4)), "0.layer4.0.conv2")}
    for net, _ in nets.values():
        net(torch.rand(2, 3, 24, 24))
        for m in net.modules():         # statistics away from their start, so that evaluation mode matters
            if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.2, .2), m.running_var.uniform_(.5, 2)
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
    assert ours.shape == images.shape and expected.abs().max() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5*expected.abs().max().item())      # float32 sums in another order
    assert torch.equal(ours, guided_gradcam(net, images, torch.tensor(target), layer=layer))           # the default layer is the one named
    in_parts = guided_gradcam(net, images, torch.tensor(target), batch_size=2)
    torch.testing.assert_close(in_parts, ours, rtol=1e-3, atol=1e-5*expected.abs().max().item())


def test_the_target(images):
    net, _ = networks()["in-place"]
    with torch.no_grad(): predicted = deepcopy(net).eval()(images).argmax(1)
    assert torch.equal(guided_gradcam(net, images), guided_gradcam(net, images, predicted))
    assert torch.equal(guided_gradcam(net, images, 2), guided_gradcam(net, images, torch.full((5,), 2)))
    for bad in (-1, 4):
        with pytest.raises(ValueError, match="classes 0 to 3"): guided_gradcam(net, images, bad)
    with pytest.raises(ValueError, match=r"\(3, 24, 24\)"): guided_gradcam(net, images[0])
    assert guided_gradcam(net, images[:0]).shape == (0, 3, 24, 24)


def state(net):
    return ({k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
            [None if p.grad is None else p.grad.clone() for p in net.parameters()], [getattr(m, "inplace", None) for m in net.modules()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()])


def same(a, b):
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    assert a[1:3] == b[1:3] and a[4:] == b[4:]
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(a[3], b[3]))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_found(images, frozen):
    net, _ = networks()["in-place"]
    net.train(); net.norm.eval()
    net(images).sum().backward()
    net.conv1.register_forward_hook(lambda m, x, out: None)      # the owner's hook stays
    if frozen: net.requires_grad_(False)
    before, pixels = state(net), images.clone()
    with torch.no_grad(): maps = guided_gradcam(net, images, 1)
    same(before, state(net))
    with pytest.raises(ValueError): guided_gradcam(net, images, 9)
    same(before, state(net))
    with pytest.raises(RuntimeError): guided_gradcam(net, images[:, :2], 0)          # fails in the middle of a forward pass
    same(before, state(net))
    assert torch.equal(images, pixels) and not images.requires_grad and not maps.requires_grad
    with torch.inference_mode(): assert torch.equal(guided_gradcam(net, images, 1), maps)


def test_layer_choice(images):
    torch.manual_seed(0)
    ones = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1),
                         nn.Flatten(), nn.Linear(4, 3))
    assert torch.equal(guided_gradcam(ones, images, 0), guided_gradcam(ones, images, 0, layer="2"))      # not "5": its map is one pixel
    flat = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 3)); flat(images)
    with pytest.raises(ValueError, match="0 convolutions"): guided_gradcam(flat, images, 0)


class Uses(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.conv, self.act, self.head, self.f = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 3), f
    def forward(self, x): return self.head(self.f(self.act(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("f", [F.relu, torch.relu, lambda x: x.relu(), lambda x: x.relu_(), lambda x: F.relu(x, inplace=True),
                               lambda x: x.clamp(min=0), lambda x: torch.clamp_min(x, 0), lambda x: F.threshold(x, 0, 0), F.gelu, F.silu,
                               F.leaky_relu, F.relu6, nn.ReLU6(), nn.GELU(), nn.PReLU(), nn.ELU(), nn.Hardswish(), nn.Mish()])
def test_unguided_activations_are_seen_and_refused(f, images):
    net = Uses(f)
    table = coverage(net, images)
    assert table.guided.tolist() == [True, False] and table.calls.tolist() == [1, 1]
    with pytest.raises(ValueError, match="1 activations would not be guided"): guided_gradcam(net, images, 0)


@pytest.mark.parametrize("f", [nn.ReLU(), torch.sigmoid, lambda x: F.normalize(x), lambda x: x.clamp(-1, 1), lambda x: x.clamp(max=3)])
def test_what_is_no_rectifier_is_not_held_against_a_model(f, images):
    assert coverage(Uses(f), images).guided.all()
    assert torch.isfinite(guided_gradcam(Uses(f), images, 0)).all()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformers_are_refused_although_their_fused_path_hides_the_activation(activation, images):
    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 3)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
        def forward(self, x): return self.head(self.layer(self.patch(x).flatten(2).mT).mean(1))
    net = ViT().eval().requires_grad_(False)
    assert coverage(net, images)[["operation", "guided"]].values.tolist() == [[activation, False]]
    with pytest.raises(ValueError, match=f"{activation} in layer"): guided_gradcam(net, images, 0)


def test_a_model_without_rectifiers_is_refused(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="0 ReLUs"): guided_gradcam(net, images, 0)


def test_monai_networks_are_covered(images):
    table = coverage(resnet(), F.interpolate(images[:1], size=32))
    assert table.guided.all() and table.calls.tolist() == [1, 2, 2, 2, 2]
    assert coverage(DenseNet121(spatial_dims=2, in_channels=3, out_channels=2), F.interpolate(images[:1], size=32)).guided.all()


def test_display_of_odd_maps():
    sparse = np.zeros((3, 100, 100)); sparse[0, 0, 0] = -5           # its 99th percentile is zero
    assert saliency_display(sparse)[0, 0].tolist() == [1, 128, 128]
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"): saliency_display(np.zeros((2, 3, 4, 4)))
    with pytest.raises(ValueError, match="not finite"): saliency_display(np.full((4, 4), np.nan))


def test_grid_has_a_row_per_class_present_and_literal_names():
    x = torch.rand(4, 3, 8, 8)
    fig = saliency_grid(x, {"a": x, "b": x}, [2, 0, 2, 0], {"a": [2, 0, 2, 0], "b": torch.tensor([1, 0, 0, 0])}, ["$x", "<b>", "c_$"])
    assert [ax.get_ylabel() for ax in fig.axes[::3]] == ["$x", "c_$"]
    assert [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()] == ["✓ $x / $x", "✓ $x / $x", "✓ c_$ / c_$", "✗ <b> / c_$"]
    fig.draw_without_rendering()               # an unpaired $ would stop mathtext
    with pytest.raises(ValueError, match="0 of 2 images"): saliency_grid(x[:2], {"a": x}, [-1, -1], {"a": [0, 0]}, ["c"])


def test_map_shows_every_class_once_in_the_legend_with_its_own_look():
    labels = np.r_[np.arange(14), -1]
    coords = {"a": np.random.rand(15, 2), "b": {"coords": np.random.rand(15, 2), "trustworthiness": .876}}
    fig = plot_map(coords, labels, [f"${i}" for i in range(14)])
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["unlabelled"] + [f"${i}" for i in range(14)]
    looks = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in fig.axes[0].collections}
    assert len(looks) == 15 and "0.88" in fig.axes[1].get_title()
    fig.draw_without_rendering()
    with pytest.raises(ValueError, match="b has 3 points"): plot_map({"b": np.zeros((3, 2))}, labels, ["x"])

def test_a_map_leaves_the_number_of_threads_alone():
    from synthpi.explain import embedding_map
    before = torch.get_num_threads()
    embedding_map(np.random.default_rng(0).normal(size=(40, 8)))
    assert torch.get_num_threads() == before
