"""Keeps the public copies of a gossip whose filters lose something, for one store on one stage. Both clocks use it.

A replica and its neighbours hold the same copy of its parameters. In a round it sends what the filters make of the
difference between the parameters and the copy, and all add what is decoded to their copies. It then moves by a share of
the distance between the average of its neighbours' copies and its own (Koloskova, Stich & Jaggi, ICML 2019). Copies of
all replicas begin as the common first parameters. The parameters themselves are never averaged, so what a filter leaves
out changes no mean, and is part of the next difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowml.plan import StoreSpec
from flowml_runtime.execution.programs import Array
from flowml_runtime.worker.training.published import PublicCopy, Reader


class Copies:
    """The own public copy, and those of the neighbours that have sent something."""

    def __init__(self, spec: StoreSpec, number: int, seed: int, first: Sequence[Array]) -> None:
        """`number` is that of this sender among all, and `first` are the common first parameters."""
        chain = spec.policy.filters
        self._spec = spec
        self._first = first
        self._own = PublicCopy(spec, (seed, number), chain=chain)
        self._own.advance(0, first)
        self._others: dict[int, tuple[Reader, Sequence[Array]]] = {}

    @property
    def own(self) -> Sequence[Array]:
        return self._own.values

    def changes(self, clock: int, params: Sequence[Array]) -> Sequence[Array]:
        """What neighbours get in the round of `clock`. The own copy follows."""
        return self._own.advance(clock + 1, params)[1]

    def follow(self, sent: Mapping[int, Sequence[Array]]) -> Mapping[int, Sequence[Array]]:
        """The copies of the neighbours, after what they have sent in a round."""
        found: dict[int, Sequence[Array]] = {}
        for number, arrays in sent.items():
            if number not in self._others:
                reader = Reader(self._spec, chain=self._spec.policy.filters, whose=f"neighbour {number}")
                self._others[number] = reader, self._first
            reader, copy = self._others[number]
            found[number] = reader.added(copy, arrays)
            self._others[number] = reader, found[number]
        return found
