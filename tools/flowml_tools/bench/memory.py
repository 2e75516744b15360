"""Measures a worker's memory without arrays against a process that imported JAX and ran one jitted step.

Resident memory counts in full the pages that forked workers share; unique memory counts only a worker's own pages.
Which one is fair depends on the number of workers on a machine, so both have a row. Every repetition starts new
processes.
"""

from __future__ import annotations

from typing import NamedTuple

from flowml_tools.bench.peers import peer
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import tell

SUMMARY = "memory of a worker after joining and after a step; against a bare JAX process"
REPEATS = 3
GOAL = Goal("at most", 1.1)


class Held(NamedTuple):
    """The memory of a process at one moment, in bytes."""

    resident: float
    unique: float


class Life(NamedTuple):
    """The memory of one process before and after its first step."""

    idle: Held
    stepped: Held


def rows(repeats: int | None) -> list[Row]:
    count = repeats or REPEATS
    ours: list[Life] = []
    bare: list[Life] = []
    for number in range(count):
        tell(f"memory: {number} of {count}")
        ours.append(_worker())
        bare.append(_bare())
    return [
        _row("joined, resident", [life.idle.resident for life in ours], [life.idle.resident for life in bare]),
        _row(
            "after a step, resident", [life.stepped.resident for life in ours], [life.stepped.resident for life in bare]
        ),
        _row("after a step, unique", [life.stepped.unique for life in ours], [life.stepped.unique for life in bare]),
    ]


def _row(name: str, ours: list[float], bare: list[float]) -> Row:
    return Row(name, "bytes", Sample(tuple(ours)), Peer("bare JAX process", Sample(tuple(bare))), GOAL)


def _worker() -> Life:
    """The first of two workers. Only this worker runs the step."""
    import jax

    import flowml as fm
    from flowml_tools.bench.functions import example, several_products

    with fm.Cluster.local(workers=2) as cluster:
        pid = cluster.pids["worker:0"]
        idle = _held(pid)
        program = fm.dataflow(several_products, cluster=cluster, placement={"*": "worker:0"})
        jax.block_until_ready(program(example(256)))
        return Life(idle, _held(pid))


def _bare() -> Life:
    """A bare process on the cores of a worker, so that XLA's thread pools have the same size."""
    from flowml_runtime.environment.machine import cores, share_cores

    with peer("bare", cores=share_cores(cores(), 2)[0]) as process:
        process.read()
        idle = _held(process.pid)
        process.ask("step")
        return Life(idle, _held(process.pid))


def _held(pid: int) -> Held:
    import psutil

    info = psutil.Process(pid).memory_full_info()
    return Held(info.rss, info.uss)
