"Worker processes end with the one that started them, however that ends."
import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import time
from synthpi.volumes.workers import run_jobs
if __name__ == "__main__":
    print("started", flush=True)
    run_jobs(time.sleep, [(600,), (600,)], workers=2)
"""

def children(pid):
    "Processes whose parent is this one; fields of /proc/N/stat follow the name in brackets"
    found = []
    for other in filter(str.isdigit, os.listdir("/proc")):
        try: stat = open(f"/proc/{other}/stat").read().rsplit(")", 1)[1].split()
        except OSError: continue
        if int(stat[1]) == pid and stat[0] != "Z": found.append(int(other))
    return found

def alive(pid):
    try: return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False

def until(true, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true(): return True
        time.sleep(.05)
    return False

@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_is_left(tmp_path, number):
    (tmp_path/"parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path/"parent.py")], stdout=subprocess.PIPE)
    # two workers and the process that looks after shared resources
    try: assert until(lambda: len(children(parent.pid)) >= 3), children(parent.pid)
    except AssertionError:
        parent.kill()
        raise
    left = children(parent.pid)
    time.sleep(.5)
    parent.send_signal(number)
    parent.wait(30)
    ended = until(lambda: not any(map(alive, left)))
    for p in filter(alive, left): os.kill(p, signal.SIGKILL)
    assert ended
