"""Sandblaster L-BFGS: a serial run's result, with a worker that is held up, and small messages of the coordinator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml_runtime.methods import Portions, Vectors, lbfgs

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 6))
SOURCE = {"x": X, "y": np.sign(X @ RNG.normal(size=6) + 0.3 * RNG.normal(size=48))}
START = {"w": np.zeros(6), "b": np.zeros(1)}
GATE = threading.Event()


def loss(params: Any, batch: Any) -> Any:
    margin = batch["y"] * (batch["x"] @ params["w"] + params["b"][0])
    return jnp.mean(jnp.logaddexp(0.0, -margin)) + 0.05 * (jnp.sum(params["w"] ** 2) + params["b"][0] ** 2)


def hold(x: Any) -> Any:
    """Holds up what worker 2 computes until GATE is set."""
    if threading.current_thread().name.startswith("worker:2/"):
        GATE.wait(60)
    return x


def held_loss(params: Any, batch: Any) -> Any:
    x = jax.pure_callback(hold, jax.ShapeDtypeStruct(batch["x"].shape, batch["x"].dtype), batch["x"])
    return loss(params, {"x": x, "y": batch["y"]})


@pytest.fixture
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=3) as found:
        yield found


def optimum() -> Any:
    """By Newton's method on the whole problem."""
    flat = np.zeros(7)

    def of(v: Any) -> Any:
        return loss({"w": v[:6], "b": v[6:]}, SOURCE)

    for _ in range(30):
        flat = flat - np.linalg.solve(jax.hessian(of)(flat), jax.grad(of)(flat))
    return flat


def test_it_reaches_the_serial_optimum(cluster: fm.Cluster) -> None:
    with jax.enable_x64(True):
        found = lbfgs(loss, START, SOURCE, cluster, steps=12, memory=5, portions=1)
        np.testing.assert_allclose(np.concatenate([found.params["w"], found.params["b"]]), optimum(), atol=1e-6)
    assert list(found.losses) == sorted(found.losses, reverse=True)


def test_a_worker_that_is_held_up_is_not_waited_for(cluster: fm.Cluster) -> None:
    """The other workers compute its portion too. Its result comes after the evaluation, and changes nothing."""
    GATE.clear()
    vectors = Vectors(START, cluster)
    start = vectors.put(START)
    evaluate = Portions(held_loss, SOURCE, vectors, cluster, portions=2, copies=True)
    expected = jax.value_and_grad(loss)(START, SOURCE)
    try:
        for _ in range(2):
            value, gradient = evaluate(start)
            assert value == pytest.approx(float(expected[0]), rel=1e-5)
            np.testing.assert_allclose(vectors.get(gradient)["w"], expected[1]["w"], rtol=1e-4, atol=1e-6)
        assert evaluate.duplicates >= 1
    finally:
        GATE.set()
    value, _ = evaluate(start)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)


def test_operations_of_vectors_are_those_of_arrays(cluster: fm.Cluster) -> None:
    vectors = Vectors(START, cluster)
    trees = [{"w": RNG.normal(size=6).astype(np.float32), "b": RNG.normal(size=1).astype(np.float32)} for _ in range(2)]
    x, y = map(vectors.put, trees)
    assert len(set(vectors.homes)) == 2, "the pieces are on different workers"
    assert [str(piece.device).split("/")[0] for piece in x] == vectors.homes
    flat = [np.concatenate([tree["b"], tree["w"]]) for tree in trees]
    assert vectors.dot(x, y) == pytest.approx(float(flat[0] @ flat[1]), rel=1e-5)
    both = vectors.get(vectors.combine(2.0, x, -3.0, y))
    np.testing.assert_allclose(both["w"], 2 * trees[0]["w"] - 3 * trees[1]["w"], rtol=1e-5)
    added = vectors.get(vectors.axpy(2.0, x, y))
    np.testing.assert_allclose(added["w"], 2 * trees[0]["w"] + trees[1]["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vectors.get(vectors.scale(0.5, x))["b"], 0.5 * trees[0]["b"], rtol=1e-6)


def test_what_does_not_divide_says_so(cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="give a multiple of 15"):
        lbfgs(loss, START, SOURCE, cluster, steps=1, portions=5)
    with pytest.raises(ValueError, match="memory"):
        lbfgs(loss, START, SOURCE, cluster, steps=1, memory=0)


def test_a_loss_that_is_not_one_number_is_named(cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match=r"loss returns float32\[16\]; give a function that returns the mean"):
        lbfgs(lambda params, batch: batch["x"] @ params["w"], START, SOURCE, cluster, steps=1, portions=1)
    with pytest.raises(ValueError, match=r"loss returns .*; give a function that returns the mean"):
        lbfgs(lambda params, batch: (loss(params, batch), 0.0), START, SOURCE, cluster, steps=1, portions=1)
