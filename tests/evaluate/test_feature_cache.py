"""The feature cache: a hit for the same encoder and images only, nothing half-written, and the
encoder is not touched."""
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import synthpi.evaluate.feature_cache
from synthpi.evaluate.features import extract_features
from synthpi.evaluate.feature_cache import encoder_key, images_key

def encoder(seed=0, stride=1, act=nn.ReLU, momentum=.1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=stride),
        nn.BatchNorm2d(6, momentum=momentum),
        act(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(24, 5),
    )

def pictures(n=11, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)

class Counted:
    "How many images went through an encoder, without a trace in it"
    def __init__(self, monkeypatch):
        self.n, plain = 0, synthpi.evaluate.features._batches
        def batches(images, size):
            for b in plain(images, size):
                self.n += len(b)
                yield b
        monkeypatch.setattr(synthpi.evaluate.features, "_batches", batches)
    def __call__(self):
        n, self.n = self.n, 0
        return n

@pytest.fixture
def read(monkeypatch): return Counted(monkeypatch)

def test_a_hit_is_bit_equal_and_the_encoder_is_left_as_found(tmp_path, read):
    model = encoder().train()
    model[1].eval()
    model[6].weight.requires_grad_(False)
    model(torch.rand(4, 3, 16, 16)).sum().backward()
    state, flags = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
    )
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    plain = extract_features(model, pictures())
    assert read() == 11
    # made, and twice found: the first and the last image are read, and eight others
    for images in (11, 10, 10):
        h = extract_features(model, pictures(), batch_size=4, cache=tmp_path/"new"/"folder")
        assert h.dtype == np.float32 and read() == images
        np.testing.assert_allclose(h, plain, rtol=1e-4, atol=1e-5)                # the batch size
        assert [m.training for m in model.modules()] == flags and all(
            torch.equal(v, state[k]) for k, v in model.state_dict().items()
        )
        for p, grad in zip(model.parameters(), grads):
            assert (grad is None) == (p.grad is None) and (
                grad is None or torch.equal(p.grad, grad)
            )
    files = list((tmp_path/"new"/"folder").iterdir())
    # no temporary file is left
    assert len(files) == 1 and files[0].suffix == ".safetensors"
    np.testing.assert_array_equal(
        extract_features(model, pictures(), cache=tmp_path / "new" / "folder"), h
    )

def test_the_cache_moves_with_its_folder_and_forms_of_one_image_are_one(tmp_path, read):
    x = pictures(3)
    h = extract_features(encoder(), x, cache=tmp_path/"a")
    shutil.move(tmp_path/"a", tmp_path/"b")
    read()
    for form in (list(x), [Image.fromarray(i) for i in x]):
        assert (
            np.array_equal(extract_features(encoder(), form, cache=tmp_path / "b"), h)
            and read() == 3
        )
    assert (
        np.array_equal(
            extract_features(encoder(), x[:1], cache=tmp_path / "b"),
            extract_features(encoder(), x[:1]),
        )
        and read() == 2
    )

def change(what):
    model = encoder()
    with torch.no_grad():
        if what == "weight": model[0].weight[0, 0, 0, 0] += 1e-6
        if what == "buffer": model[1].running_var[2] += 1e-6
    if what == "count": model[1].num_batches_tracked += 1
    if what == "half": model.half()
    if what == "setting": model[5].p = .4
    return {
        "stride": encoder(stride=2),
        "activation": encoder(act=nn.GELU),
        "seed": encoder(seed=1),
        "momentum": encoder(momentum=0.2),
        "order": model[:6].append(nn.Sequential(model[6])),
    }.get(what, model)

def test_whatever_a_hash_can_see_moves_the_key():
    whats = [
        "same",
        "weight",
        "buffer",
        "count",
        "half",
        "setting",
        "stride",
        "activation",
        "seed",
        "momentum",
        "order",
    ]
    keys = [encoder_key(change(w)) for w in whats]
    assert len({*keys}) == len(whats) and encoder_key(encoder().eval()) == keys[0] == encoder_key(
        encoder().requires_grad_(False)
    )
    with torch.autocast("cpu", torch.bfloat16): assert encoder_key(encoder()) not in keys
    # not in the state dict
    hidden = encoder()
    hidden.register_buffer("table", torch.ones(2), persistent=False)
    other = encoder()
    other.register_buffer("table", torch.zeros(2), persistent=False)
    assert encoder_key(hidden) != encoder_key(other)

def test_whatever_the_images_are_moves_the_key():
    x = pictures(4)
    one = x.copy()
    one[3, 15, 15, 2] ^= 1
    forms = [
        x,
        x[::-1],
        x[:3],
        one,
        x.reshape(4, 8, 32, 3),
        torch.from_numpy(x).permute(0, 3, 1, 2) / 255,
        torch.from_numpy(x).permute(0, 3, 1, 2).double() / 255,
        np.concatenate([x, x[:1]]),
    ]
    assert len({images_key(f) for f in forms}) == len(forms)
    assert (
        images_key(x)
        == images_key(list(x))
        == images_key(np.asfortranarray(x))
        == images_key([i.astype(np.uint16) * 257 for i in x])
    )

