"Encoder files: what comes back, and what is refused with its reason."
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from synthpi.core.files import read_safetensors, write_safetensors
from synthpi.models.encoders import make_encoder
from synthpi.models.files import load_encoder, save_encoder
from synthpi.pairs.generators import ModuleGenerator, load_generator, make_unet, save_generator

def small(channels=3, width=6):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
def same(a, b): return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    encoder = make_encoder("resnet10_narrow", in_channels=1).eval()
    save_encoder(encoder, tmp_path/"encoder.safetensors", arm="trident", seed=3)
    return encoder, tmp_path/"encoder.safetensors"

def test_an_encoder_comes_back_frozen(saved):
    encoder, path = saved
    again = load_encoder(path)
    assert (
        same(encoder.state_dict(), again.state_dict())
        and again.about == {"arm": "trident", "seed": 3}
        and again.spec == encoder.spec
    )
    assert (
        not again.training
        and not any(p.requires_grad for p in again.parameters())
        and again.width == 128
    )

def test_a_changed_byte_anywhere_is_found_or_without_effect(saved):
    encoder, path = saved
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    g = torch.Generator().manual_seed(0)
    places = [
        *range(0, header, 97),
        *(header + torch.randint(len(content) - header, (12,), generator=g)).tolist(),
    ]
    refused = 0
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        try: again = load_encoder(path)
        except ValueError: refused += 1
        # the padding, or the name of the checksum
        else: assert same(encoder.state_dict(), again.state_dict()) and place < header, place
    assert refused >= len(places) - 2

def test_equal_encoders_give_equal_files(saved, tmp_path):
    for k in range(4):
        save_encoder(
            saved[0], tmp_path / f"{k}.safetensors", steps=3, seed=0, loss="vicreg", data="x"
        )
    assert len({(tmp_path/f"{k}.safetensors").read_bytes() for k in range(4)}) == 1

def test_files_without_a_checksum_still_load(saved):
    encoder, path = saved
    with safe_open(str(path), "pt") as f: header = json.loads(f.metadata()["synthpi"])
    assert len(header.pop("sha256")) == 64
    save_file(encoder.state_dict(), path, metadata=header)          # as version 0.1.0 wrote them
    assert same(load_encoder(path).state_dict(), encoder.state_dict())

def test_other_files_are_refused_with_the_reason(saved, tmp_path):
    encoder, path = saved
    content, bad = path.read_bytes(), tmp_path/"bad.safetensors"
    def refused(match, error=ValueError, **options):
        with pytest.raises(error, match=match): load_encoder(bad, **options)
    refused("no encoder file at", FileNotFoundError)
    bad.mkdir()
    refused("is a folder")
    bad.rmdir()
    for cut in (0, 5, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:cut])
        refused("not a whole one")
    torch.save(encoder.state_dict(), bad)
    refused("Pickles")
    save_file({"w": torch.zeros(1)}, bad)
    refused("format None and not 'synthpi-encoder-1'")
    save_generator(ModuleGenerator(make_unet(4)), bad)
    refused("format 'synthpi-generator-1'")
    with pytest.raises(
        ValueError,
        match="format 'synthpi-encoder-1' and not 'synthpi-generator-1'.*ModuleGenerator",
    ):
        load_generator(path)
    save_file({"w": torch.zeros(1)}, bad, metadata={"format": "synthpi-encoder-1"})
    refused("lacks about, encoder")
    state = encoder.state_dict()
    for weights, match in (
        ({k: v for k, v in state.items() if k != "bn1.weight"}, "Missing key.*bn1.weight"),
        ({**state, "more": torch.zeros(1)}, "Unexpected key.*more"),
        ({**state, "conv1.weight": torch.zeros(16, 3, 7, 7)}, "size mismatch for conv1.weight"),
    ):
        write_safetensors(bad, weights, "synthpi-encoder-1", encoder=encoder.spec, about={})
        refused(f"do not fit the ResNet.*{match}")
    write_safetensors(bad, state, "synthpi-encoder-1", encoder={"name": "resnet19"}, about={})
    refused("encoder 'resnet19'")

VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
       "intermediate_size": 8, "image_size": 16, "patch_size": 8}

@pytest.fixture
def no_network(monkeypatch):
    def call(*args, **options): raise AssertionError("the network was reached")
    monkeypatch.setattr("socket.socket.connect", call)
    monkeypatch.setattr("socket.getaddrinfo", call)

