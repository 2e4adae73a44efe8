"Encoders of every library, and the width of any module."
import json
import sys
import types

import monai.networks.nets as nets
import pytest
import torch
from torch import nn

from synthpi.models.encoders import ENCODERS, encoder_width, make_encoder
from synthpi.models.branches import trident
from synthpi.models.files import load_encoder, save_encoder

def small(channels=3, width=6):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)

# ---- encoders

@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_gives_its_width_and_is_built_again_from_its_spec(name, spatial_dims):
    encoder = make_encoder(name, in_channels=2, spatial_dims=spatial_dims).eval()
    with torch.no_grad():
        assert encoder(torch.rand(2, 2, *[32] * spatial_dims)).shape == (2, encoder.width)
    with torch.device("meta"): again = make_encoder(**json.loads(json.dumps(encoder.spec)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in encoder.state_dict().items()
    }

@pytest.mark.parametrize("name", ["resnet10_narrow", "resnet18", "densenet121"])
@pytest.mark.parametrize("norm, groups", [("group", 2), ("instance", 1)])
def test_other_norms_leave_no_batchnorm_behind(name, norm, groups):
    encoder = make_encoder(name, norm=norm).train()
    layers = [m for m in encoder.modules() if "Norm" in type(m).__name__]
    assert layers and all(type(m) is nn.GroupNorm for m in layers)
    assert layers[0].num_channels//layers[0].num_groups == groups
    x = torch.rand(3, 3, 64, 64)
    # float32, other sums in another batch size
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), rtol=1e-3, atol=1e-4)
    assert make_encoder(**encoder.spec).spec["norm"] == norm

