"""Crops per second from a store of volumes, beside the published chain of transforms and beside
MONAI's CacheDataset, on the same volumes.

    python tests/benchmarks/volumes.py [--quick] [--data FOLDER] [--out volumes.json]

The chain, as published for ISImed and written with MONAI, decodes every volume at each step:
LoadImaged, EnsureChannelFirstd, CropForegroundd, SpatialPadd, ScaleIntensityRangePercentilesd (5
to 95 % to
[-1, 1]), RandSpatialCropSamplesd, EnsureTyped. `CacheDataset` keeps what stands before the
random crops in memory. A step is 4 volumes x 8 crops of 32^3, joined to one batch, on one
thread; `sample_crops` also draws
from tissue, and gives positions and volumes. Rounds are interleaved and take turns in who goes
first; counted is the time of the processor, and all files are in the system's memory. Preparing
is done once and
told on its own. Without --data the volumes are simulated trunks.
Then memory: the process's resident memory after every 100 of 1,000 steps over 200 volumes (each
with files of its own), with arrays kept mapped up to `open_mb`.
"""
import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import psutil
import torch
from monai.data import CacheDataset, Dataset
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    RandSpatialCropSamplesd,
    ScaleIntensityRangePercentilesd,
    SpatialPadd,
)

from synthpi.volumes.bodies import write_bodies
from synthpi.core.runs import environment
from synthpi.core.files import write_json
from synthpi.volumes.crops import crop_batches
from synthpi.volumes.sets import find_volumes
from synthpi.volumes.store import VolumeStore
from synthpi.volumes.scans import prepare_volumes

GOALS = {"published chain": 150, "CacheDataset": 10}
V, C = 4, 8

def chain(size):
    key = ["image"]
    return Compose(
        [
            LoadImaged(key),
            EnsureChannelFirstd(key),
            CropForegroundd(key, source_key="image", allow_smaller=True),
            SpatialPadd(key, size),
            ScaleIntensityRangePercentilesd(key, 5, 95, -1, 1),
            RandSpatialCropSamplesd(key, [size] * 3, num_samples=C, random_size=False),
            EnsureTyped(key),
        ]
    )

class Monai:
    "Steps of a MONAI data set: V volumes, their C crops each, one batch"
    def __init__(self, dataset): self.dataset = dataset
    def __call__(self, first, steps):
        for step in range(first, first + steps):
            items = [
                crop["image"]
                for k in range(V)
                for crop in self.dataset[(step * V + k) % len(self.dataset)]
            ]
            yield torch.stack([x.as_tensor() if hasattr(x, "as_tensor") else x for x in items])

class Store:
    "Steps of ours"
    def __init__(self, store, size): self.store, self.size = store, size
    def __call__(self, first, steps):
        for batch in crop_batches(self.store, V, C, self.size, first + steps, first):
            yield batch["crop"]

def rate(loader, first, steps, size):
    start = time.process_time()
    for batch in loader(first, steps):
        if batch.shape != (V * C, 1, size, size, size):
            raise RuntimeError(
                f"a batch of shape {tuple(batch.shape)}; both sides have to do the same."
            )
    return steps*V*C/(time.process_time() - start)

