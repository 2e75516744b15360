"""A storm: one fit loses workers again and again. It recovers within seconds each time, and its ledger adds up.

`make storm` kills 200 processes in one fit under each policy, and `make test` a few. Every tenth time two are killed at
once. The time of a recovery is the longest time between two new steps after a kill. It includes that the loss is
noticed, that another process starts and loads the plan, and that the steps since the snapshot are done again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.test_kills import EVERY_POLICY, EXACT, check_same, check_steps, check_weights
from tests.training.test_lost_and_replaced import POLICIES, REPLICAS

KILLS = int(os.environ.get("FLOWML_STORM", "10"))
CHOSEN = EVERY_POLICY if "FLOWML_STORM" in os.environ else EVERY_POLICY[-1:]
APART = 20
"""New steps from a kill to the next one."""
CALM = 100
"""Steps before the first kill. The first snapshot is taken within them."""
MOST_DELAY_S = 0.005
LIMIT_S = 5.0
WORKERS = [f"worker:{i}" for i in range(REPLICAS)]


class Storm:
    """A callback that kills workers, and notes when it sees each step first."""

    def __init__(self, cluster: fm.Cluster) -> None:
        self._cluster = cluster
        self._random = random.Random(0)
        self._victims: list[str] = []
        self.killed = 0
        self._times: list[float] = []
        """When each step was seen."""
        self._kills: list[tuple[int, float]] = []
        """At which step and when there was a kill."""

    def __call__(self, record: dict[str, Any]) -> None:
        self._times.append(time.monotonic())
        step = record["step"]
        if self.killed < KILLS and step >= CALM and step % APART == 0:
            time.sleep(self._random.uniform(0, MOST_DELAY_S))  # the workers go on, so that it comes at any moment
            self._kill(2 if len(self._kills) % 10 == 9 else 1)
            self._kills.append((step, time.monotonic()))

    def _kill(self, workers: int) -> None:
        left = [worker for worker in WORKERS if worker not in self._victims]  # those before may not be back yet
        self._victims = self._random.sample(left, min(workers, KILLS - self.killed))
        for worker in self._victims:
            os.kill(self._cluster.pids[worker], signal.SIGKILL)
            self.killed += 1

    def recoveries(self) -> np.ndarray:
        """By kill how many seconds it took."""
        each = [[at, *self._times[step + 1 : step + 1 + APART]] for step, at in self._kills]
        return np.array([max(b - a for a, b in pairwise(times)) for times in each])


def train(cluster: fm.Cluster, policy: str, **options: Any) -> fm.TrainingResult:
    """A fit whose parameters show the weight with which each example was applied."""
    steps = CALM + APART * (KILLS + 1)

    def loss(params: Any, batch: Any) -> Any:
        return -sum(jnp.mean(params[layer]["w"][batch]) for layer in "abc")

    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=POLICIES[policy])
    params = {layer: {"w": jnp.zeros(steps * REPLICAS)} for layer in "abc"}
    source = np.arange(steps * REPLICAS)
    found = trainer.fit(params, source, batch_size=REPLICAS, steps=steps, progress=False, **options)
    check_steps(found, steps)
    return found


def check_means(found: fm.TrainingResult) -> None:
    """Each step applied one mean. A record may go without a late report, so records do not say of how many."""
    layers = [np.asarray(found.params[layer]["w"]) for layer in "abc"]
    for weights in layers:
        np.testing.assert_array_equal(weights, layers[0], "all layers have the same items")
    applied = layers[0][layers[0] != 0]
    assert len(applied) == found.ledger.used + found.ledger.folded
    assert set(np.round(1 / applied)) <= {3, 4}
    np.testing.assert_allclose(applied.sum(dtype=np.float64), len(found.history), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:worker.+ (was|were) lost")
@pytest.mark.parametrize("policy", CHOSEN)
def test_a_storm_of_kills(policy: str) -> None:
    with fm.Cluster.local(workers=REPLICAS) as cluster:
        storm = Storm(cluster)
        found = train(cluster, policy, on_loss="replace", callbacks=[storm])
        whole = train(cluster, policy) if policy in EXACT else None
    if whole is not None:
        check_same(found, whole)
    elif policy == "quorum":
        check_means(found)
    else:
        check_weights(found, policy)
    assert (storm.killed, sum(len(loss.workers) for loss in found.losses)) == (KILLS, KILLS)
    starts = [loss.resumed_at for loss in found.losses]
    assert starts == sorted(starts)
    assert starts[0] > 0, "it never goes back to the first step"
    times = storm.recoveries()
    p50, p95 = np.quantile(times, [0.5, 0.95])
    print(f"{policy}: {KILLS} kills, recovery p50 {p50:.2f} s, p95 {p95:.2f} s, longest {times.max():.2f} s")
    assert p95 <= LIMIT_S
