import os
import signal

import pytest

# started in the background, tests and their children would not hear Ctrl-C
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")     # no look for a newer release
# two test processes share the cores; more threads than cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")               # nothing in the tests may need the hub

# Longest first, so that both processes are busy to the end. pytest-xdist hands out whole files,
# whose fixtures are shared, in the order of this list; notebooks go one by one and fill the gaps.
# Its own `loadgroup` marks groups in names that pytest 9.2 no longer reads: all tests were torn apart
LONG = "studies/ pairs/ test_docs explain/ train/ test_packaging losses/ data/ evaluate/ test_notebooks".split()

def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes about a minute; runs with --slow, as in the workflow"
    )

def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes about a minute: pytest --slow"))
    def place(item):
        path = item.path.relative_to(config.rootpath/"tests").as_posix()
        return next((k for k, start in enumerate(LONG) if path.startswith(start)), len(LONG))
    items.sort(key=place)

@pytest.hookimpl(optionalhook=True)     # nothing to do without pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "test_notebooks.py" in nodeid else nodeid.split("::")[0]

    return ByFile(config, log)

def pytest_addoption(parser):
    parser.addoption(
        "--browser",
        action="store_true",
        help="also drive the explorers in JupyterLab with Chromium",
    )
    for f in ("slow", "gpu"):
        parser.addoption(
            f"--{f}",
            action="store_true",
            help=f"also run notebook cells flagged #| {f}"
            + ", and the tests that take a minute" * (f == "slow"),
        )
