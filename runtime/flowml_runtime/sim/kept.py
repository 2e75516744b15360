"""Says what a simulated stage keeps between two steps beside values, so that a snapshot holds it, and tells it.

The values, where there are any, register themselves (`arithmetic`), by the names that they have on real workers. With
them go the rhythms, sums and versions of each stage, which the executor keeps itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flowml_runtime import wire
from flowml_runtime.execution.programs import Array
from flowml_runtime.protocol.training import actions as protocol
from flowml_runtime.protocol.training.accumulator import Accumulator, Sum
from flowml_runtime.sim.neighbours import Neighbours
from flowml_runtime.sim.network import DRIVER
from flowml_runtime.sim.program import At
from flowml_runtime.sim.sites import Mirrors
from flowml_runtime.sim.values import Value
from flowml_runtime.worker.training.own_values import OwnRhythm
from flowml_runtime.worker.training.resident import (
    Arrays,
    Resident,
    loaded,
    number,
    of_stage,
    of_waiting,
    row,
    row_of,
)

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


def residents_of(node: Node) -> list[Resident]:
    """The buffers that live on a worker between steps."""
    kept = (resident for stage in node.stages.values() for resident in stage.kept().residents())
    return [*kept, *node.world.values.residents(node.name)]


def export(node: Node, asked: protocol.Export) -> None:
    """Tell the driver, other workers or both what lives on a worker between steps.

    Nothing if the snapshot was withdrawn while applies took their time: a step has begun meanwhile.
    """
    if node.machine.held > asked.number:
        return
    residents, names = residents_of(node), node.world.layout.names
    for waiting, handle in asked.waiting:
        if not waiting.empty:
            arrays_of = partial(row, "array", node.payloads[handle])
            residents.append(Resident(of_waiting(names[waiting.store], waiting), arrays_of, loaded))
    ids: dict[str, Any] = {**node.ids, "cause": asked.cause, "number": asked.number}
    about: dict[str, Any] = {"stages": asked.stages, "stores": asked.stores, "sites": asked.sites}
    parts = tuple(part for part, _ in asked.waiting)
    node.send(DRIVER, wire.Exported(**ids, **about, waiting=parts, buffers=len(residents)))
    for resident in residents:
        arrays = resident.export()
        if asked.copied:
            node.copying.send(asked, resident, arrays)
        if asked.whole:
            told = wire.Buffers(**ids, owner=resident.owner, names=tuple(arrays))
            node.send(DRIVER, told, tuple(arrays.values()))
