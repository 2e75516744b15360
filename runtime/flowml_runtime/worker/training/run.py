"""The shared state of one training run on one worker: identifiers, received values, one lock, and methods to send.

One thread steps the worker's machine, and executors query it. Both hold one condition, which is notified whenever
something may have changed that an executor waits for.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flowml.errors import DeadlineError, FlowmlError, WorkerLostError
from flowml.plan import Plan, Training
from flowml_runtime import wire
from flowml_runtime.execution.mailbox import Cancelled
from flowml_runtime.execution.programs import Array
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.transport.endpoint import Sender
from flowml_runtime.worker.training.applying import Held
from flowml_runtime.worker.training.counts import Bytes, Counts
from flowml_runtime.worker.training.exchange.positions import Backlog, Lists, which
from flowml_runtime.worker.training.filtered import Encoder, added
from flowml_runtime.worker.training.finite import is_weight_at_fault, sentence
from flowml_runtime.worker.training.published import StoreView
from flowml_runtime.worker.training.resident import Residents

Fault = Callable[[int, str, BaseException], None]
"""(step, node, error): reports to the driver, which ends the fit."""


@dataclass
class Run:
    """One fit on one worker. `changed` guards everything mutable here and the machine of the worker."""

    me: str
    plan_id: str
    plan: Plan
    start: wire.StartTraining
    driver: str
    sender: Sender
    deadline_s: float
    recorder: Recorder
    changed: threading.Condition
    stores: dict[int, StoreView] = field(default_factory=dict[int, StoreView])
    source: dict[int, Array] = field(default_factory=dict[int, Array])
    states: dict[int, Sequence[Array]] = field(default_factory=dict[int, Sequence[Array]])
    """The first optimizer state of the stores whose parameters replicas update themselves."""
    model: dict[tuple[int, int], Sequence[Array]] = field(default_factory=dict[tuple[int, int], Sequence[Array]])
    """(replica, stage) -> the first state of the model there."""
    told: dict[tuple[int, int, int, int], Sequence[Array]] = field(
        default_factory=dict[tuple[int, int, int, int], Sequence[Array]]
    )
    """(store, replica here, neighbour, clock) -> the neighbour's parameters before that step."""
    lists: Lists = field(default_factory=dict[tuple[int, int, int, int], Sequence[Array]])
    shared: dict[int, Held] = field(default_factory=dict[int, Held])
    """The stores that the replicas here update themselves."""
    encoders: list[Encoder] = field(default_factory=list[Encoder])
    """Those of the stages here."""
    residents: Residents = field(default_factory=Residents)
    """What lives here between steps."""
    stopped: bool = False
    counting: threading.Lock = field(default_factory=threading.Lock)
    """Guards `counts`, because executors, lanes and groups count the bytes they send."""
    waited: Counter[int] = field(default_factory=Counter[int])
    """By thread, the seconds that it has spent in `wait_for`."""

    def __post_init__(self) -> None:
        if self.plan.training is None:
            raise FlowmlError(f"plan {self.plan.name!r} is not a training plan")
        self.training: Training = self.plan.training
        self.terms = Terms.of(self.training, self.start.total_clocks)
        self.counts = Counts(len(self.training.stores))
        sender = self.sender
        self.backlog = Backlog(lambda _, to: sender.waiting(to))
        self.positions = [which(store) for store in self.training.stores]
        self.restored = self.start.stopped is None
        """Whether all buffers are here of the snapshot from which the run goes on, if it does."""

    @property
    def number(self) -> int:
        return self.start.run

    def step_of(self, clock: int) -> int:
        """The step number of this clock in messages. It is unique over all fits of the plan."""
        return self.start.run + clock

    def refuse(
        self,
        store: int,
        part: int,
        clock: int,
        given: Mapping[int, Sequence[Array]],
        verb: str,
        total: Sequence[Array] | None = None,
    ) -> None:
        """Report to the driver that what replicas have `given` is left out, because it holds NaN or infinity, or the
        `total` with it. `verb` says what they do with it. Raises FlowmlError if that ends the fit."""
        spec, count = self.training.stores[store], self.training.microbatches
        blamed = partial(is_weight_at_fault, part=spec.parts[part], microbatches=count, weighted=spec.applies.weighted)
        ids: dict[str, Any] = {
            "replicas": tuple(given),
            "weight": any(map(blamed, (*given.values(), *([total] if total else ())))),
        }
        if self.start.on_nonfinite == "raise":
            raise FlowmlError(sentence(spec.name, self.terms.stores[store], verb=verb, **ids))
        self.send(self.driver, wire.NonFinite(plan_id=self.plan_id, run=self.number, store=store, clock=clock, **ids))

    @property
    def end(self) -> int:
        """The first step after this run."""
        return self.step_of(self.terms.most_clocks)

    def send(
        self, worker: str, message: wire.Wire, arrays: Sequence[Array] = (), timeout_s: float | None = None
    ) -> None:
        """Send to a worker or the driver. Ignores lost workers, because the driver ends the run for them.

        Raises TimeoutError if the message cannot be sent in time.
        """
        try:
            self.sender.send(worker, message, arrays, timeout_s)
        except WorkerLostError:
            return

    def wait_for(self, condition: Callable[[], bool], abandoned: Callable[[], bool], what: str, step: int) -> None:
        """Wait, holding `changed`, until the condition holds.

        Raises Cancelled if the step is given up or the run stops, DeadlineError after the deadline.
        """
        began = time.monotonic()
        while not condition():
            if self.stopped or abandoned():
                raise Cancelled
            left = began + self.deadline_s - time.monotonic()
            if left <= 0 or not self.changed.wait(left):
                raise DeadlineError(
                    f"step {step}: {self.me} waited {self.deadline_s:g} s for {what} and it did not come; see whether "
                    "another worker is stuck, or allow a longer deadline: deadline_s= where the cluster is made",
                    worker=self.me,
                    step=step,
                    node=what,
                )
        self.waited[threading.get_ident()] += time.monotonic() - began  # pyright: ignore[reportArgumentType]

    def count_push(self, store: int, part: int, nbytes: int, destination: str, *, told: bool = False) -> None:
        with self.counting:
            self.counts.push(store, part, nbytes, crosses=destination != self.me, told=told)

    def take_counts(self) -> tuple[Bytes, Bytes]:
        """See `Counts.take`."""
        with self.counting:
            return self.counts.take()

    def count_crossing(self, store: int, nbytes: int) -> None:
        """Count the bytes sent to other workers to add up a push, which is counted already."""
        with self.counting:
            self.counts.crossing(store, nbytes)

    def count_shared(self, store: int, nbytes: int) -> None:
        """Count what a home here shares with those on other workers."""
        with self.counting:
            self.counts.share(store, nbytes)

    def count_work(self, store: int, seconds: float) -> None:
        """Count what a home here has done for a store."""
        with self.counting:
            self.counts.worked(store, seconds)

    def count_publish(self, store: int, nbytes: int, destination: str) -> None:
        if destination != self.me:
            with self.counting:
                self.counts.publish(store, nbytes)

    def traffic(self, cause: int) -> wire.Traffic:
        with self.counting:
            rows, homes = self.counts.rows(), self.counts.work()
            kept = added(encoder.kept() for encoder in self.encoders)
        ids: dict[str, Any] = {"plan_id": self.plan_id, "run": self.number, "cause": cause}
        return wire.Traffic(**ids, worker=self.me, stores=rows, kept=kept, homes=homes)
