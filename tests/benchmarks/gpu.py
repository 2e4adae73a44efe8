"""Training throughput on a GPU: ResNet-50 at 224 px, batch 256, bf16, two and three branches,
and ViT-S/16 with Barlow Twins.

    python tests/benchmarks/gpu.py [--quick] [--device cpu] [--out gpu.json]

For each layout: images per second and peak memory of the Trainer with augmentation in worker
processes (`Views`) and on the device (`BatchViews`), compiled or not, beside a loop written by
hand over the same loader (eager, no log), and beside the ceiling, forward and backward passes
over one batch that is already on the device. A sample is a tile; an image is a view of it.
ViT-S/16 stands beside
the 870.9 samples/s that stable-pretraining publishes for Barlow Twins at batch 256 on one H200.
A last table, of pairs.py, is the making of pairs. `--quick --device cpu` runs every path at a
tiny size, to see that it works.
"""
import argparse
import gc
import importlib.util
import json
import os
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, Features, Image as ImageFeature
from PIL import Image

from synthpi.data.device_views import BatchViews
from synthpi.core.runs import environment
from synthpi.losses.paired import BarlowTwins, VICReg
from synthpi.models.branches import make_branches
from synthpi.models.encoders import make_encoder
from synthpi.data.recipes import histology, weak
from synthpi.train.trainer import Trainer
from synthpi.train.processes import make_accelerator
from synthpi.data.views import Views, batches

def vit_small(size, layers):
    "ViT-S/16: width 384, 12 layers, 6 heads"
    return make_encoder(
        "hf:vit-small",
        config=dict(
            model_type="vit",
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=6,
            image_size=size,
            patch_size=16,
        ),
    )

def tiles(folder, n, size):
    "JPEG tiles of coarse random colour, with a second image beside each"
    rng = np.random.default_rng(0)
    for kind in ("image", "privileged"):
        (folder/kind).mkdir()
        for k in range(n):
            Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)).resize(
                (size, size), Image.BICUBIC
            ).save(folder / kind / f"{k:05}.jpg", quality=90)
    columns = {
        name: [str(p) for p in sorted((folder / kind).iterdir())]
        for name, kind in (("primary", "image"), ("privileged", "privileged"))
    }
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, ImageFeature())))

