"""With a staleness and `every=Every(push, pull)` gradients are of parameters that are taken every `pull` steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEPS, RATE = 12, 0.05
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
Y = (X @ np.random.default_rng(1).normal(size=(6, 3))).astype(np.float32)
SOURCE = {"x": np.tile(X, (16, 1)), "y": np.tile(Y, (16, 1))}  # each work item has the same four examples
PARAMS = {"w": np.zeros((6, 3), np.float32)}
SECONDS = (0.1, 0.137123, 0.171317, 0.291719)
RHYTHMS = [(1, 4), (2, 4), (4, 2), (3, 3)]


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def gradient(w: np.ndarray) -> np.ndarray:
    return 2 * X.T @ (X @ w - Y) / Y.size


class Naive:
    """A home that applies on arrival, and replicas that push and take at their own steps."""

    def __init__(self, replicas: int, push: int, pull: int) -> None:
        self.home = PARAMS["w"].astype(np.float64)
        self.taken = [self.home] * replicas
        self.sums: list[list[np.ndarray]] = [[] for _ in range(replicas)]
        self.push, self.pull = push, pull

    def step(self, replica: int, number: int, last: bool) -> None:
        """The end of step `number` of a replica, from 1."""
        self.sums[replica].append(gradient(self.taken[replica]))
        if number % self.push == 0 or last:
            self.home = self.home - RATE * np.mean(self.sums[replica], axis=0)
            self.sums[replica] = []
        if number % self.pull == 0:
            self.taken[replica] = self.home


def fit(cluster: Any, replicas: int, policy: fm.Policy) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=replicas, policies=policy)
    return trainer.fit(PARAMS, SOURCE, batch_size=4 * replicas, steps=STEPS, shuffle=False, progress=False)


@pytest.mark.parametrize(("push", "pull"), RHYTHMS)
def test_one_replica_on_a_real_worker(threads_cluster: fm.Cluster, push: int, pull: int) -> None:
    result = fit(threads_cluster, 1, fm.Policy(staleness=fm.UNBOUNDED, every=fm.Every(push, pull)))
    naive = Naive(1, push, pull)
    for number in range(1, STEPS + 1):
        naive.step(0, number, number == STEPS)
    np.testing.assert_allclose(result.params["w"], naive.home, atol=1e-5)


@pytest.mark.parametrize(("push", "pull"), RHYTHMS)
def test_replicas_of_different_speed_in_virtual_time(push: int, pull: int) -> None:
    compute = fm.sim.Recorded([[s] for s in SECONDS])
    cluster = fm.SimulatedCluster(4, compute, fm.sim.Network(1e-6, 1e12))
    result = fit(cluster, 4, fm.Policy(staleness=fm.UNBOUNDED, every=fm.Every(push, pull)))
    steps = [tally.used for tally in result.ledger.replicas]
    naive = Naive(4, push, pull)
    ends = sorted((n * s, r, n) for r, s in enumerate(SECONDS) for n in range(1, steps[r] + 1))
    for _, replica, number in ends:
        naive.step(replica, number, number == steps[replica])
    np.testing.assert_allclose(result.params["w"], naive.home, atol=1e-5)


@pytest.mark.parametrize("staleness", [1, 3, 5])
@pytest.mark.parametrize(("push", "pull"), [(1, 4), (2, 4), (3, 4), (3, 2), (5, 3)])
def test_a_take_is_fresh_enough_for_the_last_step_that_uses_it(push: int, pull: int, staleness: int) -> None:
    """Also where replicas take more often than they push, and a take is for the steps before and after a push."""
    every = fm.Every(push, pull)
    for clock in range(0, 40, pull):
        pushed = clock // push * push
        for later in range(clock, clock + pull):
            bound = later // push * push - staleness
            assert min(bound, pushed) <= every.needed(clock, staleness) <= pushed


def test_a_bound_is_kept_by_replicas_that_take_seldom() -> None:
    """With a bound of 3 and takes every 4 steps, replicas meet at each take, so a slow one holds back all others."""
    compute = fm.sim.Straggler(fm.sim.Constant(0.1), factor=5, workers=(1,))
    cluster = fm.SimulatedCluster(2, compute, fm.sim.Network(1e-6, 1e12), arithmetic=False)
    result = fit(cluster, 2, fm.Policy(staleness=3, every=fm.Every(1, 4)))
    (found,) = result.staleness.values()
    assert max(found) == 2 * 4 - 1
    assert result.virtual_seconds > 0.9 * 0.5 * result.ledger.replicas[1].used > 4
