"""Measures a quorum beside a worker that is suspended in bursts, as SIGSTOP or a CPU quota does.

One of four workers is stopped and continued again and again: for 0.3 s in each 0.6 s. It is the last one, which
computes a replica and is no home of a layer: a home that stands still holds up all. The quorum goes on with the three
others. The peer is the same fit with no worker stopped. Both sides have equal delays, long beside what a step computes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from flowml_tools.bench.rows import Goal, Peer, Row
from flowml_tools.bench.stragglers import PAUSE_S, REPLICAS, loss, problem
from flowml_tools.bench.timing import interleave

FIRST = 8
"""The steps before it are not measured."""
STEPS = 128
BURST_S = 0.3
GOAL = Goal("at most", 1.3)


def rows(repeats: int, steps: int = STEPS) -> list[Row]:
    import optax

    import flowml as fm

    delays = dict.fromkeys((f"worker:{i}" for i in range(REPLICAS)), PAUSE_S)
    with fm.Cluster.local(workers=REPLICAS) as cluster:
        trainer = fm.Trainer(
            loss,
            optax.adam(0.01),
            cluster=cluster,
            replicas=REPLICAS,
            policies=fm.policies.quorum(0.75),
            delays=delays,
        )

        def step_s(victim: str | None) -> float:
            params, train, _ = problem(0)
            with suspending(cluster, victim):
                found = trainer.fit(params, train, batch_size=64, steps=steps, progress=False)
            ends = [record["seconds"] for record in found.history]
            return (ends[-1] - ends[FIRST]) / (steps - 1 - FIRST)

        victim = f"worker:{REPLICAS - 1}"
        probes = [lambda: step_s(victim), lambda: step_s(None)]
        ours, peer = interleave("recovery, suspended", probes, repeats, warm_up=1)
    name = f"a worker stopped for {BURST_S:g} s in each {2 * BURST_S:g} s: step, quorum(0.75)"
    return [Row(name, "s", ours, Peer("no worker stopped", peer), GOAL)]


@contextmanager
def suspending(cluster: Any, victim: str | None) -> Generator[None]:
    """Stop the process of a worker in bursts, if one is given."""
    if victim is None:
        yield
        return
    over = threading.Event()

    def burst() -> None:
        while not over.is_set():
            os.kill(cluster.pids[victim], signal.SIGSTOP)
            over.wait(BURST_S)
            os.kill(cluster.pids[victim], signal.SIGCONT)
            over.wait(BURST_S)

    thread = threading.Thread(target=burst)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
