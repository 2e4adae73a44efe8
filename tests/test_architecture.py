"Who may import whom: the table of CONTRIBUTING.md, held against the imports in the code."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p for p in (ROOT/"synthpi").glob("*.py") if p.stem[0] != "_")
LEAVES = "phantoms bodies geometry volume_sets crops data foreign cache recipes views cards memory batchnorm losses steps checkpoints watch tiling logistic comparisons feature_cache neighbours regression positions explain maps pictures figures terminal"
ALLOWED = {"core": set(), **{name: {"core"} for name in LEAVES.split()},
    "containers": {"core", "data"}, "stacks": {"core", "data", "containers"}, "presets": {"core", "data", "containers", "stacks"},
    "runtimes": {"core", "foreign"}, "generators": {"core", "foreign", "runtimes"}, "stains": {"core", "generators"}, "kid": {"core", "models"}, "quality": {"core", "tiling", "kid"}, "objectives": {"core", "generators"},
    "volumes": {"core", "volume_sets"}, "distance": {"core", "losses", "geometry"}, "trainer": {"core", "steps", "checkpoints", "watch"}, "batch_views": {"core", "recipes", "views"}, "translation": {"core", "generators", "objectives", "kid", "trainer"}, "pairs": {"core", "generators", "cache"}, "report": {"core", "figures"},
    "doctor": {"core", "terminal"}, "crop_views": {"core", "batch_views"}, "crop_lists": {"core", "crops", "volume_sets"}, "crossval": {"core", "evaluate", "logistic"}, "explore": {"core", "crops", "pictures"}, "position_maps": {"core", "maps", "figures", "geometry"},
    "explore_map": {"core", "explain", "explore", "maps", "pictures"}, "explore_pairs": {"core", "pictures"}, "sanity": {"core", "explain"}, "models": {"core", "cards"}, "evaluate": {"core", "comparisons", "feature_cache"}, "probes": {"core", "evaluate"}, "ranks": {"core", "evaluate"}}
for name in ("pretrain", "generator_run", "synthesise", "arms", "tileset", "tissue_report", "explain_run", "study", "patches", "volume_arms", "volume_scores", "volume_report", "volume_study", "cli_volumes", "cli_explain", "cli"): ALLOWED[name] = set(ALLOWED)     # these put the rooms together, each all those before it

def rooms(source):
    "The modules of synthpi that `source` imports, at its top or inside a function"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["synthpi"*(node.level > 0), node.module]))
            names = [f"{base}.{a.name}" for a in node.names]
        else: continue
        found |= {name.split(".")[1] for name in names if name.startswith("synthpi.")}
    return found

@pytest.mark.parametrize("line", ["from synthpi.data import x", "from .data import x, y", "from . import data", "from synthpi import data",
                                  "import synthpi.data", "def f():\n  from synthpi.data import x"])
def test_every_spelling_of_an_import_is_seen(line): assert rooms(line) == {"data"}

@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_imports_stay_in_their_rooms(module):
    assert module.stem in ALLOWED, f"{module.name} is new: give it a line in ALLOWED and in CONTRIBUTING.md"
    extra = rooms(module.read_text(encoding="utf-8")) - ALLOWED[module.stem]
    assert not extra, f"synthpi.{module.stem} imports {sorted(extra)}; it may import {sorted(ALLOWED[module.stem])}"

@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_modules_stay_small(module):
    lines = [line for line in module.read_text(encoding="utf-8").splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert 30 <= len(lines) <= 330, "split it along a noun"

def test_importing_the_package_imports_no_third_party():
    def loaded(statement):
        code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}} - set(sys.stdlib_module_names))"
        return set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())
    assert loaded("import synthpi") == loaded("pass") | {"synthpi"}  # the start-up files of an editable install count on both sides
