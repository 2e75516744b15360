"""Builds the function of one microbatch, which turns a loss into (loss, aux, gradients) that can be added up.

Sums over microbatches, steps or replicas are computed in float32 or wider. If the loss has a weight (such as the number
of tokens that count), each microbatch's gradient is multiplied by it. Replicas send the sum of weighted gradients and
the sum of weights, and the home divides the first by the second. The result is the gradient of one weighted mean over
all examples, independent of how they are split.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from flowml.ir import _jax
from flowml.policy import Coded, Policy
from flowml.policy.apply import most_at_once
from flowml.policy.replicas import weighs
from flowml.training.state import with_state

RNG_WORDS = 3
"""The number of uint32 words in the key feed: seed, work item, microbatch."""

Weight = str | Callable[[Any], Any]
"""The weight of a batch: the name of a leaf of aux, or a function of the batch."""


@dataclass(frozen=True)
class Treatment:
    """How a gradient is treated before it is sent: `wide` casts it to float32 or wider, `weighted` multiplies it by
    the weight of its microbatch, `coded` by the coefficient of its microbatch."""

    wide: bool = False
    weighted: bool = False
    coded: bool = False

    @staticmethod
    def of(policy: Policy, replicas: int, microbatches: int, *, weighted: bool) -> Treatment:
        """The treatment of a parameter's gradient under this policy."""
        if isinstance(policy.quorum, Coded):
            return Treatment(wide=True, weighted=weighted, coded=True)
        together = policy.adds_up and replicas > 1
        added = microbatches > 1 or (policy.every.push > 1 and not policy.local) or together
        sent = policy.local or most_at_once(policy, replicas) == 1  # applied without a sum
        alone = not added and sent and not weighs(policy, replicas)
        return Treatment(wide=added or (weighted and not alone), weighted=weighted and not alone)


@dataclass(frozen=True)
class Metrics:
    """How the loss and aux are read from fetch slots. The loss is in slot 0. Fetched values are added up.

    `slots` and `dtypes` are those of the leaves of aux; leaves with the same value share a slot, so that it is sent
    once. A leaf that is `summed` stays a sum; the others are averaged. `weight` is the slot of the weight, if there is
    one; the loss and the averaged leaves were then multiplied by it.
    """

    tree: Any = None
    slots: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    summed: tuple[bool, ...] = ()
    weight: int | None = None


class Placing(Protocol):
    """Says what is sent of a microbatch itself; see `evaluated`."""

    def placed(self, batch: Any, words: Any) -> list[Any]: ...


@dataclass(frozen=True)
class StepFunction:
    """The traced function of one microbatch, `call(params, microbatch[, rng][, coefficient][, state])`.

    It returns the loss, the leaves of aux and, if `weighted`, the weight; then the `held` leaves of state; then the
    treated gradients, if they differ from the plain ones; then the plain gradients. Each leaf is a separate copy, so
    that a node makes it.
    """

    call: Callable[..., Any]
    aux_tree: Any
    dtypes: tuple[str, ...]
    summed: tuple[bool, ...]
    weighted: bool
    held: int = 0

    @property
    def fetched(self) -> int:
        return 1 + len(self.dtypes) + self.weighted

    def metrics(self, slots: Sequence[int]) -> Metrics:
        """The metrics for these slots, one for each fetched value, in order."""
        aux = tuple(slots[1 : 1 + len(self.dtypes)])
        return Metrics(self.aux_tree, aux, self.dtypes, self.summed, slots[-1] if self.weighted else None)


def loss_takes_rng(loss: Callable[..., Any], *, has_state: bool = False) -> bool:
    """Whether a loss is `loss(params, [state, ]batch, rng)` rather than `loss(params, [state, ]batch)`."""
    at = 2 + has_state
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(loss).parameters.values()
    except ValueError:  # a builtin
        return False
    positional = [p for p in parameters if p.kind in kinds]
    return len(positional) > at and (positional[at].default is inspect.Parameter.empty or positional[at].name == "rng")


def _check_signature(loss: Callable[..., Any], name: str, *, has_state: bool) -> None:
    """Raise TypeError if a loss cannot be called with parameters, state and batch."""
    given = ("params", "state", "batch") if has_state else ("params", "batch")
    if loss_takes_rng(loss, has_state=has_state):
        given = (*given, "rng")
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # a builtin
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        form = "with has_state=True a loss is loss(params, state, batch[, rng])" if has_state else "a loss is "
        fix = "; leave has_state out if the model has none" if has_state else "loss(params, batch[, rng])"
        raise TypeError(
            f"{name}{signature} cannot be called as {name}({', '.join(given)}): {error}; {form}{fix}"
        ) from None


