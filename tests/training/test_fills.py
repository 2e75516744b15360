"""A state that an optimizer only fills is made without a compiler, and equals that of the optimizer's own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowml_runtime.driver.training.fills import filled
from flowml_runtime.driver.training.initial import first_state, own_array

PARAMS = {
    "w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "b": np.zeros(3, jnp.bfloat16),
    "n": np.float32(2).reshape(()),
}


def odd(params: Any) -> Any:
    """A state of numbers, NumPy arrays, parameters and arrays of other types."""
    halves = [jnp.ones_like(v, dtype=jnp.bfloat16) for v in params.values()]
    return (
        1,
        2.5,
        True,
        np.float32(3),
        np.arange(3),
        params,
        halves,
        jnp.full((2, 2), 1 / 3),
        jnp.zeros(0, bool),
        None,
    )


@pytest.mark.parametrize(
    "init",
    [
        optax.sgd(0.1).init,
        optax.adam(1e-3).init,
        optax.adamw(optax.cosine_decay_schedule(1.0, 10)).init,
        optax.adagrad(0.1).init,
        optax.adafactor(1e-3).init,
        optax.MultiSteps(optax.lion(1e-3), 2).init,
        jax.jit(optax.adam(1e-3).init),
        odd,
    ],
    ids=["sgd", "adam", "adamw", "adagrad", "adafactor", "multi steps", "jit", "odd"],
)
def test_a_state_that_is_filled_equals_that_of_the_optimizer(init: Callable[[Any], Any]) -> None:
    params = jax.tree_util.tree_map(own_array, PARAMS)
    made, wanted = filled(init, params), jax.tree_util.tree_map(jnp.asarray, init(params))
    assert made is not None
    assert jax.tree_util.tree_structure(made) == jax.tree_util.tree_structure(wanted)
    for one, other in zip(*map(jax.tree_util.tree_leaves, (made, wanted)), strict=True):
        assert isinstance(one, jax.Array)
        assert (one.aval, one.committed) == (other.aval, other.committed)
        np.testing.assert_array_equal(one, other)


def test_a_state_that_is_computed_is_left_to_the_optimizer() -> None:
    def computed(params: Any) -> Any:
        return jax.tree_util.tree_map(lambda x: x * 2 + 1, params)

    def looks(params: Any) -> Any:
        return jnp.zeros(int(params["n"]))

    params = jax.tree_util.tree_map(own_array, PARAMS)
    for init in (computed, looks):
        assert filled(init, params) is None
        optimizer = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
        state = first_state(optimizer, (), params, None)
        for one, other in zip(*map(jax.tree_util.tree_leaves, (state, init(params))), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, jnp.bfloat16, jnp.int4, bool])
def test_an_own_array_shares_no_memory_and_has_the_type_that_jax_gives_it(dtype: Any) -> None:
    given = np.ones((32, 32)).astype(dtype)
    wanted = jnp.array(given)
    mine = own_array(given)
    given[...] = 0
    assert mine.aval == wanted.aval
    np.testing.assert_array_equal(mine, wanted)
