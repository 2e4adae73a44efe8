"The package as others get it: sdist and wheel build, and the wheel alone runs the demo in an empty environment."
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[1]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

def run(*args, cwd):
    "Run outside of the checkout; on failure show the end of what it said"
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=CLEAN, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    assert done.returncode == 0, f"{' '.join(map(str, args))} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout

@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "sdist from the checkout, wheel from the sdist, in an isolated build environment"
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=out)
    return out

def test_sdist_holds_what_a_build_needs(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as f: names = {n.split("/", 1)[1] for n in f.getnames() if "/" in n}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names

def test_wheel_holds_the_library_and_nothing_else(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as f: names = {n for n in f.namelist() if ".dist-info/" not in n}
    assert names == {p.relative_to(ROOT).as_posix() for p in (ROOT/"synthpi").rglob("*") if p.is_file() and "__pycache__" not in p.parts}

def test_the_wheel_alone_runs_the_demo(dist):
    with TemporaryDirectory() as tmp:  # removed at once: an environment with torch takes gigabytes
        tmp = Path(tmp).resolve()
        venv.create(tmp/"env", with_pip=True)
        bin = tmp/"env"/("Scripts" if os.name == "nt" else "bin")
        run(bin/"python", "-m", "pip", "install", "-c", ROOT/"constraints.txt", next(dist.glob("*.whl")), cwd=tmp)
        assert Path(run(bin/"python", "-c", "import synthpi; print(synthpi.__file__)", cwd=tmp).strip()).is_relative_to(tmp/"env")
        run(bin/"synthpi", "demo", "--quick", "--out", tmp/"out", cwd=tmp)
        results = json.loads((tmp/"out/results.json").read_text(encoding="utf-8"))
        assert results["schema"] == 1 and results["arms"]
        assert "<html" in (tmp/"out/report.html").read_text(encoding="utf-8")
