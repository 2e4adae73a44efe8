"""Foreign checkpoints against flat functions on their weights; every way a file can be wrong;
runtimes that are not installed; stains and controls."""
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from synthpi.pairs.foreign import Blur, ResNet, UNet, recognise
from synthpi.pairs.generators import (
    ForeignGenerator,
    ModuleGenerator,
    load_generator,
    make_unet,
    save_generator,
)
from synthpi.pairs.stains import StainGenerator
from synthpi.core.files import fingerprint
from synthpi.pairs.runtimes import as_range
from synthpi.pairs.stains import Macenko, RandomWeights, Shuffled, macenko_stains

# --- The published networks as flat functions: weights are drawn here under the published names,
# and every operation is a call of torch.nn.functional

def draw(state, name, *shape, bias):
    state[f"{name}.weight"] = torch.randn(shape)/(2*shape[1]*shape[2])**.5
    if bias: state[f"{name}.bias"] = .1*torch.randn(shape[0])

def draw_norm(state, name, channels, norm):
    if norm in ("batch", "instance_affine"):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            1 + 0.2 * torch.randn(channels),
            0.2 * torch.randn(channels),
        )
    if norm in ("batch", "instance_old"):
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = (
            0.3 * torch.randn(channels),
            0.5 + torch.rand(channels),
        )
    if norm == "batch": state[f"{name}.num_batches_tracked"] = torch.tensor(7)

def normed(x, s, name, norm):
    if norm == "none": return x
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
    if norm == "batch":
        mean, var = (
            s[f"{name}.running_mean"].view(1, -1, 1, 1),
            s[f"{name}.running_var"].view(1, -1, 1, 1),
        )
    x = (x - mean)/(var + 1e-5).sqrt()
    return (
        x * s[f"{name}.weight"].view(1, -1, 1, 1) + s[f"{name}.bias"].view(1, -1, 1, 1)
        if f"{name}.weight" in s
        else x
    )

def unet_state(levels, w, norm, cin=3, cout=3):
    s, bias, width = (
        {},
        norm.startswith("instance") and norm != "instance_affine",
        [w * min(2**k, 8) for k in range(levels)],
    )
    for k in range(levels):
        p = "model.model." + ("" if k == 0 else "1.model." + "3.model."*(k - 1))
        last = k == levels - 1
        draw(s, f"{p}{int(k > 0)}", width[k], width[k - 1] if k else cin, 4, 4, bias=bias)
        up = 3 if k == 0 or last else 5
        s[f"{p}{up}.weight"] = (
            torch.randn(width[k] * (1 if last else 2), width[k - 1] if k else cout, 4, 4)
            / (8 * width[k]) ** 0.5
        )
        if bias or k == 0: s[f"{p}{up}.bias"] = .1*torch.randn(width[k - 1] if k else cout)
        if k and not last: draw_norm(s, f"{p}2", width[k], norm)
        if k: draw_norm(s, f"{p}{up + 1}", width[k - 1], norm)
    s["model.model.3.weight"] *= .1             # away from the flat ends of the Tanh
    return s

def unet_forward(s, x, levels, norm):
    names, skips = (
        [
            "model.model." + ("" if k == 0 else "1.model." + "3.model." * (k - 1))
            for k in range(levels)
        ],
        [],
    )
    for k, p in enumerate(names):
        if k:
            skips.append(x)
            x = F.leaky_relu(x, 0.2)
        x = F.conv2d(
            x, s[f"{p}{int(k > 0)}.weight"], s.get(f"{p}{int(k > 0)}.bias"), stride=2, padding=1
        )
        if 0 < k < levels - 1: x = normed(x, s, f"{p}2", norm)
    for k, p in reversed(list(enumerate(names))):
        up = 3 if k in (0, levels - 1) else 5
        x = F.conv_transpose2d(
            x.relu(), s[f"{p}{up}.weight"], s.get(f"{p}{up}.bias"), stride=2, padding=1
        )
        if k: x = torch.cat([skips.pop(), normed(x, s, f"{p}{up + 1}", norm)], 1)
    return x.tanh()