def speed(folder, records, store, deep, size, rounds, steps):
    "Crops per second of the processor and ratios, round by round"
    files = [{"image": str(folder/r["image"])} for r in records]
    loaders = {
        "published chain": Monai(Dataset(files, chain(size))),
        "CacheDataset": Monai(CacheDataset(files, chain(size), progress=False, num_workers=1)),
        "sample_crops": Store(store, size),
        "sample_crops, 16 bits": Store(deep, size),
    }
    for name, loader in loaders.items():
        rate(loader, 0, 1 if name == "published chain" else -(-len(files) // V), size)
    rates, at = {name: [] for name in loaders}, dict.fromkeys(loaders, 0)
    for k in range(rounds):
        for name in sorted(loaders, reverse=bool(k % 2)):
            rates[name].append(rate(loaders[name], at[name], steps[name], size))
            at[name] += steps[name]
    ours = np.array(rates["sample_crops"])
    return {
        "crops_per_second": {name: float(np.median(r)) for name, r in rates.items()},
        "times_faster": {
            name: {
                "median": float(np.median(ours / rates[name])),
                "min": float((ours / rates[name]).min()),
                "max": float((ours / rates[name]).max()),
            }
            for name in GOALS
        },
        "times_faster_16_bits": {
            name: float(np.median(np.array(rates["sample_crops, 16 bits"]) / rates[name]))
            for name in GOALS
        },
    }

def memory(store_folder, work, n, size, steps, every):
    "Resident memory of this process along the steps of a run over `n` volumes, in MB"
    shutil.copytree(store_folder, work)
    facts = json.loads((work/"store.json").read_text(encoding="utf-8"))
    known = [v["name"] for v in facts["volumes"]]
    facts["volumes"] = [{"name": f"copy_{k:03d}", "subject": f"{k}", "split": ""} for k in range(n)]
    for k in range(n):
        shutil.copytree(
            work / "items" / known[k % len(known)].replace("/", "__"),
            work / "items" / f"copy_{k:03d}",
        )
    write_json(work/"store.json", facts)
    store, process, seen = VolumeStore(work, open_mb=64), psutil.Process(), []
    for step, _ in enumerate(crop_batches(store, V, C, size, steps), 1):
        if step % every == 0: seen.append(process.memory_info().rss/2**20)
    stored = sum(p.stat().st_size for p in (work/"items").glob("copy_*/*.npy"))/2**20
    return {
        "volumes": n,
        "steps": steps,
        "open_mb": 64,
        "stored_MB": stored,
        "resident_MB": seen,
        "growth_after_first_tenth_MB": seen[-1] - seen[0],
    }

def run(
    quick:bool=False, # Small and short, to see that it runs; its numbers mean little
    data:str|Path|None=None, # Folder of volumes; None simulates some
)->dict: # JSON-ready
    "The comparison and the memory, with what has to be known about the machine."
    threads, size = torch.get_num_threads(), 16 if quick else 32
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tmp = Path(tmp)
            shape, spacing = ((24, 24, 24), 16.) if quick else ((128, 128, 128), 3.)
            folder = (
                Path(data)
                if data
                else write_bodies(
                    tmp / "made", n_subjects=4 if quick else 8, shape=shape, spacing_mm=spacing
                )
            )
            records = [{**r, "label": ""} for r in find_volumes(folder)][:8]
            start = time.process_time()
            store = prepare_volumes(records, tmp/"store", root=folder)
            preparing = (time.process_time() - start)/len(records)
            deep = prepare_volumes(records, tmp/"deep", root=folder, dtype="uint16")
            steps = (
                {
                    "published chain": 1,
                    "CacheDataset": 2,
                    "sample_crops": 4,
                    "sample_crops, 16 bits": 4,
                }
                if quick
                else {
                    "published chain": 1,
                    "CacheDataset": 12,
                    "sample_crops": 60,
                    "sample_crops, 16 bits": 60,
                }
            )
            ram = memory(
                tmp / "store",
                tmp / "many",
                12 if quick else 200,
                size,
                50 if quick else 1000,
                5 if quick else 100,
            )
            result = speed(folder, records, store, deep, size, 2 if quick else 7, steps)
            grids = [[int(x) for x in item["shape"]] for item in store.items]
            about = environment()
    finally: torch.set_num_threads(threads)
    met = {name: result["times_faster"][name]["median"] >= goal for name, goal in GOALS.items()}
    return {
        "benchmark": "volumes",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "goals": GOALS,
        "setup": {
            "volumes": len(records),
            "source": Path(data).name
            if data
            else f"simulated trunks, {' x '.join(map(str, shape))}",
            "stored_grids": grids,
            "volumes_per_step": V,
            "crops_per_volume": C,
            "size": size,
            "rounds": 2 if quick else 7,
            "steps": steps,
        },
        "seconds_to_prepare_a_volume": preparing,
        "results": result,
        "goals met": met,
        "memory": ram,
        "environment": about,
    }

def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs")
    parser.add_argument("--data", type=Path, help="folder of volumes to measure on")
    parser.add_argument("--out", type=Path, help="file to write the JSON to")
    args = parser.parse_args(argv)
    results = run(args.quick, args.data)
    if args.out: write_json(args.out, results)
    json.dump(results, sys.stdout, indent=1)
    print()

if __name__ == "__main__": main()
