"""Checks periodically that replicas which must hold the same parameters hold the same bits.

If replicas add up gradients among themselves, each applies the sums to its own copy. All copies add and apply the same
values in the same order, so they differ only if something is broken: memory, a processor that computes differently, or
flowml. Without a check, training would continue with replicas that stay different. So every few steps and at the end,
each copy is reduced to a digest of 64 bits. The group that adds up the store's gradients then adds up a row with one
place per member, in which each member has set its own digest. The sum gives every member all digests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import xxhash

from flowml.devices import worker_of
from flowml.errors import DivergedError, FlowmlError, WorkerLostError, one_line
from flowml_runtime.execution.future import Future
from flowml_runtime.transport.arrays import as_bytes
from flowml_runtime.worker.training.exchange.collectives import Group
from flowml_runtime.worker.training.run import Fault, Run

Digest = np.ndarray[Any, np.dtype[np.uint64]]


class Agreement:
    """The checks of one worker in one run. The lanes of stores call it."""

    def __init__(self, run: Run, groups: Callable[[int], Group], on_fault: Fault) -> None:
        """`groups` returns the group that adds up the gradients of a store."""
        self._run = run
        self._groups = groups
        self._on_fault = on_fault
        self._first_bucket = sum(len(s.parts) for s in run.training.stores)
        self._checks: dict[int, tuple[int, Future[Digest]]] = {}
        """Store -> the version that was compared last, or is being compared."""

    def is_due(self, store: int, version: int) -> bool:
        spec, steps = self._run.training.stores[store], self._run.start.check_replicas
        shared = len(dict.fromkeys(map(worker_of, spec.copies))) > 1
        return bool(shared and steps and version % -(-steps // spec.every) == 0)

    def compare(
        self,
        store: int,
        version: int,
        clock: int,
        arrays: Sequence[Any],
        then: Callable[[], None] = lambda: None,
        *,
        last: bool = False,
    ) -> None:
        """Compare a version, made by step `clock`, with the other copies, if it is due or the `last` one.

        All workers that hold a copy call this with the same versions. `then` is called when the copies agree, perhaps
        on another thread.
        """
        known, outcome = self._checks.get(store, (-1, None))
        if outcome is None or known != version:
            if not self.is_due(store, 0 if last else version):
                then()
                return
            outcome = self._begin(store, version, digest(arrays), outcome)
            outcome.when_done(partial(self._report, store, clock))
        outcome.when_done(partial(self._call_if_equal, then))

    def _begin(self, store: int, version: int, mine: int, previous: Future[Digest] | None) -> Future[Digest]:
        """Exchange digests after the previous exchange has ended, because a bucket allows one all-reduce at a time."""
        outcome: Future[Digest] = Future(f"the check of version {version}", _same)
        self._checks[store] = (version, outcome)

        def exchange(_: object) -> None:
            group = self._groups(store)
            row = np.zeros(group.size, np.uint64)
            row[group.rank] = mine
            try:
                digests = group.all_reduce(self._first_bucket + store, version, [row])
            except FlowmlError as error:
                outcome.complete(None, error)
            else:
                digests.when_done(lambda done: _hand_on(done, outcome))

        if previous is None:
            exchange(None)
        else:
            previous.when_done(exchange)
        return outcome

    def _call_if_equal(self, then: Callable[[], None], done: Future[Digest]) -> None:
        if done.exception() is None and _equal(done.result()):
            then()

    def _report(self, store: int, clock: int, done: Future[Digest]) -> None:
        error = done.exception()
        if error is None and not _equal(done.result()):
            error = self._diverged(store, clock, done.result())
        if error is not None and not self._run.stopped and not isinstance(error, WorkerLostError):
            self._on_fault(self._run.step_of(clock), f"store {self._run.training.stores[store].name}", error)

    def _diverged(self, store: int, clock: int, digests: Digest) -> DivergedError:
        spec = self._run.training.stores[store]
        members = list(dict.fromkeys(map(worker_of, spec.homes)))
        replicas: dict[int, list[str]] = {}
        for number, home in enumerate(spec.homes):
            found = replicas.setdefault(int(digests[members.index(worker_of(home))]), [])
            found.append(f"{number} ({worker_of(home)})")
        kinds = [", ".join(r) for r in sorted(replicas.values(), key=len, reverse=True)]
        return DivergedError(
            f"step {clock}: replicas hold different parameters or optimizer state of layer {one_line(spec.name)!r}: "
            f"replica {' differs from replica '.join(kinds)}; a worker's memory or processor is faulty, or computes "
            "differently from the others: train again without it, from earlier parameters",
            worker=self._run.me,
            step=clock,
            node=spec.name,
        )


def _same(digests: Digest) -> Digest:
    return digests


def _hand_on(done: Future[Any], outcome: Future[Digest]) -> None:
    error = done.exception()
    outcome.complete(done.result()[0] if error is None else None, error)


def _equal(digests: Digest) -> bool:
    return bool((digests == digests[0]).all())


def digest(arrays: Sequence[Any]) -> int:
    """A digest of 64 bits of the bits of all arrays, in order."""
    found = xxhash.xxh3_64()
    for array in arrays:
        found.update(as_bytes(np.ascontiguousarray(np.asarray(array))).data)
    return found.intdigest()