def rate(times, batch, layout, device):
    "Steady speed, without the first third of the steps"
    if device == "cuda": torch.cuda.synchronize()
    steady = median([b - a for a, b in zip(times[len(times)//3:], times[len(times)//3 + 1:])])
    return {
        "samples_per_second": batch / steady,
        "images_per_second": batch * len(layout) / steady,
        "peak_GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }

def fresh(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

def measure(ds, build, loss, layout, s, device):  # noqa: C901 each peer is one branch
    "Rows of one layout: ceiling, loop, Trainer with either augmentation, compiled or not"
    branches = [("privileged" if k else "primary", weak if k else histology) for k in layout]
    def optimizer(model): return torch.optim.AdamW(model.parameters(), 1e-4)
    def place(views):
        return tuple(
            v.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            for v in views
        )
    def cast(): return torch.autocast(device, dtype=torch.bfloat16)
    def views(kind):
        return (BatchViews if kind == "device" else Views)(
            ds, branches, s["size"], cache_mb=s["cache_mb"]
        )

    def step(model, optimizer, zs):
        with cast(): zs = model(*zs)
        value, _ = loss(*zs)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        # what a log would ask for, and the Trainer does too
        return value.item()

    def ceiling():
        model = build().to(device, memory_format=torch.channels_last).train()
        opt, batch, times = (
            optimizer(model),
            place([torch.rand(s["batch"], 3, s["size"], s["size"]) for _ in layout]),
            [],
        )
        for _ in range(s["steps"]):
            step(model, opt, batch)
            times.append(time.perf_counter())
        return times

    def loop(kind):
        model, source, times = (
            build().to(device, memory_format=torch.channels_last).train(),
            views(kind),
            [],
        )
        opt = optimizer(model)
        for batch in batches(source, s["batch"], s["steps"], workers=s["workers"]):
            batch = send_to_device(batch, device, non_blocking=True)
            if kind == "device": batch = source(batch)
            step(model, opt, place(batch["views"]))
            times.append(time.perf_counter())
        return times

    def trained(kind, compiled):
        model, source, times = build(), views(kind), []
        accelerator = make_accelerator("bf16", cpu=device == "cpu")
        Trainer(
            model,
            loss,
            optimizer(model),
            lambda start: batches(source, s["batch"], s["steps"], start, s["workers"]),
            s["steps"],
            transform=source if kind == "device" else None,
            channels_last=True,
            compile=compiled and ("inductor" if device == "cuda" else "aot_eager"),
            accelerator=accelerator,
            on_step=lambda t: times.append(time.perf_counter()),
            progress=None,
        ).fit()
        return times

    rows = {"ceiling (forward and backward on one batch)": ceiling}
    for kind in ("workers", "device"):
        rows[f"loop by hand, augmentation on {kind}"] = lambda kind=kind: loop(kind)
        for compiled in (False, True)[: 2 - s["one_compiled"] * (kind == "workers")]:
            rows[f"Trainer, augmentation on {kind}{', compiled' if compiled else ''}"] = (
                lambda kind=kind, compiled=compiled: trained(kind, compiled)
            )
    found = {name: [] for name in rows}
    for _ in range(s["rounds"]):
        for name, f in rows.items():
            fresh(device)
            found[name].append(rate(f(), s["batch"], layout, device))
    top = median(
        [r["samples_per_second"] for r in found["ceiling (forward and backward on one batch)"]]
    )
    return {
        name: {k: median([r[k] for r in runs]) if runs[0][k] is not None else None for k in runs[0]}
        | {"of_ceiling": median([r["samples_per_second"] for r in runs]) / top}
        for name, runs in found.items()
    }

def pairs(quick, device):
    "Results of the benchmark beside this one"
    spec = importlib.util.spec_from_file_location(
        "benchmark_pairs", Path(__file__).parent / "pairs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fresh(device)
    return module.run(quick, device)["results"]

def run(
    quick:bool=False, # Every path at a tiny size
    device:str="cuda", # cuda, or cpu to see that it works
)->dict: # JSON-ready: rows by layout, machine
    "All rows, interleaved in rounds."
    s = (
        dict(
            size=32,
            batch=6,
            steps=3,
            workers=0,
            tiles=12,
            cache_mb=64,
            rounds=1,
            one_compiled=True,
            encoder="resnet10_narrow",
            widths=(32, 32),
            vit_layers=1,
        )
        if quick
        else dict(
            size=224,
            batch=256,
            steps=24,
            workers=max(1, (os.cpu_count() or 2) - 1),
            tiles=2048,
            cache_mb=0,
            rounds=2,
            one_compiled=False,
            encoder="resnet50",
            widths=(2048, 2048, 2048),
            vit_layers=12,
        )
    )
    results = {}
    with tempfile.TemporaryDirectory() as d:
        ds = tiles(Path(d), s["tiles"], s["size"] + 32)
        for layout in ((0, 0), (0, 0, 1))[quick:]:
            results[f"{s['encoder']}, {len(layout)} branches, VICReg"] = measure(
                ds,
                lambda: make_branches(layout, s["encoder"], widths=s["widths"]),
                VICReg(),
                layout,
                s,
                device,
            )
        results["ViT-S/16, 2 branches, Barlow Twins"] = measure(
            ds,
            lambda: make_branches(
                (0, 0), lambda: vit_small(s["size"], s["vit_layers"]), widths=s["widths"]
            ),
            BarlowTwins(),
            (0, 0),
            s,
            device,
        )
    return {
        "benchmark": "gpu",
        "setup": s,
        "precision": "bf16",
        "published": {
            "stable-pretraining, Barlow Twins, ViT-S/16, batch 256, one H200": "870.9 samples/s"
        },
        "results": results,
        "pairs": pairs(quick, device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "environment": environment(),
    }

def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="every path at a tiny size")
    p.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    p.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("no CUDA device was found; --quick --device cpu shows that it works")
    result = run(args.quick, args.device)
    text = json.dumps(result, indent=1)
    if not args.out: return print(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    for setup, rows in result["results"].items():
        for name, r in rows.items():
            print(
                f"{setup}: {name}: {r['images_per_second']:.0f} images/s, "
                f"{r['samples_per_second']:.0f} samples/s, {r['of_ceiling']:.2f} of the ceiling"
            )

if __name__ == "__main__": main()
