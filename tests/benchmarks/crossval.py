"""Time of the batched logistic regressions beside scikit-learn's, one after another: every fold
x every value of C.

    python tests/benchmarks/crossval.py [--quick] [--folds 1] [--rounds 2] [--device cuda] [--out
    crossval.json]
    OMP_NUM_THREADS=2 python tests/benchmarks/crossval.py --folds 10 --rounds 1          # every
    fold of scikit-learn's too, on two cores

The rounds are interleaved, so that a slow minute of the machine falls on all of them; time of
the processor is given beside wall time. scikit-learn is measured as a plain loop and
with each fit starting from that of the C before, both with a tolerance that reaches the optimum,
and with its default tolerance, which does not.
The batch is all ten folds. scikit-learn's fits follow one another, so that it is timed on a few
of the folds, and its time is that times ten over their number. The objectives of those folds are
compared.
"""
import argparse
import json
import os
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from synthpi.core.runs import environment
from synthpi.core.groups import group_folds
from synthpi.evaluate.logistic import fit_logistic

CS = 10.**np.arange(-4, 5)
LOOPS = {
    "plain loop, tolerance 1e-6": dict(tol=1e-6),
    "each C from the last, tolerance 1e-6": dict(tol=1e-6, warm_start=True),
    "each C from the last, tolerance 1e-4 (default)": dict(tol=1e-4, warm_start=True),
}

def features(rows, columns, n_classes, n_groups=60, seed=0):
    "Correlated, rectified features as an encoder gives them, with classes and groups that overlap"
    rng = np.random.default_rng(seed)
    mix = (
        rng.normal(size=(columns, columns))
        / np.sqrt(columns)
        * np.logspace(0, -1.5, columns)[:, None]
    )
    group, label = rng.integers(n_groups, size=rows), rng.integers(n_classes, size=rows)
    centre = .5*rng.normal(size=(n_classes, columns))*np.exp(-np.arange(columns)/40)
    x = (
        rng.normal(size=(rows, columns))
        + centre[label]
        + 0.3 * rng.normal(size=(n_groups, columns))[group]
    ) @ mix + 0.1
    return np.maximum(x, 0), label, group

def looped(x, y, masks, **options):
    "Objectives (F, n_C) of scikit-learn's fits, and its iterations"
    objective, steps = np.empty((len(masks), len(CS))), np.empty((len(masks), len(CS)), int)
    for k, train in enumerate(masks):
        z = StandardScaler().fit_transform(x[train])
        model = LogisticRegression(max_iter=10_000, **options)
        for j, C in enumerate(CS):
            model.set_params(C=C).fit(z, y[train])
            log_loss = -model.predict_log_proba(z)[np.arange(len(z)), y[train]].mean()
            objective[k, j], steps[k, j] = (
                log_loss + (model.coef_**2).sum() / (2 * C * len(z)),
                model.n_iter_[0],
            )
    return objective, steps

def batched(x, y, masks, device):
    fits = fit_logistic(x, y, masks, CS, device=device)
    return fits.objective[..., 0], fits.passes[..., 0]

def _spread(x): return {"median": median(x), "min": min(x), "max": max(x)}

def run(
    quick:bool=False, # Few rows and columns: seconds instead of minutes
    folds:int=1, # On how many of the ten folds scikit-learn is timed
    rounds:int=2, # Each of them once per round
    device:str="cpu", # For the batch
)->dict: # JSON-ready: seconds, ratios, differences of the objectives, machine
    "Both in turn on the same folds."
    rows, columns, n_classes = (600, 24, 4) if quick else (20_000, 512, 9)
    folds, rounds = (2, 1) if quick else (folds, rounds)
    x, y, group = features(rows, columns, n_classes)
    fold = group_folds(group, 10, y)
    masks = np.stack([fold != k for k in range(10)])
    # what is loaded on first use
    batched(x[:300], y[:300], masks[:, :300], device)
    forms = {
        "batch": lambda: batched(x, y, masks, device),
        **{
            name: lambda options=options: looped(x, y, masks[:folds], **options)
            for name, options in LOOPS.items()
        },
    }
    wall, processor, objective, steps = {n: [] for n in forms}, {n: [] for n in forms}, {}, {}
    with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
        # scikit-learn warns of rounding in line searches at tight tolerances
        warnings.simplefilter("ignore")
        for _ in range(rounds):
            for name, form in forms.items():
                start = time.perf_counter(), time.process_time()
                objective[name], steps[name] = form()
                scale = 1 if name == "batch" else 10/folds
                wall[name].append(scale*(time.perf_counter() - start[0]))
                processor[name].append(scale*(time.process_time() - start[1]))
    objective["batch"] = objective["batch"][:folds]
    best = np.minimum.reduce(list(objective.values()))
    others = [n for n in forms if n != "batch"]
    return {
        "benchmark": "crossval",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "baseline": "scikit-learn's LogisticRegression (lbfgs, float64), looped over folds and "
                    f"C, timed on {folds} of 10 folds and scaled",
        "goal": 5,
        "setup": {
            "rows": rows,
            "columns": columns,
            "classes": n_classes,
            "folds": 10,
            "folds_of_the_loops": folds,
            "Cs": CS.tolist(),
            "rounds": rounds,
            "device": device,
        },
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "seconds": {n: _spread(w) for n, w in wall.items()},
        "processor_seconds": {n: _spread(p) for n, p in processor.items()},
        "times_faster": {
            n: _spread([a / b for a, b in zip(wall[n], wall["batch"])]) for n in others
        },
        "times_less_processor_time": {
            n: _spread([a / b for a, b in zip(processor[n], processor["batch"])]) for n in others
        },
        "objective_above_best": {n: float((o / best - 1).max()) for n, o in objective.items()},
        "passes": {
            n: {"median": float(np.median(s)), "max": int(s.max())} for n, s in steps.items()
        },
        "environment": environment(),
    }

def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="few rows and columns")
    p.add_argument(
        "--folds", type=int, default=1, help="on how many of the ten folds scikit-learn is timed"
    )
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    args = p.parse_args()
    result = run(args.quick, args.folds, args.rounds, args.device)
    text = json.dumps(result, indent=1)
    if not args.out: return print(text)
    args.out.write_text(text + "\n", encoding="utf-8")
    for name, r in result["times_faster"].items():
        print(
            f"{r['median']:.1f} times faster ({r['min']:.1f} to {r['max']:.1f}; "
            f"{result['times_less_processor_time'][name]['median']:.1f} by processor time) than "
            f"{name}, "
            f"objective at most {result['objective_above_best'][name]:.0e} above the best; ours "
            f"{result['objective_above_best']['batch']:.0e}"
        )

if __name__ == "__main__": main()
