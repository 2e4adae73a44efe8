"""The four objectives on real pairs: nuclear masks from H&E, on patients that were never used.

    OMP_NUM_THREADS=1 python tests/evidence/generators.py --data ../shared/data/he_nuclei_pairs
    --work generators --out tests/evidence/results/generators.json

Settings are those that validation patients chose; the test patients are scored once. A training
that was stopped goes on in --work. With --device cuda and --published the papers' widths are
trained.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from skimage.color import rgb2hed
from skimage.filters import gaussian, threshold_otsu

from synthpi.core.runs import environment
from synthpi.core.images import to_rgb
from synthpi.core.files import write_json
from synthpi.data.folders import pair_folders
from synthpi.studies.generator import train_generator
from synthpi.studies.generator_settings import GeneratorSettings
from synthpi.pairs.quality import pair_quality

TEST, SEED = .3, 0
RUNS = {
    "regression": dict(objective="regression", steps=400),
    "pix2pix": dict(objective="pix2pix", steps=600),
    "cyclegan": dict(objective="cyclegan", steps=1000, width=8, lr=1e-3, option={"blocks": 4}),
    "cut": dict(
        objective="cut", steps=1000, width=8, lr=1e-3, option={"blocks": 4, "patches": 64}
    ),
}
PUBLISHED = {
    "regression": dict(objective="regression", steps=4000, width=64, lr=1e-3),
    "pix2pix": dict(objective="pix2pix", steps=4000, width=64, lr=2e-4, batch_size=4),
    "cyclegan": dict(
        objective="cyclegan", steps=8000, width=64, lr=2e-4, batch_size=4, option={"blocks": 9}
    ),
    "cut": dict(
        objective="cut", steps=8000, width=64, lr=2e-4, batch_size=4, option={"blocks": 9}
    ),
}

def otsu(image):
    "Nuclei without any learning: haematoxylin, smoothed, above Otsu's threshold"
    stain = gaussian(rgb2hed(to_rgb(image))[..., 0], 1)
    return np.uint8(255*(stain > threshold_otsu(stain)))

def row(quality, **facts):
    return (
        facts
        | {
            m: {k: float(quality.table.loc[m, k]) for k in ("mean", "low", "high")}
            for m in ("dice", "kid", "nuclei_difference")
        }
        | {"kid_features": quality.features}
    )

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "work", "out"): parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="Some of the objectives")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--published",
        action="store_true",
        help="The papers' widths, crops of 256 pixels; for a GPU",
    )
    args = parser.parse_args()
    rows, runs = {}, PUBLISHED if args.published else RUNS
    for name in args.only or runs:
        settings = GeneratorSettings(
            args.data,
            um_per_px=0.5,
            test=TEST,
            seed=SEED,
            patience=None,
            crop=256 if args.published else 96,
            evaluate_every=runs[name]["steps"] // 16,
            licence="CC BY-NC-SA 4.0",
            **runs[name],
        )
        command = f"tests/evidence/generators.py, {name}"
        made = train_generator(settings, args.work/name, device=args.device, command=command)
        about = made.generator.about
        rows[name] = row(
            made.quality,
            pairs=about["pairs"],
            unpaired=about["unpaired"],
            steps=about["steps"],
            seconds=about["seconds"],
            dice_validation=about["dice_validation"],
            best_step=about["best_step"],
            settings=about["objective_settings"],
        )
        tested = set(made.quality.scores["group"])
    records = [
        {
            "primary": r["primary"],
            "privileged": otsu(r["primary"]),
            "true": np.uint8(255 * (to_rgb(r["privileged"]) > 0)),
            "group": r["group"],
        }
        for r in pair_folders(args.data)
        if r["group"] in tested
    ]
    rows["haematoxylin above Otsu's threshold"] = row(
        pair_quality(records, true="true", kind="mask", um_per_px=0.5, seed=SEED)
    )
    found = {
        "data": args.data.name,
        "seed": SEED,
        "test_patients": sorted(tested),
        "rows": rows,
        "environment": environment(),
    }
    write_json(args.out, found)
    def show(x): return f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"
    table = pd.DataFrame(
        {
            n: {
                "dice": show(r["dice"]),
                "KID": show(r["kid"]),
                "nuclei, difference": show(r["nuclei_difference"]),
                "validation": f"{r['dice_validation']:.3f}" if "steps" in r else "",
                "steps": r.get("steps", ""),
                "minutes": round(r["seconds"] / 60, 1) if "steps" in r else "",
            }
            for n, r in rows.items()
        }
    ).T
    print(table.to_string())

if __name__ == "__main__": main()