def item_key(seed: Any, item: Any, microbatch: Any, microbatches: int) -> jax.Array:
    """The key for the loss of a work item: `fold_in(key(seed), item)`. With several microbatches, the number of the
    microbatch is folded in too."""
    key = jax.random.fold_in(jax.random.key(seed), item)
    return jax.random.fold_in(key, microbatch) if microbatches > 1 else key


def step_function(
    loss: Callable[..., Any],
    params: Any,
    batch: Any,
    *,
    microbatches: int,
    weight: Weight | None,
    treatments: Sequence[Treatment],
    counts: bool,
    state: Sequence[Any] = (),
    evaluations: Placing | None = None,
) -> StepFunction:
    """The function of one microbatch. `treatments` has one entry for each leaf of `params`. `state` is the model's
    state, if the loss has one. `evaluations` says what is sent of the batch itself, in place of the last gradients.

    `counts` says that several microbatches or replicas share a step, so that the weight also affects the metrics. If
    gradients are coded, the floating metrics are multiplied by the coefficient too, so that they can be decoded.
    """
    _check_parameters(params)
    takes_rng, name = loss_takes_rng(loss, has_state=bool(state)), name_of(loss)
    _check_signature(loss, name, has_state=bool(state))
    loss = with_state(loss) if state else loss
    has_aux, aux_shape = _check_loss(loss, name, params, batch, takes_rng, state)
    aux_shape = aux_shape[1] if state else aux_shape
    leaves, aux_tree = jax.tree_util.tree_flatten_with_path(aux_shape)
    named = _weight_leaf(weight, [_jax.path_name(p) for p, _ in leaves], [x for _, x in leaves])
    if callable(weight) and weight not in (one, by_examples):
        _check_weight(jax.eval_shape(weight, batch), f"weight={name_of(weight)}")
    weighted = weight is not None and (counts or any(t.weighted for t in treatments))
    summed = tuple(i == named or not jnp.issubdtype(x.dtype, jnp.inexact) for i, (_, x) in enumerate(leaves))
    gradient = jax.value_and_grad(loss, has_aux=has_aux)
    coded = any(t.coded for t in treatments)

    def step(params: Any, batch: Any, *rest: Any) -> Any:
        beside: Any
        coefficient = rest[-1] if coded else None
        keys = [item_key(rest[0][0], rest[0][1], rest[0][2], microbatches)] if takes_rng else []
        value, gradients = gradient(params, batch, *keys, *(rest[-1:] if state else ()))
        scalar, beside = value if has_aux else (value, None)
        new, aux = beside if state else ((), beside)
        metrics = [scalar, *jax.tree_util.tree_leaves(aux)]
        given = evaluations.placed(batch, rest[0]) if evaluations is not None else []
        every = jax.tree_util.tree_leaves(gradients)
        raw = [jnp.copy(jnp.asarray(g)) for g in (*every[: len(every) - len(given)], *given)]
        count: Any = None
        if weighted:
            assert weight is not None
            count = one(scalar) if weight is one else wide(jnp.asarray(weight_of(weight, aux, batch)))
            count = count * one(scalar) if weight is by_examples else count
            metrics = [x if is_sum else scaled(x, count) for x, is_sum in zip(metrics, (False, *summed), strict=True)]
            metrics.append(jnp.where(count < 0, jnp.full_like(count, jnp.nan), count))  # refused, as its gradient is
        metrics = [multiplied(jnp.asarray(x), coefficient) for x in metrics]
        sent: list[Any] = []
        if coded or any(t.weighted or (t.wide and is_narrow(g.dtype)) for t, g in zip(treatments, raw, strict=True)):
            sent = [jnp.copy(_treated(g, t, count, coefficient)) for g, t in zip(raw, treatments, strict=True)]
        held = [jnp.copy(jnp.asarray(x)) for x in jax.tree_util.tree_leaves(new)]
        return [jnp.copy(x) for x in metrics], held, sent, raw

    held = len(jax.tree_util.tree_leaves(list(state)))
    dtypes = tuple(_jax.spec_of(x).dtype for _, x in leaves)
    return StepFunction(step, aux_tree, dtypes, summed, weighted, held)


