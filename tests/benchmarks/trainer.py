"""Steps per second of `Trainer` beside a loop written by hand: the same model, loss, optimiser,
batches, clipping, learning rate and log.

    python tests/benchmarks/trainer.py [--quick] [--device cuda] [--out trainer.json]

Rounds are interleaved, and within a round the two take turns in going first. Batches are made
before, so that nothing but the loop differs.
"""
import argparse
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

from synthpi.core.runs import environment
from synthpi.losses.paired import VICReg
from synthpi.models.branches import siamese
from synthpi.train.trainer import Trainer, warmup_cosine
from synthpi.train.processes import make_accelerator

def build(setup, device):
    torch.manual_seed(0)
    model = siamese(setup["encoder"], setup["widths"]).to(device)
    return model, torch.optim.AdamW(model.parameters(), 1e-3)

def clock(device):
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()

def by_hand(setup, batches, device):
    "Seconds of every step of a plain loop, and its losses"
    model, optimizer = build(setup, device)
    model.train()
    loss_of, factor, times, log = VICReg(), warmup_cosine(len(batches)), [clock(device)], []
    for k, batch in enumerate(batches):
        for group in optimizer.param_groups: group["lr"] = 1e-3*factor(k)
        loss, terms = loss_of(*model(*(v.to(device, non_blocking=True) for v in batch["views"])))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        log.append(
            {"loss": loss.item(), **{n: t.item() for n, t in terms.items()}, "norm": norm.item()}
        )
        times.append(clock(device))
    return [b - a for a, b in zip(times, times[1:])], [row["loss"] for row in log]

def by_trainer(setup, batches, device):
    "The same of a Trainer"
    model, optimizer = build(setup, device)
    times = []
    trainer = Trainer(
        model,
        VICReg(),
        optimizer,
        lambda start: iter(batches[start:]),
        len(batches),
        accelerator=make_accelerator("fp32", cpu=device == "cpu"),
        watch_every=50,
        on_step=lambda t: times.append(clock(device)),
        progress=None,
    )
    start = clock(device)
    history = trainer.fit()
    return [b - a for a, b in zip([start, *times], times)], history["loss"].tolist()

SETUPS = {
    "quick": [
        dict(encoder="resnet10_narrow", widths=(64, 64), size=32, batch=16, steps=12, rounds=3)
    ],
    "cpu": [
        dict(encoder="resnet18", widths=(512, 512, 512), size=96, batch=32, steps=8, rounds=6),
        dict(encoder="resnet10_narrow", widths=(64, 64), size=32, batch=16, steps=100, rounds=12),
    ],
    "cuda": [
        dict(
            encoder="resnet50", widths=(2048, 2048, 2048), size=224, batch=128, steps=30, rounds=5
        ),
        dict(encoder="resnet18", widths=(512, 512), size=64, batch=32, steps=100, rounds=8),
    ],
}

def compare(setup, device):
    "Both loops in turn, round after round; the first two steps of each are left out"
    batches = [
        {
            "views": tuple(
                torch.rand(
                    setup["batch"],
                    3,
                    setup["size"],
                    setup["size"],
                    generator=torch.Generator().manual_seed(2 * k + j),
                ).to(device)
                for j in range(2)
            )
        }
        for k in range(setup["steps"])
    ]
    loops, seconds, losses = (
        {"trainer": by_trainer, "loop": by_hand},
        {"trainer": [], "loop": []},
        {},
    )
    for r in range(setup["rounds"]):
        for name in sorted(loops, reverse=bool(r % 2)):
            steps, losses[name] = loops[name](setup, batches, device)
            seconds[name].append(median(steps[2:]))
    ratios = [l/t for l, t in zip(seconds["loop"], seconds["trainer"])]
    return {
        "setup": setup,
        "steps_per_second": {n: 1 / median(s) for n, s in seconds.items()},
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "milliseconds_more_per_step": 1000 * (median(seconds["trainer"]) - median(seconds["loop"])),
        "largest_relative_difference_of_losses": max(
            abs(a - b) / abs(b) for a, b in zip(losses["trainer"], losses["loop"])
        ),
    }

def run(
    quick:bool=False, # A tiny model: shows that it works, in seconds instead of minutes
    device:str="cpu", # cpu or cuda
)->dict: # JSON-ready: steps per second of both, ratios, machine
    "A usual step, and one so small that what the Trainer adds would show."
    setups = SETUPS["quick"] if quick else SETUPS[device]
    return {
        "benchmark": "trainer",
        "baseline": "a loop written by hand",
        "results": [compare(s, device) for s in setups],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }

def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="a tiny model")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    args = p.parse_args()
    result = run(args.quick, args.device)
    text = json.dumps(result, indent=1)
    if not args.out: return print(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    for r in result["results"]:
        print(
            f"{r['setup']['encoder']}: Trainer at {r['ratio']['median']:.3f} of the speed of the "
            f"loop ({r['ratio']['min']:.3f} to {r['ratio']['max']:.3f} over rounds)"
        )

if __name__ == "__main__": main()
