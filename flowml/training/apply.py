"""Builds the function of a home: it combines the contributions by their coefficients and applies the optimizer.

The function becomes one XLA task: (parameters, state, coefficients, contributions) -> (parameters, state), all flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax.numpy as jnp

from flowml.plan import Part
from flowml.training.step import scaled, wide

Product = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Payload:
    """How the arrays of one contribution become the gradients of a store.

    `products` maps each leaf that is sent as factors to the function that forms its gradient. With `weighted`,
    gradients were multiplied by weights, and each part ends with the sum of these weights. With `steps`, gradients were
    already divided by it.
    """

    parts: Sequence[Part]
    shapes: Sequence[tuple[int, ...]]
    products: Mapping[int, Product]
    weighted: bool
    steps: bool

    @property
    def size(self) -> int:
        return sum(len(p.payload) for p in self.parts)

    def gradients(self, arrays: Sequence[Any]) -> tuple[list[Any], Any]:
        """The gradient of every leaf, and their common weight (1 if they have none)."""
        leaves: dict[int, Any] = {}
        weight: Any = jnp.float32(1)
        start = 0
        for part in self.parts:
            found, weight = self._part(part, arrays[start : start + len(part.payload)])
            start += len(part.payload)
            leaves.update(zip(part.leaves, found, strict=True))
        return [jnp.asarray(leaves[i]) for i in range(len(leaves))], weight

    def _part(self, part: Part, arrays: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        weight: Any = jnp.float32(1)
        if part.factors:
            return self._product(part, arrays)
        if part.pack is not None:
            (row,) = arrays
            arrays = split(row, [self.shapes[i] for i in part.leaves])
            weight = row[-1].real
        elif self.weighted:
            *arrays, weight = arrays
        return arrays, weight

    def _product(self, part: Part, arrays: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """The sum over microbatches. Each sends its factors, and also its weight if the gradients are weighted."""
        form = self.products[part.leaves[0]]
        width = 3 if self.weighted else 2
        pieces = [arrays[i : i + width] for i in range(0, len(arrays), width)]
        formed = [form(*piece[:2]) for piece in pieces]
        if not self.weighted:
            return [added(formed)], jnp.float32(1)
        weights = [piece[2] for piece in pieces]
        total = added([scaled(p, w) for p, w in zip(formed, weights, strict=True)])
        weight = added([scaled(w, jnp.float32(1)) for w in weights])
        return [per(total, weight) if self.steps else total], weight


def added(arrays: Sequence[Any]) -> Any:
    """The sum, added in this order. Several arrays are added in float32 or wider."""
    total = arrays[0] if len(arrays) == 1 else wide(arrays[0])
    for array in arrays[1:]:
        total = total + wide(array)
    return total


def per(total: Any, weight: Any) -> Any:
    """`total / weight`; `total` where the weight is 0."""
    return total / jnp.where(weight == 0, 1, weight).astype(total.dtype)


def normalised(*arrays: Any, packed: bool) -> tuple[Any, ...]:
    """Turn the weighted sums of a step into means, and their weight into 1 (0 if it is 0).

    Sums of these results over steps are sums of the gradients of steps, with the number of steps.
    """
    if packed:
        (row,) = arrays
        mean, weight = per(row[:-1], row[-1].real), row[-1].real
        return (jnp.concatenate([mean, (weight > 0).astype(row.dtype)[None]]),)
    *sums, weight = arrays
    return (*(per(s, weight) for s in sums), (weight > 0).astype(weight.dtype))


def apply_function(
    update: Callable[..., tuple[Any, ...]], payload: Payload, *, leaves: int, states: int, arity: int, exact: bool
) -> Callable[..., tuple[Any, ...]]:
    """(parameters, state, coefficients, contributions) -> (parameters, state).

    An `exact` contribution is the only one and has weight 1. It is not multiplied by 1.0, because the compiler
    could contract that expression and change the last bit of the result.
    """
    size = payload.size
    divides = payload.weighted and not payload.steps

    def apply(*arrays: Any) -> tuple[Any, ...]:
        params, state = arrays[:leaves], arrays[leaves : leaves + states]
        coefficients = arrays[leaves + states]
        payloads = arrays[leaves + states + 1 :]
        found: list[list[Any]] = []
        weights: list[Any] = []
        for c in range(arity):
            gradients, weight = payload.gradients(payloads[c * size : (c + 1) * size])
            if divides:
                weights.append(weight * (coefficients[c] > 0).astype(weight.dtype))
            elif not exact and not payload.weighted:
                gradients = [g * coefficients[c].astype(g.dtype) for g in map(wide, gradients)]
            found.append(gradients)
        total = [added(list(leaf)) for leaf in zip(*found, strict=True)]
        if divides:
            total = [per(g, added(weights)) for g in total]
        total = [g.astype(p.dtype) for g, p in zip(total, params, strict=True)]
        return update(*total, *params, *state)

    return apply


def split(row: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The arrays of these shapes that are packed at the start of a row, one after the other."""
    ends = list(accumulate(map(math.prod, shapes)))
    return [row[e - math.prod(s) : e].reshape(s) for e, s in zip(ends, shapes, strict=True)]
