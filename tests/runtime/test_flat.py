"""Ten thousand steps leave memory, descriptors and threads as they were after the first few hundred."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import psutil

import flowml as fm
from flowml_runtime.execution.future import Future
from tests.stalls import processes_of_this_test

STEPS = 10_000
WARM_UP = 1_500
"""Until allocators, caches and the pool of shared memory have reached their size."""

ALLOWED_BYTES = 6 * 2**20
"""For any number of steps, so a leak of 630 bytes a step shows."""

LENGTH = 2**15
"""128 KiB: large enough to travel in shared memory."""


def held(processes: Sequence[psutil.Process]) -> dict[int, tuple[int, int, int]]:
    """pid -> (bytes of its own and its share of shared ones, descriptors, threads)."""
    gc.collect()
    return {p.pid: (p.memory_full_info().pss, p.num_fds(), p.num_threads()) for p in processes}


def test_ten_thousand_steps_hold_no_more_than_the_first() -> None:
    def fn(x: Any) -> tuple[jax.Array, jax.Array]:
        with fm.layer("a"):
            y = x + 1
        with fm.layer("b"):
            z = y * 2
        with fm.layer("c"):
            return z.sum(), z[:4]

    x = np.zeros(LENGTH, np.float32)
    with fm.Cluster.local(workers=2) as cluster:
        program = fm.dataflow(fn, cluster=cluster, placement={"[ac]": "worker:0", "b": "worker:1"})

        def run(steps: int) -> None:
            waiting: list[Future[tuple[jax.Array, jax.Array]]] = []
            for n in range(steps):
                if n % 3:  # some alone, most with others in flight
                    waiting.append(program.submit(x))
                    if len(waiting) < 5:
                        continue
                else:
                    assert float(program(x)[0]) == 2 * LENGTH
                for future in waiting:
                    assert float(future.result(timeout=60)[0]) == 2 * LENGTH
                waiting.clear()
            for future in waiting:
                future.result(timeout=60)

        run(WARM_UP)
        processes = [psutil.Process(), *processes_of_this_test()]
        before = held(processes)
        run(STEPS)
        after = held(processes)
    for pid, (memory, descriptors, threads) in before.items():
        # A pool may have a slot more by chance, and a library start a thread late. A leak would be thousands.
        assert after[pid][1] <= descriptors + 2, "descriptors"
        assert after[pid][2] <= threads + 2, "threads"
        assert after[pid][0] - memory < ALLOWED_BYTES, f"{(after[pid][0] - memory) / 2**20:.1f} MiB more"
