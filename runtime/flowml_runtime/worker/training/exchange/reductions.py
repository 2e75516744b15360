"""Adds up gradients over all replicas: takes the pushes of this worker's seats to collective stores, and gives the sum
to their homes.

    seat -> sum over this worker's replicas -> all-reduce among the stage's workers -> Contribution to the home here
    seat -> sum over the site's replicas here -> all-reduce among the site's workers -> Run.told, for the seats here

Filters may need several sums for one push (`flowml.policy.filters.sums`). Each has a number of its own.

The workers of a stage, or of a site, form a group. Each part of a store is one of its buckets. The sum stands for all
of them and has the same bits everywhere, because replicas of a worker are added in their order, and workers in the
order of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import msgspec
import numpy as np

from flowml.devices import worker_of
from flowml.errors import FlowmlError, WorkerLostError
from flowml.plan import Part, Reduction
from flowml.policy.filters import Seat, Talk
from flowml_runtime import wire
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.programs import Array
from flowml_runtime.execution.recorder import Span, now_ns
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.schedules import Schedule, named
from flowml_runtime.protocol.training.places import seats
from flowml_runtime.transport.arrays import aligned_empty
from flowml_runtime.worker.training.exchange.collectives import Group, GroupId, accumulator, add
from flowml_runtime.worker.training.exchange.positions import summed
from flowml_runtime.worker.training.filtered import Encoder
from flowml_runtime.worker.training.finite import all_finite
from flowml_runtime.worker.training.run import Fault, Run


@dataclass(frozen=True)
class Given:
    """One push of a replica: a part of a store at a clock, and its weight, which those of all replicas have.

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
    """One part of a collective store, or of a site's sum, on this worker.

    `homes` are the workers that apply the sum for its replicas. A sum of a site has none: the replicas here get it.
    """

    number: int
    """That of its first sum. `after` is that of the second one, if there is one."""
    part: Part
    schedule: Schedule
    group: Group
    replicas: tuple[int, ...]
    homes: tuple[str, ...] = ()
    after: int = -1
    seats: Mapping[int, Seat] = field(default_factory=dict[int, Seat])
    """By replica, if they exchange what filters encode."""


@dataclass
class _Sum:
    """One push of all replicas. `own` are those of this worker, and `talks` their parts in the sums, if filters act on
    these. It began at `began`, in ns."""

    bucket: _Bucket
    given: Given
    own: Mapping[int, Sequence[Array]]
    encoders: Mapping[int, Encoder]
    talks: Sequence[Talk] = ()
    began: int = 0

    def start(self, *, refuses: bool) -> None:
        """The sum of the push before is applied, or refused: what filters keep is known."""
        self.began, given = now_ns(), self.given
        found = (
            encoder.talk(
                given.store, given.part, given.clock, self.own[r], refuses=refuses, seat=self.bucket.seats.get(r)
            )
            for r, encoder in self.encoders.items()
        )
        self.talks = [talk for talk in found if talk is not None]

    def sent(self) -> Sequence[Array]:
        """What this worker adds in the next sum."""
        mine = [talk.sent for talk in self.talks] or list(self.own.values())
        if len(mine) == 1:
            return mine[0]
        return [sum_of([np.asarray(a) for a in each]) for each in zip(*mine, strict=True)]


