"""Sums up the study of tiles: scores of every run from its stored features, intervals over groups
and seeds, and the comparisons that were asked for."""
from hashlib import sha256

import numpy as np
import torch

from synthpi.evaluate.significance import holm, permutation_test
from synthpi.core.files import atomic_path, write_json
from synthpi.core.runs import environment
from synthpi.core.figures import show_images
from synthpi.core.images import to_rgb
from synthpi.evaluate.budget import label_budget
from synthpi.evaluate.intervals import error_reduction, interval, jackknife_t
from synthpi.evaluate.probes import linear_probe
from synthpi.evaluate.ranks import rankme
from synthpi.evaluate.regression import cross_regress, r2_difference, r2_interval

# of `score`: another number has kept scores made anew
VERSION = 1
SHARES = (.01, .05, .1, 1.)
QUANTITIES = ("nuclear count", "nuclear area fraction", "mean nuclear area")
BASES = (
    "siamese_unprivileged",
    "trident_third_view",
    "trident_haematoxylin",
    "trident_shuffled",
    "trident_blank",
    "trident_random_generator",
    "siamese_privileged",
    "trident_real_pairs",
    "supervised",
    "colour_histogram",
    "random_encoder",
    "inside_generator",
)

def score(folder, study):
    "Predictions and label-budget accuracies of one run; kept, because they take seconds"
    path, key = (
        folder / "scores.npz",
        sha256(
            (folder / "features.npz").read_bytes() + repr((SHARES, QUANTITIES, VERSION)).encode()
        ).hexdigest(),
    )
    if path.exists() and str((kept := dict(np.load(path))).pop("key", "")) == key: return kept
    h, data = dict(np.load(folder/"features.npz")), study.data
    y, groups = data.labels, data.groups
    probe = linear_probe(h["train"], y["train"], h["val"], y["val"])
    # with few labels larger C only fits longer
    budget = label_budget(
        h["train"],
        y["train"],
        groups["train"],
        h["test"],
        y["test"],
        groups["test"],
        SHARES,
        repeats=5,
        Cs=10.0 ** np.arange(-4, 2),
    )
    sets = ["test", *(k for k in h if k.startswith("shift"))]
    found = {f"correct_{s}": probe.predict(h[s]) == y["test"] for s in sets} | {
        "val_accuracy": probe.val_accuracy,
        "rankme": rankme(h["train"]),
        "nuclei": cross_regress(h["nuclei"], study.targets, study.field_groups).predicted,
    }
    found |= {f"budget_{s:g}": budget[budget.share == s].accuracy.to_numpy() for s in SHARES} | {
        k: h[k] for k in h if k.startswith("about_")
    }
    with atomic_path(path) as tmp: np.savez(tmp, key=key, **found)
    return found

def summarise(study, out):  # noqa: C901 one branch a table of the page
    torch.set_num_threads(1)
    found = {}
    for folder in sorted((study.work/"runs").iterdir()):
        if not (folder/"features.npz").exists(): continue
        arm, *rest = folder.name.split("-")
        jitter = float(rest[0][6:]) if rest[0].startswith("jitter") else None
        found.setdefault((arm, jitter), {})[int(rest[-1][4:])] = score(folder, study)
    groups, fields, y = study.data.groups["test"], study.field_groups, study.targets
    def stack(runs, key): return np.stack([runs[s][key] for s in sorted(runs)])
    sets = [
        "test",
        *(k[8:] for k in next(iter(found.values()))[0] if k.startswith("correct_shift")),
    ]
    def row(runs):
        r = {
            "seeds": sorted(runs),
            "val_accuracy": float(stack(runs, "val_accuracy").mean()),
            "rankme": float(stack(runs, "rankme").mean()),
            "accuracy": {s: interval(stack(runs, f"correct_{s}"), groups) for s in sets},
        }
        r["label_budget"] = {
            f"{s:g}": {
                "mean": float(stack(runs, f"budget_{s:g}").mean()),
                "per_seed": stack(runs, f"budget_{s:g}").mean(1).tolist(),
            }
            for s in SHARES
        }
        r["nuclei"] = {
            q: r2_interval(y[:, t], stack(runs, "nuclei")[..., t], fields)
            for t, q in enumerate(QUANTITIES)
        }
        r["nuclei_within"] = {
            q: within(y[:, t], stack(runs, "nuclei")[..., t], fields)
            for t, q in enumerate(QUANTITIES)
        }
        if "about_seconds" in next(iter(runs.values())):
            r["seconds"] = float(stack(runs, "about_seconds").mean())
        return r
    rows = [{"arm": arm, "jitter": jitter} | row(runs) for (arm, jitter), runs in found.items()]
    # the jitter that validation tiles choose, for arms that have them all
    chosen = {}
    for r in rows:
        if r["jitter"] is None or all(
            (r["arm"], j) in found for j in {j for _, j in found if j is not None}
        ):
            chosen[r["arm"]] = max(
                (chosen.get(r["arm"]), r), key=lambda x: x["val_accuracy"] if x else -1
            )
    comparisons = []
    for jitter in [*sorted({j for _, j in found if j is not None}), "chosen"]:
        for base in BASES:
            def of(arm):
                return found.get(
                    (
                        arm,
                        chosen[arm]["jitter"] if jitter == "chosen" and arm in chosen else jitter,
                    ),
                    found.get((arm, None)),
                )
            a, b = of(base), of("trident")
            if not a or not b: continue
            # nothing in them is drawn: one run stands for every seed
            fixed = base in ("colour_histogram", "inside_generator")
            seeds = sorted(b if fixed else set(a) & set(b))
            if not seeds: continue
            def pick(runs, key, fixed=False):
                return np.stack([runs[0 if fixed else s][key] for s in seeds])
            for s in sets:
                comparisons.append(
                    {
                        "model": "trident",
                        "base": base,
                        "jitter": jitter,
                        "measure": f"accuracy, {s}",
                        "seeds": seeds,
                    }
                    | paired(pick(a, f"correct_{s}", fixed), pick(b, f"correct_{s}"), groups)
                )
            for t, q in enumerate(QUANTITIES):
                comparisons.append(
                    {
                        "model": "trident",
                        "base": base,
                        "jitter": jitter,
                        "measure": f"R2, {q}",
                        "seeds": seeds,
                    }
                    | r2_difference(
                        y[:, t], pick(a, "nuclei", fixed)[..., t], pick(b, "nuclei")[..., t], fields
                    )
                )
    # one family: all bases and tile sets of a jitter
    for jitter in {c["jitter"] for c in comparisons}:
        family = [c for c in comparisons if c["jitter"] == jitter and "p" in c]
        for c, p in zip(family, holm([c["p"] for c in family])): c["holm"] = float(p)
    settings = study.settings | {
        "shifts": sets[1:],
        "generator_patients": sorted(study.learn),
        "nuclei_patients": sorted(study.asked),
        "nuclei_fields": len(y),
    }
    draw_pairs(study, out.with_suffix(".png"))
    write_json(
        out,
        {
            "data": study.data.summary,
            "settings": settings,
            "generator_dice_validation": generator_dice(study),
            "rows": rows,
            "chosen": {a: r["jitter"] for a, r in chosen.items()},
            "comparisons": comparisons,
            "environment": environment(),
        },
    )
    for r in sorted(rows, key=lambda r: (r["arm"], r["jitter"] or 0)):
        print(
            f"{r['arm']:26s} {r['jitter']!s:5s} seeds {len(r['seeds'])} val "
            f"{r['val_accuracy']:.3f} | "
            + "  ".join(f"{s} {v['mean']:.3f}" for s, v in r["accuracy"].items())
            + " | budget "
            + " ".join(f"{v['mean']:.2f}" for v in r["label_budget"].values())
            + " | R2 "
            + " ".join(f"{v['mean']:.2f}" for v in r["nuclei"].values())
            + " | within "
            + " ".join(f"{v['mean']:.2f}" for v in r["nuclei_within"].values())
        )

