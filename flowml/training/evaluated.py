"""Gives an optimizer the loss of the batch as a function of the parameters, as a line search wants it.

A home holds no examples, so each microbatch sends its own: every leaf of the batch is one more parameter, with a place
for each microbatch of a step. Its "gradient" is the microbatch in its place and zeros elsewhere, which goes the way of
all gradients. The mean over a step is therefore the batch. It travels as numbers of 16 bits in float32, so that no sum
and no division changes it, whatever its dtype is. A loss that takes a key gets the words of its keys in the same way.
One more leaf says which places are taken: those of a replica whose gradient is refused are empty.

An optimizer that evaluates the loss couples all layers by an operation that cannot be divided: they share a home.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flowml.errors import UnsupportedError
from flowml.training.private import check_whole
from flowml.training.step import RNG_WORDS, item_key, loss_takes_rng
from flowml.training.valued import Valued, ValuedOptimizer, valued_loss

if TYPE_CHECKING:
    from flowml.training.spec import TrainingSpec

KINDS: tuple[tuple[str, ...], ...] = (("value", "grad", "value_fn"), ("obj_fn",), ("grad_fn",))
"""What optimizers of optax ask for: line searches, estimators of the Hessian, and sharpness-aware minimization."""

LOOP = "write the loop with fm.dataflow"


def offered(value: Any, gradients: Any, loss: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """The arguments for each of KINDS, and all together. `loss` is a function of the parameters."""

    def slope(params: Any, *_: Any, **__: Any) -> Any:
        return jax.grad(loss)(params)

    every = {"value": value, "grad": gradients, "value_fn": loss, "obj_fn": loss, "grad_fn": slope}
    return [*({name: every[name] for name in names} for names in KINDS), every]


def kind_of(optimizer: Any, params: Any, state: Any) -> int | None:
    """The first of what is `offered` with which an optimizer works; None if it does with none."""

    def run(number: int) -> Callable[..., Any]:
        def update(params: Any, state: Any) -> Any:
            value = jnp.zeros((), jax.dtypes.canonicalize_dtype(float))
            return optimizer.update(params, state, params, **offered(value, params, _any_loss)[number])

        return update

    for number in range(len(KINDS) + 1):
        try:
            jax.eval_shape(run(number), params, state)
        except Exception:  # it is the user's function, and raises what it likes
            continue
        return number
    return None


def _any_loss(params: Any) -> Any:
    """Some loss, to try an optimizer with."""
    leaves = jax.tree_util.tree_leaves(params)
    return sum(jnp.sum(jnp.abs(x)).astype(jax.dtypes.canonicalize_dtype(float)) for x in leaves)


@dataclass(frozen=True)
class Evaluations:
    """How the batch of a step goes to the home, and what the optimizer gets there."""

    loss: Callable[..., Any]
    tree: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    """The leaves of a microbatch, and the words of its key if the loss takes one."""
    replicas: int
    microbatches: int
    takes_rng: bool

    @property
    def places(self) -> int:
        return self.replicas * self.microbatches

    def parameters(self) -> tuple[jax.Array, ...]:
        """The parameters whose gradients are the leaves."""
        shapes = [*(jax.eval_shape(_numbers, leaf).shape for leaf in self.leaves), ()]
        return tuple(jnp.zeros((self.places, *shape), jnp.float32) for shape in shapes)

    def placed(self, batch: Any, words: Any) -> list[Any]:
        """The gradients that a microbatch with these words of a key sends. Their mean over a step is the batch."""
        found = [*jax.tree_util.tree_leaves(batch), *([words] if self.takes_rng else [])]
        if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in self.leaves]:
            raise UnsupportedError(
                "the optimizer evaluates the loss of the batch within its update, so that all batches of a fit must "
                f"have the shapes of the first; leave out last='use' and batches of other shapes, or {LOOP}"
            )
        replica, microbatch = words[1] % self.replicas, words[2]
        mine = jnp.arange(self.places, dtype=words.dtype) == replica * self.microbatches + microbatch
        return [_placed(numbers * self.places, mine) for numbers in (*map(_numbers, found), jnp.float32(1))]

    def of_batch(self, means: Sequence[Any]) -> Callable[[Any], Any]:
        """The loss of the batch, whose leaves arrived as these means."""
        *numbers, taken = means
        most = jnp.max(taken)  # the mean is over those that take part
        weights = (taken > 0).astype(taken.dtype)
        filled = jnp.where(taken > 0, jnp.arange(self.places), jnp.argmax(taken))  # an empty place counts for nothing
        found = [_read(x / most, leaf)[filled] for x, leaf in zip(numbers, self.leaves, strict=True)]

        def scalar(params: Any, leaves: Sequence[Any]) -> Any:
            rows, keys = leaves, []
            if self.takes_rng:
                *rows, words = leaves
                keys = [item_key(words[0], words[1], words[2], self.microbatches)]
            value = self.loss(params, jax.tree_util.tree_unflatten(self.tree, rows), *keys)
            return value[0] if isinstance(value, tuple) else value

        def whole(params: Any) -> Any:
            if self.places == 1:
                return scalar(params, [x[0] for x in found])
            over = jax.lax.map if self.takes_rng else _at_once  # some random numbers depend on vmap
            losses = over(lambda leaves: scalar(params, leaves), found)
            return jnp.sum(losses * weights.astype(losses.dtype)) / jnp.sum(weights).astype(losses.dtype)

        return whole


@dataclass(frozen=True)
class EvaluatingOptimizer(ValuedOptimizer):
    """An optimizer that gets the loss of the batch as a function of the parameters."""

    evaluations: Evaluations

    def extra(self, updates: Valued, state: Any, params: Valued) -> Mapping[str, Any]:
        number = kind_of(self.optimizer, params.params, state)
        if number is None:
            return {"value": updates.value}
        return offered(updates.value, updates.params, self.evaluations.of_batch(updates.batch))[number]

    def update_alone(self, gradients: Any, state: Any, params: Any) -> Any:
        """The update of parameters without a batch, whose shares differ with the number of replicas, by some loss."""
        number, value = kind_of(self.optimizer, params, state), jnp.zeros((), jax.dtypes.canonicalize_dtype(float))
        given = {} if number is None else offered(value, gradients, _any_loss)[number]
        return self.optimizer.update(gradients, state, params, **given)


def with_evaluations(spec: TrainingSpec, params: Any, batch: Any) -> tuple[TrainingSpec, Valued]:
    """The training of parameters with a value and the leaves of a batch, and these. Raises UnsupportedError where the
    loss of the whole batch has no meaning."""
    check_whole(
        spec,
        params,
        "an optimizer that evaluates the loss within its update",
        "evaluates that of the whole batch of each step",
        LOOP,
    )
    found = evaluations(spec, batch)
    spec = replace(spec, loss=valued_loss(spec.loss), optimizer=EvaluatingOptimizer(spec.optimizer, found))
    return spec, replace(Valued.of(params), batch=found.parameters())


def evaluations(spec: TrainingSpec, batch: Any) -> Evaluations:
    leaves, tree = jax.tree_util.tree_flatten(batch)
    places = spec.replicas * spec.microbatches
    takes_rng = loss_takes_rng(spec.loss)
    pieces = [jax.ShapeDtypeStruct((x.shape[0] // places if x.shape else 0, *x.shape[1:]), x.dtype) for x in leaves]
    words = [jax.ShapeDtypeStruct((RNG_WORDS,), jnp.uint32)] if takes_rng else []
    return Evaluations(spec.loss, tree, (*pieces, *words), spec.replicas, spec.microbatches, takes_rng)


def _at_once(function: Callable[[Any], Any], leaves: Any) -> Any:
    return jax.vmap(function)(leaves)


def _placed(numbers: Any, mine: Any) -> Any:
    return jnp.where(mine.reshape(-1, *(1 for _ in numbers.shape)), numbers[None], 0)


def _numbers(x: Any) -> Any:
    """An array as whole numbers of up to 16 bits in float32, which are the last axis."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unit = _unit(x.dtype)
    found = jax.lax.bitcast_convert_type(x, unit)
    return (found if found.ndim > x.ndim else found[..., None]).astype(jnp.float32)


def _read(mean: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    """The array of which these are the numbers."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        part = jnp.zeros((), leaf.dtype).real.dtype
        parts = _read(mean, jax.ShapeDtypeStruct((*leaf.shape, 2), part))
        return jax.lax.complex(parts[..., 0], parts[..., 1])
    dtype = jnp.dtype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf.dtype
    unit = _unit(dtype)
    numbers = jnp.round(mean).astype(unit)
    single = dtype.itemsize == unit.itemsize
    return jax.lax.bitcast_convert_type(numbers[..., 0] if single else numbers, dtype).astype(leaf.dtype)


def _unit(dtype: Any) -> Any:
    return jnp.dtype(jnp.uint8 if dtype.itemsize == 1 else jnp.uint16)
