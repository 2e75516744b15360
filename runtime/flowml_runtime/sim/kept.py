"""Says what a simulated stage keeps between two steps beside values, so that a snapshot holds it.

The values, where there are any, register themselves (`arithmetic`), by the names that they have on real workers. With
them go the rhythms, sums and versions of each stage, which the executor keeps itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from flowml_runtime.execution.programs import Array
from flowml_runtime.protocol.training.accumulator import Accumulator, Sum
from flowml_runtime.sim.neighbours import Neighbours
from flowml_runtime.sim.program import At
from flowml_runtime.sim.sites import Mirrors
from flowml_runtime.sim.values import Value
from flowml_runtime.worker.training.own_values import OwnRhythm
from flowml_runtime.worker.training.resident import Arrays, Resident, number, of_stage, row, row_of

if TYPE_CHECKING:
    from flowml_runtime.sim.node import Node


UNREAD: tuple[int, Value] = (0, None)
"""The version and value with which a stage has read a store that it has not read."""


@dataclass(frozen=True)
class Kept:
    """What one stage keeps, by store: sums of gradients, what was read last, rhythms and rounds."""

    node: Node
    at: At
    gathered: dict[tuple[int, int], Accumulator[Value]]
    taken: list[tuple[int, Value]]
    own: Mapping[int, OwnRhythm]
    neighbours: Mapping[int, Neighbours | Mirrors]

    def residents(self) -> Iterable[Resident]:
        """The buffers of all stores."""
        for store, name in enumerate(self.node.world.layout.names):
            owner = partial(of_stage, *self.at, name)
            yield Resident(owner("sums"), partial(self._sums, store), partial(self._restore_sums, store))
            yield Resident(owner("read"), partial(self._read, store), partial(self._restore_read, store))
            if store in self.own:
                yield Resident(owner("rhythm"), self.own[store].numbers, self.own[store].set_numbers)
            found = self.neighbours.get(store)
            if isinstance(found, Mirrors):
                yield Resident(owner("heard"), found.export, found.restore)

    @property
    def rests(self) -> bool:
        """Whether all has come that neighbours have sent."""
        return all(found.rests for found in self.neighbours.values() if isinstance(found, Mirrors))

    def _sums(self, store: int) -> Arrays:
        found: dict[str, Array] = {}
        for (s, part), gathered in self.gathered.items():
            total = gathered.kept()
            if s == store and total is not None:
                found |= {**row(f"{part}/sum", total.value or ()), f"{part}/weight": number(total.weight)}
        return found

    def _restore_sums(self, store: int, arrays: Arrays) -> None:
        for name in arrays:
            if name.endswith("/weight"):
                part = int(name.split("/")[0])
                gathered = Accumulator(partial(self.node.world.values.add, self.at, store, part))
                self.gathered[store, part] = gathered
                gathered.restore(Sum(row_of(arrays, f"{part}/sum"), int(arrays[name])))

    def _read(self, store: int) -> Arrays:
        version, value = self.taken[store]
        if self.taken[store] is UNREAD:
            return {}
        held = (value or ()) if self.node.machine.stage(self.at).holds(store) else ()
        return {"version": number(version), **row("held", held)}

    def _restore_read(self, store: int, arrays: Arrays) -> None:
        if arrays:
            self.taken[store] = int(arrays["version"]), row_of(arrays, "held")
