"""A step may still run when its fit has ended. Nothing of it may reach the next fit."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, EXAMPLES, FEATURES, assert_same, data

SOURCE = data()
PARAMS = {"w": jnp.ones((FEATURES, 2))}
WAIT_S = 60.0
FIRST_FIT, SECOND_FIT = 1, 2
ENTERED, RELEASED = threading.Event(), threading.Event()
RUNNERS: list[threading.Thread] = []
"""The threads that run the steps of the first fit."""


def hold(x: np.ndarray, held: np.ndarray) -> np.ndarray:
    """In the first fit wait for the second; in the second wait until the first has run to its end."""
    if FIRST_FIT in held:
        ENTERED.set()
        assert RELEASED.wait(WAIT_S)
    elif SECOND_FIT in held:
        RELEASED.set()
        for runner in RUNNERS:
            runner.join(WAIT_S)
            assert not runner.is_alive()
    return x


@jax.custom_vjp
def held_gradient(leaf: Any, held: Any) -> Any:
    """The leaf. Its gradient passes through `hold`, in the last task of a step."""
    del held
    return leaf


def _backward(held: Any, gradient: Any) -> Any:
    shape = jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)
    return jax.pure_callback(hold, shape, gradient, held), np.zeros(held.shape, jax.dtypes.float0)


held_gradient.defvjp(lambda leaf, held: (leaf, held), _backward)


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def held_loss(params: Any, batch: Any) -> Any:
    return loss({"w": held_gradient(params["w"], batch["held"])}, batch)


def test_the_gradients_of_a_fit_that_has_ended_do_not_reach_the_next_one(threads_cluster: fm.Cluster) -> None:
    """Step 1 of the first fit goes on in the middle of step 0 of the second, which has no version 1 yet."""

    def refuse(record: dict[str, Any]) -> None:
        assert ENTERED.wait(WAIT_S)
        RUNNERS.extend(t for t in threading.enumerate() if t.name.endswith(" run 0") and "cpu:0" in t.name)
        raise KeyError(record["step"])

    def marked(step: int, fit: int) -> dict[str, np.ndarray]:
        return {**SOURCE, "held": np.where(np.arange(EXAMPLES) // BATCH == step, fit, 0)}

    trainer = fm.Trainer(held_loss, optax.sgd(0.1), cluster=threads_cluster, placement=fm.Pipeline(1))
    options: dict[str, Any] = {"batch_size": BATCH, "steps": 3, "shuffle": False}
    with pytest.raises(KeyError):
        trainer.fit(PARAMS, marked(1, FIRST_FIT), callbacks=[refuse], **options)
    assert RUNNERS
    result = trainer.fit(PARAMS, marked(0, SECOND_FIT), **options)
    plain = fm.Trainer(held_loss, optax.sgd(0.1), cluster=threads_cluster, placement=fm.Pipeline(1))
    assert_same(result.params, plain.fit(PARAMS, marked(-1, 0), **options).params)
