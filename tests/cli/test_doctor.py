"""`synthpi doctor`: what it sees on this machine, and what it says of machines that are put in its
place."""
import configparser
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from synthpi.cli import doctor
from synthpi.cli.doctor import check_environment
from synthpi.cli.app import app

ROOT = Path(__file__).parents[2]
COMMAND = typer.Typer()
COMMAND.command()(doctor.doctor)

def ask(*args):
    said = CliRunner().invoke(COMMAND, [str(a) for a in args])
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    return said

def row(what, **kwargs):
    rows = check_environment(**kwargs)
    found = rows[rows.what == what]
    assert len(found) == 1, f"{len(found)} rows of {what}"
    return found.iloc[0]

@pytest.fixture
def versions(monkeypatch):
    "Installed versions put in the place of those that are there; None: not installed"
    faked, true = {}, importlib.metadata.version
    def version(name):
        value = faked[name] if name in faked else true(name)
        if value is None: raise importlib.metadata.PackageNotFoundError(name)
        return value
    monkeypatch.setattr(importlib.metadata, "version", version)
    return faked

@pytest.fixture
def asks(monkeypatch):
    "Requirements put in the place of those of a distribution"
    faked, true = {}, importlib.metadata.requires
    def requires(name):
        if faked.get(name, 0) is None: raise importlib.metadata.PackageNotFoundError(name)
        return faked[name] if name in faked else true(name)
    monkeypatch.setattr(importlib.metadata, "requires", requires)
    return faked

@pytest.fixture
def absent(monkeypatch):
    "Modules that are not to be found"
    names, true = set(), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in names else true(name, *a)
    )
    return names

