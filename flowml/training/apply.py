"""Builds the functions of a home, which fold contributions into a sum and apply the optimizer to it.

`fold` adds contributions to an accumulator in the order in which they are given. `finish` turns the accumulator into
the gradient and updates parameters and state. Any number of contributions can be folded, so no function depends on the
number of replicas. `apply` is both at once for the common case of few contributions: a single pass over memory takes
about half the time of several. All functions take and return flat arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import jax.numpy as jnp

from flowml.plan import Part
from flowml.training.distil import Distilling
from flowml.training.step import scaled, wide
from flowml.training.updates import ballot, elected

Product = Callable[[Any, Any], Any]

FOLD_WIDTH = 8
"""The most contributions that one task folds."""


@dataclass(frozen=True)
class Payload:
    """How the arrays of one contribution become the gradients of a store.

    `products` maps each leaf that is sent as factors to the function that forms its gradient. With `weighted`,
    gradients were multiplied by weights, and each part ends with the sum of these weights. With `steps`, gradients were
    already divided by it. With `kept` they are parameters, of which a mean over nothing keeps those of before.
    """

    parts: Sequence[Part]
    shapes: Sequence[tuple[int, ...]]
    products: Mapping[int, Product]
    weighted: bool
    steps: bool
    kept: bool = False

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
            weight = weight.real
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


@dataclass(frozen=True)
class HomeTasks:
    """The functions of one store's home.

    `update` is the optimizer's: a function of flat (gradients, parameters, state) to (parameters, state), with `params`
    parameters and `states` leaves of state.

    A coefficient multiplies a gradient, and a share multiplies its weight if it has one; the sum of gradients is then
    divided by the sum of weights. An `exact` contribution is the only one and is not multiplied: the compiler could
    contract a multiplication by 1.0 with the update, which changes the last bit of the result.

    With `voted` rows, each contribution also votes for so many rows of each leaf; the sum keeps those that win. With
    `distils`, contributions are models; their outputs are added up too, and the update gets the sum after theirs.
    """

    update: Callable[..., tuple[Any, ...]]
    payload: Payload
    params: int
    states: int
    exact: bool
    voted: int = 0
    distils: Distilling | None = None

    def fold(self, *arrays: Any) -> tuple[Any, ...]:
        """(accumulator, coefficients, contributions) -> accumulator."""
        outputs = self.distils.width if self.distils else 0
        size = self.params + outputs + len(self._voting) + self._divides
        return tuple(self.folded(list(arrays[:size]), *arrays[size:]))

    def finish(self, *arrays: Any) -> tuple[Any, ...]:
        """(parameters, state, accumulator) -> (parameters, state)."""
        kept = self.params + self.states
        return self._finished(arrays[:kept], arrays[kept:])

    def apply(self, *arrays: Any) -> tuple[Any, ...]:
        """(parameters, state, coefficients, contributions) -> (parameters, state)."""
        kept = self.params + self.states
        return self._finished(arrays[:kept], self.folded(None, *arrays[kept:]))

    @property
    def _divides(self) -> bool:
        return self.payload.weighted and not self.payload.steps

    @property
    def _voting(self) -> list[int]:
        """The leaves whose rows are voted on."""
        return [i for i, shape in enumerate(self.payload.shapes) if self.voted and shape]

    def folded(self, accumulator: list[Any] | None, coefficients: Any, *payloads: Any) -> list[Any]:
        """Row 0 of `coefficients` has a coefficient for each contribution, row 1 a share. After the first, those with
        coefficient 0 are skipped: they only fill the list of arguments."""
        size = self.payload.size
        for i in range(len(payloads) // size):
            coefficient, share = coefficients[0, i], coefficients[1, i]
            terms, weight = self.payload.gradients(payloads[i * size : (i + 1) * size])
            if self.distils is not None:
                terms = [*terms, *self._outputs(terms, weight)]
            if not self.exact:
                terms = [g * coefficient.astype(g.dtype) for g in map(wide, terms)]
            terms = [*terms, *(ballot(terms[leaf], self.voted) for leaf in self._voting)]
            if self._divides:
                terms.append(weight * share.astype(weight.dtype))
            if accumulator is None:
                accumulator = terms
            elif i == 0:
                accumulator = [a + t for a, t in zip(accumulator, terms, strict=True)]
            else:
                accumulator = [jnp.where(coefficient != 0, a + t, a) for a, t in zip(accumulator, terms, strict=True)]
        assert accumulator is not None
        return accumulator

    def _outputs(self, terms: list[Any], weight: Any) -> list[Any]:
        """What the model of one contribution computes, multiplied by its weight as its parameters are."""
        assert self.distils is not None
        if not self._divides:
            return list(self.distils.outputs(terms))
        return [scaled(x, weight) for x in self.distils.outputs([per(t, weight) for t in terms])]

    def _finished(self, kept: Sequence[Any], accumulator: Sequence[Any]) -> tuple[Any, ...]:
        total = list(accumulator[: self.params])
        for leaf, votes in zip(self._voting, accumulator[self.params :], strict=False):
            total[leaf] = elected(total[leaf], votes, self.voted)
        outputs = accumulator[self.params :] if self.distils else ()
        if self._divides:
            total = [per(g, accumulator[-1]) for g in total]
            outputs = [per(x, accumulator[-1]) for x in outputs[:-1]]
        gradients = [g.astype(p.dtype) for g, p in zip(total, kept[: self.params], strict=True)]
        results = self.update(*gradients, *outputs, *kept)
        if not (self._divides and self.payload.kept):
            return results
        return tuple(jnp.where(accumulator[-1] > 0, new, old) for new, old in zip(results, kept, strict=True))


def split(row: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The arrays of these shapes that are packed at the start of a row, one after the other."""
    ends = list(accumulate(map(math.prod, shapes)))
    return [row[e - math.prod(s) : e].reshape(s) for e, s in zip(ends, shapes, strict=True)]
