"""Gives an optimizer the value of the loss, as `optax.contrib.reduce_on_plateau` wants it.

The value is one more parameter, whose gradient is the loss and whose update is nothing. Its gradient goes the way of
all others: replicas compute it, its home takes their mean at each clock, and the optimizer couples it to the layers
that read it. Each home therefore has the value that belongs to the gradients that it applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from flowml.training.spec import TrainingSpec

VALUE = "(loss)"
"""The path of the value among the parameters."""
BATCH = "(batch)"
"""The path of the leaves of the batch among the parameters, if the optimizer evaluates the loss (`evaluated`)."""


def is_given(path: str) -> bool:
    """Whether a path is that of what is given to an optimizer beside the parameters."""
    return path == VALUE or path.startswith(f"{BATCH}/")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Valued:
    """Parameters, the value of the loss and the leaves of the batch, if they are wanted: zeros, or their gradients."""

    params: Any
    value: Any
    batch: tuple[Any, ...] = ()

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        children, _ = self.tree_flatten()
        return tuple(zip(map(jax.tree_util.GetAttrKey, ("params", VALUE, BATCH)), children, strict=True)), None

    def tree_flatten(self) -> tuple[tuple[Any, Any, tuple[Any, ...]], None]:
        return (self.params, self.value, self.batch), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any, tuple[Any, ...]]) -> Valued:
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
        found, state = self.optimizer.update(updates.params, state, params.params, **self.extra(updates, state, params))
        return Valued(found, jnp.zeros_like(updates.value), tuple(map(jnp.zeros_like, updates.batch))), state

    def extra(self, updates: Valued, state: Any, params: Valued) -> Mapping[str, Any]:
        """What the optimizer gets beside gradients, state and parameters."""
        del state, params
        return {"value": updates.value}


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
