"""Lets a loop with kept values go on after the loss of workers, from the state that `fm.save` has written last.

The first call that misses a lost value raises the error, which says that the next call goes on: what else the caller
gives, such as a batch, was chosen for the state that is lost. The next call takes the saved values in place of the lost
ones. An argument is known by its structure, shapes and dtypes, as the saved tree or as an element of it. All arguments
that the saved tree has are taken from there, also those that are not lost: a mixture of two states would be none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from jax.tree_util import tree_leaves

from flowml.callers import warn
from flowml.errors import FlowmlError, WorkerLostError
from flowml_runtime.driver.remote import Remote
from flowml_runtime.membership.advice import without_remedy
from flowml_runtime.saved import Saved, records_of, taken_from

T = TypeVar("T")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@runtime_checkable
class Restarts(Protocol):
    """A cluster that has lost workers again, when asked."""

    @property
    def lost(self) -> Sequence[str]: ...
    def bring_back(self, workers: Sequence[str]) -> None: ...
    def notice(self, worker: str | None) -> None: ...


def revived(error: FlowmlError, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Arguments:
    """The arguments of a call that has failed with this error, with saved ones in place of those that were lost before
    it began. Warns of it. Raises the error if there are none, or if the caller has had none of the loss yet."""
    given = [*args, *kwargs.values()]
    remotes = [leaf for leaf in tree_leaves(given) if type(leaf) is Remote]
    during = isinstance(error, WorkerLostError) and error.step is not None
    for remote in remotes if during else ():
        if remote.is_deleted():  # donated to this call, which was lost
            remote.perish()
    lost = [i for i, value in enumerate(given) if any(_is_lost(leaf) for leaf in tree_leaves(value))]
    if not lost:
        raise error
    records = records_of(remotes)
    found = _saved(given, lost, [record for record in records if record.is_there])
    if found is None:
        hint = f"fm.save the state of {name} now and then: then a call goes on from what was saved last"
        removed = _saved(given, lost, records)
        if removed is not None:
            hint = f"the state saved in {removed[0].path} is not there any more; save to a directory that stays"
        raise _with_hint(error, hint) from error
    record, places = found
    gone = [leaf for i in lost for leaf in tree_leaves(given[i]) if _is_lost(leaf)]
    if during or not all(leaf.told for leaf in gone):
        for leaf in gone:
            leaf.tell()
        hint = f"call {name} again: it goes on from the state saved in {record.path}, on the workers that there are"
        raise _with_hint(error, hint) from error
    values = taken_from(record, {i: (given[i], place) for i, place in places.items()})
    warn(f"{gone[0].why_lost()}; {name} goes on from the state saved in {record.path}")
    given = [values.get(i, value) for i, value in enumerate(given)]
    return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))


def with_workers(cluster: Any, use: Callable[[Any, Any], T], given: Arguments) -> T:
    """Use arguments in place of those that were lost. What needs lost workers by its placement gets them back."""
    for _ in range(2):
        try:
            return use(*given)
        except WorkerLostError as error:
            if not isinstance(cluster, Restarts):
                raise
            if error.step is not None:  # the loss is not known everywhere yet
                cluster.notice(error.worker)
            else:
                cluster.bring_back(cluster.lost)
    return use(*given)


def _is_lost(leaf: Any) -> bool:
    return type(leaf) is Remote and leaf.is_lost()


def _with_hint(error: FlowmlError, hint: str) -> FlowmlError:
    """The same error with another remedy."""
    text = without_remedy(str(error))
    if not isinstance(error, WorkerLostError):
        return type(error)(f"{text}; {hint}")
    return WorkerLostError(f"{text}; {hint}", worker=error.worker, step=error.step)


def _saved(
    given: Sequence[Any], lost: Sequence[int], records: Iterable[Saved]
) -> tuple[Saved, dict[int, tuple[int, int]]] | None:
    """The first saved tree that has all lost arguments, and for each argument that it has the range of its leaves."""
    kept = [i for i, value in enumerate(given) if any(type(leaf) is Remote for leaf in tree_leaves(value))]
    for record in records:
        places: dict[int, tuple[int, int]] = {}
        for i in sorted(kept, key=lambda i: i not in lost):
            place = record.place(given[i])
            if place is None:
                continue
            if place in places.values():  # two arguments of one kind, and the tree has one of them
                if i in lost:
                    break
                continue
            places[i] = place
        else:
            if all(i in places for i in lost):
                return record, places
    return None
