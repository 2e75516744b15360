"""Joins what several replicas have kept into one, and brings sums of gradients into another unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowml.policy import filters

Buffers = dict[str, np.ndarray[Any, Any]]


def mean(values: Sequence[Any]) -> Any:
    """The mean of floating arrays; of others, such as counts and keys, the first."""
    first = np.asarray(values[0])
    if not jnp.issubdtype(first.dtype, jnp.inexact):
        return first
    wide = np.complex128 if jnp.issubdtype(first.dtype, jnp.complexfloating) else np.float64
    return np.mean([np.asarray(v, wide) for v in values], axis=0, dtype=wide).astype(first.dtype)


def is_weight(name: str) -> bool:
    """Whether a buffer of sums is the number of gradients in one."""
    return name.endswith("/weight")


def times(array: Any, now: int, before: int) -> Any:
    """An array multiplied by now / before, which is a whole number if the array has whole numbers."""
    given = np.asarray(array)
    if not jnp.issubdtype(given.dtype, jnp.inexact):
        return (given * now // before).astype(given.dtype)
    wide = np.complex128 if jnp.issubdtype(given.dtype, jnp.complexfloating) else np.float64
    return (given.astype(wide) * now / before).astype(given.dtype)


def joined_sums(found: Sequence[Buffers], *, adds: bool = False) -> Buffers | None:
    """The mean of sums of gradients, if they have the same weights, or contributions of replicas are added up."""
    weights = [{n: int(a) for n, a in one.items() if is_weight(n)} for one in found]
    if any(one.keys() != found[0].keys() for one in found) or not (adds or all(one == weights[0] for one in weights)):
        return None
    joined = {n: mean([one[n] for one in found]) for n in found[0]}
    for name in weights[0]:
        weight = round(sum(one[name] for one in weights) / len(weights))
        joined[name] = np.asarray(max(weight, 1), joined[name].dtype)
    return joined


def regrouped_sums(sums: Sequence[Buffers], places: Sequence[tuple[int, int]], shapes: Sequence[Any]) -> Buffers | None:
    """Sums of gradients of several layers as those of one that has parameters of these: each at a place, (layer, number
    there). None unless each is of as many gradients, and has a row for each parameter, of its shape."""
    weights = {int(one["0/weight"]) for one in sums if "0/weight" in one}
    if len(weights) != 1 or not all("0/weight" in one for one in sums):
        return None
    rows = [sums[layer].get(f"0/sum/{number}") for layer, number in places]
    if any(row is None or row.shape != shape for row, shape in zip(rows, shapes, strict=True)):
        return None
    made = {f"0/sum/{number}": row for number, row in enumerate(rows) if row is not None}
    return {**made, "0/weight": sums[0]["0/weight"]}


def joined_residuals(found: Sequence[Buffers]) -> Buffers | None:
    """The mean of residuals, if the filters remember nothing else."""
    if any(one.keys() != found[0].keys() for one in found):
        return None
    if any(n.split("/")[-1] != filters.RESIDUAL for n in found[0]):
        return None
    return {n: mean([one[n] for one in found]) for n in found[0]}
