"""Plant small faults in the library, one at a time, and report which of them the tests find.

`python tests/faults.py` works on copies: the checkout is not changed. A fault is an expression of
`faults.json` (an operator, a constant or a condition) that is replaced in its module and in the
notebook that defines it. It is found if the module's notebook fails, or a test file that names the
module. `--slow` also runs what is marked slow, `--only TEXT` keeps faults whose room holds TEXT."""
import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = (
    "import sys; from pathlib import Path; from nbdev.test import test_nb; "
    "ok, _ = test_nb(Path(sys.argv[1]), skip_flags=sys.argv[2].split(), "
    "basepath=Path('.').resolve()); "
    "sys.exit(not ok)"
)

def positions(source, before):
    """Where an expression stands in `source`: (first line, column, last line, column), counted from
    0"""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.expr) and ast.unparse(node) == before:
            yield node.lineno - 1, node.col_offset, node.end_lineno - 1, node.end_col_offset

def replaced(source, before, after):
    "`source` with the one expression exchanged, or None if it is not there exactly once"
    found = list(positions(source, before))
    if len(found) != 1: return None
    a, i, b, j = found[0]
    lines = [line.encode() for line in source.split("\n")]      # columns count bytes
    lines[a:b + 1] = [lines[a][:i] + f"({after})".encode() + lines[b][j:]]
    return b"\n".join(lines).decode()

def plant(tree, fault):
    "Exchange the expression in the module of the fault and in its notebook; their paths, or None"
    module = tree/"synthpi"/(fault["room"].replace(".", "/") + ".py")
    notebook = tree/fault.get("notebook", f"nbs/{fault['room'].replace('.', '/')}.ipynb")
    if not module.exists(): return None
    source = replaced(module.read_text(encoding="utf-8"), fault["before"], fault["after"])
    if source is None: return None
    nb, cells = json.loads(notebook.read_text(encoding="utf-8")), 0
    for cell in nb["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or not text.startswith("#| export"): continue
        new = replaced(text, fault["before"], fault["after"])
        if new: cell["source"], cells = new.splitlines(keepends=True), cells + 1
    if cells != 1: return None
    module.write_text(source, encoding="utf-8")
    notebook.write_text(json.dumps(nb), encoding="utf-8")
    return module, notebook

def tests_of(tree, fault):
    "Test files that name the module of a fault"
    dotted = "synthpi." + fault["room"]
    parent, _, name = dotted.rpartition(".")
    words = (f"{dotted} import", f"import {dotted}", f"from {parent} import {name}", f"{dotted}.")
    files = [
        p
        for p in sorted((tree / "tests").rglob("test_*.py"))
        if any(w in p.read_text(encoding="utf-8") for w in words)
    ]
    same = [p for p in files if p.parent.name in dotted.split(".")]
    return same + [p for p in files if p not in same]

def finds(tree, fault, slow, seconds=400):
    "Which notebook or test file finds a planted fault; None: nothing does"
    planted = plant(tree, fault)
    if planted is None: return "NOT THERE"
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    notebook = [sys.executable, "-c", RUN, planted[1], "notest gpu" if slow else "notest slow gpu"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider"]
    files = tests_of(tree, fault)
    for command, name in [(notebook, "notebook"), ([*pytest, *["--slow"] * slow, *files], "tests")]:
        if name == "tests" and not files: return None
        try: run = subprocess.run(command, cwd=tree, env=env, capture_output=True, timeout=seconds)
        except subprocess.TimeoutExpired: return f"{name} (no end)"
        if run.returncode in (0, 5): continue
        failed = re.search(rb"^(?:FAILED|ERROR) (?:.*/)?(test_\w+\.py)", run.stdout, re.M)
        return failed[1].decode() if failed else name
    return None

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--faults", type=Path, default=ROOT/"tests"/"faults.json")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout to plant them in")
    parser.add_argument("--part", default="0/1", help="K/N: each Nth fault from the Kth on")
    a = parser.parse_args()
    k, n = map(int, a.part.split("/"))
    faults = [f for f in json.loads(a.faults.read_text(encoding="utf-8")) if a.only in f["room"]][
        k::n
    ]
    found = 0
    for fault in faults:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder)/"main"
            ignored = shutil.ignore_patterns(
                ".git", ".venv", "__pycache__", "_docs", "_proc", "synthpi-demo*", "tutorials"
            )
            shutil.copytree(a.tree, tree, ignore=ignored)
            by = finds(tree, fault, a.slow)
        found += by not in (None, "NOT THERE")
        print(
            f"{by or 'NOT FOUND':<28} {fault['room']}: {fault['before']}  ->  {fault['after']}",
            flush=True,
        )
    print(f"{found} of {len(faults)} faults found")

if __name__ == "__main__": main()
