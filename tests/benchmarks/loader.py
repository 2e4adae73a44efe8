"""Images per second of the paired loader beside a bare loop of the same work on the same files.

    python tests/benchmarks/loader.py [--quick] [--out loader.json]

The baseline, "bare loop", is what one would write for one's own data and nothing else:
`PIL.Image.open(path).convert("RGB")`, the same albumentations recipe,
`torch.from_numpy(...).permute(2, 0, 1).float().div(255)`; no keys, no checks, no data set.
Beside it, `Views` of two branches on a Hugging Face data set of pairs of files.
Both are joined to batches by PyTorch's `default_collate`, as a `DataLoader` does.
Both run on one thread of one process, in interleaved rounds that take turns in who goes first,
so that a slow minute of the machine falls on both; the ratio is taken
round by round. Counted is the time of the processor, not of the clock, for other work on the
same machine is no part of either; the files are in the system's memory. Once with every image
decoded anew, once with the decoded images in memory.
"""
import argparse
import json
import sys
import tempfile
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np
import torch
from datasets.utils.logging import disable_progress_bar
from PIL import Image
from torch.utils.data import default_collate

from synthpi.core.runs import environment
from synthpi.core.files import write_json
from synthpi.data.folders import pair_folders
from synthpi.data.phantoms import tissue_phantoms
from synthpi.data.recipes import farndale, histology, strong, weak
from synthpi.data.views import Views

RECIPES = {"weak": weak, "strong": strong, "histology": histology, "farndale": farndale}
GOAL, BATCH = .95, 9

def write_pairs(folder, per_class, size):
    "Simulated tiles, and beside each the same with its colours exchanged, as PNG"
    tiles = tissue_phantoms(n_per_class=per_class, n_patients=1, size=size).image
    for side, channels in (("image", [0, 1, 2]), ("privileged", [2, 0, 1])):
        (Path(folder)/side).mkdir()
        for i, tile in enumerate(tiles):
            Image.fromarray(tile[..., channels]).save(Path(folder) / side / f"{i:04}.png")
    return len(tiles)

class Bare:
    "The same work without the library"
    def __init__(self, folder, recipe, size, cached):
        self.files = [sorted((Path(folder)/side).iterdir()) for side in ("image", "privileged")]
        self.recipes, self.kept = [recipe(size) for _ in self.files], {} if cached else None
    def read(self, path):
        if self.kept is None: return np.array(Image.open(path).convert("RGB"))
        if path not in self.kept: self.kept[path] = np.array(Image.open(path).convert("RGB"))
        return self.kept[path]
    def item(self, i):
        views = [
            recipe(image=self.read(files[i]))["image"]
            for files, recipe in zip(self.files, self.recipes)
        ]
        return tuple(torch.from_numpy(view).permute(2, 0, 1).float().div(255) for view in views)
    def __call__(self, epoch, rows): return default_collate([self.item(i) for i in rows])

class Served:
    "The same work by the library"
    def __init__(self, folder, recipe, size, cached):
        with warnings.catch_warnings():
            # of pairs without a patient, which matters where they are split
            warnings.simplefilter("ignore")
            pairs = pair_folders(folder)
        self.views = Views(
            pairs,
            [("primary", recipe), ("privileged", recipe)],
            size,
            cache_mb=1024 if cached else 0,
        )
    def __call__(self, epoch, rows):
        return default_collate([self.views[epoch, i] for i in rows])["views"]

def seconds(loader, n, epochs):
    start = time.process_time()
    for epoch in epochs:
        for first in range(0, n, BATCH): loader(epoch, range(first, first + BATCH))
    return time.process_time() - start

def compare(folder, n, recipe, size, cached, rounds, passes):
    "Rates and the ratio of the rates, per round"
    loaders = {
        "bare loop": Bare(folder, recipe, size, cached),
        "Views": Served(folder, recipe, size, cached),
    }
    # files into the system's memory, decoded images into the cache
    for loader in loaders.values(): seconds(loader, n, [0])
    rates = {name: [] for name in loaders}
    for k in range(rounds):
        for name in sorted(loaders, reverse=bool(k % 2)):
            rates[name].append(
                2 * n * passes / seconds(loaders[name], n, range(k * passes, (k + 1) * passes))
            )
    ratios = np.array(rates["Views"])/np.array(rates["bare loop"])
    return {
        **{f"{name}, images per core-second": float(np.median(v)) for name, v in rates.items()},
        "ratio": float(np.median(ratios)),
        "ratio, 10 and 90 %": [float(q) for q in np.quantile(ratios, [0.1, 0.9])],
        "rounds": rounds,
    }

def run(
    quick:bool=False, # Small and short, to see that it runs; its numbers mean little
)->dict: # JSON-ready
    "All comparisons, with what has to be known about the machine."
    threads, size = (torch.get_num_threads(), cv2.getNumThreads()), 64 if quick else 224
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    disable_progress_bar()
    results = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            n = write_pairs(folder, 1 if quick else 2, size)
            for cached in (False, True):
                for name in ("strong",) if quick else RECIPES:
                    results.append(
                        {
                            "recipe": name,
                            "decoded images": "in memory" if cached else "not kept",
                            **compare(
                                folder,
                                n,
                                RECIPES[name],
                                size,
                                cached,
                                rounds=3 if quick else 30,
                                passes=1 if quick or not cached else 2,
                            ),
                        }
                    )
        about = environment()
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    return {
        "benchmark": "loader",
        "baseline": "bare loop: PIL decode, the same albumentations recipe, conversion to "
                    "tensors; both collated by PyTorch",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "what": f"{n} pairs of {size} x {size} PNG, two branches, batches of {BATCH}, one "
                "process, one thread",
        "quick": quick,
        "goal": GOAL,
        "results": results,
        "goal met": all(r["ratio"] >= GOAL for r in results),
        "environment": about,
    }

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs")
    parser.add_argument("--out", type=Path, help="file to write the JSON to")
    args = parser.parse_args(argv)
    results = run(args.quick)
    if args.out: write_json(args.out, results)
    json.dump(results, sys.stdout, indent=1)
    print()

if __name__ == "__main__": main()