@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "other"])
def test_a_damaged_file_is_noticed_and_made_anew(tmp_path, read, damage):
    h = extract_features(encoder(), pictures(), cache=tmp_path)
    extract_features(encoder(1), pictures(), cache=tmp_path)
    path = next(
        p
        for p in tmp_path.iterdir()
        if torch.allclose(
            torch.from_numpy(h),
            synthpi.evaluate.feature_cache.read_safetensors(p, "synthpi-features-1")[1]["features"],
        )
    )
    other, data = next(p for p in tmp_path.iterdir() if p != path), bytearray(path.read_bytes())
    if damage == "byte":
        data[-3] ^= 1
        path.write_bytes(data)
    if damage == "cut": path.write_bytes(data[:len(data)//2])
    if damage == "empty": path.write_bytes(b"")
    # another encoder's features under this name
    if damage == "other": shutil.copy(other, path)
    read()
    with pytest.warns(UserWarning, match="made anew"):
        assert np.array_equal(extract_features(encoder(), pictures(), cache=tmp_path), h)
    assert read() == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            np.array_equal(extract_features(encoder(), pictures(), cache=tmp_path), h)
            and read() == 10
        )

def test_code_that_no_hash_sees_is_noticed(tmp_path, read):
    class Mean(nn.Module):
        # one feature is far larger than the others
        def forward(self, x): return torch.cat([x.mean((2, 3)), 1e5 + 0*x[:, :1, 0, 0]], 1)
    old = extract_features(Mean(), pictures(), cache=tmp_path)
    Mean.forward = lambda self, x: torch.cat([x.mean((2, 3))*1.03, 1e5 + 0*x[:, :1, 0, 0]], 1)
    with pytest.warns(UserWarning, match="other features than those in"):
        new = extract_features(Mean(), pictures(), cache=tmp_path)
    np.testing.assert_allclose(new[:, :3], 1.03*old[:, :3], rtol=1e-6)
    hooked = Mean()
    hooked.register_forward_hook(lambda m, x, out: torch.cat([out, out], 1))        # another width
    with pytest.warns(UserWarning, match="made anew"):
        assert extract_features(hooked, pictures(), cache=tmp_path).shape == (11, 8)

class Brightest(nn.Module):
    "Only images brighter than `above` get other features"
    def forward(self, x): return x.mean((2, 3))

def test_code_that_changes_images_in_the_middle_or_little_is_noticed(tmp_path, read):
    x = np.full((40, 4, 4, 3), 100, np.uint8) + np.random.default_rng(0).integers(
        0, 9, (40, 4, 4, 3)
    ).astype(np.uint8)
    x[1:-1] += 100
    old = extract_features(Brightest(), x, cache=tmp_path)
    with pytest.MonkeyPatch.context() as m:
        # 1 %, and neither of the ends
        m.setattr(
            Brightest,
            "forward",
            lambda self, x: (
                x.mean((2, 3)) * torch.where(x.mean((1, 2, 3)) > 0.6, 1.01, 1.0)[:, None]
            ),
        )
        with pytest.warns(UserWarning, match="other features than those in"):
            new = extract_features(Brightest(), x, cache=tmp_path)
    assert np.array_equal(new[[0, -1]], old[[0, -1]]) and not np.allclose(new, old)
    # features differ little between these images
    flat = x[1:-1]
    old = extract_features(Brightest(), flat, cache=tmp_path)
    shift = .01*float(old.std(0).min())
    for factor, warns in ((.01, False), (1, True)):
        with pytest.MonkeyPatch.context() as m, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m.setattr(Brightest, "forward", lambda self, x: x.mean((2, 3)) + 5*factor*shift)
            extract_features(Brightest(), flat, cache=tmp_path)
        assert any("made anew" in str(w.message) for w in caught) == warns

@pytest.mark.parametrize("n, rows", [(1, 1), (2, 2), (5, 5), (10, 10), (60, 10)])
def test_ten_images_are_read_again(tmp_path, read, n, rows):
    h = extract_features(encoder(), pictures(n), cache=tmp_path)
    assert (
        read() == n
        and np.array_equal(extract_features(encoder(), pictures(n), cache=tmp_path), h)
        and read() == rows
    )

def test_half_precision_is_rounding_and_no_other_code(tmp_path):
    "Batches of other sizes may round otherwise by the resolution of the type"
    with torch.autocast("cpu", torch.bfloat16):
        extract_features(encoder(), pictures(40), cache=tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            extract_features(encoder(), pictures(40), cache=tmp_path)

def test_nothing_is_stored_of_a_run_that_fails(tmp_path):
    for bad, message in (
        (np.zeros((0, 4, 4, 3), np.uint8), "0 images"),
        (torch.full((3, 3, 8, 8), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            extract_features(
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), bad, cache=tmp_path
            )
    with pytest.raises(ValueError, match="pool and flatten"):
        extract_features(nn.Identity(), pictures(), cache=tmp_path)
    assert not list(tmp_path.iterdir())

def test_what_cannot_be_cached_is_refused(tmp_path):
    batches = torch.rand(4, 3, 16, 16).split(2)
    with pytest.raises(ValueError, match="a generator of batches with a cache"):
        extract_features(encoder(), (b for b in batches), cache=tmp_path)
    (tmp_path/"file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        extract_features(encoder(), pictures(), cache=tmp_path / "file")
