"""Fits and calls for a long time on one cluster: memory, descriptors, threads and shared memory stay as they are.

`make soak` runs 20 minutes, `make soak SOAK=7200` two hours, and `make test` a few seconds. What is counted is that of
this process and of its workers, between fits. Memory grows at first, as caches fill; a line is laid through the second
half. Its slope says something about a leak after an hour or more, so only then it is checked.

The workers run without huge pages. With them the kernel makes whole pages of 2 MiB, at any time, of regions of the heap
that were used in part, although nothing was allocated.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

import flowml as fm
from flowml_runtime.environment import allocator
from tests.training.reference import BATCH, data, mlp, mlp_loss

SECONDS = float(os.environ.get("FLOWML_SOAK", "4"))
LEAST_FITS, SAMPLES = 4, 1000
CHECKED_S = 3600.0
MOST_SLOPE = 2**20 / 3600
"""Bytes of memory in a second: 1 MiB in an hour, of all processes."""
SPARE_DESCRIPTORS = SPARE_THREADS = 2
"""How many may be in use for a moment."""


def usage(processes: list[psutil.Process]) -> tuple[int, int, int, int]:
    """Bytes of memory, descriptors and threads of the processes, and the files in shared memory."""
    each = [(p.memory_info().rss, p.num_fds(), p.num_threads()) for p in processes]
    memory, descriptors, threads = (sum(column) for column in zip(*each, strict=True))
    return memory, descriptors, threads, len(list(Path("/dev/shm").iterdir()))


def test_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = allocator.environment()[allocator.VARIABLE]
    monkeypatch.setenv(allocator.VARIABLE, settings.replace("hugetlb=1", "hugetlb=0"))
    with fm.Cluster.local(workers=2) as cluster:
        step = fm.dataflow(lambda x: jnp.tanh(x @ x), cluster=cluster)
        trainers = [
            fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=2, policies=policy)
            for policy in (None, fm.policies.asynchronous(), fm.policies.diloco(4))
        ]
        processes = [psutil.Process(), *map(psutil.Process, cluster.pids.values())]
        began, seen, rounds = time.monotonic(), list[tuple[float, ...]](), 0
        while rounds < LEAST_FITS or time.monotonic() - began < SECONDS:
            for trainer in trainers:
                with TemporaryDirectory(dir=tmp_path) as folder:
                    checkpoint = fm.Checkpoint(folder, every_steps=10)
                    trainer.fit(mlp(), data(), batch_size=BATCH, steps=20, progress=False, checkpoint=checkpoint)
            for _ in range(20):
                step(np.eye(64, dtype=np.float32))
            rounds += 1
            if not seen or time.monotonic() - began - seen[-1][0] >= SECONDS / SAMPLES:  # what is noted grows too
                seen.append((time.monotonic() - began, *usage(processes)))
    half = np.array(seen[len(seen) // 2 :])
    at, memory, descriptors, threads, shared = half.T
    slope = float(np.polyfit(at, memory, 1)[0])
    first, last = half[0], half[-1]
    mib, an_hour = memory[-1] / 2**20, slope * 3600 / 2**20
    print(
        f"{rounds} rounds in {at[-1]:.0f} s: memory {mib:.0f} MiB, {an_hour:+.2f} MiB/h; "
        f"descriptors {first[2]:.0f} to {last[2]:.0f}, threads {first[3]:.0f} to {last[3]:.0f}"
    )
    assert descriptors[-1] <= descriptors[0] + SPARE_DESCRIPTORS
    assert threads[-1] <= threads[0] + SPARE_THREADS
    assert shared[-1] <= shared[0]
    assert at[-1] < CHECKED_S or slope < MOST_SLOPE