def within(y, predicted, groups):
    """Correlation of predicted and true differences between fields of one patient: what is known
    beside the patient's own level; jackknife interval by Fisher's transform"""
    codes = np.unique(groups, return_inverse=True)[1]
    def centre(v): return v - (np.bincount(codes, weights=v)/np.bincount(codes))[codes]
    # (S, G, 3)
    sums = np.stack(
        [
            np.stack(
                [
                    np.bincount(codes, weights=a)
                    for a in (centre(y) * centre(p), centre(y) ** 2, centre(p) ** 2)
                ],
                1,
            )
            for p in predicted
        ]
    )
    def r(w):
        total = w @ sums
        return total[:, 0]/np.sqrt(total[:, 1]*total[:, 2])
    low, high = jackknife_t(
        lambda w, v: np.arctanh(r(w) @ v / v.sum()), codes.max() + 1, len(predicted)
    )[1:]
    each = r(np.ones(codes.max() + 1))
    return {
        "mean": float(each.mean()),
        "ci": [float(np.tanh(low)), float(np.tanh(high))],
        "per_seed": each.tolist(),
    }

def draw_pairs(study, path):
    "Two training tiles of each class, and what the generator makes of them"
    study.tables()
    pairs, labels = study.table["privileged"], study.data.labels["train"]
    rows = [
        int(i)
        for c in range(len(study.data.classes))
        for i in np.random.default_rng(0).choice(np.flatnonzero(labels == c), 2, replace=False)
    ]
    shown = [
        np.asarray(to_rgb(pairs[i][column])) for column in ("primary", "privileged") for i in rows
    ]
    show_images(
        shown,
        titles=[study.data.classes[labels[i]] for i in rows] + [""] * len(rows),
        ncols=len(rows),
        size=0.9,
    ).savefig(path, dpi=70, bbox_inches="tight")

def paired(base, model, groups, n=4000):
    """Difference of accuracies with an interval over groups and seeds, and a test that exchanges
    the arms in whole groups"""
    names, codes = np.unique(groups, return_inverse=True)
    # (S, G)
    d, size = (
        np.stack([np.bincount(codes, weights=x) for x in model.astype(float) - base]),
        np.bincount(codes),
    )
    rng = np.random.default_rng(0)
    def draw(m): return rng.multinomial(m, np.full(m, 1/m), size=n)
    w, v = draw(len(names)), draw(len(d))/len(d)
    replicates = np.einsum("bs,sg,bg->b", v, d, w)/(w @ size)
    return {
        "mean": float(d.mean(0).sum() / size.sum()),
        "ci": np.quantile(replicates, [0.025, 0.975]).tolist(),
        "p": permutation_test(model.mean(0), base.mean(0), groups).p,
        "error_reduction": error_reduction(base, model, groups),
    }

def generator_dice(study):
    from synthpi.pairs.generators import load_generator
    return load_generator(study.work/"generator.safetensors").about["dice_validation"]
