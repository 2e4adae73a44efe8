"""Time and memory of the second-moment losses beside the textbook form, which builds the D x D
matrix.

    python tests/benchmarks/losses.py [--quick] [--device cuda] [--out losses.json]

The rounds are interleaved, so that a slow minute of the machine falls on both forms; memory is
the peak above what was held before the loss, of one
forward and backward pass in a process of its own (CPU) or by the allocator's count (CUDA).
lightly's losses join in where lightly can be imported.
"""
import argparse
import json
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

from synthpi.core.runs import environment
from synthpi.losses.paired import BarlowTwins, VICReg

def textbook_vicreg(z1, z2):
    "The official two-branch VICReg with its weights, by way of the D x D covariances."
    loss = 25*(z1 - z2).square().mean()
    for z in (z1, z2):
        n, d = z.shape
        zc = z - z.mean(dim=0)
        cov = zc.T @ zc/(n - 1)
        std = (z.var(dim=0) + 1e-4).sqrt()
        loss = (
            loss
            + 25 * torch.relu(1 - std).mean() / 2
            + (cov.square().sum() - cov.diagonal().square().sum()) / d
        )
    return loss

def textbook_barlow(z1, z2):
    "Two-branch Barlow Twins divided by D, by way of the D x D cross-correlations."
    n, d = z1.shape
    z1, z2 = ((z - z.mean(dim=0))/(z.var(dim=0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    c = z1.T @ z2/n
    diagonal = c.diagonal()
    return ((1 - diagonal).square().sum() + .0051*(c.square().sum() - diagonal.square().sum()))/d

FORMS = {"vicreg": {"synthpi": lambda a, b: VICReg()(a, b)[0], "textbook": textbook_vicreg},
         "barlow": {"synthpi": lambda a, b: BarlowTwins()(a, b)[0], "textbook": textbook_barlow}}

def add_lightly():
    "lightly's losses into FORMS; returns its version or why it is missing"
    try:
        import lightly
        from lightly.loss import BarlowTwinsLoss, VICRegLoss
    # it needs torchvision, which fails in more ways than ImportError where it does not fit torch
    except Exception as error:
        return f"skipped: {type(error).__name__}: {error}"
    # a loss of lightly's own scale: time and memory only
    FORMS["vicreg"]["lightly"], FORMS["barlow"]["lightly"] = VICRegLoss(), BarlowTwinsLoss()
    return lightly.__version__

def embeddings(n, d, device="cpu"):
    g = torch.Generator().manual_seed(0)
    common = torch.randn(n, d, generator=g)
    return [
        (0.8 * common + 0.6 * torch.randn(n, d, generator=g)).to(device).requires_grad_()
        for _ in range(2)
    ]

def once(form, zs):
    "Seconds of one forward and backward pass, and the loss"
    for z in zs: z.grad = None
    if zs[0].is_cuda: torch.cuda.synchronize()
    start = time.perf_counter()
    loss = form(*zs)
    loss.backward()
    if zs[0].is_cuda: torch.cuda.synchronize()
    return time.perf_counter() - start, loss.item()

def _resident(key):
    "VmRSS or VmHWM, the resident memory of this process now or at its peak, in bytes"
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )

def memory_of_this_process(name, form, n, d):
    """Bytes that one forward and backward pass takes at its peak, above the embeddings themselves
    (Linux)"""
    # what is loaded on first use is not the loss's
    once(FORMS[name][form], embeddings(8, 16))
    zs = embeddings(n, d)
    # the peak starts again from here
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    once(FORMS[name][form], zs)
    return _resident("VmHWM") - before

def extra_memory(name, form, zs):
    "Peak bytes above what is held before; None where the system cannot tell"
    n, d = zs[0].shape
    if zs[0].is_cuda:
        for z in zs:
            z.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(FORMS[name][form], zs)
        return torch.cuda.max_memory_allocated() - before
    # no peak that can be started again
    if not sys.platform.startswith("linux"): return None
    out = subprocess.run(
        [sys.executable, __file__, "--memory", name, form, str(n), str(d)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return int(out.stdout)

def _spread(x): return {"median": median(x), "min": min(x), "max": max(x)}

def run(
    quick:bool=False, # Small embeddings and few rounds: seconds instead of a minute
    device:str="cpu", # cpu or cuda
)->dict: # JSON-ready: shapes, seconds, extra bytes, ratios, machine
    "Forward and backward of every form in turn, round after round, then the memory of each."
    n, d, rounds = (64, 2048, 3) if quick else (256, 8192, 7)
    lightly, zs = add_lightly(), embeddings(n, d, device)
    results = {}
    for name, forms in FORMS.items():
        grads, losses, seconds = {}, {}, {form: [] for form in forms}
        # warm-up, whose gradients are compared
        for form in forms:
            _, losses[form] = once(forms[form], zs)
            grads[form] = zs[0].grad.clone()
        for _ in range(rounds):
            for form in forms: seconds[form].append(once(forms[form], zs)[0])
        memory = {form: extra_memory(name, form, zs) for form in forms}
        ours, textbook = grads["synthpi"], grads["textbook"]
        results[name] = {
            "loss": losses,
            "relative_gradient_difference": ((ours - textbook).norm() / textbook.norm()).item(),
            "seconds": {form: _spread(s) for form, s in seconds.items()},
            "extra_bytes": memory,
            "times_faster": {
                form: {
                    "of_medians": median(s) / median(seconds["synthpi"]),
                    "rounds": _spread([slow / fast for slow, fast in zip(s, seconds["synthpi"])]),
                }
                for form, s in seconds.items()
                if form != "synthpi"
            },
            "times_less_memory": {
                form: m / memory["synthpi"] if m and memory["synthpi"] else None
                for form, m in memory.items()
                if form != "synthpi"
            },
        }
    return {
        "benchmark": "losses",
        "rows": n,
        "columns": d,
        "branches": 2,
        "dtype": "float32",
        "rounds": rounds,
        "device": device,
        "lightly": lightly,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "results": results,
        "environment": environment(),
    }

def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="small embeddings and few rounds")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    # the child process of extra_memory
    p.add_argument("--memory", nargs=4, metavar=("LOSS", "FORM", "N", "D"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.memory:
        name, form, n, d = args.memory
        if form == "lightly": add_lightly()
        return print(memory_of_this_process(name, form, int(n), int(d)))
    result = run(args.quick, args.device)
    text = json.dumps(result, indent=1)
    if not args.out: return print(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    for name, r in result["results"].items():
        for form, faster in r["times_faster"].items():
            less = r["times_less_memory"][form]
            print(
                f"{name}, N={result['rows']}, D={result['columns']}: {faster['of_medians']:.1f} "
                f"times faster than {form} "
                f"({faster['rounds']['min']:.1f} to {faster['rounds']['max']:.1f} over rounds), "
                + (f"{less:.1f} times less extra memory" if less else "memory not measured")
            )

if __name__ == "__main__": main()
