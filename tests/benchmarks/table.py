"""tests/benchmarks/README.md from the stored results.

    python tests/benchmarks/table.py

Each benchmark is a script that measures beside a named baseline, interleaved in one run, and
stores its numbers with the machine, the versions and the date:

    for name in losses loader trainer startup pairs volumes crossval; do OMP_NUM_THREADS=1 python
    tests/benchmarks/$name.py --out tests/benchmarks/results/$name.json; done
    python tests/benchmarks/losses.py --device cuda --out tests/benchmarks/results/losses-cuda.json
    python tests/benchmarks/trainer.py --device cuda --out
    tests/benchmarks/results/trainer-cuda.json
    python tests/benchmarks/pairs.py --device cuda --out tests/benchmarks/results/pairs-cuda.json
    python tests/benchmarks/gpu.py --out tests/benchmarks/results/gpu.json
"""
import json
from pathlib import Path

HERE = Path(__file__).parent
GPU = ("losses-cuda", "trainer-cuda", "pairs-cuda", "gpu")

def _range(r, digits=2):
    return f"{r['median']:.{digits}f} ({r['min']:.{digits}f} to {r['max']:.{digits}f})"

def losses(r):
    yield (
        f"N = {r['rows']}, D = {r['columns']}, {r['branches']} branches, {r['dtype']}, "
        f"{r['rounds']} rounds; lightly: {r['lightly']}."
    )
    yield ""
    yield (
        "| loss | beside | times faster, forward and backward | seconds, ours and theirs | times "
        "less extra memory | relative difference of gradients |"
    )
    yield "|---|---|---|---|---|---|"
    for name, x in r["results"].items():
        for form, faster in x["times_faster"].items():
            less = x["times_less_memory"][form]
            yield (
                f"| {name} | {form} | {_range(faster['rounds'], 1)} | "
                f"{x['seconds']['synthpi']['median']:.3f}, {x['seconds'][form]['median']:.3f} | "
                f"{f'{less:.1f}' if less else 'not measured'} | "
                f"{x['relative_gradient_difference']:.1e} |"
            )

def trainer(r):
    yield f"Two branches. Beside {r['baseline']}:"
    yield ""
    yield (
        "| model | ratio of steps per second (range over rounds) | steps per second, ours and the "
        "loop's | more per step, ms | largest relative difference of the losses |"
    )
    yield "|---|---|---|---|---|"
    for x in r["results"]:
        s = x["setup"]
        yield (
            f"| {s['encoder']}, {s['size']} px, batch {s['batch']}, {s['rounds']} rounds of "
            f"{s['steps']} steps | {_range(x['ratio'], 3)} | "
            f"{x['steps_per_second']['trainer']:.2f}, "
            f"{x['steps_per_second']['loop']:.2f} | {x['milliseconds_more_per_step']:+.2f} | "
            f"{x['largest_relative_difference_of_losses']:.1e} |"
        )

def startup(r):
    yield f"New interpreters, {r['rounds']} rounds. Beside {r['baseline']}:"
    yield ""
    yield "| import | seconds | third parties alone | its own |"
    yield "|---|---|---|---|"
    for name, s in r["seconds"].items():
        yield f"| `{name}` | {s['all']:.3f} | {s['third_parties']:.3f} | {s['own']:.3f} |"

def gpu(r):
    s = r["setup"]
    yield (
        f"{s['size']} px, batch {s['batch']}, {r['precision']}, {s['workers']} workers, "
        f"{s['rounds']} rounds of {s['steps']} steps. Published: "
        f"{'; '.join(f'{k}: {v}' for k, v in r['published'].items())}."
    )
    for setup, rows in r["results"].items():
        yield from (
            "",
            f"**{setup}**",
            "",
            "| | samples/s | images/s | peak GB | of the ceiling |",
            "|---|---|---|---|---|",
        )
        for name, x in rows.items():
            yield (
                f"| {name} | {x['samples_per_second']:.0f} | {x['images_per_second']:.0f} | "
                f"{x['peak_GB'] or float('nan'):.1f} | {x['of_ceiling']:.2f} |"
            )
    yield from (
        "",
        "**Pairs**, beside forward passes of the generator's network",
        "",
        *_made(r["pairs"]),
    )

def loader(r):
    yield f"{r['what']}. Beside {r['baseline']}. Goal: a ratio of {r['goal']} or more."
    yield ""
    yield (
        "| recipe | decoded images | ratio (10 to 90 % of rounds) | images per core-second, ours "
        "and the loop's |"
    )
    yield "|---|---|---|---|"
    for x in r["results"]:
        low, high = x["ratio, 10 and 90 %"]
        yield (
            f"| {x['recipe']} | {x['decoded images']} | {x['ratio']:.3f} ({low:.2f} to {high:.2f}) "
            f"| {x['Views, images per core-second']:.0f}, "
            f"{x['bare loop, images per core-second']:.0f} |"
        )

