"""Training on one worker: the seats of its devices, the stores that live here, and the thread that drives them.

Messages go to an inbox; one thread takes them out, steps the machine concerned and carries out its actions.
Executors run beside it and only ever wait for what that thread brings. Chunks of sums among replicas go past it, to the
group that adds them up.

    inbox -> machine.step(event) -> actions: start a step, abandon it, apply and publish, tell somebody

A fit begins with the driver's StartTraining. Peers may be quicker than the driver, so what comes for a run
that has not begun here waits for it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowml.devices import worker_of
from flowml.errors import FlowmlError
from flowml.plan import Plan
from flowml_runtime import service, wire
from flowml_runtime.execution.faults import step_failed
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.protocol.training import decision
from flowml_runtime.protocol.training import replica as protocol
from flowml_runtime.protocol.training.home import StageRetired
from flowml_runtime.protocol.training.terms import Committed
from flowml_runtime.worker.training.homes import Homes
from flowml_runtime.worker.training.reductions import Reductions
from flowml_runtime.worker.training.run import Run, StoreView
from flowml_runtime.worker.training.stage_runner import StageRunner

if TYPE_CHECKING:
    from flowml_runtime.worker.worker import Worker

MAX_EARLY = 4096
"""Messages kept for runs that have not begun here. Peers can be ahead by a few steps, not more."""

MAX_EARLY_BYTES = 2**30
"""Bytes of arrays in those messages. The largest are contributions to the stores that live here."""


class TrainingHost:
    """Hosts a training plan on a worker: one fit at a time."""

    def __init__(
        self,
        worker: Worker,
        plan_id: str,
        plan: Plan,
        programs: Mapping[str, LoadedProgram],
        driver: str,
        deadline_s: float,
    ) -> None:
        self._worker = worker
        self._plan_id = plan_id
        self._plan = plan
        self._programs = programs
        self._driver = driver
        self._deadline_s = deadline_s
        self._fit: _Fit | None = None
        self._finished = -1
        self._early: list[tuple[str, Any, Sequence[Array]]] = []
        self._early_bytes = 0
        self._inbox: queue.SimpleQueue[tuple[str, Any, Sequence[Array]] | None] = queue.SimpleQueue()
        self._thread = service.start(f"{worker.name} training", self._work, self._end)

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None:
        fit = self._fit
        if isinstance(message, wire.Collective) and fit is not None and fit.run.number == message.run:
            fit.reductions.on_message(peer, message, arrays)
        else:
            self._inbox.put((peer, message, arrays))

    def on_lost(self, peer: str, reason: str) -> None:
        """The driver learns it too, and ends the fit."""
        fit = self._fit
        if fit is not None:
            fit.reductions.on_lost(peer, reason)

    def close(self) -> None:
        self._inbox.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _work(self) -> None:
        while (entry := self._inbox.get()) is not None:
            self._try(entry)
        self._stop()

    def _try(self, entry: tuple[str, Any, Sequence[Array]]) -> None:
        try:
            self._take(*entry)
        except BaseException as error:  # an optimizer of the user may call sys.exit()
            self.fail(getattr(entry[1], "run", 0), "training", error)

    def _end(self, reason: str) -> None:
        self.fail(self._newest_run(), "training", FlowmlError(reason))

    def _take(self, peer: str, message: Any, arrays: Sequence[Array]) -> None:
        from_driver = peer == self._driver
        if isinstance(message, wire.StartTraining) and from_driver:
            self._stop()
            self._fit = self._begin(message)
            self._retake()
        elif isinstance(message, wire.StopTraining) and from_driver:
            self._finished = max(self._finished, message.run)
            self._stop()
            self._retake()
        elif self._fit is not None and message.run == self._fit.run.number:
            self._fit.take(peer, message, arrays)
        elif message.run > self._newest_run():
            self._keep(peer, message, arrays)

    def _keep(self, peer: str, message: Any, arrays: Sequence[Array]) -> None:
        """Keep what came for a run that has not begun here. Raises FlowmlError if it is too much: nothing is dropped
        unless its fit ends over it."""
        nbytes = self._early_bytes + sum(a.nbytes for a in arrays)
        if len(self._early) >= MAX_EARLY or nbytes > MAX_EARLY_BYTES:
            raise FlowmlError(
                f"{self._worker.name} has been sent {len(self._early)} messages with {self._early_bytes} bytes for a "
                f"fit that has not begun there, and {type(message).__name__} from {peer} is one too many (at most "
                f"{MAX_EARLY} messages and {MAX_EARLY_BYTES} bytes are kept); see whether {self._driver} or its "
                "connection is stuck, and start the fit again"
            )
        self._early.append((peer, message, arrays))
        self._early_bytes = nbytes

    def _retake(self) -> None:
        """Take in again what came early: some of it is for the run that has begun, some for none that will."""
        early, self._early, self._early_bytes = self._early, [], 0
        for entry in early:
            self._try(entry)

    def _newest_run(self) -> int:
        return max(self._finished, self._fit.run.number if self._fit else -1)

    def _begin(self, start: wire.StartTraining) -> _Fit:
        training = self._plan.training
        assert training is not None
        run = Run(
            me=self._worker.name,
            plan_id=self._plan_id,
            plan=self._plan,
            training=training,
            start=start,
            driver=self._driver,
            sender=self._worker.endpoint,
            deadline_s=self._deadline_s,
            recorder=self._worker.recorder,
        )
        return _Fit(run, self)

    def _stop(self) -> None:
        if self._fit is not None:
            self._fit.stop()
            self._fit = None

    def seat(self, run: Run, reductions: Reductions, replica: int, stage: int, device: str) -> StageRunner:
        def finished(seat: StageRunner, clock: int) -> None:
            self._inbox.put((run.me, _Finished(run.number, seat, clock), ()))

        loaded, mailbox = self._programs[device], self._worker.mailbox
        return StageRunner(run, replica, stage, loaded, mailbox, reductions, finished, self.fail)

    @property
    def programs(self) -> Mapping[str, LoadedProgram]:
        return self._programs

    def fail(self, step: int, node: str, error: BaseException) -> None:
        """Tell the driver. By its step it knows which run is meant, which may be one that it has ended."""
        try:
            self._worker.endpoint.send(self._driver, step_failed(self._plan_id, step, self._worker.name, node, error))
        except FlowmlError:
            return


class _Finished:
    """A seat's executor has left a clock. Travels through the inbox like a message."""

    def __init__(self, run: int, seat: StageRunner, clock: int) -> None:
        self.run = run
        self.seat = seat
        self.clock = clock


