"The import rule of CONTRIBUTING.md, and that every module has its notebook."
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p for p in (ROOT/"synthpi").rglob("*.py") if p.parent != ROOT/"synthpi")
LEVELS = "core < data models losses train evaluate volumes < pairs explain < studies < cli"
LEVEL = {wing: k for k, wings in enumerate(LEVELS.split("<")) for wing in wings.split()}

def wing(module): return module.relative_to(ROOT/"synthpi").parts[0]

def imported(module):
    """(wing, name) of all that a module of synthpi imports from synthpi, at its top or inside a
    function"""
    package = ["synthpi", *module.relative_to(ROOT/"synthpi").parts[:-1]]
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            names = [
                [*base, *filter(None, (node.module or "").split(".")), a.name] for a in node.names
            ]
        else: continue
        for name in names:
            if name[0] == "synthpi" and len(name) > 1 and name[1] in LEVEL: yield name[1], name[-1]

@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.relative_to(ROOT/"synthpi").as_posix())
def test_imports_come_from_wings_to_the_left(module):
    "... never from a neighbour on the same level, and never a private name of another wing."
    here = wing(module)
    for there, name in imported(module):
        assert there == here or LEVEL[there] < LEVEL[here] and not name.startswith("_"), (
            f"{here} imports {name} of {there}; {LEVELS}"
        )

def test_every_module_has_its_notebook_and_every_notebook_its_module():
    rooms = {
        m.relative_to(ROOT / "synthpi").with_suffix("").as_posix().replace("__init__", "index")
        for m in MODULES
    }
    documents = {"tutorials", "evidence"}
    notebooks = {
        n.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        for n in (ROOT / "nbs").glob("*/**/*.ipynb")
        if not documents & {*n.parts}
    }
    assert rooms == {n for n in notebooks if ".ipynb_checkpoints" not in n}

@pytest.mark.parametrize("statement", ["import synthpi", *(f"import synthpi.{w}" for w in LEVEL if w != "cli")])
def test_a_face_loads_no_third_party_until_a_name_is_used(statement):
    def loaded(statement):
        code = (
            f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}} - "
            "set(sys.stdlib_module_names))"
        )
        return set(
            subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout.split()
        )
    # the start-up files of an editable install count on both sides
    assert loaded(statement) <= loaded("pass") | {"synthpi", "lazy_loader"}
