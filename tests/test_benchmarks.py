"""The benchmarks run, at their quick size, and do the same on both sides (that of the losses:
test_losses.py). Speed is read from stored results, never asserted."""
import importlib.util
import json
from pathlib import Path

import pytest

HERE = Path(__file__).parent/"benchmarks"

def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_the_trainer_takes_the_steps_of_the_loop():
    r, = load("trainer").run(quick=True)["results"]
    assert r["largest_relative_difference_of_losses"] < 1e-4 and r["ratio"]["min"] > 0

def test_the_loader_is_compared_with_the_same_pixels():
    assert json.dumps(load("loader").run(quick=True))

def test_startup_is_measured():
    assert load("startup").run(quick=True)["seconds"]["synthpi"]["all"] > 0

@pytest.mark.slow
def test_the_gpu_benchmark_works_where_there_is_none():
    r = load("gpu").run(quick=True, device="cpu")
    assert len(r["results"]) == 2 and all(
        x["images_per_second"] > 0 for rows in r["results"].values() for x in rows.values()
    )

def test_the_table_is_made_from_the_results(tmp_path, monkeypatch):
    table = load("table")
    stored = (HERE/"README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(table, "HERE", tmp_path)
    (tmp_path/"results").symlink_to(HERE/"results")
    table.main()
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == stored, (
        "run python tests/benchmarks/table.py"
    )
