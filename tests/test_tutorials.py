"""Tutorials keep the rules of a page to read: they open in Colab without touching its torch, plain
imports, one question, pictures that are stored, and what a synthetic image is not.
`test_notebooks` runs them from top to bottom."""
import ast
import configparser
import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT/"nbs"/"tutorials").glob("*.ipynb"))
LIBRARIES = {"synthpi", "numpy", "torch", "matplotlib", "PIL", "datasets"}       # and the standard library
INSTALL = '''import subprocess, sys

if "google.colab" in sys.modules:  # Colab keeps its own torch
    package = "synthpi @ git+https://github.com/synthpi/synthpi"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)'''
BADGE = (
    "[![Open in "
    "Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/synthpi/synthpi/blob/main/nbs/tutorials/{}.ipynb)"
)
# what its machines come with
COLAB = {
    "python": "3.12",
    "torch": "2.11.0+cu128",
    "numpy": "2.1.0",
    "ipywidgets": "7.7.1",
    "albumentations": "2.0.8",
    "umap-learn": "0.5.12",
    "accelerate": "1.14.0",
    "datasets": "4.0.0",
}

def cells(path, kind):
    return [
        c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind
    ]

def text(cell): return "".join(cell["source"])

def test_there_are_tutorials_and_the_notebooks_test_runs_them():
    from test_notebooks import NBS
    assert TUTORIALS and set(TUTORIALS) <= set(NBS)

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_imports_are_plain_and_on_top(path):
    import sys
    code = [text(c) for c in cells(path, "code")]
    found = {
        name.split(".")[0]
        for c in code
        for node in ast.walk(ast.parse(c))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert found - set(sys.stdlib_module_names) <= LIBRARIES, found
    assert not any(re.search(r"^\s*(import|from) ", c, re.M) for c in code[2:]), (
        "imports stand in the first two code cells: the one that installs, and one of their own"
    )
    assert all(
        isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(code[1]).body
    ), "nothing else in the cell of imports"
    assert not any(re.search(r"#\| *(default_exp|export)", c) for c in code) and not any(
        re.search(r"^\s*[%!]", c, re.M) for c in code
    )

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_it_opens_in_colab(path):
    prose = [text(c) for c in cells(path, "markdown")]
    assert BADGE.format(path.stem) in prose[1], (
        "the badge stands in the second cell: what follows the title in the first is lost from "
        "the site"
    )
    assert sum("colab.research.google.com/github" in p for p in prose) == 1
    assert text(cells(path, "code")[0]) == INSTALL and not any(
        "pip" in re.findall(r"\w+", text(c)) for c in cells(path, "code")[1:]
    )

def test_the_install_cell_installs_in_colab_only():
    calls, modules = [], {"google.colab": None}
    fake = {
        "subprocess": type(
            "subprocess",
            (),
            {"run": staticmethod(lambda command, check: calls.append((command, check)))},
        ),
        "sys": type("sys", (), {"modules": {}, "executable": "python3"}),
    }
    for there in ({}, modules):
        fake["sys"].modules = there
        exec(INSTALL.split("\n", 1)[1], dict(fake))
    assert len(calls) == 1 and calls[0][1], "a failed installation stops the page"
    assert (
        calls[0][0][:4] == ["python3", "-m", "pip", "install"]
        and "--upgrade" not in calls[0][0]
        and "-U" not in calls[0][0]
    )
    wanted, = [Requirement(a) for a in calls[0][0] if " @ " in a]
    assert wanted.name == "synthpi" and not wanted.extras and "torch" not in " ".join(calls[0][0])

def test_colab_keeps_what_it_has():
    """The requirements accept the versions on Colab's machines, so that pip has no reason to
    replace torch or numpy"""
    ini = configparser.ConfigParser(delimiters=["="], interpolation=None)
    ini.read(ROOT/"settings.ini", encoding="utf-8")
    wanted = {
        r.name: r.specifier
        for r in map(Requirement, ini["DEFAULT"]["requirements"].split("\n")[1:])
    } | {"python": Requirement(f"python>={ini['DEFAULT']['min_python']}").specifier}
    assert COLAB.keys() <= wanted.keys()
    assert not {
        name: str(wanted[name])
        for name, version in COLAB.items()
        if not wanted[name].contains(version)
    }
    assert "torchvision" not in wanted

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_the_page_asks_shows_checks_and_warns(path):
    code, prose = cells(path, "code"), "\n".join(text(c) for c in cells(path, "markdown"))
    assert re.match(r"# .+\n> .+\?", prose), "a title, and one question below it"
    warns = (
        "Synthetic images are training aids, not findings"
        if "synthetic image" in prose.lower()
        else "says nothing about real scans"
    )
    assert warns in prose and "## What to do next" in prose
    outputs = [o for c in code for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3 and not any(
        o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs
    ), "run it and store what it shows"
    assert sum("assert " in text(c) for c in code) >= 3, "what the prose says is asserted"
    shown = json.dumps(outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", shown) and path.stat().st_size < 2.5e6

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    links = re.findall(
        r"\]\((?!https?:)([^)#]+\.ipynb)", "\n".join(text(c) for c in cells(path, "markdown"))
    )
    assert links and not [link for link in links if not (path.parent/link).is_file()]
