"""The encoder that ships with synthpi for the features of KID, made again: `python
tests/phantom_encoder.py --out synthpi/phantom_encoder.safetensors`

A narrow ResNet-10 is told what the simulation of `synthpi.data.phantoms` knows about a tile: its
tissue, how it is rendered (H&E, mask, gray stain, brown stain), whether it is inverted, how much
of it is nucleus, how far out of focus and how noisy it is. No image of a real patient takes
part. The same seed on the same machine and PyTorch gives the same file.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import synthpi
from synthpi.core.seeds import seed_for, set_seed
from synthpi.pairs.kid import pooled_stages
from synthpi.models.encoders import make_encoder
from synthpi.models.files import save_encoder
from synthpi.data.phantoms import CLASSES, Lab, OTHER_LAB, tissue_phantoms

RENDERINGS = ("H&E", "mask", "gray stain", "brown stain")
SIDE = 64       # of the crops, pixels

def draw_tissue(n_per_class, seed):
    """H&E, nuclear masks and classes of two laboratories at two resolutions: (N, 3, 96, 96) and (N,
    1, 96, 96) in [0, 1], (N,)"""
    sets = [
        tissue_phantoms(
            n_per_class,
            12,
            96,
            um,
            seed_for(seed, "phantom encoder", name),
            prefix=f"{name}-",
            lab=lab,
        )
        for name, lab, um in (("here", Lab(), 0.5), ("there", OTHER_LAB, 0.75))
    ]
    image, mask = (
        torch.from_numpy(np.concatenate([getattr(s, k) for s in sets])).float() / 255
        for k in ("image", "mask")
    )
    return (
        image.permute(0, 3, 1, 2),
        mask[:, None],
        torch.from_numpy(np.concatenate([s.label for s in sets])),
    )

def blur(x:Tensor, sigma:Tensor)->Tensor: # (B, C, H, W); sigma (B,), pixels
    "Every image blurred by its own Gaussian"
    t = torch.arange(-9., 10.)
    kernel = torch.where(
        sigma[:, None] > 0.05,
        (-(t**2) / (2 * sigma[:, None].clamp(min=0.05) ** 2)).exp(),
        (t == 0).float(),
    )
    kernel = (kernel/kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)
    y = F.pad(x, (9,)*4, mode="reflect").reshape(1, -1, x.shape[2] + 18, x.shape[3] + 18)
    y = F.conv2d(
        F.conv2d(y, kernel[:, None, None], groups=len(kernel)),
        kernel[:, None, :, None],
        groups=len(kernel),
    )
    return y.reshape(x.shape)

def render(image, mask, kind, g):
    "Each tile in the rendering `kind`, (B, 3, H, W) in [0, 1]; and whether it was inverted"
    b = len(image)
    def rand(lo=0.0, hi=1.0, *shape):
        return lo + (hi - lo)*torch.rand((b, *(shape or (1, 1, 1))), generator=g)
    soft = blur(mask, rand(0, 1.5).flatten())
    # red: what haematoxylin takes
    density = -image[:, :1].clamp(min=1/255).log10()
    brown, counter = (
        torch.tensor([0.27, 0.57, 0.78]).reshape(1, 3, 1, 1),
        torch.tensor([0.65, 0.70, 0.29]).reshape(1, 3, 1, 1),
    )
    drawn = torch.stack(
        [
            image,
            soft.expand(-1, 3, -1, -1),
            (1 - density / rand(0.6, 1.4)).clamp(0, 1).expand(-1, 3, -1, -1),
            10
            ** -(
                rand(0.6, 1.2) * soft * (brown + rand(-0.1, 0.1, 3, 1, 1))
                + rand(0.05, 0.3) * counter
            ),
        ]
    )
    out = drawn[kind, torch.arange(b)]
    inverted = rand() < .3
    return torch.where(inverted, 1 - out, out), inverted.flatten().float()

def batch(tissue, size, seed, step):
    "Crops, and all that is known of them; step k depends on (seed, k)"
    g = torch.Generator().manual_seed(seed_for(seed, "phantom encoder", step))
    image, mask, label = tissue
    rows, kind = (
        torch.randint(len(image), (size,), generator=g),
        torch.randint(len(RENDERINGS), (size,), generator=g),
    )
    y, x = torch.randint(0, image.shape[-1] - SIDE + 1, (2,), generator=g).tolist()
    image, mask = (t[rows, :, y:y + SIDE, x:x + SIDE] for t in (image, mask))
    turns = int(torch.randint(4, (), generator=g))
    image, mask = (torch.rot90(t, turns, (2, 3)) for t in (image, mask))
    out, inverted = render(image, mask, kind, g)
    sigma, noise = (
        scale * torch.rand(size, generator=g) * (torch.rand(size, generator=g) < 0.6)
        for scale in (3.0, 0.08)
    )
    out = (
        blur(out, sigma) + noise[:, None, None, None] * torch.randn(out.shape, generator=g)
    ).clamp(0, 1)
    return out, {
        "tissue": label[rows],
        "rendering": kind,
        "rest": torch.stack([inverted, 2 * mask.mean((1, 2, 3)), sigma / 3, noise / 0.08], 1),
    }

def train(steps, size, n_per_class, seed, lr=2e-3):
    """The encoder, the mean and standard deviation of its features, and how well it has learnt, on
    tissue of other patients"""
    set_seed(seed_for(seed, "phantom encoder"))
    tissue = draw_tissue(n_per_class, seed)
    encoder = make_encoder("resnet10_narrow")
    norm, heads = (
        nn.BatchNorm1d(encoder.width, affine=False),
        nn.ModuleDict(
            {
                "tissue": nn.Linear(encoder.width, len(CLASSES)),
                "rendering": nn.Linear(encoder.width, len(RENDERINGS)),
                "rest": nn.Linear(encoder.width, 4),
            }
        ),
    )
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    for step in range(steps):
        x, known = batch(tissue, size, seed, step)
        h = norm(encoder(x.contiguous(memory_format=torch.channels_last)))
        loss = (
            F.cross_entropy(heads["tissue"](h), known["tissue"])
            + F.cross_entropy(heads["rendering"](h), known["rendering"])
            + 4 * F.mse_loss(heads["rest"](h), known["rest"])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    # as it will be stored
    encoder.half().float().eval()
    norm.eval()
    heads.eval()
    held, seen, right = draw_tissue(max(12, n_per_class//4), seed + 1), [], []
    with torch.no_grad():
        for step in range(12):
            x, known = batch(held, 64, seed + 1, step)
            out = {k: head(norm(encoder(x))) for k, head in heads.items()}
            right.append(
                [
                    *[
                        (out[k].argmax(1) == known[k]).float().mean()
                        for k in ("tissue", "rendering")
                    ],
                    *(out["rest"] - known["rest"]).abs().mean(0),
                ]
            )
            seen.append(pooled_stages(encoder, x))
    h, right = torch.cat(seen), torch.tensor(right).mean(0).tolist()
    names = (
        "accuracy_tissue",
        "accuracy_rendering",
        "error_inverted",
        "error_twice_nuclear_fraction",
        "error_blur_thirds_of_3_px",
        "error_noise",
    )
    return (
        encoder,
        h.mean(0),
        h.std(0).clamp(min=1e-3),
        {k: round(v, 3) for k, v in zip(names, right)},
    )

def main(out, steps, batch_size, n_per_class, seed):
    encoder, mean, std, learnt = train(steps, batch_size, n_per_class, seed)
    save_encoder(
        encoder.half(),
        out,
        purpose="features of KID",
        data="synthpi.data.phantoms.tissue_phantoms",
        synthpi=synthpi.__version__,
        steps=steps,
        batch_size=batch_size,
        n_per_class=n_per_class,
        seed=seed,
        mean=[float(f"{v:.4g}") for v in mean],
        std=[float(f"{v:.4g}") for v in std],
        held_out=learnt,
    )
    print(f"{out}: {Path(out).stat().st_size/1e6:.2f} MB; on other simulated patients {learnt}")

def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    for name, value in (("steps", 2400), ("batch-size", 64), ("n-per-class", 60), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    return parser.parse_args(arguments)

if __name__ == "__main__": main(**vars(parse()))
