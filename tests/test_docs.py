"The documentation builds: nbdev's own processing of every page, the real _quarto.yml, and quarto itself where there is one."
import ast
import re
import shutil
import sys
from pathlib import Path
from subprocess import run

import nbformat
import pytest
import yaml
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))

@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    "A copy of the repository as nbdev-docs hands it to quarto, without needing quarto"
    src = tmp_path_factory.mktemp("src")
    for name in ("nbs", "synthpi", "pyproject.toml", "_quarto.yml", "settings.ini"):
        p = ROOT/name
        shutil.copytree(p, src/name) if p.is_dir() else shutil.copy2(p, src/name)
    process = "from nbdev.serve import proc_nbs; from nbdev.quarto import refresh_quarto_yml as r; r(); proc_nbs(n_workers=0)"
    run([sys.executable, "-c", process], cwd=src, check=True)
    return src/"_proc"

def _hrefs(x):
    if isinstance(x, dict):
        for k, v in x.items(): yield from [v] if k == "href" and isinstance(v, str) else _hrefs(v)
    elif isinstance(x, list):
        for v in x: yield from [v] if isinstance(v, str) and re.search(r"\.(ipynb|qmd|md)$", v) else _hrefs(v)

def test_every_page_is_rendered_and_in_the_sidebar(pages):
    nbs = {p.relative_to(ROOT).as_posix() for p in (ROOT/"nbs").rglob("*.ipynb") if not any(o[0] in "._" for o in p.relative_to(ROOT).parts)}
    rendered = {p.relative_to(pages).as_posix() for g in SITE["project"]["render"] for p in pages.glob(g)}
    assert rendered == nbs
    assert sorted(_hrefs(SITE["website"]["sidebar"])) == sorted(nbs)
    assert all((ROOT/h).exists() for h in _hrefs(SITE["website"]["navbar"]) if "://" not in h)

def test_every_page_becomes_html(pages):
    for p in sorted(pages.glob("nbs/**/*.ipynb")):
        nb = nbformat.read(p, as_version=4)
        keep = {"id", "cell_type", "metadata", "source", "outputs", "execution_count", "attachments"}
        for c in nb.cells: [c.pop(k) for k in set(c) - keep] + [c.metadata.pop("execution", None)]  # nbdev's own marks are not part of the format
        html, _ = HTMLExporter().from_notebook_node(nb)
        assert "<h1" in html or "output-file" in html, p

def test_every_page_about_synthetic_images_says_what_they_are():
    about = ["index", "tutorials/make_and_judge", "03_*", "04_*", "05_*", "14_generator_run", "14_synthesise", "14_pretrain", "14_arms", "14_study", "14_tissue_report", "15_cli"]
    silent = [p.name for g in about for p in (ROOT/"nbs").glob(f"{g}.ipynb") if "Synthetic images are training aids, not findings" not in p.read_text(encoding="utf-8")]
    assert not silent

def _public(module):
    "The functions and classes that `module` exports, read without importing it"
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = next(ast.literal_eval(s.value) for s in tree.body if isinstance(s, ast.Assign) and s.targets[0].id == "__all__")
    return {s.name for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))} & set(names)

def test_every_public_name_is_documented(pages):
    shown = "".join(p.read_text(encoding="utf-8") for p in pages.glob("nbs/*.ipynb"))
    public = {(m.stem, name) for m in (ROOT/"synthpi").glob("*.py") if m.name[0] != "_" for name in _public(m)}
    assert public and not {(m, name) for m, name in public if f"show_doc({name})" not in shown}

@pytest.mark.skipif(not shutil.which("quarto"), reason="quarto is not installed")
def test_site_builds(pages):
    run(["quarto", "render"], cwd=pages, check=True)
    assert (pages/"_docs/nbs/core.html").exists()

def test_the_tests_that_the_differences_name_are_there():
    text = "".join(c.source for c in nbformat.read(ROOT/"nbs/differences.ipynb", 4).cells)
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert named and not [n for n in named if not re.search(rf"^def {n[1]}\(", (ROOT/f"tests/{n[0]}.py").read_text(encoding="utf-8"), re.M)]
