import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")     # no look for a newer release
os.environ.setdefault("OMP_NUM_THREADS", "1")              # two test processes share the cores; more threads than cores wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")               # nothing in the tests may need the hub

def pytest_addoption(parser):
    for f in ("slow", "gpu"): parser.addoption(f"--{f}", action="store_true", help=f"also run notebook cells flagged #| {f}")
