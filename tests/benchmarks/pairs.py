"""Making pairs beside the generator alone: `add_privileged` into an empty cache, and forward
passes of the same network over the same batches, already in memory.

    python tests/benchmarks/pairs.py [--quick] [--device cuda] [--out pairs.json]

Rounds are interleaved, and the two take turns in going first. `add_privileged` also looks the
tiles up, decodes them (JPEG), encodes and writes PNG with checksums, and writes the manifest.
On CUDA: the U-Net-256 and the ResNet-9 of pix2pix and CycleGAN at 256 px, float32 and bfloat16,
compiled or not.
"""
import argparse
import json
import os
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset, Features, Image as ImageFeature, Value
from PIL import Image
from torch import nn

from synthpi.core.runs import environment
from synthpi.pairs.foreign import ResNet, UNet
from synthpi.pairs.generators import ModuleGenerator, make_unet
from synthpi.pairs.privileged import add_privileged

NETWORKS = {
    "U-Net (make_unet(16))": lambda: nn.Sequential(make_unet(16), nn.Sigmoid()),
    "U-Net-256": lambda: nn.Sequential(UNet(8), Unit()),
    "ResNet-9": lambda: nn.Sequential(ResNet(9), Unit()),
}

class Unit(nn.Module):
    "[-1, 1] to [0, 1]"
    def forward(self, x): return (x + 1)/2

class Cast(nn.Module):
    "A network in bfloat16 that takes and gives float32"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16): return self.inner(x).float()

def as_it_is(y): return y

def tiles(folder, n, size, seed):
    "JPEG tiles of coarse random colour"
    rng = np.random.default_rng(seed)
    for k in range(n):
        Image.fromarray(rng.integers(60, 256, (size // 8, size // 8, 3), dtype=np.uint8)).resize(
            (size, size), Image.BICUBIC
        ).save(folder / f"{k:05}.jpg", quality=90)
    files = sorted(folder.glob("*.jpg"))
    return Dataset.from_dict(
        {"primary": [str(f) for f in files], "path": [f.name for f in files]},
        features=Features({"primary": ImageFeature(), "path": Value("string")}),
    )

def clock(device):
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()

def compare(ds, name, precision, compiled, s, device, folder):
    "Seconds of both, round after round"
    torch.manual_seed(s["seed"])
    module = NETWORKS[name]().eval().requires_grad_(False).to(device)
    if precision == "bf16": module = Cast(module)
    bare = torch.compile(module) if compiled else module
    generator = ModuleGenerator(module, um_per_px=.5, name=name, activation=as_it_is)
    if compiled: generator.module = bare
    batches = (
        torch.stack([torch.from_numpy(np.array(r["primary"])) for r in ds])
        .permute(0, 3, 1, 2)
        .float()
        .div(255)
        .contiguous()
        .to(device)
        .split(s["batch"])
    )
    made = []

    @torch.no_grad()
    def forward():
        start = clock(device)
        for x in batches: y = bare(x)
        return clock(device) - start

    def pairs():
        cache = Path(tempfile.mkdtemp(dir=folder))
        start = clock(device)
        _, stats = add_privileged(ds, generator, cache, .5, s["batch"])
        taken = clock(device) - start
        assert stats["made"] == len(ds)
        made.append(sum(p.stat().st_size for p in cache.glob("*/*.png"))/len(ds))
        return taken

    forward(), pairs()                              # compiles, chooses kernels, starts threads
    seconds = {"forward": [], "pairs": []}
    for r in range(s["rounds"]):
        for kind, f in (("forward", forward), ("pairs", pairs))[:: 1 - 2 * (r % 2)]:
            seconds[kind].append(f())
    ratios = [a/b for a, b in zip(seconds["forward"], seconds["pairs"])]
    return {
        "network": name,
        "precision": precision,
        "compiled": compiled,
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "images_per_second": {k: len(ds) / median(v) for k, v in seconds.items()},
        "bytes_per_image": made[-1],
    }

def run(
    quick:bool=False, # A few small tiles: shows that it works
    device:str="cpu", # cpu or cuda
    seed:int=0, # Of the tiles and the weights
)->dict: # JSON-ready: ratios, images per second, machine
    "Every network, precision and way of running it."
    s = {
        "quick": dict(size=32, tiles=8, batch=4, rounds=2),
        "cpu": dict(size=224, tiles=96, batch=8, rounds=4),
        "cuda": dict(size=256, tiles=2048, batch=64, rounds=3),
    }["quick" if quick else device] | {"seed": seed}
    kinds = (
        [("U-Net (make_unet(16))", "fp32", False)]
        if device == "cpu"
        else [
            (n, p, c)
            for n in ("U-Net-256", "ResNet-9")
            for p in ("fp32", "bf16")
            for c in (False, True)
        ]
    )
    with tempfile.TemporaryDirectory() as d:
        (Path(d)/"tiles").mkdir()
        ds = tiles(
            Path(d) / "tiles", s["tiles"], 256 if quick and device == "cuda" else s["size"], seed
        )
        results = [compare(ds, *kind, s, device, d) for kind in kinds]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "benchmark": "pairs",
        "baseline": "forward passes of the generator's network over the same batches, in memory, "
                    "nothing else",
        "goal": 0.9,
        "setup": s,
        "results": results,
        "cores": cores,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }

def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="a few small tiles")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available(): p.error("no CUDA device was found")
    result = run(args.quick, args.device, args.seed)
    text = json.dumps(result, indent=1)
    if not args.out: return print(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    for r in result["results"]:
        print(
            f"{r['network']}, {r['precision']}{', compiled' if r['compiled'] else ''}: "
            f"{r['images_per_second']['pairs']:.1f} of {r['images_per_second']['forward']:.1f} "
            f"images/s, ratio {r['ratio']['median']:.3f} ({r['ratio']['min']:.3f} to "
            f"{r['ratio']['max']:.3f})"
        )

if __name__ == "__main__": main()
