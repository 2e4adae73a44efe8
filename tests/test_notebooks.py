"""Every notebook in nbs/ runs as one pytest test, with nbdev's own runner; the library on disk is
what the notebooks export."""
import sys
import json
from pathlib import Path
from shutil import copy2, copytree
from subprocess import run

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb

ROOT = Path(__file__).parents[1]
NBS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if not any(o[0] in "._" for o in p.relative_to(ROOT).parts)
)

@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_notebook(nb, request):
    cfg = get_config(ROOT)
    force = [f for f in ("slow", "gpu") if request.config.getoption(f"--{f}")]
    ok, _ = run_nb(nb, skip_flags=cfg.tst_flags.split(), force_flags=force, basepath=ROOT)
    assert ok, f"{nb.name} failed; its traceback is on standard error"

def test_export_is_current(tmp_path):
    for name in ("nbs", "synthpi", "pyproject.toml"):
        src = ROOT/name
        copytree(src, tmp_path/name) if src.is_dir() else copy2(src, tmp_path/name)
    run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, check=True)
    def mods(root):
        return {
            p.relative_to(root).as_posix(): p.read_text(encoding="utf-8")
            for p in root.rglob("*.py")
        }
    fresh, disk = mods(tmp_path/"synthpi"), mods(ROOT/"synthpi")
    assert not sorted(m for m in fresh.keys() | disk.keys() if fresh.get(m) != disk.get(m)), (
        "run nbdev-export and commit synthpi/"
    )

@pytest.mark.parametrize("nb", NBS, ids=lambda p: p.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_stored_outputs_hold_no_standard_error(nb):
    "Warnings and progress bars name paths of the machine that they were printed on"
    streams = [
        o["name"]
        for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]
        for o in c.get("outputs", [])
        if o["output_type"] == "stream"
    ]
    assert "stderr" not in streams