class Reductions:
    """The groups of one run on one worker. Every method may be called from any thread."""

    def __init__(self, run: Run, on_fault: Fault) -> None:
        self._run = run
        self._on_fault = on_fault
        self._waiting: dict[tuple[int, int], dict[int, tuple[Sequence[Array], Encoder | None]]] = {}
        """(bucket, clock) -> the pushes that have arrived from this worker's replicas."""
        self._numbers: dict[tuple[int, tuple[str, ...]], int] = {}
        """(stage, workers) -> the number of their group, which is the same on all workers."""
        self._groups: dict[int, Group] = {}
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        """(store, part) -> the bucket of the sum that homes apply."""
        self._inside: dict[tuple[int, int, int], _Bucket] = {}
        """(store, part, replica) -> the bucket of its site."""
        self._queued: dict[int, deque[Callable[[], None]]] = {}
        """Bucket -> the sum that is under way, and those that begin after it: a replica gets the values of the next
        step by another way than the sum, and may push before its own part in the sum is over."""
        self._open()

    def _open(self) -> None:
        """Make a bucket for each part that replicas here push. Its number is the same on all workers."""
        run, number = self._run, count()
        for s, store in enumerate(run.training.stores):
            for p, part in enumerate(store.parts):
                senders = store.leaders or run.training.live
                bucket = self._bucket(next(number), part, part.reduction, senders)
                if bucket is not None:
                    homes = tuple(dict.fromkeys(worker_of(store.homes[r]) for r in bucket.replicas))
                    self._buckets[s, p] = replace(bucket, homes=homes, seats=seats(run.training, store, part))
        number = count(next(number) + len(run.training.stores))  # the numbers between are of `Agreement`
        for s, store in enumerate(run.training.stores):
            for p, part in enumerate(store.parts):
                for site in store.sites:
                    how = site.reductions[p] if site.reductions else None
                    bucket = self._bucket(next(number), part, how, site.replicas)
                    if bucket is not None:
                        self._inside.update({(s, p, replica): bucket for replica in bucket.replicas})
        for s, store in enumerate(run.training.stores):
            for p, _ in enumerate(store.parts if store.policy.summed_filters else ()):
                after, bucket = next(number), self._buckets.get((s, p))
                if bucket is not None:
                    self._buckets[s, p] = replace(bucket, after=after)

    def _bucket(self, number: int, part: Part, reduction: Reduction | None, replicas: Iterable[int]) -> _Bucket | None:
        """The bucket of those of these replicas that are here; None if it has no part here."""
        if reduction is None:
            return None
        run = self._run
        group = self._numbers.setdefault((part.stage, reduction.workers), len(self._numbers))
        if run.me not in reduction.workers:
            return None
        if group not in self._groups:
            identity, send = GroupId(run.plan_id, run.number, group), run.sender.send
            ahead = 1 + max((int(s.policy.staleness) for s in run.training.stores if s.collective), default=0)
            hosts, deadline_s = reduction.hosts, run.deadline_s
            self._groups[group] = Group(
                identity, run.me, reduction.workers, send, hosts=hosts, deadline_s=deadline_s, ahead=ahead
            )
        here = tuple(r for r in replicas if worker_of(run.training.replicas[r][part.stage]) == run.me)
        schedule = named(reduction.schedule, reduction.hosts, reduction.fanout, reduction.route)
        return _Bucket(number, part, schedule, self._groups[group], here)

    def group(self, store: int) -> Group:
        """The group that adds up the gradients of a store for its homes."""
        return self._buckets[store, 0].group

    def push(self, encoder: Encoder, given: Given, arrays: Sequence[Array]) -> None:
        """Add the push of a replica for the homes, which `encoder` filters, if anything does. The push of this worker's
        last replica starts the all-reduce.

        The arrays must not change any more. May wait until they are computed.
        """
        self._push(self._buckets[given.store, given.part], given, arrays, encoder)

    def push_inside(self, given: Given, arrays: Sequence[Array]) -> None:
        """The same for the sum of its site, which nothing filters."""
        self._push(self._inside[given.store, given.part, given.replica], given, arrays, None)

    def _push(self, bucket: _Bucket, given: Given, arrays: Sequence[Array], encoder: Encoder | None) -> None:
        found = {given.replica: (arrays, encoder)}
        if len(bucket.replicas) > 1:
            key = (bucket.number, given.clock)
            with self._run.changed:
                waiting = self._waiting.setdefault(key, {})
                waiting.update(found)
                if len(waiting) < len(bucket.replicas):
                    return
                found = self._waiting.pop(key)
        own = {r: found[r][0] for r in bucket.replicas}
        encoders = {r: e for r in bucket.replicas if (e := found[r][1]) is not None}
        start = partial(self._start, _Sum(bucket, given, own, encoders))
        with self._run.changed:
            queued = self._queued.setdefault(bucket.number, deque())
            queued.append(start)
            if len(queued) > 1:
                return
        start()

    def _start(self, sum_: _Sum) -> None:
        try:
            sum_.start(refuses=self._run.start.on_nonfinite != "apply")
        except Exception as error:
            self._failed(sum_.given, error)
        else:
            self._add(sum_, sum_.bucket.number)

    def _add(self, sum_: _Sum, number: int) -> None:
        """Begin the first sum of a push, or the one after it."""
        try:
            future = sum_.bucket.group.all_reduce(number, sum_.given.clock, sum_.sent(), sum_.bucket.schedule)
        except FlowmlError as error:
            self._failed(sum_.given, error)
        else:
            future.when_done(lambda done: self._added(sum_, done))

    def _added(self, sum_: _Sum, done: Future[Any]) -> None:
        """A sum is complete, or has failed. Called on a receiving thread or on the group's thread.

        If filters need another sum, that begins. Else the result is handed on, and the next push of this bucket starts,
        if there was one meanwhile.
        """
        try:
            talks = sum_.talks if done.exception() is None else ()
            another = [talk.take(done.result()) for talk in talks]
            if any(another):
                self._add(sum_, sum_.bucket.after)
                return
        except Exception as error:
            self._failed(sum_.given, error)
            return
        self._done(sum_, done)
        with self._run.changed:
            queued = self._queued[sum_.bucket.number]
            queued.popleft()
            following = queued[0] if queued else None
        if following is not None:
            following()

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

    def _done(self, sum_: _Sum, done: Future[Any]) -> None:
        bucket, given = sum_.bucket, sum_.given
        error = done.exception()
        if error is not None:
            self._failed(given, error)
            return
        if not bucket.homes:
            self._tell_site(bucket, given, done.result())
            return
        run, live = self._run, self._run.training.live
        sums: Sequence[Array] = sum_.talks[0].total() if sum_.talks else done.result()
        weight, decided = given.weight * len(live), run.training.stores[given.store].sites_decide
        if decided:  # the sum ends with the number of gradients in it
            weight, sums = round(float(np.asarray(sums[-1])[0])), sums[:-1]
        message = wire.Contribution(
            plan_id=run.plan_id,
            run=run.number,
            cause=given.cause,
            store=given.store,
            part=given.part,
            replica=live[0],
            incarnation=0,
            clock=given.clock,
            base_version=0,  # unused, because a sum is never stale
            weight=weight,
            specs=bucket.part.payload,
            of_site=decided,
        )
        try:
            if not self._is_sound(given, sum_.own, sums) or not weight:
                message, sums = msgspec.structs.replace(message, weight=0, empty=True, specs=()), ()
            for talk in () if message.empty else sum_.talks:
                talk.commit()
        except FlowmlError as error:
            self._failed(given, error)
            return
        if run.recorder.on:
            name, step = f"store {run.training.stores[given.store].name}", run.step_of(given.clock)
            lane = f"{run.training.replicas[given.replica][bucket.part.stage]} reduce {bucket.number}"
            span = Span(lane, "reduce", name, step, 0, bucket.part.nbytes, bucket.schedule.name, sum_.began, now_ns())
            run.recorder.add(span)
        numbers = (bucket.number, bucket.after)
        run.count_crossing(given.store, sum(bucket.group.take_sent_bytes(n) for n in numbers))
        for home in bucket.homes:
            run.send(home, message, sums)

    def _tell_site(self, bucket: _Bucket, given: Given, total: Sequence[Array]) -> None:
        """Give the sum of a site to its replicas here."""
        run = self._run
        run.count_crossing(given.store, bucket.group.take_sent_bytes(bucket.number))
        with run.changed:
            for replica in bucket.replicas:
                run.told[given.store, replica, summed(given.part), given.clock] = total
            run.changed.notify_all()

    def _is_sound(self, given: Given, own: Mapping[int, Sequence[Array]], sums: Sequence[Array]) -> bool:
        """Whether a sum may be applied. It has the same bits on all workers, so all workers decide the same.

        If it is not finite, each worker reports those of its own replicas whose gradients are not. Raises FlowmlError
        if such a sum ends the fit.
        """
        if self._run.start.on_nonfinite == "apply" or all_finite(sums):
            return True
        bad = {r: arrays for r, arrays in own.items() if not all_finite(arrays)}
        self._run.refuse(given.store, given.part, given.clock, bad, "sends", sums)
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
