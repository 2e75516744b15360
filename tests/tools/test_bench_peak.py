"""The memory of a process with those that it has started."""

from __future__ import annotations

import subprocess
import sys

MIB = 2**20
SCRIPT = """
import os
from flowml_tools.bench.peak import Peak

with Peak() as before:
    pass
with Peak() as peak:
    held = bytearray(os.urandom(2**20)) * 128
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
os.close(theirs)
os.waitpid(pid, 0)
print(before.nbytes, peak.nbytes)
"""


def test_pages_that_two_processes_share_count_once() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    before, most = map(int, done.stdout.split())
    assert 110 * MIB < most - before < 200 * MIB
