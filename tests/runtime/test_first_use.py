"""What happens once a process, and in a cluster of threads happens on several of them at once."""

from __future__ import annotations

import os
import subprocess
import sys

FIRST_DECODE = """
import sys, threading
from flowml.plan import Estimate, Plan
data = Plan("f", (), (), (), (), {}, (), (), (), (), Estimate(0.0, {}, 0, 0.0)).encode()
sys.setswitchinterval(1e-5)
go = threading.Event()
done = []
def decode(delay):
    go.wait()
    for _ in range(delay): pass
    done.append(Plan.decode(data).name)
threads = [threading.Thread(target=decode, args=(200 * n,)) for n in range(4)]
for t in threads: t.start()
go.set()
for t in threads: t.join()
print(len(done))
"""
PROCESSES = 4
"""Each gets one try: without care about half of them crash."""


def test_several_threads_decode_the_first_plan_at_once() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for _ in range(PROCESSES):
        command = [sys.executable, "-c", FIRST_DECODE]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
        assert (ended.returncode, ended.stdout) == (0, "4\n"), ended.stderr
