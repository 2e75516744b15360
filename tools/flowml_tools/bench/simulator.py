"""Measures the simulator: whole fits of many workers without arithmetic: their time, events a second and memory.

One small layer; compute times are log-normal. The plan is compiled before the measurement begins. The goal for
1,000,000 machines over 10 steps is 10 minutes and 16 GiB, with a quorum inside each site of about as many machines as
there are sites, and one of sites. Fewer machines are measured, and the goal is divided by the number of machines;
`--machines 1000000` measures all of them, which takes about a quarter of an hour.

Each fit runs in turn as machine code, if that can be compiled here, and as Python. Both do the same events. With more
machines than usual only one of them is measured.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from flowml_tools.bench.peak import Peak
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import tell

SUMMARY = "fits of 10,000 simulated workers over 100 steps, without arithmetic, as machine code and as Python"
REPEATS = 1
WORKERS, STEPS = 10_000, 100
TIME, RATE = Goal("at most", 60.0, of="value"), Goal("at least", 1e5, of="value")
MACHINES, FEW_STEPS = 20_000, 10
MACHINE_TIME, MACHINE_BYTES = Goal("at most", 600 / 1e6, of="value"), Goal("at most", 16 * 2**30 / 1e6, of="value")
"""For each of 1,000,000 machines."""
_PYTHON = "Python"


def rows(
    repeats: int | None,
    workers: int = WORKERS,
    steps: int = STEPS,
    machines: int | None = None,
    few_steps: int = FEW_STEPS,
    jobs: int | None = None,
    *,
    compiles: bool | None = None,
) -> list[Row]:
    """`compiles`: whether to measure machine code too (default: if it can be compiled here)."""
    import flowml as fm
    from flowml_runtime.sim.native.kit import what_is_missing

    kinds = [False, True] if (what_is_missing() is None if compiles is None else compiles) else [False]
    count = repeats or REPEATS
    many = machines or MACHINES
    found = _each(many, few_steps, jobs, kinds if many <= MACHINES else kinds[-1:])
    for name, policy in {"every replica": fm.policies.synchronous(), "quorum(0.75)": fm.policies.quorum(0.75)}.items():
        seconds: dict[bool, list[float]] = {kind: [] for kind in kinds}
        events: dict[bool, list[float]] = {kind: [] for kind in kinds}
        for number in range(count):
            for kind in kinds:
                tell(f"simulator: {name}, {'compiled' if kind else _PYTHON}, {number + 1} of {count}")
                taken, happened = measure(policy, workers, steps, jobs, compiled=kind)
                seconds[kind].append(taken)
                events[kind].append(happened / taken)
        title = f"{workers} workers × {steps} steps, {name}"
        found += [_row(title, "s", seconds, TIME), _row(f"{title}, events", "1/s", events, RATE)]
    return found


def _row(title: str, unit: Any, found: dict[bool, list[float]], goal: Goal) -> Row:
    """Machine code beside Python, or one of them alone."""
    if False not in found:
        return Row(title, unit, Sample(tuple(found[True])), Peer("Python not measured"), goal)
    python = Sample(tuple(found[False]))
    if True not in found:
        return Row(title, unit, python, Peer("not compiled"), goal)
    return Row(title, unit, Sample(tuple(found[True])), Peer(_PYTHON, python), goal)


def _each(machines: int, steps: int, jobs: int | None, kinds: list[bool]) -> list[Row]:
    """The time and memory of a fit with many machines, with those of its plan, for each machine. Each fit has a process
    of its own, because what an earlier one leaves in memory would hide what it takes."""
    sites = math.isqrt(machines)
    seconds: dict[bool, list[float]] = {}
    nbytes: dict[bool, list[float]] = {}
    for kind in kinds:
        tell(f"simulator: {machines} machines in {sites} sites, {'compiled' if kind else _PYTHON}")
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            taken, most = pool.submit(_alone, sites, machines, steps, jobs, kind).result()  # no deadline: it ends
        seconds[kind], nbytes[kind] = [taken / machines], [most / machines]
    title = f"{machines} machines × {steps} steps with their plan, quorum 0.75 in {sites} sites, 0.9 of sites, each"
    return [
        _row(title, "s", seconds, MACHINE_TIME),
        _row(f"{title}, memory", "bytes", nbytes, MACHINE_BYTES),
    ]


def _alone(sites: int, machines: int, steps: int, jobs: int | None, compiled: bool) -> tuple[float, int]:
    """The seconds of a fit with its plan, and the bytes."""
    # imports, and compiles what does not depend on the number of machines
    measure(hierarchical(2), 8, steps, jobs, compiled=compiled)
    with Peak() as before:
        pass
    with Peak() as peak:
        began = time.perf_counter()
        measure(hierarchical(sites), machines, steps, jobs, compiled=compiled)
        seconds = time.perf_counter() - began
    return seconds, max(peak.nbytes - before.nbytes, 0)  # few machines may fit into what was free


def hierarchical(sites: int) -> Any:
    """A quorum inside each site, and one of sites."""
    import flowml as fm

    inside = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites, fm.Quorum(0.75))
    return fm.Policy(topology=inside, quorum=fm.Quorum(0.9))


def measure(
    policy: Any, workers: int, steps: int, jobs: int | None = None, *, compiled: bool = False
) -> tuple[float, int]:
    """The seconds of a fit, and the number of its events."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    examples = workers * 2
    params = {"w": jnp.ones(4)}
    source = {"x": np.zeros((examples, 4), np.float32), "y": np.zeros(examples, np.float32)}
    models = fm.sim.LogNormal(mean_s=0.1, sigma=0.3), fm.sim.Network(latency_s=1e-3, bytes_per_s=1e9)
    cluster = fm.SimulatedCluster(workers, *models, arithmetic=False, jobs=jobs, compiled=compiled)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers, policies=policy)
    trainer.plan(params, {"x": source["x"][:workers], "y": source["y"][:workers]})
    began = time.perf_counter()
    result = trainer.fit(params, source, batch_size=workers, steps=steps, shuffle=False, progress=False)
    assert result.events is not None
    return time.perf_counter() - began, result.events
