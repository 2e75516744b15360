"""Lets a loop with kept values go on after the loss of workers, from the state that `fm.save` has written last.

The first call that misses a lost value raises the error, which says that the next call goes on: what else the caller
gives, such as a batch, was chosen for the state that is lost. The next call takes saved values in place of the lost
ones.

Values that were saved themselves come back as they were. Else the loop has gone on since the save: an argument is known
by its structure, shapes and dtypes, as the saved tree or as an element of it, and by its lineage (`driver.lineage`).
All arguments that the saved tree has are taken from there, also those that are not lost: a mixture of two states would
be none. Those that were made since calls go on from there are as they are. What would be a mixture all the same is
refused (`mixtures`), as is a tree that fits but may be another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from jax.tree_util import tree_leaves, tree_map

from flowml.callers import warn
from flowml.errors import FlowmlError, WorkerLostError
from flowml_runtime.driver.lineage import Mark, Parent, descending_from
from flowml_runtime.driver.remote import Batch, Remote
from flowml_runtime.driver.staying import parents_of
from flowml_runtime.membership.advice import without_remedy
from flowml_runtime.mixtures import Call, Caller, is_fresh, note_same, recovery_of, tell_all
from flowml_runtime.saved import Place, Recovery, Saved, leaves_of, records_of, taken_from

T = TypeVar("T")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@runtime_checkable
class Restarts(Protocol):
    """A cluster that has lost workers again, when asked."""

    @property
    def lost(self) -> Sequence[str]: ...
    def bring_back(self, workers: Sequence[str]) -> None: ...
    def notice(self, worker: str | None) -> None: ...


@dataclass(frozen=True)
class Revived:
    """Arguments with saved values in place of lost ones, and what these come from."""

    given: Arguments
    parents: Sequence[Parent]


@dataclass(frozen=True)
class _Found:
    """Where lost values were saved, and what gives the arguments of a call with them in place."""

    records: Sequence[Saved]
    parents: Sequence[Parent]
    take: Callable[[], Sequence[Any]]
    mixes: str = ""
    """Why that would be a mixture of two states, and what to do."""

    @property
    def paths(self) -> Sequence[Path]:
        return [record.path for record in self.records]


def revived(error: FlowmlError, args: Sequence[Any], kwargs: Mapping[str, Any], caller: Caller) -> Revived:
    """The arguments of a call that has failed with this error, with saved ones in place of those that were lost before
    it began. Warns of it. Raises the error if there are none, or if the caller has had none of the loss yet."""
    given, name = [*args, *kwargs.values()], caller.name
    remotes = [leaf for leaf in tree_leaves(given) if type(leaf) is Remote]
    during = isinstance(error, WorkerLostError) and error.step is not None
    for remote in remotes if during else ():
        if remote.is_deleted():  # donated to this call, which was lost
            remote.perish()
    gone = [leaf for leaf in remotes if leaf.is_lost()]
    if not gone:
        raise error
    error = _of_loss(error, remotes)
    records = records_of(remotes)
    there = [record for record in records if record.is_there]
    found = _same(given, gone, there, caller) or _before(given, gone, there, caller)
    if found is None or found.mixes:
        hint = found.mixes if found is not None else _why_not(given, gone, records, there, caller)
        raise _with_hint(error, hint) from error
    paths = " and ".join(map(str, found.paths))
    if during or not all(leaf.told for leaf in gone):
        for leaf in gone:
            leaf.tell()
        tell_all(found.records, gone)
        hint = f"call {name} again: it goes on from the state saved in {paths}, on the workers that there are"
        raise _with_hint(error, hint) from error
    tell_all(found.records, gone)  # a loss during a call is known of the other values only now
    given = found.take()
    warn(f"{gone[0].why_lost()}; {name} goes on from the state saved in {paths}")
    return Revived((tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))), found.parents)


def with_workers(cluster: Any, use: Callable[[Any, Any], T], again: Revived) -> T:
    """Use arguments in place of those that were lost. What needs lost workers by its placement gets them back."""
    with descending_from(again.parents):
        return _with_workers(cluster, use, again.given)


def _with_workers(cluster: Any, use: Callable[[Any, Any], T], given: Arguments) -> T:
    for _ in range(2):
        try:
            return use(*given)
        except WorkerLostError as error:
            if not isinstance(cluster, Restarts):
                raise
            if error.step is not None:  # the loss is not known everywhere yet
                cluster.notice(error.worker)
            else:
                # Those that others have started may be gone for long, and on purpose.
                others = getattr(cluster, "outlives", False)
                cluster.bring_back(_started_again(cluster, error.worker) if others else cluster.lost)
    return use(*given)


def _started_again(cluster: Any, worker: str | None) -> Sequence[str]:
    """The worker, if a spare takes its place or a launcher starts it again."""
    return [worker] if worker and (cluster.spares or cluster.launchers) else ()


def _with_hint(error: FlowmlError, hint: str) -> FlowmlError:
    """The same error with another remedy."""
    text = without_remedy(str(error))
    if not isinstance(error, WorkerLostError):
        return type(error)(f"{text}; {hint}")
    return WorkerLostError(f"{text}; {hint}", worker=error.worker, step=error.step)


def _of_loss(error: FlowmlError, remotes: Sequence[Remote]) -> FlowmlError:
    """That of a value which was donated to a call during a loss is of the loss, if nothing else is wrong."""
    if isinstance(error, WorkerLostError) or any(r.is_deleted() and not r.is_lost() for r in remotes):
        return error
    cause = error.__cause__
    loss = WorkerLostError(str(error), worker=cause.worker if isinstance(cause, WorkerLostError) else None)
    loss.__cause__ = cause
    return loss


def _same(given: Sequence[Any], gone: Sequence[Remote], records: Sequence[Saved], caller: Caller) -> _Found | None:
    """Where all of the lost values were saved themselves. The others are left as they are."""
    places: dict[int, tuple[Saved, int]] = {}
    for leaf in gone:
        hit = next(((r, i) for r in records if (i := r.index(leaf)) is not None), None)
        if hit is None:
            return None
        places[id(leaf)] = hit
    used = list({id(record): record for record, _ in places.values()}.values())

    def take() -> Sequence[Any]:
        mine = {id(r): sorted({i for record, i in places.values() if record is r}) for r in used}
        read = {id(r): leaves_of(r, mine[id(r)]) for r in used}
        for record in used:
            here = [leaf for leaf in gone if places[id(leaf)][0] is record]
            note_same(record, mine[id(record)], here, caller)

        def of(leaf: Any) -> Any:
            record, index = places.get(id(leaf), (None, 0))
            return leaf if record is None else read[id(record)][index]

        return tree_map(of, list(given))

    return _Found(used, parents_of(gone), take)


def _before(given: Sequence[Any], gone: Sequence[Remote], records: Iterable[Saved], caller: Caller) -> _Found | None:
    """The newest saved tree from which all lost arguments come."""
    for record in records:
        recovery = recovery_of(record, gone)
        places = _places(given, record, recovery)
        if places is None:
            continue
        call = Call(record, recovery, given, places, caller)
        origins = [o for place in places.values() for o in record.origins[slice(*place)] if o is not None]

        def take(record: Saved = record, call: Call = call) -> Sequence[Any]:
            taken = {i: (given[i], place) for i, place in call.places.items()}
            values = taken_from(record, taken, lambda leaf: is_fresh(leaf, call.recovery))
            call.begin()
            return [values.get(i, value) for i, value in enumerate(given)]

        return _Found([record], list({origin.element or origin.mark for origin in origins}), take, call.mixes())
    return None


def _places(given: Sequence[Any], record: Saved, recovery: Recovery) -> dict[int, Place] | None:
    """The place of each argument that comes from a saved tree. None if a lost one does not, or if what does could be
    taken for something else. What was made since others have gone on from there is as it is."""
    places: dict[int, Place] = {}
    moved: dict[tuple[Any, ...], int] = {}
    for i, value in enumerate(given):
        remotes = [leaf for leaf in tree_leaves(value) if type(leaf) is Remote]
        if remotes and all(is_fresh(leaf, recovery) for leaf in remotes):
            continue
        heirs = {tuple(record.origins[slice(*p)]): p for p in record.fitting(value) if record.precedes(value, p)}
        if len(heirs) > 1:  # one may have it as it is
            heirs = {o: p for o, p in heirs.items() if all(record.index(leaf) in range(*p) for leaf in remotes)}
        if len(heirs) == 1 and remotes:
            ((origins, places[i]),) = heirs.items()
            if all(record.index(leaf) is not None for leaf in remotes):
                continue
            if origins in moved:
                return None
            moved[origins] = i
        elif any(leaf.is_lost() for leaf in remotes):
            return None
    return places if not _others(given, places, record) else None


def _others(given: Sequence[Any], places: Mapping[int, Place], record: Saved) -> bool:
    """Whether values besides these come from what was sent or read, and saved before a call had made anything of it:
    then nothing tells which of them go on from it."""
    origins = [o for place in places.values() for o in record.origins[slice(*place)]]
    sent = {o.mark for o in origins if o is not None and o.mark.maker is None}
    leaves = [leaf for i in places for leaf in tree_leaves(given[i]) if type(leaf) is Remote]
    leaves = [leaf for leaf in leaves if record.index(leaf) is None]
    here = {(leaf.lineage.maker, leaf.kind.name) for leaf in leaves}
    types = {leaf.kind.signature[:2] for leaf in leaves}
    mine = {o.element.mark for o in origins if o is not None and o.element is not None}
    known = bool(mine) and all(leaf.lineage.line & mine for leaf in leaves)
    return bool(sent) and any(
        kind.signature[:2] in types and (batch.lineage.maker, kind.name) not in here
        for owner in {id(leaf.owner): leaf.owner for leaf in leaves}.values()
        for batch in (owner.batches() if owner is not None else ())
        if batch.lineage.maker is not None and batch.lineage.line & sent
        if not (known and _is_another(batch, places, mine, record))
        for kind in (batch.kinds[i] for i in batch.alive.copy())
    )


def _is_another(batch: Batch, places: Mapping[int, Place], mine: set[Mark], record: Saved) -> bool:
    """Whether the values of a call go on from another element than those at these places, which have the marks `mine`:
    they come from that one and are like it as a whole, and these are not."""
    found = {o.element.mark for o in record.origins if o is not None and o.element is not None}
    found &= batch.lineage.line
    if len(found) != 1 or found & mine:
        return False
    here = [i for i, o in enumerate(record.origins) if o is not None and o.element and o.element.mark in found]
    element = tuple(record.types[here[0] : here[-1] + 1])
    made = tuple((tuple(kind.signature[0]), str(kind.signature[1])) for kind in batch.kinds)
    return made == element and all(tuple(record.types[slice(*place)]) != element for place in places.values())


def _why_not(
    given: Sequence[Any], gone: Sequence[Remote], records: Sequence[Saved], there: Sequence[Saved], caller: Caller
) -> str:
    """What to do where no saved values can be taken."""
    removed = _same(given, gone, records, caller) or _before(given, gone, records, caller)
    if removed is not None:
        return f"the state saved in {removed.paths[0]} is not there any more; save to a directory that stays"
    lost = [value for value in given if any(type(x) is Remote and x.is_lost() for x in tree_leaves(value))]
    like = next((record for record in there if any(map(record.fitting, lost))), None)
    if like is not None:
        return (
            f"the tree saved in {like.path} has the structure of what was lost, but may be another one: it was not "
            f"saved from these values, nor do they come from it alone; fm.save all that {caller.name} is given in one "
            f"tree, and give it now what fm.load({str(like.path)!r}, cluster) returns, if that is what was lost"
        )
    return f"fm.save the state of {caller.name} now and then: then a call goes on from what was saved last"
