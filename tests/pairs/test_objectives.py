"""Every objective against its equation, written out again; who is taught by which term; the critic
against an independent PatchGAN."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Image as ImageFeature
from PIL import Image
from torch import nn

from synthpi.pairs.objectives import (
    CUT,
    CycleGAN,
    ImagePool,
    Pix2Pix,
    Regression,
    make_critic,
    patch_nce,
    read_mask,
)

GANS = [
    Pix2Pix(width=4),
    CycleGAN(width=4, blocks=1),
    CycleGAN(width=4, network="unet"),
    CUT(width=4, blocks=2, patches=32),
    Pix2Pix("image", 4, "resnet", blocks=1),
    CUT("image", width=4, blocks=1),
]

def batch(kind="mask", n=2, side=48):
    g = torch.Generator().manual_seed(0)
    y = torch.rand(n, 1 if kind == "mask" else 3, side, side, generator=g)
    return torch.rand(n, 3, side, side, generator=g), y.round() if kind == "mask" else y

def signed(logits): return 2*logits.sigmoid() - 1

def soft(y, s=.1):
    "A mask with its rims averaged over 3 x 3 pixels, in [s, 1 - s]"
    return s + (1 - 2 * s) * F.conv2d(
        F.pad(y, (1, 1, 1, 1), mode="replicate"), torch.full((1, 1, 3, 3), 1 / 9)
    )

def lsgan(real, fake): return .5*(((real - 1)**2).mean() + (fake**2).mean())

def test_pix2pix_is_its_equation():
    torch.manual_seed(0)
    model, (x, y) = Pix2Pix(width=4, l1=30.).model(48), batch()
    loss, terms = model(x, y)
    fake = signed(model.generator(x))
    def judge(v): return model.critic(torch.cat([2*x - 1, v], 1))[-1]
    bce = F.binary_cross_entropy_with_logits
    one, zero = torch.ones_like(judge(fake)), torch.zeros_like(judge(fake))
    critic = .5*(bce(judge(2*y - 1), one) + bce(judge(fake), zero))
    torch.testing.assert_close(terms["l1"], (fake - (2*y - 1)).abs().mean().detach())
    torch.testing.assert_close(terms["critic"], critic.detach())
    torch.testing.assert_close(
        loss, 30 * (fake - (2 * y - 1)).abs().mean() + bce(judge(fake), one) + critic
    )

@pytest.mark.parametrize("kind, dark", [("mask", True), ("mask", False), ("image", True)])
def test_cyclegan_is_its_equation(kind, dark):
    torch.manual_seed(0)
    model, (x, y) = (
        CycleGAN(kind, 4, blocks=1, cycle=7.0, identity=3.0, pool=0, dark=dark).model(48),
        batch(kind),
    )
    loss, terms = model(x, y)
    if kind == "mask": y = soft(y)
    def show(v): return v if kind == "image" else (1 - v if dark else v).repeat(1, 3, 1, 1)
    go, back = lambda v: model.generator(v).sigmoid(), lambda v: model.back(v).sigmoid()
    def l1(a, b): return 2*(a - b).abs().mean()                     # in units of [-1, 1]
    fake_y, fake_x = go(x), back(show(y))
    cycle, same = l1(back(show(fake_y)), x) + l1(go(fake_x), y), l1(go(show(y)), y) + l1(back(x), x)
    judge_y, judge_x = lambda v: model.critic_y(2*v - 1)[-1], lambda v: model.critic_x(2*v - 1)[-1]
    convince = ((judge_y(fake_y) - 1)**2).mean() + ((judge_x(fake_x) - 1)**2).mean()
    critic = lsgan(judge_y(y), judge_y(fake_y)) + lsgan(judge_x(x), judge_x(fake_x))
    for name, value in (
        ("cycle", cycle),
        ("identity", same),
        ("convince", convince),
        ("critic", critic),
    ):
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, 7*cycle + 3*same + convince + critic, rtol=1e-4, atol=1e-4)

def test_cut_is_its_equation():
    torch.manual_seed(0)
    model, (x, y) = (
        CUT(width=4, blocks=2, patches=10**6, temperature=0.2, nce=2.0).model(48),
        batch(side=24),
    )
    loss, terms = model(x, y)
    y = soft(y)
    def features(image):
        out, h = [], image
        for i, layer in enumerate(model.generator.model):
            h = layer(h)
            if i in model.layers: out.append(h)
        return out
    # written with loops over images and patches
    def nce(image, answer):
        total = []
        for a, b, projector in zip(
            features(image), features((1 - answer).repeat(1, 3, 1, 1)), model.projectors
        ):
            rows = []
            for k, q in zip(a, b):
                k, q = (F.normalize(projector(f.flatten(1).T), dim=1) for f in (k, q))
                rows += [
                    torch.logsumexp(q[i] @ k.T / 0.2, 0) - q[i] @ k[i] / 0.2 for i in range(len(q))
                ]
            total.append(torch.stack(rows).mean())
        return torch.stack(total).mean()
    fake, kept = model.generator(x).sigmoid(), model.generator((1 - y).repeat(1, 3, 1, 1)).sigmoid()
    torch.testing.assert_close(
        terms["nce"],
        (0.5 * (nce(x, fake) + nce((1 - y).repeat(1, 3, 1, 1), kept))).detach(),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(
        terms["critic"],
        lsgan(model.critic(2 * y - 1)[-1], model.critic(2 * fake - 1)[-1]).detach(),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(loss.detach(), 2*terms["nce"] + terms["convince"] + terms["critic"])

def test_patches_of_the_input_are_not_taught():
    q, k = (F.normalize(torch.randn(2, 8, 4), dim=2).requires_grad_() for _ in range(2))
    patch_nce(q, k).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None

@pytest.mark.parametrize("objective", GANS, ids=repr)
def test_generators_and_critics_are_taught_by_their_own_terms(objective):
    """The gradient of the sum is, for critics, that of the critics' term alone; for the rest, that
    of the rest alone"""
    torch.manual_seed(0)
    model, (x, y) = objective.model(48), batch(objective.kind)
    for m in model.modules():
        if isinstance(m, ImagePool): m.size = 0
    def gradients(weight):
        torch.manual_seed(1)
        taught = copy.deepcopy(model)
        tell = taught.adversary.tell
        taught.adversary.tell = lambda *a: weight*tell(*a)
        taught(x, y)[0].backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in taught.named_parameters()
        }
    both, without = gradients(1), gradients(0)
    for name in both:
        # a bias before instance normalisation has no effect
        if name.startswith("critic"):
            assert not without[name].any() and both[name].any() or name.endswith("bias"), name
        else:
            torch.testing.assert_close(both[name], without[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(both[n].any() for n in both if n.startswith("generator")) and all(
        p.requires_grad for p in model.parameters()
    )

def test_the_critic_is_the_published_patchgan():
    torch.manual_seed(0)
    critic, c = make_critic(6, 8), [8, 16, 32, 64]
    layers = [nn.Conv2d(6, 8, 4, 2, 1), nn.LeakyReLU(.2)]
    for a, b, stride in zip(c, c[1:], (2, 2, 1)):
        layers += [nn.Conv2d(a, b, 4, stride, 1), nn.InstanceNorm2d(b), nn.LeakyReLU(0.2)]
    mine = nn.Sequential(*layers, nn.Conv2d(64, 1, 4, 1, 1))
    theirs, ours = [p for p in critic.parameters()], [p for p in mine.parameters()]
    assert [p.shape for p in theirs] == [p.shape for p in ours]
    with torch.no_grad():
        for p, q in zip(ours, theirs): p.copy_(q)
    x = torch.rand(2, 6, 256, 256)
    torch.testing.assert_close(critic(x)[-1], mine(x), rtol=1e-4, atol=1e-5)
    assert mine(x).shape == (2, 1, 30, 30)                       # as published for 256 pixels

@pytest.mark.parametrize("objective", [Regression(width=4), *GANS], ids=repr)
def test_half_precision_stays_finite(objective):
    torch.manual_seed(0)
    model, (x, y) = objective.model(48), batch(objective.kind)
    with torch.autocast("cpu", torch.bfloat16): loss, terms = model(x, y)
    loss.backward()
    assert (
        loss.dtype == torch.float32
        and loss.isfinite()
        and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    )
    full = model(x, y)[0]
    assert abs(loss.item() / full.item() - 1) < 0.1 or any(
        isinstance(m, ImagePool) for m in model.modules()
    )

def test_a_pool_is_part_of_the_state():
    torch.manual_seed(0)
    one = ImagePool(4, (1, 2, 2))
    for _ in range(3): one(torch.rand(3, 1, 2, 2))
    two = ImagePool(4, (1, 2, 2))
    two.load_state_dict(one.state_dict())
    x = torch.rand(6, 1, 2, 2)
    torch.manual_seed(5)
    a = one(x)
    torch.manual_seed(5)
    b = two(x)
    assert torch.equal(a, b) and torch.equal(one.images, two.images) and not a.requires_grad
    with pytest.raises(ValueError, match="give the objective the crop"): one(torch.rand(1, 1, 3, 3))

def test_soft_masks_become_hard_and_rims_stay():
    x = torch.rand(2, 3, 48, 48)
    for objective in (
        CycleGAN(width=4, blocks=1, soft=0.2),
        CycleGAN(width=4, network="unet"),
        CUT(width=4, blocks=1),
    ):
        raw = objective.generator()
        with torch.no_grad():
            a, b = raw(x).sigmoid(), objective.finish(raw)(x).sigmoid()
        torch.testing.assert_close(
            torch.logit(torch.tensor(0.999))
            / torch.logit(torch.tensor(1 - objective.soft))
            * torch.logit(a),
            torch.logit(b),
            rtol=1e-3,
            atol=1e-3,
        )
        assert torch.equal(a > 0.5, b > 0.5)
    for objective in (
        Pix2Pix(width=4),
        CUT("image", width=4, blocks=1),
        CUT(width=4, blocks=1, soft=0),
    ):
        assert objective.finish(raw) is raw

def test_masks_of_every_kind_are_read_and_blurred_ones_refused(tmp_path):
    numbers = np.zeros((8, 8), np.uint16)
    numbers[2:4, 2:4] = [[1, 2], [300, 4]]
    palette = Image.fromarray((numbers > 0).astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 0, 255, 0])
    blue = np.zeros((8, 8, 3), np.uint8)
    blue[2:4, 2:4, 2] = 9
    opaque = np.dstack([blue, np.full((8, 8), 255, np.uint8)])
    for mask in (
        numbers,
        Image.fromarray(numbers),
        palette,
        blue,
        Image.fromarray(blue),
        Image.fromarray(opaque),
        numbers > 0,
        Image.fromarray(numbers > 0),
    ):
        assert read_mask(mask).sum() == 4 and read_mask(mask)[2:4, 2:4].all()
    Image.fromarray(np.uint8(numbers > 0)*255).save(tmp_path/"mask.jpg")
    ds = Dataset.from_dict({"privileged": [str(tmp_path / "mask.jpg")]}).cast_column(
        "privileged", ImageFeature()
    )
    for image in (Image.open(tmp_path/"mask.jpg"), ds[0]["privileged"]):
        with pytest.raises(ValueError, match="a mask in a JPEG"): read_mask(image)
    with pytest.raises(ValueError, match="whole numbers"): read_mask(np.zeros((2, 2)))

def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="below 0.5"): CUT(soft=.5).model()
    for make, words in (
        (lambda: Pix2Pix("stain"), "'mask' or 'image'"),
        (lambda: CycleGAN(network="vit"), "unet, resnet"),
        (lambda: Regression(width=0), "at least 1"),
        (lambda: Pix2Pix(blocks=3), "blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
