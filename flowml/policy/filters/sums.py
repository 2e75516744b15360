"""Adds up filtered arrays of several replicas without decoding them on the way.

If replicas draw from one seed and keep one state, some filters are linear: the sum of what they make of several arrays
is what they make of the sum. `random_k` then chooses the same elements everywhere. `low_rank` needs two sums (Vogels et
al., *PowerSGD*, 2019): that of M·B, whose orthonormal columns are the left factor P of all, and that of MᵀP, which is
the right factor.

A filter says so with `additive` and `add_up`, a conversation: it yields what a replica adds, and is sent the total,
until it returns. All that replicas compute from a total has the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import Protocol

import numpy as np

from flowml.arrays import ArraySpec, unheard
from flowml.policy.filters.base import Added, Array, Context, Form, State, wide
from flowml.policy.filters.chain import RESIDUAL, Chain, encoded_by

Summing = Generator[Array, Array, tuple[Array, State]]
"""Yields what a replica adds, and returns the total and the buffers for the next push."""


def is_additive(chain: Chain) -> bool:
    """Whether what the chain makes of several arrays can be added up."""
    return len(chain) < 2 and all(f.additive for f in chain)


def sum_sizes(chain: Chain, payload: Sequence[ArraySpec], filtered: Collection[int]) -> tuple[int, ...]:
    """The bytes, or the most possible, that a replica adds in each sum of a payload whose arrays at positions
    `filtered` are filtered."""
    sizes: list[int] = [0]
    for i, form in enumerate(map(Form.of, payload)):
        first = encoded_by(chain, form) if i in filtered else None
        added = first.summed(form) if first else (form,)
        sizes += [0] * (len(added) - len(sizes))
        for number, one in enumerate(added):
            sizes[number] += one.nbytes
    return tuple(sizes)


def add_up(chain: Chain, value: Array, state: State, context: Context) -> Summing:
    """One replica's part in the sum of an array. `context.seed` is that of all replicas."""
    first = encoded_by(chain, Form(value.shape, value.dtype))
    if first is None:
        return (yield value), {}
    given = total = wide(value)
    if first.feedback:
        if RESIDUAL in state:
            with unheard():
                total = total + state[RESIDUAL] * total.dtype.type(first.feedback)
        given, context = total, context._replace(feedback=True)
    added: Added = yield from first.add_up(given.astype(value.dtype, copy=False), state.get(_STATE), context)
    after = {} if added.state is None else {_STATE: added.state}
    if first.feedback:
        with unheard():
            after[RESIDUAL] = total - wide(added.own())
    return added.total(), after


_STATE = "0"
"""The name of a filter's own buffer: the number of the filter in the chain, as `chain.encode` names it."""


class Talk(Protocol):
    """One replica's part in the sums of a payload, sum by sum. Nothing is kept of a sum that is not committed."""

    @property
    def sent(self) -> list[Array]:
        """What the replica adds in the next sum: arrays of one dtype."""
        ...

    def take(self, totals: Sequence[Array]) -> bool:
        """Go on with the totals of what all replicas have sent. Returns whether there is another sum."""
        ...

    def total(self) -> list[Array]:
        """The sum of the payload, when there is no other sum."""
        ...

    def commit(self) -> None:
        """The sum is applied: keep the buffers for the next push."""
        ...


class Adding:
    """One replica's part in the sums of a payload whose arrays a filter can add up: all their conversations."""

    def __init__(
        self, summings: Sequence[Summing], commit: Callable[[Sequence[State]], None], *, spoiled: bool = False
    ) -> None:
        """`commit` is given the buffers for the next push. A `spoiled` payload makes the sum NaN for all replicas: one
        that holds NaN, which a filter might leave out at this replica alone."""
        self._summings = summings
        self._commit = commit
        self._open = {i: next(s) for i, s in enumerate(summings)}
        self._ended: dict[int, tuple[Array, State]] = {}
        if spoiled:
            self._open = {i: np.full_like(a, np.nan) for i, a in self._open.items()}
        self._dtypes = [a.dtype for a in self._open.values()]

    @property
    def sent(self) -> list[Array]:
        """Arrays of one dtype, as sums need."""
        return [a.astype(self._dtypes[0], copy=False) for a in self._open.values()]

    def take(self, totals: Sequence[Array]) -> bool:
        """Go on with the totals of what all replicas have sent. Returns whether there is another sum."""
        given, self._open = zip(self._open, totals, strict=True), {}
        with np.errstate(all="ignore"):  # totals that are not finite make others, which the caller refuses
            for i, total in given:
                try:
                    self._open[i] = self._summings[i].send(np.asarray(total).astype(self._dtypes[i], copy=False))
                except StopIteration as end:
                    self._ended[i] = end.value
        return bool(self._open)

    def total(self) -> list[Array]:
        """The sums of all arrays."""
        return [self._ended[i][0] for i in range(len(self._summings))]

    def commit(self) -> None:
        """The sum is applied: keep the buffers for the next push."""
        self._commit([self._ended[i][1] for i in range(len(self._summings))])
