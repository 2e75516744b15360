"""Tells whether a call that goes on from a saved tree would mix two states, as in a loop of several programs.

The first call that takes values of a saved tree after a loss begins a `Recovery`. What is made since goes on from that
tree, and is as it is in later calls; what was made before is of the state that is lost. A call is refused

- while a value of a later step than the saved one is on a worker, which is not lost and which the call does not
  replace: other programs would go on with it
- with a value that was made of the state that is lost, such as its gradient, or that may be a part of it which the
  caller has fetched
- if another program of the loop has had the saved values before it did. A body that was left in the middle would go on
  there with what was saved at its end.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.tree_util import tree_leaves

from flowml.ir.objects import array_leaves
from flowml_runtime.driver.lineage import Mark
from flowml_runtime.driver.remote import Batch, Owner, Perished, Remote
from flowml_runtime.saved import Place, Recovery, Saved


@dataclass(frozen=True)
class Caller:
    """A program, as the lineage of its results names it, and whether results of it stay on the workers."""

    name: str
    code: Any
    keeps: bool

    @property
    def maker(self) -> Hashable:
        return self.name, self.code


@dataclass(frozen=True)
class Heir:
    """A value that a session has, and the leaves of a saved tree that it was or comes from."""

    batch: Batch
    index: int
    leaves: Sequence[int]
    is_saved: bool
    """Whether it is the very value that was saved."""

    @property
    def number(self) -> int:
        return self.batch.first + self.index

    @property
    def is_lost(self) -> bool:
        return self.batch.is_lost(self.index)


def _owner(gone: Sequence[Remote]) -> Owner:
    """The session of lost values."""
    owner = next(leaf.owner for leaf in gone if leaf.is_lost())
    assert owner is not None
    return owner


def _remotes(values: Any) -> list[Remote]:
    return [leaf for leaf in tree_leaves(values) if type(leaf) is Remote]


def heirs_of(record: Saved, gone: Sequence[Remote]) -> Iterator[Heir]:
    """The values with handles that were saved in a tree, or that come from its leaves, in the session of these."""
    saved: dict[tuple[Mark, int], list[int]] = {}
    made: dict[tuple[Hashable, str], list[int]] = {}
    sent: dict[Any, list[int]] = {}
    for i, (origin, kind) in enumerate(zip(record.origins, record.types, strict=True)):
        if origin is None:
            continue
        saved.setdefault((origin.mark, origin.number), []).append(i)
        if origin.mark.maker is None:
            sent.setdefault(kind, []).append(i)
        else:
            made.setdefault((origin.mark.maker, origin.name), []).append(i)
    for batch in _owner(gone).batches():
        lineage = batch.lineage
        if not lineage.line:
            continue
        for index in batch.alive - batch.gone.keys():
            kind = batch.kinds[index]
            number = batch.first + index
            same = saved.get((lineage.mark, number), ()) if lineage.mark is not None else ()
            like = list(made.get((lineage.maker, kind.name), ()))
            if lineage.maker is not None:
                like += sent.get((tuple(kind.signature[0]), str(kind.signature[1])), ())
            found = same or [i for i in like if (o := record.origins[i]) and o.precedes(lineage, kind.name)]
            if found:
                yield Heir(batch, index, found, bool(same))


def tell_all(records: Iterable[Saved], gone: Sequence[Remote]) -> None:
    """The caller has had the error of the loss of all values that go on from these trees."""
    for record in records:
        for heir in heirs_of(record, gone):
            if heir.is_lost:
                heir.batch.told = True


def recovery_of(record: Saved, gone: Sequence[Remote]) -> Recovery:
    """That which a call with these lost values belongs to: a new one if values made in the last one are lost."""
    recovery = record.recovery
    if recovery is not None and all(leaf.number < recovery.began for leaf in gone):
        return recovery
    return Recovery(_owner(gone).next_number())


def is_fresh(leaf: Any, recovery: Recovery) -> bool:
    """Whether a value was made in a recovery and is there."""
    return type(leaf) is Remote and leaf.number >= recovery.began and not leaf.is_lost()


def note_same(record: Saved, leaves: Sequence[int], gone: Sequence[Remote], caller: Caller) -> None:
    """Saved leaves are in place of the values that they were. If no later ones are there, a recovery begins."""
    recovery = recovery_of(record, gone)
    later = (h for h in heirs_of(record, gone) if not h.is_saved and not h.is_lost and h.number < recovery.began)
    if next(later, None) is None:
        _take(record, recovery, leaves, caller)
    for leaf in gone:
        if leaf.lineage.mark is not None:
            leaf.lineage.mark.readers[caller.maker, leaf.number] = None


def _take(record: Saved, recovery: Recovery, leaves: Iterable[int], caller: Caller) -> None:
    record.recovery = recovery
    for i in leaves:
        recovery.revived.add(i)
        if (origin := record.origins[i]) is not None:
            recovery.read.add((caller.maker, origin.number))


@dataclass(frozen=True)
class Call:
    """A call whose arguments at some `places` shall come from a saved tree."""

    record: Saved
    recovery: Recovery
    given: Sequence[Any]
    places: Mapping[int, Place]
    caller: Caller

    @cached_property
    def _heirs(self) -> Sequence[Heir]:
        return list(heirs_of(self.record, _remotes(self.given)))

    @cached_property
    def _hit(self) -> set[int]:
        """The lineages of calls some of whose results are lost."""
        return {id(h.batch.lineage) for h in self._heirs if h.is_lost}

    def _later(self) -> Iterator[Heir]:
        """The values of a later step than the saved one, which are not lost."""
        for heir in self._heirs:
            if not heir.is_saved and not heir.is_lost and heir.number < self.recovery.began:
                yield heir

    def begin(self) -> None:
        """The saved values are taken. The rest of steps that are lost in part is of no use any more."""
        _take(self.record, self.recovery, (i for place in self.places.values() for i in range(*place)), self.caller)
        why = (
            f"is of a step that is lost in part: {self.caller.name} goes on from the state saved in {self.record.path}"
        )
        for heir in self._later():
            if id(heir.batch.lineage) in self._hit:
                heir.batch.give_up((heir.index,), Perished(f"{why}; call again with it, or use what that returned"))

    def mixes(self) -> str:
        """Why the call would mix two states, and what to do. Empty if it would not."""
        path, load = self.record.path, f"give each program what fm.load({str(self.record.path)!r}, cluster) returns"
        remedy = f"begin again: {load}"
        why = self._made_of_lost()
        if why:
            remedy = f"begin the turn again if it makes that argument, or {load}"
        elif why := self._stays():
            if any(heir.batch.future is not None for heir in self._later()):  # its call may fail because of the loss
                remedy = f"begin the turn again, and if that is refused, {load}"
        elif why := self._in_the_middle():
            remedy = f"begin the turn again, or {load}"
        why = why or self._fetched()
        return why and (
            f"{self.caller.name} cannot go on alone from the state saved in {path}, because {why}; {remedy}"
        )

    def _made_of_lost(self) -> str:
        """An argument made of the lost state, which was not saved."""
        marks = {origin.mark for origin in self.record.origins if origin is not None}
        for i, value in enumerate(self.given):
            for leaf in _remotes(value) if i not in self.places else ():
                if leaf.number < self.record.made or is_fresh(leaf, self.recovery):
                    continue
                if leaf.lineage.line & marks and self.record.index(leaf) is None:
                    return f"its argument {leaf.kind.name!r} was made of the state that is lost"
        return ""

    def _stays(self) -> str:
        """A value of a later step that is not lost, of a call with no lost results, and that stays with the caller."""
        own = {
            leaf.number
            for i in self.places
            for leaf in _remotes(self.given[i])
            if self.caller.keeps and leaf.lineage.maker == self.caller.maker
        }
        for heir in self._later():
            if heir.number not in own and id(heir.batch.lineage) not in self._hit:
                name = heir.batch.kinds[heir.index].name
                return f"{name!r} of {heir.batch.call} is of a later step and is not lost"
        return ""

    def _in_the_middle(self) -> str:
        """Another program of the loop that was the first to get the saved values, and has not got them again."""
        origins = [origin for origin in self.record.origins if origin is not None]
        makers = {origin.mark.maker for origin in origins}
        sent = None in makers
        if not self.caller.keeps or not (sent or self.caller.maker in makers):
            return ""
        if sent:
            makers |= {heir.batch.lineage.maker for heir in self._heirs}
        for i, place in self.places.items():
            for (_, leaf), origin in zip(
                array_leaves(self.given[i])[0], self.record.origins[slice(*place)], strict=True
            ):
                if origin is None or type(leaf) is not Remote or is_fresh(leaf, self.recovery):
                    continue
                if self.record.index(leaf) is not None:
                    continue
                readers = [maker for maker, number in origin.mark.readers if number == origin.number]
                known = self.caller.maker in readers
                before = readers[: readers.index(self.caller.maker)] if known else readers
                missing = [m for m in before if m in makers and (m, origin.number) not in self.recovery.read]
                if missing or not known:
                    other = missing[0] if missing else origin.mark.maker
                    first = f"{other[0]} is called before it" if isinstance(other, tuple) else "others are called first"
                    return f"{first} with the saved {origin.name!r}"
        return ""

    def _fetched(self) -> str:
        """An argument that may be a part of the lost state that was fetched, and sent again."""
        there = {i for heir in self._heirs for i in heir.leaves} | self.recovery.revived
        there |= {i for place in self.places.values() for i in range(*place)}
        marks = {origin.mark for origin in self.record.origins if origin is not None}
        for i, value in enumerate(self.given):
            remotes = _remotes(value)
            if i in self.places or not any(getattr(leaf, "ndim", 0) for leaf in tree_leaves(value)):
                continue
            if any(leaf.lineage.line & marks for leaf in remotes):
                continue
            if remotes and all(leaf.number < self.record.made for leaf in remotes):
                continue
            for place in self.record.fitting(value):
                if any(self.record.origins[slice(*place)]) and there.isdisjoint(range(*place)):
                    return "an argument may be a part of the later state that was fetched"
        return ""