def test_seeds_of_earlier_versions_give_the_same_weights():
    "Encoders in order, then projectors in order, each as MONAI and PyTorch initialise them"
    torch.manual_seed(3)
    args = dict(
        spatial_dims=2, n_input_channels=3, feed_forward=False, conv1_t_size=7, conv1_t_stride=2
    )
    encoders = [nets.ResNet("basic", [1]*4, [16, 32, 64, 128], **args) for _ in range(2)]
    projectors = [
        nn.Sequential(nn.Linear(128, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        for _ in range(2)
    ]
    torch.manual_seed(3)
    model = trident("resnet10_narrow", (8, 4))
    for old, new in zip([*encoders, *projectors], [*model.encoders, *model.projectors]):
        assert same(old.state_dict(), new.state_dict())

@pytest.mark.parametrize("args, message", [
    (dict(name="resnet19"), "expected one of resnet10_narrow"),
    (dict(name="timm:"), "expected one of"),
    (dict(spatial_dims=1), "2 for images"),
    (dict(norm="layer"), "expected one of batch, group, instance"),
    (dict(pretrained=True), "starts from random weights"),
    (dict(name="hf:x", spatial_dims=3), "for volumes or another norm"),
])
def test_make_encoder_says_what_it_expects(args, message):
    with pytest.raises(ValueError, match=message): make_encoder(**args)

@pytest.mark.parametrize("name, package", [("timm:resnet18", "timm"), ("hf:somewhere", "transformers")])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"): make_encoder(name)

def test_timm_is_called_for_features_without_a_classifier(monkeypatch, tmp_path):
    calls = []
    def create_model(name, **options):
        calls.append((name, options))
        net = small(options["in_chans"], 5)
        net.num_features = 5
        return net
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    encoder = make_encoder("timm:tiny", in_channels=4, pretrained=True)
    save_encoder(encoder, tmp_path/"e.safetensors")
    assert encoder.width == 5 and same(
        load_encoder(tmp_path / "e.safetensors").state_dict(), encoder.state_dict()
    )
    # loading downloads nothing
    assert calls == [
        ("tiny", dict(pretrained=True, num_classes=0, in_chans=4)),
        ("tiny", dict(pretrained=False, num_classes=0, in_chans=4)),
    ]

def test_timm_itself():
    pytest.importorskip("timm")
    encoder = make_encoder("timm:resnet18", in_channels=1).eval()
    assert encoder(torch.rand(2, 1, 64, 64)).shape == (2, encoder.width) == (2, 512)

HF = {
    "vit": dict(
        model_type="vit",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
    ),
    "dinov2": dict(
        model_type="dinov2",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
    ),
    "swin": dict(
        model_type="swin",
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
        image_size=32,
        patch_size=4,
    ),
    "convnext": dict(
        model_type="convnext", hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], num_stages=4
    ),
    "resnet": dict(
        model_type="resnet",
        embedding_size=4,
        hidden_sizes=[8, 8, 8, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
    ),
}

@pytest.mark.parametrize("kind", HF)
def test_hugging_face_encoders(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**HF[kind])
    torch.manual_seed(0)
    published = transformers.AutoModel.from_config(config)
    published.save_pretrained(tmp_path/"published")
    encoder = make_encoder(f"hf:{tmp_path/'published'}", pretrained=True)
    x = torch.rand(2, 3, 32, 32)
    h = encoder(x)
    assert h.shape == (2, 16) and encoder.width == 16
    # processes that train together wait for the gradient of every parameter that wants one
    h.sum().backward()
    assert not [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    out = published.eval()(pixel_values=x)
    expected = {
        "vit": lambda: out.last_hidden_state[:, 0],
        "dinov2": lambda: out.last_hidden_state[:, 0],
    }.get(kind, lambda: out.pooler_output.flatten(1))()
    assert torch.equal(encoder.eval()(x), expected)
    save_encoder(encoder, tmp_path/"e.safetensors")
    (tmp_path/"published").rename(tmp_path/"gone")
    again = load_encoder(tmp_path/"e.safetensors")
    # without a gradient on both sides: attention has other kernels with one
    with torch.no_grad(): assert torch.equal(again(x), encoder(x))
    assert str(tmp_path) not in json.dumps(again.spec)
    assert make_encoder(f"hf:{tmp_path/'gone'}", in_channels=1)(x[:, :1]).shape == (2, 16)
    with pytest.raises(ValueError, match="neither a folder with a config.json"):
        make_encoder(f"hf:{tmp_path / 'published'}")

# ---- any module

class Odd(nn.Module):
    "Counts its inputs, and gives what `out` makes of them"
    def __init__(self, out, **attributes):
        super().__init__()
        self.bn, self.out, self.shown = nn.BatchNorm2d(1), out, 0
        for name, value in attributes.items(): setattr(self, name, value)
    def forward(self, x):
        self.shown += 1
        return self.out(self.bn(x))

def test_encoder_width_leaves_the_module_as_it_was():
    net = nn.Sequential(nn.BatchNorm2d(1), *small(1, 7))
    net[2].eval()                               # a frozen layer in a training network
    state, modes = (
        {k: v.clone() for k, v in net.state_dict().items()},
        [m.training for m in net.modules()],
    )
    assert encoder_width(net, in_channels=1) == 7
    assert same(state, net.state_dict()) and modes == [m.training for m in net.modules()]
    assert encoder_width(net.double(), in_channels=1) == 7
    assert (
        encoder_width(
            nn.Sequential(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()),
            1,
            spatial_dims=3,
        )
        == 4
    )

def test_encoder_width_reads_attributes_first():
    for name in ("width", "head_hidden_size", "num_features"):
        odd = Odd(lambda x: x, **{name: 9})
        assert encoder_width(odd, in_channels=1) == 9 and odd.shown == 0, name

@pytest.mark.parametrize("out, message", [
    (lambda x: x, r"gave shape \(2, 1, 32, 32\)"),
    (lambda x: (x.flatten(1),), "gave a tuple"),
    (lambda x: x.flatten(), "gave shape"),
    (lambda x: x @ torch.ones(3), "failed on images of shape"),
])
def test_encoder_width_refuses_other_outputs(out, message):
    with pytest.raises(ValueError, match=message): encoder_width(Odd(out).train(), in_channels=1)

def test_modes_come_back_after_a_failure():
    odd = Odd(lambda x: x@torch.ones(3))
    with pytest.raises(ValueError): encoder_width(odd, in_channels=1)
    assert odd.training and odd.bn.training