def volumes(r):
    s, m, x = r["setup"], r["memory"], r["results"]
    yield (
        f"{s['volumes']} volumes ({s['source']}), steps of {s['volumes_per_step']} volumes x "
        f"{s['crops_per_volume']} crops of {s['size']}^3, {s['rounds']} rounds, one thread, time "
        f"of the processor; preparing took {r['seconds_to_prepare_a_volume']:.2f} s a volume, once."
    )
    yield ""
    yield (
        "| beside | times faster (range over rounds) | goal | crops per second, ours and theirs | "
        "times faster from a store of 16 bits |"
    )
    yield "|---|---|---|---|---|"
    for name, goal in r["goals"].items():
        yield (
            f"| {name} | {_range(x['times_faster'][name], 1)} | {goal} | "
            f"{x['crops_per_second']['sample_crops']:.0f}, {x['crops_per_second'][name]:.0f} | "
            f"{x['times_faster_16_bits'][name]:.1f} |"
        )
    yield ""
    yield (
        f"Memory over {m['steps']} steps and {m['volumes']} volumes ({m['stored_MB']:.0f} MB on "
        f"disk): {min(m['resident_MB']):.0f} to {max(m['resident_MB']):.0f} MB resident, "
        f"{m['growth_after_first_tenth_MB']:+.1f} MB after the first tenth."
    )

def pairs(r):
    s = r["setup"]
    yield (
        f"{s['tiles']} tiles of {s['size']} px, batches of {s['batch']}, {s['rounds']} rounds, "
        f"{r['cores']} cores with a load of {r['load']:.1f}, wall time. Beside {r['baseline']}. "
        f"Goal: a ratio of {r['goal']} or more."
    )
    yield ""
    yield from _made(r["results"])

def _made(rows):
    yield "| network | ratio (range over rounds) | images per second, pairs and forward alone |"
    yield "|---|---|---|"
    for x in rows:
        yield (
            f"| {x['network']}, {x['precision']}{', compiled' if x['compiled'] else ''} | "
            f"{_range(x['ratio'], 3)} | {x['images_per_second']['pairs']:.1f}, "
            f"{x['images_per_second']['forward']:.1f} |"
        )

def crossval(r):
    s = r["setup"]
    yield (
        f"{s['rows']} x {s['columns']} features, {s['classes']} classes, {s['folds']} folds x "
        f"{len(s['Cs'])} values of C, {s['rounds']} rounds, {r['cores']} cores with a load of "
        f"{r['load']:.1f}. Beside {r['baseline']}. Goal: {r['goal']} times faster at the same "
        "optimum (1e-6)."
    )
    yield ""
    yield (
        "| beside | times faster (range over rounds) | times less processor time | processor "
        "seconds, ours and theirs | objective above the best, ours and theirs |"
    )
    yield "|---|---|---|---|---|"
    for name, x in r["times_faster"].items():
        p, o = r["processor_seconds"], r["objective_above_best"]
        yield (
            f"| {name} | {_range(x, 1)} | {_range(r['times_less_processor_time'][name], 1)} | "
            f"{p['batch']['median']:.1f}, {p[name]['median']:.1f} | {o['batch']:.0e}, "
            f"{o[name]:.0e} |"
        )

def main():
    lines = [
        "<!-- Made from results/*.json by table.py. -->",
        "",
        "# Benchmarks",
        "",
        *__doc__.split("\n\n", 2)[2].strip().splitlines(),
        "",
    ]
    for path in sorted((HERE/"results").glob("*.json")):
        r = json.loads(path.read_text(encoding="utf-8"))
        e = r["environment"]
        lines += [
            f"## {path.stem}",
            "",
            *{
                "losses": losses,
                "trainer": trainer,
                "startup": startup,
                "gpu": gpu,
                "loader": loader,
                "pairs": pairs,
                "volumes": volumes,
                "crossval": crossval,
            }[r["benchmark"]](r),
            "",
            f"Measured {r['date'][:10]} on {', '.join(e['gpus']) or e['cpu']}, "
            f"{r.get('threads', e['threads'])} thread(s), Python {e['python']}, torch "
            f"{e['packages']['torch']}.",
            "",
        ]
    missing = [name for name in GPU if not (HERE/"results"/f"{name}.json").exists()]
    if missing:
        lines += [
            f"Not measured yet, for want of a GPU: {', '.join(missing)}. The commands are above.",
            "",
        ]
    (HERE/"README.md").write_text("\n".join(lines), encoding="utf-8")

if __name__ == "__main__": main()
