"""Consensus ADMM reaches the optimum of the lasso that one machine finds, with and without waiting."""

from __future__ import annotations

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.training import convexity
from tests.training.reference import BATCH, assert_close, data, mlp, mlp_loss

REPLICAS, ROWS, COLUMNS = 3, 20, 6
RNG = np.random.default_rng(3)
A = RNG.normal(size=(REPLICAS * ROWS, COLUMNS)).astype(np.float32)
TRUE = np.array([2.0, 0.0, -1.5, 0.0, 0.0, 1.0])
B = (A @ TRUE + 0.1 * RNG.normal(size=len(A))).astype(np.float32)
SOURCE, PARAMS = {"a": A, "b": B}, {"x": jnp.zeros(COLUMNS)}
L1, RHO, EVERY, RATE = 0.3, 1.0, 8, 0.2


def loss(params: Any, batch: Any) -> Any:
    return 0.5 * jnp.mean((batch["a"] @ params["x"] - batch["b"]) ** 2)


def shrunk(x: np.ndarray, by: float) -> np.ndarray:
    return np.sign(x) * np.maximum(np.abs(x) - by, 0)


def serial_lasso() -> np.ndarray:
    """One coordinate at a time, each to its optimum."""
    a, b, x = A.astype(np.float64), B.astype(np.float64), np.zeros(COLUMNS)
    for _ in range(500):
        for j in range(COLUMNS):
            rest = b - a @ x + a[:, j] * x[j]
            x[j] = shrunk(np.asarray(a[:, j] @ rest / len(a)), L1) / (a[:, j] @ a[:, j] / len(a))
    return x


def rounds(count: int) -> np.ndarray:
    """ADMM as in the book, in scaled form, where a replica minimises with some steps of gradient descent."""
    x, u, z = np.zeros((REPLICAS, COLUMNS)), np.zeros((REPLICAS, COLUMNS)), np.zeros(COLUMNS)
    shards = [(A[i : i + ROWS].astype(np.float64), B[i : i + ROWS]) for i in range(0, len(A), ROWS)]
    for _ in range(count):
        for i, (a, b) in enumerate(shards):
            for _ in range(EVERY):
                x[i] -= RATE * (a.T @ (a @ x[i] - b) / ROWS + RHO * (x[i] - z + u[i]))
        u += x - z
        z = shrunk((x + u).mean(0), L1 / RHO)
        # the dual variables of the next round begin from the consensus of this one
    return z


def fit(cluster: Any, policy: fm.Policy, count: int, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=cluster, replicas=REPLICAS, policies=policy, **options)
    return trainer.fit(PARAMS, SOURCE, batch_size=len(A), steps=EVERY * count, shuffle=False, progress=False)


def simulated(compute: Any) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(REPLICAS, compute, fm.sim.Network(1e-3, 1e9))


def test_rounds_equal_the_loop_and_reach_the_optimum(threads_cluster: fm.Cluster) -> None:
    policy = fm.policies.admm(RHO, every=EVERY, l1=L1)
    for count in (1, 2, 5):
        result = fit(simulated(fm.sim.LogNormal(0.1, 0.5)), policy, count)
        assert_close(result.params["x"], rounds(count).astype(np.float32))
    result = fit(threads_cluster, policy, 40)
    np.testing.assert_allclose(result.params["x"], serial_lasso(), atol=2e-3)
    assert (np.asarray(result.params["x"])[[1, 3, 4]] == 0).all(), "the numbers that the penalty makes 0 are 0"


def test_the_optimum_is_reached_without_waiting(threads_cluster: fm.Cluster) -> None:
    """The consensus is updated at two of three reports, and no replica is more than three rounds ahead."""
    policy = fm.policies.admm(RHO, 2, 3 * EVERY, EVERY, l1=L1)
    slow = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.3), workers=(2,), factor=3)
    for cluster, options in ((threads_cluster, {"delays": {"worker:2": 0.004}}), (simulated(slow), {})):
        result = fit(cluster, policy, 60, **options)
        np.testing.assert_allclose(result.params["x"], serial_lasso(), atol=5e-3)


def test_a_next_fit_begins_without_dual_variables(threads_cluster: fm.Cluster) -> None:
    policy = fm.policies.admm(RHO, every=EVERY, l1=L1)
    trainer = fm.Trainer(loss, optax.sgd(RATE), cluster=threads_cluster, replicas=REPLICAS, policies=policy)
    options: dict[str, Any] = {"batch_size": len(A), "shuffle": False, "progress": False}
    first = trainer.fit(PARAMS, SOURCE, steps=EVERY * 3, **options)
    second = trainer.fit(first.params, SOURCE, opt_state=first.opt_state, steps=EVERY * 40, **options)
    np.testing.assert_allclose(second.params["x"], serial_lasso(), atol=2e-3)


@pytest.mark.parametrize(
    ("knobs", "nearest"),
    [
        ({"payload": fm.Gradient()}, r"use payload=Delta\(\)"),
        ({"payload": fm.Delta(0.5)}, "leave alpha, delay and pull out"),
        ({"every": fm.Every(4, delay=1)}, "leave alpha, delay and pull out"),
        ({"quorum": fm.Quorum(0.5)}, "staleness=1 or more"),
        ({"filters": (fm.filters.top_k(0.1),)}, r"with_error_feedback\(\)"),
    ],
)
def test_what_consensus_cannot_do_is_refused(knobs: dict[str, Any], nearest: str) -> None:
    with pytest.raises(fm.PolicyError, match=nearest):
        fm.Policy(**{"every": 4, "payload": fm.Delta(), "apply": fm.Consensus(1.0)} | knobs)


@pytest.mark.parametrize("rho", [0, -1, float("inf"), "one"])
def test_a_rho_that_pulls_nowhere_is_refused(rho: Any) -> None:
    with pytest.raises(fm.PolicyError, match="rho"):
        fm.Consensus(rho)


def test_a_loss_that_is_not_convex_is_told_before_the_fit(threads_cluster: fm.Cluster) -> None:
    for policy, why in ((fm.policies.admm(1.0), "consensus ADMM"), (fm.policies.average_once(), "may be worse")):
        trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2, policies=policy)
        with pytest.warns(fm.FlowmlWarning, match=f"mlp_loss is not convex: .*{why}"):
            trainer.fit(mlp(), data(), batch_size=BATCH, steps=1)


def test_parameters_that_are_too_many_for_its_vectors_are_not_looked_at(
    threads_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convexity, "MOST_BYTES", 0)
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2, policies=fm.policies.average_once()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=1)