def wide(x: Any) -> Any:
    """Cast to float32 if the dtype is narrower, because a sum of many bfloat16 values loses precision."""
    return x.astype(jnp.float32) if is_narrow(x.dtype) else x


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is too narrow for sums: it is smaller than float32 or not floating."""
    return dtype.itemsize < 4 or not jnp.issubdtype(dtype, jnp.inexact)


def scaled(x: Any, weight: Any) -> Any:
    """`x * weight`, and 0 where the weight is 0, even if `x` is NaN (as a mean over no tokens is)."""
    x = wide(jnp.asarray(x))
    return jnp.where(weight > 0, x * weight.astype(x.dtype), jnp.zeros_like(x))


def multiplied(x: Any, coefficient: Any) -> Any:
    """`x * coefficient` for floating arrays. Counts are multiplied where they are added up, in 64 bits."""
    if coefficient is None or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return wide(x) * coefficient.astype(wide(x).dtype)


def _treated(gradient: Any, treatment: Treatment, weight: Any, coefficient: Any) -> Any:
    if treatment.weighted:
        return multiplied(scaled(gradient, weight), coefficient)
    return multiplied(wide(gradient) if treatment.wide else gradient, coefficient)


def one(loss: Any) -> jax.Array:
    """The weight of a microbatch that counts as one. A sum of weights then counts the microbatches in a sum.

    It depends on the loss in form only, so that the stage that computes the loss makes it, after the loss.
    """
    return jnp.where(loss == loss, jnp.float32(1), jnp.float32(1))


def by_examples(batch: Any) -> jax.Array:
    """The weight of a batch by its examples."""
    return jnp.float32(jax.tree_util.tree_leaves(batch)[0].shape[0])


def weight_of(weight: Weight, aux: Any, batch: Any) -> Any:
    """The weight of a batch for which the loss returned `aux`."""
    if callable(weight):
        return weight(batch)
    leaves = jax.tree_util.tree_flatten_with_path(aux)[0]
    return next(leaf for path, leaf in leaves if _jax.path_name(path) == weight)


def _weight_leaf(weight: Weight | None, names: Sequence[str], leaves: Sequence[Any]) -> int | None:
    """The position of the leaf of aux that `weight` names; None if it names none."""
    if weight is None or callable(weight):
        return None
    if weight not in names:
        known = ", ".join(map(repr, names)) or "none; return (loss, aux) with the weight in aux"
        raise ValueError(f"weight={weight!r} names no leaf of the loss's aux; there are: {known}")
    position = names.index(weight)
    _check_weight(leaves[position], f"weight={weight!r}")
    return position


def _check_weight(value: Any, what: str) -> None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    real = dtype is not None and any(jnp.issubdtype(dtype, k) for k in (jnp.floating, jnp.integer, jnp.bool_))
    if shape != () or not real:
        raise ValueError(f"{what} is {described(value)}; a weight is one real number a batch, such as its tokens")


def _check_parameters(params: Any) -> None:
    if not jax.tree_util.tree_leaves(params):
        raise ValueError("params has no floating arrays; there is nothing to train")


def _check_loss(
    loss: Callable[..., Any], name: str, params: Any, batch: Any, takes_rng: bool, state: Sequence[Any]
) -> tuple[bool, Any]:
    """Whether the loss returns (scalar, aux), and the shapes of aux."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        shape = jax.eval_shape(loss, params, batch, *([key] if takes_rng else []), *state)
    except Exception as error:
        called = ", ".join(("params", *(["state"] if state else []), "batch", *(["rng"] if takes_rng else [])))
        beside = "" if state else "; a loss with the state of a model needs Trainer(has_state=True) and fit(state=)"
        error.add_note(f"{name} was called as {name}({called}){beside}")
        raise
    has_aux = isinstance(shape, tuple)
    wanted = "a loss returns a floating scalar, or (scalar, aux)"
    if has_aux and len(shape) != 2:
        raise ValueError(f"{name} returns {len(shape)} values; {wanted}")
    scalar = shape[0] if has_aux else shape
    if getattr(scalar, "shape", None) != ():
        raise ValueError(f"{name} returns {described(scalar)}; {wanted}, so take the mean over the examples")
    if not jnp.issubdtype(scalar.dtype, jnp.floating):
        raise ValueError(f"{name} returns {described(scalar)}; {wanted}")
    return has_aux, shape[1] if has_aux else None


def described(value: Any) -> str:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return f"a {type(value).__name__}"
    return f"{value.dtype}[{','.join(map(str, value.shape))}]"


def name_of(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
