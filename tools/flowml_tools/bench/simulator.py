"""Measures the simulator: whole fits of many workers without arithmetic, in processor time and events a second.

One small layer; compute times are log-normal. The plan is compiled before the measurement begins.
"""

from __future__ import annotations

import time
from typing import Any

from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import tell

SUMMARY = "fits of 10,000 simulated workers over 100 steps, without arithmetic"
REPEATS = 1
WORKERS, STEPS = 10_000, 100
TIME, RATE = Goal("at most", 60.0, of="value"), Goal("at least", 1e5, of="value")


def rows(repeats: int | None, workers: int = WORKERS, steps: int = STEPS) -> list[Row]:
    import flowml as fm

    count = repeats or REPEATS
    found: list[Row] = []
    for name, policy in {"every replica": fm.policies.synchronous(), "quorum(0.75)": fm.policies.quorum(0.75)}.items():
        seconds: list[float] = []
        events: list[float] = []
        for number in range(count):
            tell(f"simulator: {name}, {number + 1} of {count}")
            taken, happened = measure(policy, workers, steps)
            seconds.append(taken)
            events.append(happened / taken)
        title = f"{workers} workers × {steps} steps, {name}"
        found.append(Row(title, "s", Sample(tuple(seconds)), Peer("no peer"), TIME))
        found.append(Row(f"{title}, events", "1/s", Sample(tuple(events)), Peer("no peer"), RATE))
    return found


def measure(policy: Any, workers: int, steps: int) -> tuple[float, int]:
    """The processor seconds of a fit, and the number of its events."""
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
    cluster = fm.SimulatedCluster(workers, *models, arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers, policies=policy)
    trainer.plan(params, {"x": source["x"][:workers], "y": source["y"][:workers]})
    began = time.process_time()
    result = trainer.fit(params, source, batch_size=workers, steps=steps, shuffle=False, progress=False)
    assert result.events is not None
    return time.process_time() - began, result.events
