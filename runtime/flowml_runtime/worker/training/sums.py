"""Adds gradients that are gathered over steps, on a lane beside the executor, which does not wait for the sums."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from flowml.plan import StoreSpec
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.mailbox import Cancelled
from flowml_runtime.execution.programs import Array, LoadedProgram, TaskFunction
from flowml_runtime.protocol.training.accumulator import Accumulator, Sum
from flowml_runtime.worker.training.resident import Arrays, number, row, row_of

Gradients = Future[Sequence[Array]]
"""The gradients of one part in a step, or the sum over several steps, which may not be computed yet."""


def known(arrays: Sequence[Array]) -> Gradients:
    """Gradients that are already computed."""
    found: Gradients = Future("a gradient", _same)
    found.complete(list(arrays))
    return found


def added(lane: Lane, device: str, add: TaskFunction, a: Gradients, b: Gradients) -> Gradients:
    """The sum of two. The lane may not have computed them yet; it computes sums in order."""
    total: Gradients = Future("a sum of gradients", _same)

    def work() -> None:
        total.complete(list(add(*a.result(), *b.result())))  # no deadline: the lane has computed both already

    def failed(error: BaseException) -> None:
        total.complete(None, error)

    if not lane.put(work, failed):
        total.complete(None, Cancelled(device))
    return total


def _same(arrays: Sequence[Array]) -> Sequence[Array]:
    return arrays


class Sums:
    """The gradients of one stage that are gathered over steps, by store and part."""

    def __init__(self, stores: Sequence[StoreSpec], stage: int, loaded: LoadedProgram, run: int) -> None:
        self._lane = Lane(f"{loaded.name} add run {run}")
        """Adds the gradients. The machine decides what counts without waiting for the sum."""
        self._gathered: dict[tuple[int, int], Accumulator[Gradients]] = {
            (s, p): Accumulator(partial(added, self._lane, loaded.name, loaded.tasks[part.accumulate]))
            for s, store in enumerate(stores)
            for p, part in enumerate(store.parts)
            if store.every > 1 and part.stage == stage and part.accumulate is not None
        }

    def add(self, store: int, part: int, clock: int, given: Sum[Gradients], pushes: bool) -> Sum[Gradients] | None:
        """The sum that a step pushes; None if it `pushes` none, and its gradients wait for a later one."""
        gathered = self._gathered.get((store, part))
        if pushes:
            return gathered.push(clock, given.value, given.weight) if gathered else given
        if gathered is not None:
            gathered.gather(clock, given.value, given.weight)
        return None

    def export(self, store: int) -> Arrays:
        """The sums of a store that wait for a push, for a snapshot between two steps."""
        found: dict[str, Array] = {}
        for (s, part), gathered in self._gathered.items():
            total = gathered.kept()
            if s == store and total is not None:
                # no deadline: the lane computes what is put to it, or is closed
                found |= {**row(f"{part}/sum", total.value.result()), f"{part}/weight": number(total.weight)}
        return found

    def restore(self, store: int, arrays: Arrays) -> None:
        """Go on with the sums of a snapshot."""
        for (s, part), gathered in self._gathered.items():
            if s == store and f"{part}/weight" in arrays:
                gathered.restore(Sum(known(row_of(arrays, f"{part}/sum")), int(arrays[f"{part}/weight"])))

    def settle(self, clock: int, stores: Sequence[int], *, counts: bool) -> None:
        """Whether the gradients of `clock` count for these stores."""
        for (store, _), gathered in self._gathered.items():
            if store in stores:
                (gathered.adopt if counts else gathered.discard)(clock)

    def close(self) -> None:
        """Add no more. A step may still wait for a sum, so those that are under way are ended."""
        self._lane.close(drop=False)