@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    "No settings of this machine"
    for name in (
        "ACCELERATE_USE_CPU",
        "ACCELERATE_MIXED_PRECISION",
        "MASTER_ADDR",
        "RANK",
        "XDG_CACHE_HOME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path/"hf"))

def test_the_table():
    rows = check_environment()
    assert (
        list(rows.columns) == ["what", "found", "says", "status", "needed"]
        and rows.what.is_unique
        and set(rows.status) <= {"ok", "warning", "missing"}
    )
    assert (rows.says[rows.status != "ok"] != "").all(), "what is not well comes with what to do"
    assert rows.set_index("what").loc["torch", "found"] == importlib.metadata.version("torch")

def test_every_requirement_and_no_extra_is_needed():
    asked = [
        line.split(";")[0]
        for line in importlib.metadata.requires("synthpi")
        if "extra ==" not in line
    ]
    names = {line.partition(">")[0].partition("<")[0] for line in asked}
    rows = check_environment()
    assert (
        names and names <= set(rows.what[rows.needed]) and not {"nbdev", "pytest"} & set(rows.what)
    )

def test_the_demo_can_run_here():
    said = ask()
    assert said.exit_code == 0, said.output
    assert said.output.endswith("synthpi demo can run here.\n")

@pytest.mark.parametrize(
    "name, version, says",
    [
        ("captum", None, 'pip install "captum>=0.7"'),
        ("albumentations", "2.1.0", 'pip install "albumentations<2.1,>=2.0.8"'),
        ("albumentations", "2.0.7", "is supported"),
        ("numpy", "1.26.4", 'pip install "numpy>=2.0"'),
        ("scipy", None, "pip install scipy"),
    ],
)
def test_a_requirement_that_does_not_serve(versions, name, version, says):
    versions[name] = version
    said = ask()
    end = said.output.partition("synthpi demo cannot run here:")[2]
    assert said.exit_code == 1 and f"{name}: " in end and says in end
    assert row(name).status == "missing" and row(name).found == (version or "none")

@pytest.mark.parametrize("version", ["2.0.8", "2.0.9rc1"])
def test_a_version_inside_serves(versions, version):
    versions["albumentations"] = version
    assert row("albumentations").status == "ok" and ask().exit_code == 0

@pytest.mark.parametrize(
    "version", ["2.13.0+cpu", "2.14.0.dev20260101+cu130", "2.6.0a0+ecf3bae40a.nv25.1"]
)
def test_builds_and_previews_of_torch_serve(versions, version):
    versions["torch"] = version
    assert row("torch").status == "ok"

def test_json(versions):
    said = json.loads(ask("--json").output)
    assert said["can_run_demo"] is True and said["rows"][0] == {
        "what": "Python",
        "found": sys.version.split()[0],
        "says": "",
        "status": "ok",
        "needed": False,
    }
    versions["monai"] = None
    answer = ask("--json")
    said = json.loads(answer.output)
    assert (
        answer.exit_code == 1
        and said["can_run_demo"] is False
        and [r["what"] for r in said["rows"] if r["needed"] and r["status"] == "missing"]
        == ["monai"]
    )

def test_not_installed(asks):
    asks["synthpi"] = None
    assert ask().exit_code == 1 and "pip install -e ." in row("synthpi").says

def test_without_packaging(absent):
    absent.add("packaging")
    assert ask().exit_code == 1 and "pip install packaging" in ask().output

def test_python_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    assert (
        row("Python").status == "missing"
        and ">=3.10" in row("Python").says
        and ask().exit_code == 1
    )

@pytest.mark.parametrize(
    "feature, module, command",
    [
        ("NRRD volumes", "nrrd", "pip install pynrrd"),
        ("DICOM volumes", "pydicom", "pip install pydicom"),
        ("MHA volumes", "itk", "pip install itk"),
        ("preset pcam", "h5py", "pip install h5py"),
        ("diffusers generators", "diffusers", "pip install diffusers"),
        ("timm encoders", "timm", "pip install timm; it brings torchvision"),
        ("Hugging Face encoders", "transformers", "pip install transformers"),
        ("tracking", "tensorboard", "pip install tensorboard"),
        ("ONNX generators", "onnxruntime", "pip install onnxruntime"),
        ("explorers", "anywidget", "pip install anywidget"),
    ],
)
def test_a_feature_that_lacks_a_package(absent, feature, module, command):
    absent.add(module)
    r = row(feature)
    # with versions, where the installation asks for some
    assert (
        r.status == "missing"
        and not r.needed
        and re.sub(r'"([\w-]+)[<>=.,\d]*"', r"\1", r.says).startswith(command)
    )
    assert ask().exit_code == 0, "a feature does not stop the demo"

def test_a_feature_of_an_old_package(versions, absent):
    versions["transformers"] = "4.30.0"
    r = row("Hugging Face encoders")
    assert (r.status, r.found, r.says) == (
        "warning",
        "transformers 4.30.0",
        'pip install "transformers>=4.40"',
    )

def test_every_package_of_an_extra_is_in_a_feature():
    settings = configparser.ConfigParser()
    settings.read(ROOT/"settings.ini")
    extras = {
        key: [re.split("[<>=]", line)[0] for line in text.split()]
        for key, text in settings["DEFAULT"].items()
        if key.endswith("_requirements") and key != "dev_requirements"
    }
    features = {name for packages in doctor._FEATURES.values() for name in packages.values()}
    assert (
        extras["volumes_requirements"]
        and not {name for names in extras.values() for name in names} - features
    )

@pytest.mark.parametrize(
    "version, requires, torch_is, status",
    [
        ("0.28.0", ["torch==2.13.0"], "2.13.0", "ok"),
        ("0.28.0+cpu", ["numpy", "torch==2.13.0"], "2.13.0+cpu", "ok"),
        ("0.20.0", ["torch==2.5.0"], "2.13.0", "warning"),
        ("0.28.0+cu130", ["torch==2.13.0"], "2.13.0+cpu", "warning"),
    ],
)
def test_torchvision(versions, asks, version, requires, torch_is, status):
    versions.update(torchvision=version, torch=torch_is)
    asks["torchvision"] = requires
    assert row("torchvision").status == status
    if status == "warning":
        assert requires[-1] in row("torchvision").says and torch_is in row("torchvision").says

def test_no_torchvision_no_row(versions):
    versions["torchvision"] = None
    assert "torchvision" not in set(check_environment().what)

def test_a_torch_for_processors_beside_a_driver(monkeypatch):
    for name in ("cuda", "hip"): monkeypatch.setattr(torch.version, name, None, raising=False)
    monkeypatch.setattr(
        doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None
    )
    assert row("torch build").status == "warning" and "CUDA build" in row("torch build").says
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert row("torch build").status == "ok" and row("torch build").found == "CPU"

def test_a_torch_for_gpus_that_sees_none(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert (
        row("torch build").status == "warning" and "CUDA_VISIBLE_DEVICES" in row("torch build").says
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert row("torch build").status == "ok" and row("torch build").found == "CUDA 13.0"

@pytest.fixture
def gpu(monkeypatch):
    "A GPU of a capability that computes what it is told to compute"
    class P: name, total_memory = "GPU of the test", 24e9
    state = {"capability": (9, 0), "works": True}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: P)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: state["capability"])
    true = doctor._works
    monkeypatch.setattr(
        doctor,
        "_works",
        lambda torch, device, dtype: (
            state["works"] if "cuda" in device else true(torch, device, dtype)
        ),
    )
    return state

def test_a_gpu(gpu):
    assert tuple(row("cuda:0")[["found", "says", "status", "needed"]]) == (
        "GPU of the test, 24 GB",
        "bf16 works",
        "ok",
        False,
    )
    assert "bf16 is faster" in row("precision").says
    gpu["capability"] = (7, 5)
    assert row("cuda:0").says.startswith("no bf16") and row("precision").says == "the default"

def test_a_gpu_that_does_not_compute_stops_the_demo(gpu):
    gpu["works"] = False
    assert (
        row("cuda:0").status == "missing"
        and ask().exit_code == 1
        and "--device cpu" in ask().output
    )

def test_bf16_is_tried_not_believed(monkeypatch):
    assert row("cpu").says == (
        "bf16 works" if doctor._works(torch, "cpu", torch.bfloat16) else "no bf16"
    )
    true = torch.ones
    def ones(*args, dtype=None, **kwargs):
        if dtype == torch.bfloat16: raise RuntimeError("not implemented for 'BFloat16'")
        return true(*args, dtype=dtype, **kwargs)
    monkeypatch.setattr(torch, "ones", ones)
    assert row("cpu").says == "no bf16" and row("cpu").found == "works"

@pytest.mark.parametrize(
    "told, found, status",
    [("bf16", "bf16", "ok"), ("no", "fp32", "ok"), ("fp16", "fp16", "warning")],
)
def test_precision_as_accelerate_was_told(monkeypatch, told, found, status):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (row("precision").found, row("precision").status) == (found, status)

def test_a_torch_that_does_not_load(tmp_path):
    (tmp_path/"torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "raise OSError('/home/jane/lib/libcudart.so.13: cannot open shared object file')"
    )
    code = (
        "import typer; from synthpi.cli import doctor; t = typer.Typer(); "
        "t.command()(doctor.doctor); t()"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert (
        said.returncode == 1 and "torch build: ~/lib/libcudart.so.13: cannot open" in said.stdout
    ), said.stderr

def test_threads(monkeypatch):
    cores = doctor._cores()
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 1))
    assert (
        row("OMP_NUM_THREADS").status == "warning"
        and f"OMP_NUM_THREADS={cores}" in row("OMP_NUM_THREADS").says
        and ask().exit_code == 0
    )
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
    assert "OMP_NUM_THREADS" not in set(check_environment().what)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores + 1)
    assert row("threads").status == "warning"

