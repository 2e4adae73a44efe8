"What a full disk and a killed process leave behind, and what is printed when nobody reads."
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from synthpi.core.files import write_arrays, write_json, write_safetensors
from synthpi.core.runs import hold_folder

@pytest.mark.parametrize("write", (
    lambda path: write_json(path, ["x"*100_000]),
    lambda path: write_arrays(path, h=np.zeros(100_000)),
    lambda path: write_safetensors(path, {"w": torch.zeros(100_000)}, "synthpi-encoder-1"),
))
def test_a_full_disk_is_told_with_the_file_and_leaves_no_half(write, tmp_path):
    "A limit on the size of a file fails as a full disk does"
    path, limits = tmp_path/"kept.npz", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="kept.npz could not be written .*free some space"): write(path)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.npz"] and path.read_text() == "old"

HOLD = '''
import sys, time
from synthpi.core.runs import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
'''

@pytest.mark.slow
def test_a_second_process_is_told_who_holds_a_folder_and_a_dead_one_holds_nothing(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {other.pid} on .* since"):
            with hold_folder(tmp_path): pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with hold_folder(tmp_path): pass
    finally: other.kill()

@pytest.mark.slow
@pytest.mark.parametrize("shell", (
    "doctor | true", "doctor >&- 2>&-", "tissue --tiles none --out x 2>&-", "--help | head -1",
))
def test_output_that_nobody_reads_is_no_traceback(shell, tmp_path):
    command = f"{sys.executable} -m synthpi {shell}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