def resnet_state(blocks, w, norm, padding="reflect", dropout=False, aa=False, cin=3, cout=3):
    s, n, bias = {}, 1, norm.startswith("instance") and norm != "instance_affine"
    def conv(i, cout, cin, k): draw(s, f"model.{i}", cout, cin, k, k, bias=bias)
    conv(1, w, cin, 7)
    draw_norm(s, "model.2", w, norm)
    i = 4
    for c in (w, 2 * w):
        conv(i, 2 * c, c, 3)
        draw_norm(s, f"model.{i + 1}", 2 * c, norm)
        if aa:
            s[f"model.{i + 3}.filt"] = (
                torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16
            ).repeat(2 * c, 1, 1, 1)
        i += 4 if aa else 3
    first = 0 if padding == "zero" else 1
    second = first + 3 + dropout + (padding != "zero")
    for _ in range(blocks):
        for k in (first, second):
            draw(s, f"model.{i}.conv_block.{k}", 4*w, 4*w, 3, 3, bias=bias)
            draw_norm(s, f"model.{i}.conv_block.{k+1}", 4*w, norm)
        i += 1
    for c in (4*w, 2*w):
        if aa:
            s[f"model.{i}.filt"] = (
                torch.tensor([1.0, 3, 3, 1])[:, None] * torch.tensor([1.0, 3, 3, 1]) / 16
            ).repeat(c, 1, 1, 1)
            conv(i + 1, c // 2, c, 3)
            draw_norm(s, f"model.{i + 2}", c // 2, norm)
            i += 4
        else:
            s[f"model.{i}.weight"] = torch.randn(c, c // 2, 3, 3) / (3 * c) ** 0.5
            if bias:
                s[f"model.{i}.bias"] = 0.1 * torch.randn(c // 2)
            draw_norm(s, f"model.{i + 1}", c // 2, norm)
            i += 3
    draw(s, f"model.{i+1}", cout, w, 7, 7, bias=True)
    s[f"model.{i+1}.weight"] *= .1              # away from the flat ends of the Tanh
    return s

def halve(x):
    """The binomial filter 1 2 1 along both sides, every second value, written with slices instead
    of a convolution"""
    for d in (2, 3):
        x = F.pad(x, (0, 0, 1, 1) if d == 2 else (1, 1, 0, 0), mode="reflect")
        n = x.shape[d] - 2
        x = (x.narrow(d, 0, n) + 2*x.narrow(d, 1, n) + x.narrow(d, 2, n))/4
    return x[..., ::2, ::2]

def double(x):
    """1 3 3 1 interpolation: every new value is 3/4 of the nearer old one and 1/4 of the other,
    edges repeated"""
    for d in (2, 3):
        a = F.pad(x, (0, 0, 1, 1) if d == 2 else (1, 1, 0, 0), mode="replicate")
        n = x.shape[d]
        x = torch.stack(
            [0.25 * a.narrow(d, 0, n) + 0.75 * x, 0.75 * x + 0.25 * a.narrow(d, 2, n)], d + 1
        ).flatten(d, d + 1)
    return x

def resnet_forward(s, x, blocks, norm, padding="reflect", dropout=False, aa=False):
    def conv(x, name, **k): return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **k)
    x = normed(conv(F.pad(x, (3,)*4, mode="reflect"), "model.1"), s, "model.2", norm).relu()
    i = 4
    for _ in range(2):
        x = normed(
            conv(x, f"model.{i}", stride=1 if aa else 2, padding=1), s, f"model.{i + 1}", norm
        ).relu()
        x, i = (halve(x), i + 4) if aa else (x, i + 3)
    mode = {"zero": "constant"}.get(padding, padding)
    first = 0 if padding == "zero" else 1
    second = first + 3 + dropout + (padding != "zero")
    for _ in range(blocks):
        p = f"model.{i}.conv_block."
        y = normed(
            conv(F.pad(x, (1,) * 4, mode=mode), f"{p}{first}"), s, f"{p}{first + 1}", norm
        ).relu()
        x = x + normed(conv(F.pad(y, (1,)*4, mode=mode), f"{p}{second}"), s, f"{p}{second+1}", norm)
        i += 1
    for _ in range(2):
        if aa:
            x, i = (
                normed(
                    conv(double(x), f"model.{i + 1}", padding=1), s, f"model.{i + 2}", norm
                ).relu(),
                i + 4,
            )
        else:
            x, i = (
                normed(
                    F.conv_transpose2d(
                        x,
                        s[f"model.{i}.weight"],
                        s.get(f"model.{i}.bias"),
                        stride=2,
                        padding=1,
                        output_padding=1,
                    ),
                    s,
                    f"model.{i + 1}",
                    norm,
                ).relu(),
                i + 3,
            )
    return conv(F.pad(x, (3,)*4, mode="reflect"), f"model.{i+1}").tanh()

NORMS = ["batch", "instance", "instance_old", "instance_affine", "none"]
EPS = 2e-5      # float32: the same sums in another order, some ten layers deep
EXACT = 1e-9    # the same in float64, where no such excuse is needed

def exact(module, x): return module.double()(x.double())
def doubled(state): return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
def same(a, b, eps=EPS):
    assert a.shape == b.shape and (a - b).abs().max() < eps, (a - b).abs().max()
def images(side=32, n=2):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(5))

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(11)

@pytest.mark.parametrize(
    "levels,side,norm",
    [(5, 64, n) for n in NORMS]
    + [(7, 128, n) for n in NORMS]
    + [(k, 2**k, n) for k in (8, 9) for n in ("batch", "instance")],
)
def test_unets_equal_the_flat_function(norm, levels, side):
    s = unet_state(levels, 2, norm)
    network = recognise(dict(s))
    x = 2*images(side, 1) - 1
    same(exact(network.module, x), (y := unet_forward(doubled(s), x.double(), levels, norm)), EXACT)
    assert .01 < y.std() and y.abs().median() < .9
    assert (
        network.multiple == network.least == 2**levels
        and network.facts["norm"] == norm.removesuffix("_old")
        and network.facts["levels"].startswith(f"{levels} ")
    )

@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("padding", ["reflect", "zero", "replicate"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("aa", [False, True])
def test_resnets_equal_the_flat_function(norm, padding, dropout, aa):
    s = resnet_state(2, 4, norm, padding, dropout, aa)
    network = recognise(dict(s), padding="replicate" if padding == "replicate" else None)
    x = 2*images() - 1
    same(
        exact(network.module, x),
        (y := resnet_forward(doubled(s), x.double(), 2, norm, padding, dropout, aa)),
        EXACT,
    )
    assert .01 < y.std() and y.abs().median() < .9
    facts = network.facts
    assert (facts["padding"], facts["dropout"][:2] == "no", facts["norm"], facts["blocks"]) == (
        padding,
        not dropout,
        norm.removesuffix("_old"),
        2,
    )
    assert ("CUT" in facts["family"]) == aa and network.multiple == 4

@pytest.mark.parametrize("blocks", [6, 9])
def test_the_published_depths(blocks):
    s = resnet_state(blocks, 2, "instance")
    network, x = recognise(dict(s)), 2*images() - 1
    same(
        exact(network.module, x), resnet_forward(doubled(s), x.double(), blocks, "instance"), EXACT
    )
    assert network.facts["blocks"] == blocks and "dropout: no" in str(network)

def test_deepliif_stain_generators_are_of_the_resnet_family():
    s = resnet_state(9, 2, "batch", "zero", dropout=True)
    network, x = recognise({f"module.{k}": v for k, v in s.items()}), 2*images() - 1
    same(
        exact(network.module, x),
        resnet_forward(doubled(s), x.double(), 9, "batch", "zero", True),
        EXACT,
    )

def test_reflection_and_replication_leave_the_same_names_but_not_the_same_image():
    s = resnet_state(1, 4, "batch")
    reflect, replicate = recognise(dict(s)), recognise(dict(s), padding="replicate")
    assert any("replication" in a for a in reflect.assumed) and not any(
        "replication" in a for a in replicate.assumed
    )
    assert (reflect.module(images()) - replicate.module(images())).abs().max() > 1e-3
    assert ForeignGenerator(reflect).key != ForeignGenerator(replicate).key

@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"epoch": 3, "netG": s},
        lambda s: {"state_dict": {f"netG.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
        lambda s: {
            **{f"G.{k}": v for k, v in s.items()},
            "D.model.0.weight": torch.zeros(4, 6, 4, 4),
        },
        lambda s: {k: v.half() for k, v in s.items()},
        OrderedDict,
    ],
    ids="parallel entry lightning compiled beside_a_discriminator half ordered".split(),
)
@pytest.mark.parametrize("family", ["unet", "resnet"])
def test_wrappings_come_off(wrap, family):
    s = unet_state(5, 2, "batch") if family == "unet" else resnet_state(1, 2, "batch")
    x = 2*images() - 1
    same(
        recognise(wrap(s)).module(x),
        recognise(dict(s)).module(x),
        eps=5e-2
        if wrap(s).get("model.model.0.weight", wrap(s).get("model.1.weight", torch.empty(0))).dtype
        == torch.half
        else 1e-7,
    )

def test_of_several_generators_one_is_chosen():
    a, b = resnet_state(1, 2, "instance"), resnet_state(1, 2, "instance")
    both = {"netG_A": a, "netG_B": b, "optimizer": {"state": {0: {"step": torch.tensor(3.)}}}}
    x = images()
    same(recognise(both, entry="netG_B").module(x), recognise(b).module(x), eps=1e-7)
    with pytest.raises(
        ValueError, match="entry='netG_C', expected one of 'netG_A', 'netG_B'"
    ):
        recognise(both, entry="netG_C")
    with pytest.raises(ValueError, match="2 generators in one file: choose by entry="):
        recognise(both)

@pytest.mark.parametrize("family", ["unet", "resnet"])
def test_image_statistics_equal_training_mode_on_one_image(family):
    s = unet_state(5, 2, "batch") if family == "unet" else resnet_state(1, 2, "batch")
    x = 2*images() - 1
    stored, by_image = recognise(dict(s)), recognise(dict(s), batch_statistics="image")
    one_by_one = torch.cat([recognise(dict(s)).module.train()(x[i:i+1]) for i in range(2)])
    same(by_image.module(x), one_by_one)
    assert (stored.module(x) - one_by_one).abs().max() > 0.01 and ForeignGenerator(
        stored
    ).key != ForeignGenerator(by_image).key
    assert by_image.facts["batch statistics"] == "of each image"

def test_files_from_before_batch_counters():
    s = {
        k: v
        for k, v in resnet_state(1, 2, "batch").items()
        if not k.endswith("num_batches_tracked")
    }
    same(recognise(dict(s)).module(images()), resnet_forward(s, images(), 1, "batch"))

def test_sizes_are_the_published_ones():
    """In millions, as the programs of pix2pix and CycleGAN print them when they build their default
    networks"""
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (UNet(), ResNet())]
    assert [f"{n:.3f}" for n in sizes] == ["54.414", "11.378"]

def test_blur_is_the_published_filter():
    assert torch.equal(
        Blur(3, False).filt[0, 0], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    )
    assert (
        torch.equal(Blur(3, True).filt[2, 0][0], torch.tensor([1.0, 3, 3, 1]) / 16)
        and Blur(1, True).filt.sum() == 4
    )
    for side in (8, 9, 11):
        same(Blur(3, False)(images(side)), halve(images(side)), 1e-6)
        same(Blur(3, True)(images(side)), double(images(side)), 1e-6)

# --- Through load_generator

def test_a_file_translates_as_the_network_does(tmp_path, capsys):
    s = resnet_state(2, 4, "instance")
    torch.save(s, tmp_path / "latest_net_G.pth")
    save_file(s, tmp_path / "g.safetensors")
    torch.save(s, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    generators = [
        load_generator(tmp_path / n, um_per_px=0.5, training_ids=["p1"])
        for n in ("latest_net_G.pth", "g.safetensors", "old.pth")
    ]
    x = images()
    expected = (resnet_forward(s, 2*x - 1, 2, "instance") + 1)/2
    for g in generators: same(g.translate(x, um_per_px=.5), expected)
    assert (
        len({g.key for g in generators}) == 1
        and generators[0].training_ids == ["p1"]
        and generators[0].name == "latest_net_G"
    )
    said = capsys.readouterr().out
    assert (
        said.count("recognised ResNet generator") == 3
        and "scale: 0.5 um/px" in said
        and "norm: instance" in said
    )
    load_generator(tmp_path/"g.safetensors", verbose=False)
    assert capsys.readouterr().out == ""

def test_padding_to_the_needed_multiple_and_back():
    s = unet_state(7, 2, "batch")
    g = load_generator(s, verbose=False)
    for h, w in ((128, 128), (100, 130), (40, 256)):
        x = torch.rand(1, 3, h, w)
        H, W = (-(-n//128)*128 for n in (h, w))
        padded = F.pad(
            x, (0, W - w, 0, H - h), mode="reflect" if H - h < h and W - w < w else "replicate"
        )
        same(g.translate(x), (unet_forward(s, 2*padded - 1, 7, "batch")[..., :h, :w] + 1)/2)
    tiny = load_generator(resnet_state(1, 2, "instance"), verbose=False)
    assert tiny.translate(torch.rand(1, 3, 5, 3)).shape == (1, 3, 5, 3)

def test_scale_is_asked_for_and_used():
    s = resnet_state(1, 2, "instance")
    blind, sighted = (
        load_generator(s, verbose=False),
        load_generator(s, um_per_px=0.25, verbose=False),
    )
    x = images()
    with pytest.raises(ValueError, match="is not known: give it, load_generator"):
        blind.translate(x, um_per_px=0.5)
    same(blind.translate(x), sighted.translate(x), 1e-7)
    up = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)
    same(
        sighted.translate(x, um_per_px=0.5),
        F.interpolate(
            blind.translate(up.clamp(0, 1)), size=(32, 32), mode="bilinear", antialias=True
        ),
        1e-5,
    )

@pytest.mark.parametrize("cin,cout", [(1, 3), (3, 1), (1, 1)])
def test_gray_in_and_out(cin, cout):
    s = resnet_state(1, 2, "instance", cin=cin, cout=cout)
    x = images()
    gray = (.299*x[:, :1] + .587*x[:, 1:2] + .114*x[:, 2:]) if cin == 1 else x
    out = load_generator(s, verbose=False).translate(x)
    same(out, ((resnet_forward(s, 2*gray - 1, 1, "instance") + 1)/2).expand(-1, 3, -1, -1))

def test_no_gradient_no_randomness_and_a_batch_is_its_images():
    g = load_generator(resnet_state(1, 2, "batch", dropout=True), verbose=False)
    g.module.train()
    x = images().requires_grad_(True)
    out = g.translate(x)
    assert not out.requires_grad and torch.equal(out, g.translate(x)) and g.module.training
    same(torch.cat([g.translate(x[i:i+1]) for i in range(2)]), out, 1e-6)

def test_ranges():
    assert (
        as_range((-1, 1)) == ((-1.0, 1.0), (-1.0, 1.0))
        and as_range(((0, 255), "logits")) == ((0.0, 255.0), "logits")
        and as_range([[0, 1], [-1, 1]]) == ((0.0, 1.0), (-1.0, 1.0))
    )
    for bad in ((1, 0), "logits", (0, 1, 2), ((0, 1), "sigmoid"), ("a", "b")):
        with pytest.raises(ValueError, match="expected \\(low, high\\)"): as_range(bad)
    x = images()
    same(
        load_generator(
            lambda x: 4 * x - 2, name="f", range=((0, 1), "logits"), verbose=False
        ).translate(x),
        (4 * x - 2).sigmoid(),
        1e-6,
    )
    with pytest.raises(ValueError, match="gave values .*; expected 0 to 1: give range="):
        load_generator(lambda x: 4 * x - 2, name="f", verbose=False).translate(x)
    with pytest.raises(ValueError, match="gave values nan"):
        load_generator(lambda x: x * float("nan"), name="f", verbose=False).translate(x)
    with pytest.raises(ValueError, match="gave shape .*of the same size"):
        load_generator(lambda x: x[..., ::2], name="f", verbose=False).translate(x)
    with pytest.raises(ValueError, match="gave type tuple"):
        load_generator(lambda x: (x, x), name="f", verbose=False).translate(x)

def test_modules_and_functions(capsys):
    net = nn.Conv2d(3, 1, 3, padding=1).requires_grad_(False)
    net.weight.mul_(.1)
    g = load_generator(net, range=((0, 1), (-1, 1)), multiple=1)
    same(g.translate(images()), ((net(images()) + 1)/2).expand(-1, 3, -1, -1), 1e-6)
    assert "recognised module Conv2d" in capsys.readouterr().out and g.name == "Conv2d"
    assert g.key != load_generator(net, range=((0, 1), (-1, 1)), multiple=2, verbose=False).key
    assert load_generator(g) is g and isinstance(load_generator(StainGenerator()), StainGenerator)
    with pytest.raises(ValueError, match="without a name"): load_generator(lambda x: x)
    with pytest.raises(TypeError, match="a int, expected a path"): load_generator(3)

# --- What is refused

def test_a_pickle_never_runs(tmp_path):
    class Trap:
        def __reduce__(self): return (exec, (f"open({str(tmp_path/'ran')!r}, 'w').close()",))
    def bare(path): path.write_bytes(pickle.dumps({"model.1.weight": Trap()}, protocol=2))
    def zipped(path): torch.save({"model.1.weight": Trap()}, path)
    def legacy(path):
        torch.save({"model.1.weight": Trap()}, path, _use_new_zipfile_serialization=False)
    for write in (bare, zipped, legacy):
        write(tmp_path/"g.pth")
        with pytest.raises(
            ValueError, match="g.pth (holds more than weights|is not a whole PyTorch file)"
        ):
            load_generator(tmp_path / "g.pth")
        assert not (tmp_path/"ran").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path/"ran").exists()            # the trap works

def test_a_whole_module_is_refused_with_how_to_convert_it(tmp_path):
    torch.save(ResNet(1, width=2), tmp_path/"g.pth")
    with pytest.raises(
        ValueError, match="holds more than weights.*torch.save\\(network.state_dict\\(\\)"
    ):
        load_generator(tmp_path / "g.pth")

def test_bad_files_say_what_they_are(tmp_path):
    good, bad = tmp_path/"good.pth", tmp_path/"bad.pth"
    torch.save(resnet_state(1, 4, "batch"), good)
    content = good.read_bytes()
    for cut in (4, 1000, len(content)//2, len(content) - 1):
        bad.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="not a whole PyTorch file"): load_generator(bad)
    save_file(resnet_state(1, 4, "batch"), tmp_path/"s.safetensors")
    (tmp_path/"s.safetensors").write_bytes((tmp_path/"s.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole one"):
        load_generator(tmp_path / "s.safetensors")
    bad.write_bytes(b"")
    pytest.raises(ValueError, load_generator, bad)
    with pytest.raises(FileNotFoundError, match="no generator file at"):
        load_generator(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a folder.*good.pth"): load_generator(tmp_path)
    torch.save(torch.zeros(3), bad)
    with pytest.raises(ValueError, match="holds a Tensor"): load_generator(bad)
    torch.save({"epoch": 3}, bad)
    with pytest.raises(ValueError, match="without a single tensor"): load_generator(bad)

def patch_gan(norm=True):
    s, c = {"model.0.weight": torch.zeros(4, 6, 4, 4), "model.0.bias": torch.zeros(4)}, 4
    for i in (2, 5, 8):
        s[f"model.{i}.weight"] = torch.zeros(2 * c, c, 4, 4)
        c *= 2
    return s | {"model.11.weight": torch.zeros(1, c, 4, 4), "model.11.bias": torch.zeros(1)}

@pytest.mark.parametrize(
    "state,match",
    [
        (patch_gan(), "this is a discriminator .*model.11.weight.*_net_G"),
        ({f"module.{k}": v for k, v in patch_gan().items()}, "this is a discriminator"),
        (
            {"net.0.weight": torch.zeros(4, 3, 1, 1), "net.5.weight": torch.zeros(1, 8, 1, 1)},
            "this is a discriminator",
        ),
        (
            {"mlp_0.0.weight": torch.zeros(256, 3), "mlp_0.2.weight": torch.zeros(256, 256)},
            "feature layers of CUT",
        ),
        (
            nn.Linear(2, 2).state_dict(),
            "2 tensors of no known generator. Nearest is the .* missing model",
        ),
        (make_unet(4).state_dict(), "no known generator"),
        (
            {k: v for k, v in resnet_state(1, 2, "batch").items() if k != "model.7.weight"},
            "look like a ResNet.*missing model.7.weight",
        ),
        (
            {**resnet_state(1, 2, "batch"), "extra.weight": torch.zeros(1)},
            "not expected extra.weight",
        ),
        (
            {**resnet_state(1, 2, "batch"), "model.4.weight": torch.zeros(5, 2, 3, 3)},
            "model.4.weight has \\(5, 2, 3, 3\\) and not \\(4, 2, 3, 3\\)",
        ),
        (
            {k: v for k, v in unet_state(5, 2, "batch").items() if k != "model.model.3.weight"},
            "look like a U-Net.*missing model.model.3.weight",
        ),
        (
            {k: v for k, v in unet_state(5, 2, "batch").items() if ".3.model.3.model." not in k},
            "look like a U-Net",
        ),
        (resnet_state(1, 2, "instance", cin=6), "takes 6 channels.*DeepLIIF"),
        (
            {
                "model.1.weight": torch.zeros(2, 3, 7, 7),
                "model.10.conv_block.1.weight": torch.zeros(1),
            },
            "look like|no known",
        ),
    ],
    ids=lambda v: v[:24] if isinstance(v, str) else "",
)
def test_wrong_weights_are_named(state, match):
    with pytest.raises(ValueError, match=match): load_generator(state)

@pytest.mark.parametrize(
    "options,match",
    [
        ({"padding": "zero"}, "expected 'reflect' or 'replicate'"),
        ({"norm": "layer"}, "norm='layer'"),
        ({"batch_statistics": "none"}, "batch_statistics='none'"),
        ({"multiple": 0}, "multiple=0"),
        ({"range": (1, 1)}, "range="),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(ValueError, match=match):
        load_generator(resnet_state(1, 2, "batch"), **options)

def test_own_files_keep_their_settings(tmp_path, capsys):
    own = ModuleGenerator(make_unet(4), None, ["p1"])
    save_generator(own, tmp_path/"g.safetensors", dice=.8)
    again = load_generator(tmp_path/"g.safetensors", "cpu")
    assert again.key == own.key and again.about == {"dice": .8} and capsys.readouterr().out == ""
    told = load_generator(
        tmp_path / "g.safetensors", um_per_px=0.5, training_ids=["p2", "p1"], name="mine"
    )
    assert (told.um_per_px, told.training_ids, told.name) == (.5, ["p1", "p2"], "mine")
    save_generator(told, tmp_path/"g.safetensors")
    with pytest.raises(ValueError, match="um_per_px=0.25.*trained at 0.5"):
        load_generator(tmp_path / "g.safetensors", um_per_px=0.25)
    with pytest.raises(ValueError, match="range .*its own settings"):
        load_generator(tmp_path / "g.safetensors", range=(0, 1))

def test_keys_of_version_0_1_stay():
    "Caches are named by them. The values were computed with version 0.1.0's code."
    assert (StainGenerator().key, StainGenerator("dab", 0.8).key) == (
        "aa54ff23a7c1e603",
        "5a5e7476730cea60",
    )
    net = nn.Conv2d(3, 1, 3)
    with torch.no_grad():
        for p in net.parameters(): p.fill_(.5)
    assert (
        ModuleGenerator(net, 0.5).key,
        ModuleGenerator(net, None, multiple=32, activation=torch.tanh).key,
    ) == ("c7aa7aceb5e07789", "40c741fb7074c290")

def test_weights_are_copied():
    s = resnet_state(1, 2, "batch")
    g = load_generator(s, verbose=False)
    before, key = g.translate(images()), g.key
    for v in s.values(): v.zero_()
    assert torch.equal(g.translate(images()), before) and g.key == key

# --- Runtimes

def test_torchscript(tmp_path, capsys):
    s = resnet_state(1, 4, "instance")
    net = recognise(dict(s)).module
    torch.jit.trace(net, images()).save(tmp_path/"G1.pt")
    g = load_generator(tmp_path/"G1.pt")
    same(g.translate(images(40)), (resnet_forward(s, 2*images(40) - 1, 1, "instance") + 1)/2)
    assert (
        "recognised TorchScript of a ResNet generator" in capsys.readouterr().out
        and g.network.multiple == 4
    )
    assert (
        g.key
        == load_generator(tmp_path / "G1.pt", verbose=False).key
        != load_generator(tmp_path / "G1.pt", um_per_px=0.5, verbose=False).key
    )

def test_torchscript_of_something_else(tmp_path, capsys):
    class Scaled(nn.Module):
        """Takes [0, 1]: the names of the weights inside are those of a known family, but its rule
        is not"""
        def __init__(self, net, tanh):
            super().__init__()
            self.net, self.tanh = net, tanh
        def forward(self, x):
            y = self.net(2*x - 1)
            return (2*y).tanh() if self.tanh else (y + 1)/2
    net = recognise(resnet_state(1, 2, "instance")).module
    torch.jit.trace(Scaled(net, False), images()).save(tmp_path/"a.pt")
    with pytest.raises(ValueError, match="(?s)last operation: aten::.*not visible: give range="):
        load_generator(tmp_path / "a.pt")
    g = load_generator(tmp_path/"a.pt", range=(0, 1), multiple=4)
    same(g.translate(images()), (net(2*images() - 1) + 1)/2, 1e-5)
    torch.jit.trace(Scaled(net, True), images()).save(tmp_path/"b.pt")
    load_generator(tmp_path/"b.pt")
    assert (
        "assumed: sides of multiples of 32" in (said := capsys.readouterr().out)
        and "assumed: values of [-1, 1] in" in said
    )
    content = (tmp_path/"a.pt").read_bytes()
    (tmp_path/"a.pt").write_bytes(content[:len(content)//2])
    with pytest.raises(ValueError, match="not a whole"): load_generator(tmp_path/"a.pt")

# an ONNX file, field by field: a graph (7) with one node (1) of the type (4) Sub
GRAPH = b"\x3a\x07\x0a\x05\x22\x03Sub"

class FakeSession:
    "onnxruntime.InferenceSession as far as it is used; the graph is 1 - x"
    shape, calls = ["batch", 3, "height", "width"], []
    def __init__(self, path, providers):
        if open(path, "rb").read() != GRAPH: raise RuntimeError("INVALID_PROTOBUF\nmore")
        self.providers = providers
    def get_inputs(self):
        return [types.SimpleNamespace(name="image", shape=self.shape, type="tensor(float)")]
    def run(self, outputs, feed):
        assert (
            outputs is None
            and list(feed) == ["image"]
            and feed["image"].dtype == np.float32
            and feed["image"].flags.c_contiguous
        )
        assert all(
            not isinstance(n, int) or n == m for n, m in zip(self.shape, feed["image"].shape)
        )
        self.calls.append(feed["image"].shape)
        return [1 - feed["image"]]

@pytest.fixture
def onnx(monkeypatch, tmp_path):
    monkeypatch.setitem(
        sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=FakeSession)
    )
    monkeypatch.setattr(FakeSession, "calls", [])
    (tmp_path/"g.onnx").write_bytes(GRAPH)
    return tmp_path/"g.onnx"

@pytest.mark.parametrize(
    "shape,calls",
    [
        (["b", 3, "h", "w"], [(2, 3, 64, 64)]),
        ([1, 3, "h", "w"], [(1, 3, 64, 64)] * 2),
        ([1, 3, 64, 64], [(1, 3, 64, 64)] * 2),
        (["b", "h", "w", 3], [(2, 64, 64, 3)]),
        (["b", 1, "h", "w"], [(2, 1, 64, 64)]),
    ],
    ids=str,
)
def test_onnx(onnx, monkeypatch, shape, calls):
    monkeypatch.setattr(FakeSession, "shape", shape)
    with pytest.raises(ValueError, match="(?s)last operation: Sub.*give range="):
        load_generator(onnx)
    g = load_generator(onnx, range=(0, 1), verbose=False)
    x = images(40)
    expected = (
        1 - x
        if 3 in shape
        else (
            1 - (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        ).expand(-1, 3, -1, -1)
    )
    same(g.translate(x), expected, 1e-6)
    assert FakeSession.calls == calls

def test_onnx_that_cannot_be_used(onnx, monkeypatch):
    monkeypatch.setattr(FakeSession, "shape", [1, 3, 64, 64])
    with pytest.raises(
        ValueError, match="takes 64 x 64 pixels only, and images of 128 x 128"
    ):
        load_generator(onnx, range=(0, 1), verbose=False).translate(images(80))
    for shape, match in (
        ([4, 3, 64, 64], "4 images at once"),
        ([1, 3, 64, 96], "equal sides"),
        ([1, 3], "four dimensions"),
        ([1, 6, "h", "w"], "takes 6 channels"),
    ):
        monkeypatch.setattr(FakeSession, "shape", shape)
        with pytest.raises(ValueError, match=match):
            load_generator(onnx, range=(0, 1))
    onnx.write_bytes(GRAPH.replace(b"Sub", b"Odd"))
    with pytest.raises(
        ValueError, match="not an ONNX graph that onnxruntime can run \\(INVALID_PROTOBUF\\)"
    ):
        load_generator(onnx, range=(0, 1))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"): load_generator(onnx)

def test_onnx_by_the_real_runtime(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    s = resnet_state(1, 4, "instance")
    torch.onnx.export(
        recognise(dict(s)).module,
        (2 * images() - 1,),
        str(tmp_path / "g.onnx"),
        dynamo=False,
        dynamic_axes={"x": {0: "b", 2: "h", 3: "w"}},
        input_names=["x"],
    )
    # other kernels
    same(
        load_generator(tmp_path / "g.onnx", multiple=4).translate(images(48)),
        (resnet_forward(s, 2 * images(48) - 1, 1, "instance") + 1) / 2,
        1e-4,
    )

class FakePipeline:
    """A diffusers image-to-image pipeline as far as it is used: the image, and noise of the given
    generators"""
    vae_scale_factor, flagged = 8, []
    def __init__(self): self.components, self.calls = {"unet": nn.Linear(2, 2)}, []
    def to(self, device): return self
    def set_progress_bar_config(self, disable): assert disable
    def __call__(self, prompt=None, image=None, strength=.8, generator=None, output_type="pil"):
        assert (
            output_type == "pt"
            and len(prompt) == len(generator) == len(image)
            and image.shape[2] % 8 == image.shape[3] % 8 == 0
        )
        self.calls.append((prompt, strength))
        noise = torch.stack([torch.rand(image.shape[1:], generator=g) for g in generator])
        return types.SimpleNamespace(
            images=(1 - 0.1 * strength) * image + 0.1 * strength * noise,
            nsfw_content_detected=self.flagged,
        )

def test_a_pipeline_draws_the_same_noise_for_every_image(monkeypatch):
    pipe = FakePipeline()
    g = load_generator(pipe, options={"prompt": "IHC", "strength": .5}, seed=3, verbose=False)
    x = images(64)
    out = g.translate(x)
    assert (
        torch.equal(out, g.translate(x))
        and torch.equal(g.translate(x[1:]), out[1:])
        and pipe.calls[0] == (["IHC", "IHC"], 0.5)
    )
    other = load_generator(pipe, options={"prompt": "IHC", "strength": .5}, seed=4, verbose=False)
    assert not torch.equal(other.translate(x), out) and other.key != g.key
    assert (
        g.key
        == load_generator(
            pipe, options={"prompt": "IHC", "strength": 0.5}, seed=3, verbose=False
        ).key
        != load_generator(pipe, seed=3, verbose=False).key
    )
    with pytest.raises(ValueError, match="options steps; the FakePipeline takes"):
        load_generator(pipe, options={"steps": 3})
    monkeypatch.setattr(FakePipeline, "flagged", [True, False])
    with pytest.raises(ValueError, match="blanked 1 of 2 images"): g.translate(x)

def test_a_pipeline_folder_takes_safetensors_only(tmp_path, monkeypatch):
    seen = []
    class TextToImage:
        def __call__(self, prompt, generator=None, output_type="pil"): raise AssertionError
    def from_pretrained(folder, **options):
        seen.append((folder, options))
        return TextToImage()
    fake = types.SimpleNamespace(
        DiffusionPipeline=types.SimpleNamespace(from_pretrained=from_pretrained),
        AutoPipelineForImage2Image=types.SimpleNamespace(
            from_pipe=lambda pipe: seen.append(type(pipe)) or FakePipeline()
        ),
    )
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet.safetensors").write_bytes(b"1")
    first = load_generator(tmp_path, verbose=False)
    assert seen == [
        (str(tmp_path), {"use_safetensors": True, "local_files_only": True}),
        TextToImage,
    ]
    assert first.key == load_generator(tmp_path, verbose=False).key and first.translate(
        images(64)
    ).shape == (2, 3, 64, 64)
    (tmp_path/"unet.safetensors").write_bytes(b"2")
    assert first.key != load_generator(tmp_path, verbose=False).key
    for name, content in (("theirs.py", ""), ("model_index.json", '{"_class_name": ["theirs", "Pipe"]}')):
        before = len(seen)
        kept = (tmp_path/name).read_text() if (tmp_path/name).exists() else None
        (tmp_path/name).write_text(content)
        with pytest.raises(ValueError, match="brings code of its own"): load_generator(tmp_path)
        assert len(seen) == before
        if kept is None: (tmp_path/name).unlink()
        else: (tmp_path/name).write_text(kept)
    def pickles_only(folder, **options): raise OSError("no file named model.safetensors found")
    fake.DiffusionPipeline.from_pretrained = pickles_only
    with pytest.raises(
        ValueError,
        match="cannot be loaded from safetensors alone .no file named.*safe_serialization=True",
    ):
        load_generator(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'synthpi\[diffusion\]'"):
        load_generator(tmp_path)

# --- Stains and controls

def mixture(true, seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    kind = torch.rand(n, 1, 48, 48, generator=g)
    # pure of either stain, and both
    amounts = (0.3 + 0.7 * torch.rand(n, 2, 48, 48, generator=g)) * torch.cat(
        [(kind > 0.3).float(), (kind < 0.6).float()], 1
    )
    return 10**-torch.einsum("bshw,sc->bchw", amounts, true), amounts

@pytest.mark.parametrize(
    "pair,true",
    [
        (("haematoxylin", "eosin"), [[0.6, 0.7, 0.35], [0.12, 0.9, 0.3]]),
        (("haematoxylin", "dab"), [[0.6, 0.7, 0.35], [0.3, 0.55, 0.75]]),
        (("eosin", "dab"), [[0.1, 0.95, 0.2], [0.3, 0.55, 0.75]]),
    ],
)
def test_macenko_finds_colours_and_amounts(pair, true):
    true = F.normalize(torch.tensor(true), dim=1)
    x, amounts = mixture(true)
    found = macenko_stains(x, pair, background=.02)
    assert (found - true).abs().max() < 0.01 and (
        macenko_stains(x, pair[::-1], background=0.02) - true.flip(0)
    ).abs().max() < 0.01
    for i, stain in enumerate(pair):
        for stains in (found, None):            # of the set, and of each tile
            assert (
                1
                - Macenko(stain, stains, pair, background=0.02).translate(x)[:, 0]
                - amounts[:, i].clamp(0, 1)
            ).abs().mean() < 0.01
    one = Macenko(pair[0], None, pair)
    # a tile does not depend on its batch
    assert torch.equal(one.translate(x)[2:3], one.translate(x[2:3]))

def test_macenko_is_not_led_by_few_odd_pixels():
    true = F.normalize(torch.tensor([[.6, .7, .35], [.12, .9, .3]]), dim=1)
    x = mixture(true)[0]
    # ink, 36 of 9216 pixels: fewer than the percent on either side
    x[0, :, 0, :36] = torch.tensor([.05, .5, .4])[:, None]
    assert (
        (macenko_stains(x, background=0.02) - true).abs().max()
        < 0.03
        < 0.1
        < (macenko_stains(x, percentile=0.0, background=0.02) - true).abs().max()
    )

def test_macenko_demands():
    x = mixture(F.normalize(torch.tensor([[.6, .7, .35], [.12, .9, .3]]), dim=1))[0]
    for make, match in (
        (lambda: Macenko("dab"), "stain 'dab'"),
        (lambda: Macenko("eosin", pair=("eosin", "eosin")), "pair="),
        (lambda: Macenko(stains=torch.ones(2, 3)), "two different"),
        (lambda: macenko_stains(x, ("a", "b")), "pair="),
        (lambda: macenko_stains(torch.ones(1, 3, 9, 9)), "0 pixels"),
        (
            lambda: macenko_stains(
                torch.tensor([0.3, 0.2, 0.5]).view(1, 3, 1, 1).expand(1, 3, 9, 9)
            ),
            "one stain only",
        ),
        (lambda: Macenko().translate(x * 255), "divide 8-bit"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    keys = {
        Macenko().key,
        Macenko("eosin").key,
        Macenko(full=2.0).key,
        Macenko(stains=macenko_stains(x, background=0.02)).key,
        Macenko(pair=("haematoxylin", "dab")).key,
    }
    assert len(keys) == 5 and Macenko().key == Macenko().key

def test_shuffled_gives_each_tile_another_tiles_image():
    pool = torch.rand(40, 3, 16, 16)
    plain = StainGenerator()
    shuffled = Shuffled(plain, pool, seed=1)
    out = shuffled.translate(pool)
    donors = [shuffled.donor(x) for x in pool]
    # of 40 draws with replacement from 39, about 25 are different
    assert all(i != d for i, d in enumerate(donors)) and len(set(donors)) > 15
    assert torch.equal(out, plain.translate(pool)[donors]) and torch.equal(
        shuffled.translate(pool[5:7].flip(0)), out[5:7].flip(0)
    )
    new = torch.rand(1, 3, 16, 16)
    assert torch.equal(shuffled.translate(new), Shuffled(plain, pool, seed=1).translate(new))
    assert [Shuffled(plain, pool, seed=2).donor(x) for x in pool] != donors
    assert (
        len(
            {
                shuffled.key,
                Shuffled(plain, pool, seed=2).key,
                Shuffled(plain, pool[:9], seed=1).key,
                Shuffled(StainGenerator("eosin"), pool, seed=1).key,
            }
        )
        == 4
    )
    with pytest.raises(ValueError, match="no other of that shape"):
        shuffled.translate(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="no other of that shape"):
        Shuffled(plain, pool[:1]).translate(pool[:1])

@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: ModuleGenerator(make_unet(4), 0.5, ["p1"]),
        lambda: load_generator(resnet_state(1, 4, "batch"), um_per_px=0.5, verbose=False),
    ],
)
def test_random_weights_keep_the_network_and_nothing_that_it_learnt(make):
    trained = make()
    before = trained and trained.key
    a, b, c = RandomWeights(trained, 1), RandomWeights(trained, 1), RandomWeights(trained, 2)
    x = images()
    assert (
        torch.equal(a.translate(x), b.translate(x))
        and not torch.equal(a.translate(x), c.translate(x))
        and a.key == b.key != c.key
    )
    assert a.training_ids == [] and (
        trained is None
        or trained.key == before
        and not torch.equal(trained.translate(x), a.translate(x))
        and a.um_per_px == 0.5
    )
    if trained:
        def shapes(g): return {k: v.shape for k, v in g.module.state_dict().items()}
        assert shapes(a) == shapes(trained)
    state = torch.random.get_rng_state()
    RandomWeights(trained, 3)
    assert torch.equal(state, torch.random.get_rng_state())

def test_controls_demand_what_they_need():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="weights gain of a Own"):
        RandomWeights(ModuleGenerator(Own()))
    with pytest.raises(ValueError, match="has no weights"):
        RandomWeights(load_generator(lambda x: x, name="f", verbose=False))