class _Fit:
    """One run on this worker: its machines, and what their actions mean here."""

    def __init__(self, run: Run, host: TrainingHost) -> None:
        self.run = run
        self.reductions = Reductions(run, host.fail)
        self._homes = Homes(run, host.programs, host.fail)
        self._decision = decision.Decision(run.terms) if run.leader == run.me else None
        self._ids: dict[str, Any] = {"plan_id": run.plan_id, "run": run.number}
        self._seats = [
            host.seat(run, self.reductions, r, s, device)
            for r, devices in enumerate(run.training.replicas)
            for s, device in enumerate(devices)
            if worker_of(device) == run.me
        ]
        for seat in self._seats:
            self._step(seat, protocol.Started())

    def stop(self) -> None:
        with self.run.changed:
            self.run.stopped = True
            self.run.changed.notify_all()
        for seat in self._seats:
            seat.stop()
        self._homes.close()
        self.reductions.close()

    def take(self, peer: str, message: Any, arrays: Sequence[Array]) -> None:
        match message:
            case _Finished():
                self._step(message.seat, protocol.StepFinished(message.clock))
            case wire.Published():
                self._published(message, arrays)
            case wire.Contribution():
                self._homes.receive(message, arrays)
            case wire.Collective():
                self.reductions.on_message(peer, message, arrays)
            case wire.Arrived():
                self._decide(decision.Arrived(message.store, message.replica, message.clock))
            case wire.Commit():
                self._committed(Committed(message.clock, message.replicas))
            case wire.Begin():
                for seat in self._seats_of(message.replica, leading=False):
                    self._step(seat, protocol.BeginReceived(message.clock, message.item, message.last))
            case wire.Grant():
                for seat in self._seats_of(message.replica, leading=True):
                    self._step(seat, protocol.Granted(message.items, message.exhausted))
            case wire.Retired():
                self._retired(message.replica, message.stage)
            case wire.StoreValue():
                self._homes.load(message, arrays)
            case wire.Source():
                with self.run.changed:
                    self.run.source.update(zip(message.slots, arrays, strict=True))
                    self.run.changed.notify_all()
            case wire.Batch():
                with self.run.changed:
                    for seat in self._seats:
                        if seat.device == message.device:
                            seat.give(message.sequence, message.slots, arrays)
            case _:
                raise FlowmlError(f"a worker has no use for {type(message).__name__} during training")

    def _seats_of(self, replica: int, *, leading: bool) -> list[StageRunner]:
        return [s for s in self._seats if s.replica == replica and (s.stage == 0) == leading]

    def _published(self, message: wire.Published, arrays: Sequence[Array]) -> None:
        with self.run.changed:
            view = self.run.stores.get(message.store)
            if view is not None and message.version <= view.version and self._has_copies(message.store):
                return  # a copy that is behind another which is read here
            if arrays or view is None:
                self.run.stores[message.store] = StoreView(message.version, message.clocks, arrays)
            else:
                view.clocks = message.clocks
        event = protocol.StorePublished(message.store, message.version, message.clocks)
        for seat in self._seats:
            self._step(seat, event)

    def _has_copies(self, store: int) -> bool:
        return self.run.training.stores[store].collective

    def _decide(self, event: decision.Event) -> None:
        if self._decision is None:
            return
        for commit in self._decision.step(event):
            self.run.broadcast(wire.Commit(**self._ids, clock=commit.clock, replicas=commit.replicas))

    def _committed(self, event: Committed) -> None:
        # Readers first: a replica must know that its step counts before it sees the version that it made.
        for seat in self._seats:
            self._step(seat, event)
        self._homes.step(event)

    def _retired(self, replica: int, stage: int) -> None:
        self._homes.step(StageRetired(replica, stage))
        if stage == 0:
            self._decide(decision.ReplicaRetired(replica))
            for seat in self._seats_of(replica, leading=False):
                self._step(seat, protocol.LeaderRetired())

    def _step(self, seat: StageRunner, event: protocol.Event) -> None:
        with self.run.changed:
            actions = seat.machine.step(event)
            for action in actions:
                self._act_locally(seat, action)
            self.run.changed.notify_all()
        for action in actions:
            self._tell(seat, action)

    def _act_locally(self, seat: StageRunner, action: protocol.Action) -> None:
        match action:
            case protocol.Abandon(clock):
                seat.abandon(clock)
            case protocol.AdoptAccumulator(clock):
                seat.settle(clock, counts=True)
            case protocol.DiscardAccumulator(clock):
                seat.settle(clock, counts=False)
            case protocol.Start(clock, item, _):
                seat.start(clock, item)
            case _:
                pass

    def _tell(self, seat: StageRunner, action: protocol.Action) -> None:
        run, replica = self.run, seat.replica
        match action:
            case protocol.Ask(clocks, returned):
                run.send(run.driver, wire.Ask(**self._ids, replica=replica, clocks=clocks, returned=returned))
            case protocol.Begin(clock, item, last):
                message = wire.Begin(**self._ids, replica=replica, clock=clock, item=item, last=last)
                for worker in dict.fromkeys(worker_of(d) for d in run.training.replicas[replica][1:]):
                    run.send(worker, message)
            case protocol.Settle(item, fate):
                run.send(run.driver, wire.Settled(**self._ids, replica=replica, fates=((item, fate),)))
            case protocol.Retire():
                run.broadcast(wire.Retired(**self._ids, replica=replica, stage=seat.stage))
                run.send(run.driver, run.traffic())  # before the word that may end the fit
                run.send(run.driver, wire.Retired(**self._ids, replica=replica, stage=seat.stage))
            case _:
                pass