def config(folder, text):
    (folder/"hf/accelerate").mkdir(parents=True)
    (folder/"hf/accelerate/default_config.yaml").write_text(text)

@pytest.mark.parametrize(
    "text, told",
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 4\n", True),
        ("num_processes: 4\nuse_cpu: true\n", True),
        ("num_processes: 1\nuse_cpu: true\n", False),
        ("num_processes: 4\nuse_cpu: false\n", False),
        ("", False),
    ],
)
def test_accelerate_asked_for_several_processes_on_processors(tmp_path, text, told):
    config(tmp_path, text)
    rows = check_environment().set_index("what")
    assert "several processes on the CPU" not in set(rows.found) or told
    if told:
        assert (
            "torchrun --nproc_per_node 4"
            in rows[rows.found == "several processes on the CPU"].says.iloc[0]
        )
    assert told == bool((rows.found == "several processes on the CPU").any())

def test_a_process_that_accelerate_started_alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "torchrun" in ask().output
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" not in ask().output

def test_the_disk(monkeypatch, tmp_path):
    class Usage: free = 5e8
    assert (
        row("disk", out=tmp_path / "not/there/yet").says.startswith("at the output folder")
        and not (tmp_path / "not").exists()
    )
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage)
    assert (row("disk").found, row("disk").status) == ("0.5 GB free", "warning")

def test_an_output_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path/"file").write_text("")
    assert ask("--out", tmp_path/"file").exit_code == 1
    monkeypatch.setattr(doctor.os, "access", lambda path, mode, **k: mode != os.W_OK)
    assert row("output folder", out=tmp_path).needed and ask("--out", tmp_path).exit_code == 1

def test_no_path_of_a_home_folder_is_said(monkeypatch, tmp_path):
    home = tmp_path/"people"/"jane"
    (home/"study").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode, **k: mode != os.W_OK)
    for args in ((), ("--json",), ("--out", home/"study"), ("--out", home/"study", "--json")):
        said = ask(*args).output
        assert str(home) not in said and "jane" not in said
    assert "~/study" in ask("--out", home/"study").output

@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/jane/a b.so: not found", "~/a b.so: not found"),
        ("/Users/Jane.Doe/x", "~/x"),
        (r"C:\Users\Jane\x.dll", r"~\x.dll"),
        ("nothing", "nothing"),
    ],
)
def test_homes_of_others(text, shown): assert doctor.no_home(text) == shown

def test_the_command_is_registered():
    assert "doctor" in [c.name or c.callback.__name__ for c in app.registered_commands]

def test_it_loads_no_library_but_torch():
    """Not even torch to be registered; no other library of the list to run, which would wait for
    seconds"""
    code = (
        "import sys; from synthpi.cli import doctor; early = 'torch' in sys.modules; "
        "doctor._rows('.'); print(early, [m for m in ('monai', 'transformers', 'umap', 'sklearn', "
        "'albumentations', 'accelerate', 'diffusers', 'timm') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        == "False []"
    )
