"""Checks before a fit that the loss is a mean over examples, because replicas and microbatches average it.

The loss is evaluated on a few examples of the first batch: on each half and on both together. There is no check if that
would take long, if the loss accepts only certain shapes, if it is random, or if it calls Python, which a fit does as
often as its steps say and not once more. A loss that was found to be a mean is not evaluated again on the same
examples: compiling it takes a core some tenths of a second, while workers compile too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from xxhash import xxh3_128_digest

from flowml.callers import warn
from flowml.data import Source
from flowml.ir.host import has_calls
from flowml.plan import Plan
from flowml.rows import seems_swapped
from flowml.training.spec import TrainingSpec
from flowml.training.step import loss_takes_rng, name_of, weight_of
from flowml_runtime.driver.training.convexity import convex_warning

MOST_EXAMPLES = 32
MOST_SECONDS = 1.0
"""The longest evaluation to make, as estimated by the cost model."""

_QUICKLY: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": "1",
}
"""Compiling takes most of the time, and what is compiled runs two or four times. With these options it takes half."""

_CLOSE, _CLOSE_NARROW = 1e-3, 3e-2
"""The largest relative difference between a mean over examples and the mean of its halves that rounding can explain:
if all dtypes have the precision of float32 or more, and if some dtype has less."""

_MOST_MEANS = 16
_means: WeakKeyDictionary[FunctionType, set[Hashable]] = WeakKeyDictionary()
"""The losses that were found to be means: by which weight, with parameters of which shapes, and on which examples."""


class Looked:
    """Looks at a loss while workers compile, and warns when they have."""

    def __init__(self, *finds: Callable[[], str | None]) -> None:
        self._finds = finds
        self._found: list[str] = []

    def look(self) -> None:
        self._found = [text for find in self._finds if (text := find())]

    def warn(self) -> None:
        for text in self._found:
            warn(text)


def looking(*about: Any) -> Looked:
    """What looks whether a loss is a mean, and convex where a method needs it; `about` is as for `mean_warning`."""
    return Looked(partial(mean_warning, *about), partial(convex_warning, *about))


def mean_warning(
    spec: TrainingSpec, plan: Plan, params: Any, source: Source, order: np.ndarray, batch: int
) -> str | None:
    """A warning if the loss is not a (weighted) mean over examples, else None. `order` starts with the first batch."""
    if spec.replicas * spec.microbatches == 1:
        return None
    seconds = plan.estimate.single_device_seconds / batch
    alike = batch if source.arrays is not None else batch // spec.replicas  # those of a work item have one shape
    half = min(alike, MOST_EXAMPLES, int(MOST_SECONDS / max(seconds, 1e-9))) // 2
    if half < 1:
        return None
    leaves = source.take(order[: 2 * half])
    known, key = _known(spec), _about(spec, params, source, leaves)
    if key in known:
        return None
    batches = [
        jax.tree_util.tree_unflatten(source.tree, [x[piece] for x in leaves])
        for piece in (slice(None), slice(half), slice(half, None))
    ]
    try:
        found = _evaluate(spec, params, batches)
    except Exception:  # the user's function may accept only the shapes that the fit gives it
        return None
    if found is None:
        return None
    (whole, _), (first, one), (second, other) = found
    mean = (first * one + second * other) / (one + other) if min(one, other) >= 0 and one + other else math.nan
    scale = max(abs(whole), abs(first), abs(second))
    close = _CLOSE_NARROW if _is_narrow([params, leaves]) else _CLOSE
    if not math.isfinite(whole) or not math.isfinite(mean):
        return None
    if abs(whole - mean) <= close * scale:
        if len(known) < _MOST_MEANS:
            known.add(key)
        return None
    weighted = "" if spec.weight is None else " by its weight"
    return (
        f"{name_of(spec.loss)} is no mean over examples{weighted}: on two halves of {2 * half} examples it is "
        f"{first:.6g} and {second:.6g}, on both together {whole:.6g} instead of {mean:.6g}; so the gradient of "
        f"{spec.replicas} replicas x {spec.microbatches} microbatches differs from that of the whole batch; give "
        "Trainer(weight=) what it is a mean over: a leaf of aux, such as 'tokens', or a function of the batch"
        f"{seems_swapped(source.shapes_of(leaves))}"
    )


def _known(spec: TrainingSpec) -> set[Hashable]:
    """What is known of a loss. A weight that is a function could hold the loss alive, and callable objects change."""
    kept = isinstance(spec.loss, FunctionType) and isinstance(spec.weight, str | None)
    return _means.setdefault(spec.loss, set()) if kept else set()


def _about(spec: TrainingSpec, params: Any, source: Source, leaves: Sequence[np.ndarray]) -> Hashable:
    given, tree = jax.tree_util.tree_flatten(params)
    kinds = tuple((np.shape(x), jax.dtypes.result_type(x)) for x in given)
    batch = tuple((x.shape, x.dtype, xxh3_128_digest(x.tobytes())) for x in leaves)
    return spec.weight, tree, kinds, source.tree, batch


def _evaluate(spec: TrainingSpec, params: Any, batches: Sequence[Any]) -> list[tuple[float, float]] | None:
    """The loss and its weight for each batch; None if it is random or calls Python."""
    takes_rng = loss_takes_rng(spec.loss)
    evaluate = jax.jit(lambda *args: _with_weight(spec, *args))
    compiled: dict[Any, Any] = {}
    found: list[tuple[float, float]] = []
    for batch in batches:
        arguments = [(params, batch, *([jax.random.key(k)] if takes_rng else [])) for k in range(1 + takes_rng)]
        shapes = tuple(x.shape for x in jax.tree_util.tree_leaves(batch))
        if shapes not in compiled:
            traced = evaluate.trace(*arguments[0])
            if any(map(has_calls, traced.jaxpr.jaxpr.eqns)):
                return None
            compiled[shapes] = _compiled(traced.lower())
        values = [compiled[shapes](*given) for given in arguments]
        if len({float(v[0]) for v in values}) > 1:
            return None
        found.append((float(values[0][0]), float(values[0][1])))
    return found


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile(_QUICKLY)
    except Exception:  # another version of XLA may lack an option
        return lowered.compile()


def _with_weight(spec: TrainingSpec, params: Any, batch: Any, *rng: Any) -> tuple[Any, Any]:
    value = spec.loss(params, batch, *rng)
    loss, aux = value if isinstance(value, tuple) else (value, None)
    return loss, jnp.float32(1) if spec.weight is None else weight_of(spec.weight, aux, batch)


def _is_narrow(trees: Sequence[Any]) -> bool:
    found = [jax.dtypes.result_type(x) for x in jax.tree_util.tree_leaves(trees)]
    return any(d.itemsize < 4 and jnp.issubdtype(d, jnp.inexact) for d in found)
