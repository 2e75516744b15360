"""A worker that is lost during a method: the error names it and the method, how far that was, and what to do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml_runtime.methods import Vectors, boost, lbfgs, trees

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 3)).astype(np.float32)
PARAMS = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch @ params["a"].T - 1) ** 4) + jnp.sum((params["b"] - 2) ** 4)


@pytest.fixture
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.local(workers=2) as found:
        yield found


def killing(process: int, call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, which ends the process before its call number `at`."""
    calls: list[None] = []

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == at:
            os.kill(process, signal.SIGKILL)
        return call(*args, **kwargs)

    return called


@pytest.mark.parametrize("worker", ["worker:0", "worker:1"])
def test_lbfgs_says_how_far_it_was(cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch, worker: str) -> None:
    monkeypatch.setattr(Vectors, "dot", killing(cluster.pids[worker], Vectors.dot, 4))
    with pytest.raises(fm.WorkerLostError) as caught:
        lbfgs(loss, PARAMS, X, cluster, steps=50, portions=2)
    said = str(caught.value)
    assert caught.value.worker == worker
    assert worker in said and "lbfgs had taken 1 of 50 steps" in said and "call it again" in said
    assert "_dots" not in said and "_combined" not in said and "fm.save" not in said


@pytest.mark.parametrize("split", ["rows", "features"])
def test_boost_says_how_far_it_was(cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch, split: Any) -> None:
    monkeypatch.setattr(trees, "Tree", killing(cluster.pids["worker:1"], trees.Tree, 3))
    with pytest.raises(fm.WorkerLostError) as caught:
        boost(X, X[:, 0] > 0, cluster, trees=500, split=split)
    said = str(caught.value)
    assert caught.value.worker == "worker:1"
    assert "worker:1 was lost" in said and " of 500 trees" in said and "call it again" in said and "partial" not in said


def test_vectors_say_to_put_them_again(cluster: fm.Cluster) -> None:
    vectors = Vectors(PARAMS, cluster)
    x, y = vectors.put(PARAMS), vectors.put(PARAMS)
    assert vectors.dot(x, y) == 10.0
    os.kill(cluster.pids["worker:1"], signal.SIGKILL)
    for call in (lambda: vectors.dot(x, y), lambda: vectors.get(vectors.axpy(1.0, x, y)), lambda: vectors.get(x)):
        with pytest.raises(fm.WorkerLostError, match=r"worker:1 .*put\(\) the vectors again") as caught:
            call()
        assert caught.value.worker == "worker:1" and "fm.save" not in str(caught.value)
