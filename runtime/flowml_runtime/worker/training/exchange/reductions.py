"""Adds up gradients over all replicas: takes the pushes of this worker's seats to collective stores, and gives the sum
to their homes.

    seat -> sum over this worker's replicas -> all-reduce among the stage's workers -> Contribution to the home here

The workers of a stage form a group. Each part of a store is one of its buckets. The sum stands for all replicas and has
the same bits at every home, because replicas of a worker are added in their order, and workers in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from flowml.devices import worker_of
from flowml.errors import FlowmlError, WorkerLostError
from flowml.plan import Part
from flowml_runtime import wire
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.programs import Array
from flowml_runtime.execution.recorder import Span, now_ns
from flowml_runtime.protocol.collective import Schedule, named
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.transport.arrays import aligned_empty
from flowml_runtime.worker.training.exchange.collectives import Group, GroupId, accumulator, add
from flowml_runtime.worker.training.finite import all_finite
from flowml_runtime.worker.training.run import Fault, Run


@dataclass(frozen=True)
class Given:
    """One push of a replica: a part of a store at a clock, and how many microbatch gradients it sums.

    `cause` is the cause of the step, as in `actions.Start`.
    """

    store: int
    part: int
    replica: int
    clock: int
    weight: int
    cause: int


@dataclass(frozen=True)
class _Bucket:
    """One part of a collective store on this worker. `homes` are the workers that apply the sum for its replicas."""

    number: int
    part: Part
    schedule: Schedule
    group: Group
    replicas: tuple[int, ...]
    homes: tuple[str, ...]


class Reductions:
    """The groups of one run on one worker. Every method may be called from any thread."""

    def __init__(self, run: Run, on_fault: Fault) -> None:
        self._run = run
        self._on_fault = on_fault
        self._waiting: dict[tuple[int, int, int], dict[int, Sequence[Array]]] = {}
        """(store, part, clock) -> the pushes that have arrived from this worker's replicas."""
        self._groups: dict[int, Group] = {}
        self._buckets = self._open()

    def _open(self) -> dict[tuple[int, int], _Bucket]:
        """Make a bucket for each part that replicas here push. Its number is the same on all workers."""
        run, replicas = self._run, self._run.training.replicas
        parts = [(s, p) for s, store in enumerate(run.training.stores) for p in range(len(store.parts))]
        found: dict[tuple[int, int], _Bucket] = {}
        for number, (s, p) in enumerate(parts):
            store = run.training.stores[s]
            part = store.parts[p]
            if part.reduction is None or run.me not in part.reduction.workers:
                continue
            here = tuple(r for r, devices in enumerate(replicas) if worker_of(devices[part.stage]) == run.me)
            homes = tuple(dict.fromkeys(worker_of(store.homes[r]) for r in here))
            schedule = named(part.reduction.schedule, part.reduction.hosts, part.reduction.fanout)
            found[s, p] = _Bucket(number, part, schedule, self._group(part), here, homes)
        return found

    def _group(self, part: Part) -> Group:
        assert part.reduction is not None
        if part.stage not in self._groups:
            run, reduction = self._run, part.reduction
            identity = GroupId(run.plan_id, run.number, part.stage)
            self._groups[part.stage] = Group(
                identity, run.me, reduction.workers, run.sender.send, hosts=reduction.hosts, deadline_s=run.deadline_s
            )
        return self._groups[part.stage]

    def group(self, stage: int) -> Group:
        """The group of a stage whose gradients are added up here."""
        return self._groups[stage]

    def push(self, given: Given, arrays: Sequence[Array]) -> None:
        """Add the push of a replica. The push of this worker's last replica starts the all-reduce.

        The arrays must not change any more. May wait until they are computed.
        """
        bucket = self._buckets[given.store, given.part]
        own = {given.replica: arrays}
        if len(bucket.replicas) > 1:
            key = (given.store, given.part, given.clock)
            with self._run.changed:
                waiting = self._waiting.setdefault(key, {})
                waiting[given.replica] = arrays
                if len(waiting) < len(bucket.replicas):
                    return
                own = self._waiting.pop(key)
            arrays = [sum_of([np.asarray(own[r][i]) for r in bucket.replicas]) for i in range(len(arrays))]
        began = now_ns()
        try:
            future = bucket.group.all_reduce(bucket.number, given.clock, arrays, bucket.schedule)
        except FlowmlError as error:
            self._failed(given, error)
        else:
            future.when_done(lambda done: self._done(bucket, given, own, began, done))

    def on_message(self, peer: str, message: wire.Collective, arrays: Sequence[Array]) -> None:
        """Process a chunk. Does not wait."""
        group = self._groups.get(message.group)
        if group is None:
            error = ProtocolError(f"{peer} sent for a sum of stage {message.group}, in which this worker has no part")
            self._on_fault(self._run.step_of(message.clock), "an all-reduce", error)
            return
        group.on_message(peer, message, arrays)

    def on_lost(self, peer: str, reason: str) -> None:
        for group in self._groups.values():
            group.on_lost(peer, reason)

    def close(self) -> None:
        """Fail all running all-reduces. The caller has marked the run as stopped."""
        for group in self._groups.values():
            group.close()

    def _done(
        self, bucket: _Bucket, given: Given, own: Mapping[int, Sequence[Array]], began: int, done: Future[Any]
    ) -> None:
        """The sum is complete, or has failed. Called on a receiving thread or on the group's thread."""
        error = done.exception()
        if error is not None:
            self._failed(given, error)
            return
        run, replicas = self._run, len(self._run.training.replicas)
        message = wire.Contribution(
            plan_id=run.plan_id,
            run=run.number,
            cause=given.cause,
            store=given.store,
            part=given.part,
            replica=0,
            incarnation=0,
            clock=given.clock,
            base_version=0,  # unused, because a sum is never stale
            weight=given.weight * replicas,
            specs=bucket.part.payload,
        )
        sums: Sequence[Array] = done.result()
        try:
            if not self._is_sound(given, own, sums):
                message, sums = msgspec.structs.replace(message, weight=0, empty=True, specs=()), ()
        except FlowmlError as error:
            self._failed(given, error)
            return
        if run.recorder.on:
            name, step = f"store {run.training.stores[given.store].name}", run.step_of(given.clock)
            lane = f"{run.training.replicas[given.replica][bucket.part.stage]} reduce {bucket.number}"
            span = Span(lane, "reduce", name, step, 0, bucket.part.nbytes, bucket.schedule.name, began, now_ns())
            run.recorder.add(span)
        run.count_crossing(given.store, bucket.group.take_sent_bytes(bucket.number))
        for home in bucket.homes:
            run.send(home, message, sums)

    def _is_sound(self, given: Given, own: Mapping[int, Sequence[Array]], sums: Sequence[Array]) -> bool:
        """Whether a sum may be applied. It has the same bits on all workers, so all workers decide the same.

        If it is not finite, each worker reports those of its own replicas whose gradients are not. Raises FlowmlError
        if such a sum ends the fit.
        """
        if self._run.start.on_nonfinite == "apply" or all_finite(sums):
            return True
        bad = tuple(r for r, arrays in own.items() if not all_finite(arrays))
        whose = f"which replicas {', '.join(map(str, bad))} send" if bad else "added up over all replicas"
        self._run.refuse(given.store, given.clock, bad, whose)
        return False

    def _failed(self, given: Given, error: BaseException) -> None:
        """Report an error to the driver, unless it already knows: a lost worker, or the end of the run."""
        if self._run.stopped or isinstance(error, WorkerLostError):
            return
        name = self._run.training.stores[given.store].name
        self._on_fault(self._run.step_of(given.clock), f"store {name}", error)


def sum_of(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The sum of the arrays, added in this order."""
    flat = [a.reshape(-1) for a in arrays]
    total = aligned_empty(flat[0].nbytes).view(flat[0].dtype)
    add(flat, total, accumulator(total.dtype))
    return total.reshape(arrays[0].shape)
