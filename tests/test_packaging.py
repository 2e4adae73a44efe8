"""The package as others get it: sdist and wheel build, and the wheel runs the demo away from the
checkout, among nothing but what it asks for.

The requirements are not installed again: the environment gets links to those of the installed
distributions that the wheel's own metadata ask for, and to what these ask for. A module that is
imported and not asked for is missing there, as it is after `pip install`.
"""
import ast
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CLEAN = {
    k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
}
# what a user may ask for; dev is ours
EXTRAS = ("volumes", "presets", "diffusion")

def run(*args, cwd):
    "Run outside of the checkout; on failure show the end of what it said"
    done = subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env=CLEAN,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, args))} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    )
    return done.stdout

@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "sdist from the checkout, wheel from the sdist, in an isolated build environment"
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return out

@pytest.fixture(scope="module")
def requires(dist):
    "What the wheel asks for"
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as f:
        metadata = f.read(next(n for n in f.namelist() if n.endswith(".dist-info/METADATA")))
    return Parser().parsestr(metadata.decode()).get_all("Requires-Dist")

def asked_for(requirements, extras=("",)):
    """By name: the installed distribution, or None, of everything that these requirements ask for,
    and of what that asks for"""
    found, seen, todo = (
        {},
        set(),
        [(Requirement(r), extra) for r in requirements for extra in extras],
    )
    while todo:
        r, extra = todo.pop()
        if r.marker and not r.marker.evaluate({"extra": extra}): continue
        name = canonicalize_name(r.name)
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            found.setdefault(name, None)
            continue
        for extra in {"", *r.extras}:
            if (name, extra) not in seen:
                todo += [(Requirement(x), extra) for x in found[name].requires or ()]
            seen.add((name, extra))
    return found

def link(distributions, site):
    "Put links to what these distributions installed into another environment's folder of packages"
    for d in distributions:
        for top in {f.parts[0] for f in d.files or () if f.parts[0] not in ("..", "__pycache__")}:
            if not (site/top).exists(): (site/top).symlink_to(Path(d.locate_file(top)).absolute())

def test_sdist_holds_what_a_build_needs(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as f:
        names = {n.split("/", 1)[1] for n in f.getnames() if "/" in n}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names

def test_wheel_holds_the_library_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as f:
        names = {n for n in f.namelist() if ".dist-info/" not in n}
    assert names == {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "synthpi").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }

def imported(source):
    "The packages that `source` imports, at its top or inside a function"
    nodes = list(ast.walk(ast.parse(source)))
    return {
        name.split(".")[0]
        for n in nodes
        for name in (
            [a.name for a in n.names]
            if isinstance(n, ast.Import)
            else [n.module]
            if isinstance(n, ast.ImportFrom) and not n.level
            else []
        )
    }

def test_every_import_is_asked_for(requires):
    "Also where a function imports it that the demo does not call"
    owners, asked = packages_distributions(), asked_for(requires, ("", *EXTRAS))
    files = {
        m: p.name
        for p in (ROOT / "synthpi").rglob("*.py")
        for m in imported(p.read_text(encoding="utf-8"))
        if m != "synthpi" and m not in sys.stdlib_module_names
    }
    assert {"torch", "umap", "h5py"} <= set(files)
    assert not {
        m: f
        for m, f in files.items()
        if not {canonicalize_name(o) for o in owners.get(m, [m])} & set(asked)
    }, "imported, and neither in the requirements nor in an extra of settings.ini"

SHORT = """
import sys
from dataclasses import replace
from synthpi.cli import main, tissue
from synthpi.data import phantoms
def short(f, **less): return lambda *args, **given: f(*args, **given | less)
few = dict(n_per_class={"train": 4, "val": 2, "test": 4}, n_pairs=6, n_pair_patients=3)
patients = {"train": 2, "val": 1, "test": 2}
phantoms.write_tissue = short(phantoms.write_tissue, n_patients=patients, **few)
full, tiny = tissue.demo_settings, dict(steps=2, batch_size=8, generator_steps=2, generator_crop=32)
tissue.demo_settings = lambda *args, **given: replace(full(*args, **given), **tiny)
sys.exit(main())
"""

@pytest.mark.slow
def test_the_wheel_alone_runs_the_demo(dist, requires):
    "A few tiles and steps: `.ci/run` runs the demo at its full length"
    asked = asked_for(requires)
    assert not [name for name, d in asked.items() if d is None], "asked for, and not installed here"
    assert not {"pytest", "nbdev", "build"} & set(asked)
    with TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        venv.create(tmp/"env")
        bin = tmp/"env"/("Scripts" if os.name == "nt" else "bin")
        site = Path(
            run(
                bin / "python",
                "-c",
                "import sysconfig; print(sysconfig.get_path('purelib'))",
                cwd=tmp,
            ).strip()
        )
        link(asked.values(), site)
        pip = [sys.executable, "-m", "pip", "--python", bin/"python"]
        run(*pip, "install", "--no-deps", "--no-index", next(dist.glob("*.whl")), cwd=tmp)
        # every version is one that is asked for
        run(*pip, "check", cwd=tmp)
        assert Path(
            run(bin / "python", "-c", "import synthpi; print(synthpi.__file__)", cwd=tmp).strip()
        ).is_relative_to(site)
        assert "demo" in run(bin/"synthpi", "--help", cwd=tmp)
        (tmp/"short.py").write_text(SHORT)
        run(
            bin / "python",
            tmp / "short.py",
            "demo",
            "--quick",
            "--device",
            "cpu",
            "--workers",
            "0",
            "--out",
            tmp / "out",
            cwd=tmp,
        )
        results = json.loads((tmp/"out/results.json").read_text(encoding="utf-8"))
        assert results["schema"] == 1 and {"trident", "trident_real_pairs", "supervised"} <= set(
            results["arms"]
        )
        page = (tmp/"out/report.html").read_text(encoding="utf-8")
        assert "<html" in page and "tiles are simulated" in page
