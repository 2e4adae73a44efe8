"The limits of width, length, complexity and arguments, and the words that a reader never meets."
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in (ROOT/"synthpi").rglob("*.py") if p.name != "_modidx.py")
BODY = CELL = 40

def name(path): return path.relative_to(ROOT).with_suffix("").as_posix()

def test_ruff_finds_nothing():
    "Rules and limits are in pyproject.toml."
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "nbs",
            "synthpi",
            "tests",
            "--output-format=concise",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout

def test_exceptions_are_few_and_each_says_why():
    lines = [
        line
        for m in MODULES
        for line in m.read_text(encoding="utf-8").splitlines()
        if "noqa" in line
    ]
    assert len(lines) <= 16 and all(re.search(r"noqa: \w+", line) for line in lines), lines

@pytest.mark.parametrize("module", MODULES, ids=name)
def test_exported_lines_are_within_the_width(module):
    "But for `__all__`, which nbdev writes."
    lines = module.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("__all__ = ")]

def bodies(module):
    "Name and length in lines of the body of each function, its docstring left out"
    for f in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(f, ast.FunctionDef): continue
        body = f.body[1:] if ast.get_docstring(f) else f.body
        if body: yield f.name, body[-1].end_lineno - body[0].lineno + 1

@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_function_does_one_thing(module):
    long = [f"{f}: {n} lines" for f, n in bodies(module) if n > BODY]
    assert not long

def exported(path):
    "The exported code cells of a notebook, without their directives"
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] == "code" and re.match(r"#\|\s*export\b", source):
            yield re.sub(r"^#\|.*\n", "", source, flags=re.M)

@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_cell_holds_one_idea(path):
    long = [cell[:80] for cell in exported(path) if len(cell.splitlines()) > CELL]
    assert not long

@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *MODULES, ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"],
    ids=name,
)
def test_plain_words(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"])
    assert not re.findall(r"\barrived\b|\bheld against\b|\bof others\b|\bguessing\b", text, re.I)
