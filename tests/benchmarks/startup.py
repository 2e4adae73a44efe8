"""Seconds to import synthpi and its engine, above what torch and the other third parties take by
themselves.

    python tests/benchmarks/startup.py [--quick] [--out startup.json]

Each import runs in a new interpreter, interleaved with the third parties' imports alone. The
first entry is `import synthpi`; the others are the modules of the engine beside the libraries
that
they stand on.
"""
import argparse
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from synthpi.core.runs import environment

CASES = {
    "synthpi": "pass",
    "synthpi.losses.paired": "import torch, torch.distributed, torch.distributed.nn.functional",
    "synthpi.train.trainer": "import torch, accelerate, accelerate.utils, pandas, "
                             "matplotlib.pyplot, tqdm.auto, numpy, PIL.Image, safetensors.torch",
    "synthpi.data.views": "import torch.utils.data, albumentations, cv2, numpy, PIL.Image, "
                          "matplotlib.pyplot, safetensors.torch",
}

def seconds(statement):
    code = (
        "import os, time; os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'; t = time.perf_counter(); "
        f"exec({statement!r}); print(time.perf_counter() - t)"
    )
    return float(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    )

def run(
    quick:bool=False, # One round, of `synthpi` and its losses
)->dict: # JSON-ready: seconds by module
    "Every import in turn, round after round."
    cases, rounds = (dict(list(CASES.items())[:2]), 1) if quick else (CASES, 7)
    found = {name: {"all": [], "third_parties": []} for name in cases}
    for _ in range(rounds):
        for name, third in cases.items():
            found[name]["all"].append(seconds(f"import {name}"))
            found[name]["third_parties"].append(seconds(third))
    rows = {
        n: {k: median(v) for k, v in f.items()}
        | {"own": median([a - b for a, b in zip(f["all"], f["third_parties"])])}
        for n, f in found.items()
    }
    return {
        "benchmark": "startup",
        "baseline": "importing the third parties alone",
        "rounds": rounds,
        "seconds": rows,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
    }

def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="one round of two modules")
    p.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    args = p.parse_args()
    result = run(args.quick)
    text = json.dumps(result, indent=1)
    if not args.out: return print(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    for name, s in result["seconds"].items():
        print(f"import {name}: {s['all']:.3f} s, of which its own {s['own']:.3f} s")

if __name__ == "__main__": main()