@pytest.mark.parametrize(
    "spec, match",
    [
        ({"name": "resnet18", "in_channels": 10**7}, "10000000 channels"),
        ({"name": "resnet18", "in_channels": -1}, "-1 channels"),
        ({"name": "resnet18", "in_channels": "3"}, "'3' channels"),
        ({"name": "resnet18", "pretrained": True}, "pretrained"),
        ({"name": "hf:google/vit-base-patch16-224"}, "without a configuration"),
        ({"name": "hf:x", "config": VIT | {"num_hidden_layers": 10**6}}, "num_hidden_layers=1000000"),
        ({"name": "hf:x", "config": VIT | {"hidden_size": 10**9}}, "hidden_size=1000000000"),
        ({"name": "hf:x", "config": VIT | {"attn_implementation": "a/kernel"}}, "attn_implementation"),
        ({"name": "hf:x", "config": VIT | {"auto_map": {"AutoModel": "x.Y"}}}, "auto_map"),
        ({"name": "hf:x", "config": VIT | {"backbone": "resnet50"}}, "backbone"),
        ({"name": "timm:hf-hub:a/b"}, "no architecture of timm"),
        ({"name": "timm:hf_hub:a/b", "pretrained": True}, "pretrained"),
        (["resnet18"], "no encoder"),
        ({"name": 3}, "no encoder"),
    ],
    ids=str,
)
def test_a_header_builds_only_what_is_written(tmp_path, no_network, spec, match):
    path = tmp_path/"e.safetensors"
    write_safetensors(path, {"w": torch.zeros(1)}, "synthpi-encoder-1", encoder=spec, about={})
    with pytest.raises(ValueError, match=f"{match}.*It is not built"): load_encoder(path)

def test_a_header_larger_than_its_weights_takes_no_memory(tmp_path, no_network, monkeypatch):
    path, built = tmp_path/"e.safetensors", []
    def make(**spec):
        encoder = make_encoder(**spec)
        built.append({p.device.type for p in encoder.parameters()})
        return encoder
    monkeypatch.setattr("synthpi.models.files.make_encoder", make)
    for spec in (
        {"name": "resnet10_narrow", "in_channels": 4096},
        {"name": "hf:x", "config": VIT | {"hidden_size": 10**5, "intermediate_size": 10**6}},
    ):
        write_safetensors(path, {"w": torch.zeros(1)}, "synthpi-encoder-1", encoder=spec, about={})
        with pytest.raises(ValueError, match="do not fit"): load_encoder(path)
    assert built == [{"meta"}]*2

def test_an_encoder_of_hugging_face_comes_back(tmp_path, no_network):
    torch.manual_seed(0)
    encoder, path = make_encoder("hf:mine", config=VIT).eval(), tmp_path/"e.safetensors"
    save_encoder(encoder, path)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_encoder(path)(x), encoder(x))

@pytest.mark.parametrize(
    "spec, match",
    [
        ({"name": "unet", "width": 10**7}, "width=10000000.*not built"),
        ({"name": "resnet", "blocks": 10**6}, "blocks=1000000.*not built"),
        ({"name": "resnet", "halvings": 1}, "halvings=1.*not built"),
        ({"name": "unet", "width": "4"}, "width='4'.*not built"),
        ({"name": "unet", "width": 4096}, "do not fit the unet"),
        ("unet", "a network called None"),
    ],
    ids=str,
)
def test_a_generators_header_builds_only_what_is_written(tmp_path, spec, match):
    path = tmp_path/"g.safetensors"
    facts = {"module": spec, "settings": {}, "about": {}}
    write_safetensors(path, make_unet(4).state_dict(), "synthpi-generator-1", **facts)
    with pytest.raises(ValueError, match=match): load_generator(path)

def test_a_module_of_ones_own(tmp_path):
    net, path = small(), tmp_path/"e.safetensors"
    save_encoder(net, path, note="mine")
    with pytest.raises(
        ValueError, match=r"class Sequential.*load_encoder\(path, encoder=Sequential\(...\)\)"
    ):
        load_encoder(path)
    other = small()
    again = load_encoder(path, encoder=other)
    assert (
        again is other
        and same(again.state_dict(), net.state_dict())
        and again.about == {"note": "mine"}
        and not again.training
    )
    with pytest.raises(ValueError, match="do not fit the Sequential"):
        load_encoder(path, encoder=small(1))

def test_tied_weights_are_stored(tmp_path):
    a = nn.Linear(3, 3)
    b = nn.Linear(3, 3)
    b.weight = a.weight
    write_safetensors(
        tmp_path / "t.safetensors", nn.Sequential(a, b).state_dict(), "synthpi-encoder-1"
    )
    facts, state = read_safetensors(tmp_path/"t.safetensors", "synthpi-encoder-1")
    assert facts == {} and torch.equal(state["0.weight"], state["1.weight"]) and len(state) == 4
