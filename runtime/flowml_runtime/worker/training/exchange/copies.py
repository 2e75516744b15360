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
from flowml_runtime.worker.training.resident import Arrays, row, row_of, states, states_of


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

    def export(self) -> Arrays:
        """All copies and what their filters remember, for a snapshot between two steps."""
        found = {f"own/{name}": array for name, array in self._own.export().items()}
        for number, (reader, copy) in self._others.items():
            known = states("filter", {(i,): state for i, state in enumerate(reader.buffers)})
            found |= {f"{number}/{name}": array for name, array in (row("copy", copy) | known).items()}
        return found

    def restore(self, arrays: Arrays) -> None:
        """Go on with the copies of a snapshot."""
        parts: dict[str, dict[str, Array]] = {}
        for key, array in arrays.items():
            owner, name = key.split("/", 1)
            parts.setdefault(owner, {})[name] = array
        self._own.restore(parts.pop("own"))
        for owner, found in parts.items():
            reader, known = self._reader(int(owner)), states_of(found, "filter")
            reader.buffers = [known.get((i,), {}) for i in range(len(self._spec.specs))]
            self._others[int(owner)] = reader, row_of(found, "copy")

    def _reader(self, number: int) -> Reader:
        return Reader(self._spec, chain=self._spec.policy.filters, whose=f"neighbour {number}")

    def changes(self, clock: int, params: Sequence[Array]) -> Sequence[Array]:
        """What neighbours get in the round of `clock`. The own copy follows."""
        return self._own.advance(clock + 1, params)[1]

    def follow(self, sent: Mapping[int, Sequence[Array]]) -> Mapping[int, Sequence[Array]]:
        """The copies of the neighbours, after what they have sent in a round."""
        found: dict[int, Sequence[Array]] = {}
        for number, arrays in sent.items():
            if number not in self._others:
                self._others[number] = self._reader(number), self._first
            reader, copy = self._others[number]
            found[number] = reader.added(copy, arrays)
            self._others[number] = reader, found[number]
        return found
