"""Gives an optimizer the value of the loss, as `optax.contrib.reduce_on_plateau` wants it.

The value is one more parameter, whose gradient is the loss and whose update is nothing. Its gradient goes the way of
all others: replicas compute it, its home takes their mean at each clock, and the optimizer couples it to the layers
that read it. Each home therefore has the value that belongs to the gradients that it applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from flowml.training.compiler import TrainingSpec

VALUE = "(loss)"
"""The path of the value among the parameters."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Valued:
    """Parameters, and the value of the loss: zero, or its gradient."""

    params: Any
    value: Any

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        return ((jax.tree_util.GetAttrKey("params"), self.params), (jax.tree_util.GetAttrKey(VALUE), self.value)), None

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self.params, self.value), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> Valued:
        return cls(*children)

    @staticmethod
    def of(params: Any) -> Valued:
        return Valued(params, jnp.zeros((), jax.dtypes.canonicalize_dtype(float)))


def own_of(params: Any) -> Any:
    """The parameters without the value, if they have it."""
    return params.params if isinstance(params, Valued) else params


@dataclass(frozen=True)
class ValuedOptimizer:
    """An optimizer of parameters with a value, which it gives to `optimizer`."""

    optimizer: Any

    def init(self, params: Valued) -> Any:
        return self.optimizer.init(params.params)

    def update(self, updates: Valued, state: Any, params: Valued) -> tuple[Any, Any]:
        found, state = self.optimizer.update(updates.params, state, params.params, value=updates.value)
        return Valued(found, jnp.zeros_like(updates.value)), state


@jax.custom_jvp
def _watched(loss: Any, value: Any) -> Any:
    """The loss, whose derivative by `value` is the loss."""
    del value
    return loss


@_watched.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (loss, value), (change, of_value) = primals, tangents
    return loss, change + (of_value * loss.astype(value.dtype)).astype(loss.dtype)


def valued_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of parameters with a value."""

    def watched(scalar: Any, value: Any) -> Any:
        floating = getattr(scalar, "shape", None) == () and jnp.issubdtype(scalar.dtype, jnp.floating)
        return _watched(scalar, value) if floating else scalar  # the compiler refuses another one

    @wraps(loss)
    def valued(params: Valued, *rest: Any) -> Any:
        found = loss(params.params, *rest)
        if isinstance(found, tuple) and found:
            return (watched(found[0], params.value), *found[1:])
        return watched(found, params.value)

    return valued


def with_value(spec: TrainingSpec, params: Any) -> tuple[TrainingSpec, Valued]:
    """The training of parameters with a value, and these."""
    spec = replace(spec, loss=valued_loss(spec.loss), optimizer=ValuedOptimizer(spec.optimizer))
    return spec, Valued.of(params)
