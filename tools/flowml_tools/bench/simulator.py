"""Measures the simulator: whole fits of many workers without arithmetic: their time, events a second and memory.

One small layer; compute times are log-normal. The plan is compiled before the measurement begins. The goal for
1,000,000 machines over 10 steps is 10 minutes and 16 GiB, with a quorum inside each site of about as many machines as
there are sites, and one of sites. Fewer machines are measured, and the goal is divided by the number of machines.
"""

from __future__ import annotations

import math
import time
from typing import Any

from flowml_tools.bench.peak import Peak
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import tell

SUMMARY = "fits of 10,000 simulated workers over 100 steps, without arithmetic"
REPEATS = 1
WORKERS, STEPS = 10_000, 100
TIME, RATE = Goal("at most", 60.0, of="value"), Goal("at least", 1e5, of="value")
MACHINES, FEW_STEPS = 20_000, 10
MACHINE_TIME, MACHINE_BYTES = Goal("at most", 600 / 1e6, of="value"), Goal("at most", 16 * 2**30 / 1e6, of="value")
"""For each of 1,000,000 machines."""


def rows(
    repeats: int | None,
    workers: int = WORKERS,
    steps: int = STEPS,
    machines: int = MACHINES,
    few_steps: int = FEW_STEPS,
    jobs: int | None = None,
) -> list[Row]:
    import flowml as fm

    count = repeats or REPEATS
    found = _each(machines, few_steps, jobs)  # first: what later fits leave in memory would hide it
    for name, policy in {"every replica": fm.policies.synchronous(), "quorum(0.75)": fm.policies.quorum(0.75)}.items():
        seconds: list[float] = []
        events: list[float] = []
        for number in range(count):
            tell(f"simulator: {name}, {number + 1} of {count}")
            taken, happened = measure(policy, workers, steps, jobs)
            seconds.append(taken)
            events.append(happened / taken)
        title = f"{workers} workers × {steps} steps, {name}"
        found.append(Row(title, "s", Sample(tuple(seconds)), Peer("no peer"), TIME))
        found.append(Row(f"{title}, events", "1/s", Sample(tuple(events)), Peer("no peer"), RATE))
    return found


def _each(machines: int, steps: int, jobs: int | None) -> list[Row]:
    """The time and memory of a fit with many machines, with those of its plan, for each machine."""
    sites = math.isqrt(machines)
    tell(f"simulator: {machines} machines in {sites} sites")
    measure(hierarchical(2), 8, steps, jobs)  # imports, and compiles what does not depend on their number
    with Peak() as before:
        pass
    with Peak() as peak:
        began = time.perf_counter()
        measure(hierarchical(sites), machines, steps, jobs)
        seconds = time.perf_counter() - began
    nbytes = peak.nbytes - before.nbytes
    title = f"{machines} machines × {steps} steps with their plan, quorum 0.75 in {sites} sites, 0.9 of sites, each"
    return [
        Row(title, "s", Sample((seconds / machines,)), Peer("no peer"), MACHINE_TIME),
        Row(f"{title}, memory", "bytes", Sample((nbytes / machines,)), Peer("no peer"), MACHINE_BYTES),
    ]


def hierarchical(sites: int) -> Any:
    """A quorum inside each site, and one of sites."""
    import flowml as fm

    inside = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites, fm.Quorum(0.75))
    return fm.Policy(topology=inside, quorum=fm.Quorum(0.9))


def measure(policy: Any, workers: int, steps: int, jobs: int | None = None) -> tuple[float, int]:
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
    cluster = fm.SimulatedCluster(workers, *models, arithmetic=False, jobs=jobs)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers, policies=policy)
    trainer.plan(params, {"x": source["x"][:workers], "y": source["y"][:workers]})
    began = time.perf_counter()
    result = trainer.fit(params, source, batch_size=workers, steps=steps, shuffle=False, progress=False)
    assert result.events is not None
    return time.perf_counter() - began, result.events
