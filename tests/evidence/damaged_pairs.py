"""Does each measure of `pair_quality` fall when real pairs are damaged on purpose? `python
tests/evidence/damaged_pairs.py --data DIR --out FILE.json`

DIR is a folder of pairs as `pair_folders` reads it: H&E tiles and nuclear masks (for synthpi's
own figures the MoNuSeg pairs, 120 of 30 patients; they stay where they are). Two kinds of second
images are damaged:
the true *masks*, as a perfect generator would draw them, and the *haematoxylin* images of
`StainGenerator`. The undamaged ones are a little out of focus and noisy, as a good generator's
answers are. A cell of the
table is the change to the worse, in half widths of the measure's 95 % interval on the undamaged
pairs (over patients): above 1 the damage is noticed. Prints a Markdown table and writes every
number.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from synthpi.core.runs import environment
from synthpi.core.images import to_rgb
from synthpi.core.files import write_json
from synthpi.data.splits import check_images
from synthpi.data.folders import pair_folders
from synthpi.pairs.stains import StainGenerator
from synthpi.pairs.kid import RandomFeatures, embed_images
from synthpi.pairs.quality import DAMAGES, MEASURES, _kid_range, damage, pair_quality

def imperfect(images, seed=0):
    """A little out of focus and noisy, as a good generator's answers are: a perfect copy has no
    interval"""
    rng = np.random.default_rng(seed)
    return [
        np.uint8(
            np.clip(
                gaussian_filter(x.astype(float), (1, 1, 0))
                + 3 * rng.standard_normal((*x.shape[:2], 1)),
                0,
                255,
            ).round()
        )
        for x in map(to_rgb, images)
    ]

def judge(images, records, true, kind, um_per_px, draws, seed):
    "The measures of `pair_quality`, and KID a second time with features that have seen nothing"
    pairs = [
        {"primary": r["primary"], "privileged": y, "group": r["group"]}
        for r, y in zip(records, images)
    ]
    found = pair_quality(
        pairs,
        true=true,
        kind=kind,
        um_per_px=um_per_px,
        seam=(32, 0),
        n_boot=draws,
        seed=seed,
        most=None,
    ).table.to_dict("index")
    values = _kid_range(
        *(embed_images(RandomFeatures(), x) for x in (images, true)),
        [r["group"] for r in records],
        100,
        seed,
    )
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return found | {
        "kid, random features": {"mean": values[0], "low": low, "high": high, "n": len(records)}
    }

def damaged(images, records, true, kind, um_per_px, draws, seed):
    """Measures as they are, and the change to the worse by damage, in half widths of the undamaged
    interval"""
    intact, changes = judge(images, records, true, kind, um_per_px, draws, seed), {}
    for how in DAMAGES:
        found = judge(damage(images, how, seed), records, true, kind, um_per_px, draws, seed)
        for m, r in intact.items():
            worse = MEASURES[m.split(",")[0]][0]*(r["mean"] - found[m]["mean"])
            half = (
                r["mean"] - r["low"] if MEASURES[m.split(",")[0]][0] > 0 else r["high"] - r["mean"]
            )
            changes.setdefault(how, {})[m] = {
                "mean": found[m]["mean"],
                "half_widths_worse": worse / max(half, 1e-3),
            }
    return {
        "undamaged": {
            m: {"mean": r["mean"], "ci": [r["low"], r["high"]], "n": r["n"]}
            for m, r in intact.items()
        },
        "damaged": changes,
    }

def markdown(found):
    names = list(found["undamaged"])
    def show(r): return f"{r['mean']:.3f} [{r['ci'][0]:.3f}, {r['ci'][1]:.3f}]"
    def cell(x): return f"**{x:.1f}**" if x > 1 else f"{x:.1f}"
    lines = [
        "| damage | " + " | ".join(names) + " |",
        "|---" + "|---:" * len(names) + "|",
        "| undamaged | " + " | ".join(show(found["undamaged"][m]) for m in names) + " |",
    ]
    return "\n".join(
        lines
        + [
            f"| {how} | " + " | ".join(cell(row[m]["half_widths_worse"]) for m in names) + " |"
            for how, row in found["damaged"].items()
        ]
    )

def main(data, out, um_per_px, most, draws, seed):
    ds, _ = check_images(pair_folders(data))
    if most and len(ds) > most:
        ds = ds.select(np.linspace(0, len(ds) - 1, most).round().astype(int))
    records = [
        {
            "primary": to_rgb(r["primary"]),
            "mask": np.uint8(to_rgb(r["privileged"]) > 0) * 255,
            "group": r["group"],
        }
        for r in ds
    ]
    stain = StainGenerator()
    drawn = [
        np.uint8(
            (
                stain.translate(
                    torch.from_numpy(r["primary"]).permute(2, 0, 1)[None].float() / 255
                )[0]
                * 255
            )
            .round()
            .permute(1, 2, 0)
        )
        for r in records
    ]
    results = {
        "data": {
            "folder": Path(data).name,
            "pairs": len(records),
            "groups": len({r["group"] for r in records}),
            "um_per_px": um_per_px,
        },
        "draws": draws,
        "seed": seed,
        "environment": environment(),
        "kinds": {},
    }
    for name, true, kind in (
        ("true masks", [r["mask"] for r in records], "mask"),
        ("haematoxylin images", drawn, "image"),
    ):
        results["kinds"][name] = damaged(
            imperfect(true, seed), records, true, kind, um_per_px, draws, seed
        )
        print(
            f"\n{name}, {len(records)} pairs of {results['data']['groups']} "
            f"groups\n\n{markdown(results['kinds'][name])}",
            flush=True,
        )
    write_json(out, results)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of pairs: image/NAME.* and privileged/NAME.*",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--um-per-px",
        type=float,
        default=None,
        help="micrometres per pixel; without it nuclei are not counted",
    )
    parser.add_argument(
        "--most", type=int, default=None, help="judge so many pairs only, evenly spaced"
    )
    parser.add_argument("--draws", type=int, default=500, help="bootstrap draws, default 500")
    parser.add_argument("--seed", type=int, default=0, help="of damages")
    main(**vars(parser.parse_args()))
