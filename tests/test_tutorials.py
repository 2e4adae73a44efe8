"Tutorials keep the rules of a page to read: plain imports, one question, pictures that are stored, and what a synthetic image is not. `test_notebooks` runs them from top to bottom."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT/"nbs"/"tutorials").glob("*.ipynb"))
LIBRARIES = {"synthpi", "numpy", "torch", "matplotlib", "PIL"}       # and the standard library

def cells(path, kind): return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]

def text(cell): return "".join(cell["source"])

def test_there_are_tutorials_and_the_notebooks_test_runs_them():
    from test_notebooks import NBS
    assert TUTORIALS and set(TUTORIALS) <= set(NBS)

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_imports_are_plain_and_on_top(path):
    import sys
    code = [text(c) for c in cells(path, "code")]
    found = {name.split(".")[0] for c in code for node in ast.walk(ast.parse(c)) if isinstance(node, (ast.Import, ast.ImportFrom))
             for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert found - set(sys.stdlib_module_names) <= LIBRARIES, found
    assert not any(re.search(r"^(import|from) ", c, re.M) for c in code[1:]), "imports stand in the first code cell"
    assert not any(re.search(r"#\| *(default_exp|export)", c) for c in code) and not any(re.search(r"^\s*[%!]", c, re.M) for c in code)

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_the_page_asks_shows_checks_and_warns(path):
    code, prose = cells(path, "code"), "\n".join(text(c) for c in cells(path, "markdown"))
    assert re.match(r"# .+\n> .+\?", prose), "a title, and one question below it"
    warns = "Synthetic images are training aids, not findings" if "synthetic image" in prose.lower() else "says nothing about real scans"
    assert warns in prose and "## What to do next" in prose
    outputs = [o for c in code for o in c["outputs"]]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3 and not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs), "run it and store what it shows"
    assert sum("assert " in text(c) for c in code) >= 3, "what the prose says is asserted"
    shown = json.dumps(outputs)
    assert not re.search(r"/(home|root|work|tmp|Users)/", shown) and path.stat().st_size < 2.5e6

@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+\.ipynb)", "\n".join(text(c) for c in cells(path, "markdown")))
    assert links and not [link for link in links if not (path.parent/link).is_file()]
