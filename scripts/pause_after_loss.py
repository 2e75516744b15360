"""Measures how long the other replicas of an asynchronous fit have no step after one is killed.

    python scripts/pause_after_loss.py [--kills 5] [--policy downpour]

Each fit has four processes; one that is the home of no layer is killed by kill -9 in the middle of it. Printed are the
median time between two steps, and the longest in the second before each kill and after it, by the times of callbacks.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flowml as fm

STEPS, KILLED_AT, WITHIN_S = 600, 200, 1.0


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2)


def fit(cluster: fm.Cluster, policy: fm.Policy) -> tuple[float, float, float]:
    """The median time between two steps, the longest in the second before the kill, and after it, in seconds."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, 32)).astype(np.float32)
    source = {"x": x, "y": np.tanh(x @ rng.normal(size=(32, 4))).astype(np.float32)}
    params = {"a": jax.random.normal(jax.random.key(0), (32, 64)) / 6, "b": jnp.zeros((64, 4))}
    times: list[float] = []

    def tell(record: dict[str, Any]) -> None:
        times.append(time.perf_counter())
        if record["step"] == KILLED_AT:
            os.kill(cluster.pids["worker:2"], signal.SIGKILL)

    trainer = fm.Trainer(loss, optax.sgd(0.01), cluster=cluster, replicas=4, policies=policy)
    options: dict[str, Any] = {"batch_size": 64, "steps": STEPS, "callbacks": [tell], "progress": False}
    trainer.fit(params, source, on_loss="shrink", **options)
    gaps = np.diff(times)
    since = [(at - times[KILLED_AT], gap) for at, gap in zip(times, gaps, strict=False)]
    before, after = ([gap for at, gap in since if first <= at < first + WITHIN_S] for first in (-WITHIN_S, 0))
    return float(statistics.median(gaps)), max(before), max(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--policy", choices=["downpour", "asynchronous"], default="downpour")
    given = parser.parse_args()
    policy = fm.policies.downpour(2, 4) if given.policy == "downpour" else fm.policies.asynchronous()
    warnings.simplefilter("ignore", fm.FlowmlWarning)
    found: list[tuple[float, float, float]] = []
    with fm.Cluster.local(workers=4) as cluster:
        for _ in range(given.kills):
            found.append(fit(cluster, policy))
            cluster.bring_back(cluster.lost)
    usual, before, after = zip(*found, strict=True)
    print(f"{given.policy}: a step each {1e3 * statistics.median(usual):.1f} ms; {given.kills} kills")
    for when, longest in (("before", before), ("after", after)):
        print(f"longest time without a step {when} them: {', '.join(f'{1e3 * one:.0f}' for one in longest)} ms")


if __name__ == "__main__":
    main()
