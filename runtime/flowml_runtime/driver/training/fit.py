"""Runs one fit in the driver: carries out the decisions of the driver's state machine (`protocol.training.driver`).

Messages arrive on the endpoint's threads and are queued. The caller's thread processes them, so that callbacks run in
the thread that called `fit`, and Ctrl-C ends the fit there.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from flowml.callers import warn
from flowml.data import Source, epoch_order
from flowml.devices import worker_of
from flowml.errors import FlowmlError, WorkerError, WorkerLostError
from flowml.plan import ArraySpec, Training
from flowml.training.compiler import TrainingCompiled
from flowml.training.pieces import pieces
from flowml.training.step import Metrics
from flowml.training.without import left_out
from flowml_runtime import wire
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.progress import Progress
from flowml_runtime.driver.training.amount import work_of
from flowml_runtime.driver.training.failures import closed_error, failed_error, lost_error
from flowml_runtime.driver.training.feeding import Feeding, Variant, shipments, whole
from flowml_runtime.driver.training.history import History, Record
from flowml_runtime.driver.training.inbox import Entry, Lost
from flowml_runtime.driver.training.observer import Observer
from flowml_runtime.driver.training.outcome import FitOptions, Outcome, as_buffer, from_buffer
from flowml_runtime.driver.training.saving import Saving
from flowml_runtime.driver.training.traffic import kept_norms, sent_bytes, totals
from flowml_runtime.driver.training.training_session import IgnoreMessages, TrainingSession
from flowml_runtime.execution.programs import buffer_struct
from flowml_runtime.protocol.training import driver as protocol
from flowml_runtime.protocol.training.actions import Received, Release, Send
from flowml_runtime.protocol.training.kept_fits import key_of
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.story import entry
from flowml_runtime.protocol.training.terms import Terms


class Fit:
    """Runs one fit over a loaded training plan."""

    def __init__(
        self,
        session: TrainingSession,
        handle: LoadedPlan,
        source: Source,
        options: FitOptions,
        compiled: TrainingCompiled,
        variant: Callable[[Any], LoadedPlan],
        saving: Saving,
        model: Sequence[Sequence[Any]] = (),
    ) -> None:
        """`model` is the first state of the model, the leaves of each replica. `variant` loads a plan for global
        batches of other shapes, given as `jax.ShapeDtypeStruct`s."""
        training = handle.plan.training
        if training is None:
            raise FlowmlError(f"plan {handle.plan.name!r} is not a training plan")
        self._session = session
        self._time = session.time
        self._handle = handle
        self._training: Training = training
        self._source = source
        self._options = options
        self.saving, saving.total = saving, options.total
        self._ids: dict[str, Any] = {"plan_id": handle.plan_id, "run": options.run}
        self._inbox: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        terms, places = Terms.of(training, options.total), Places.of(training)
        work = work_of(training, terms, source.examples, options.batch_size, options.rest, options.shuffle)
        self._aligned = terms.aligned
        start, kept = self._start_message(), saving.resumed.content.ledger if saving.resumed else None
        rhythm = saving.rhythm(training)
        self._machine = self._time.driver(start, terms, work, places, rhythm, kept, outlives=saving.keeps)
        computed = session.arithmetic  # else reports have no values, and every loss is NaN
        self._history = History(
            training,
            work.clocks_per_epoch,
            compiled.metrics if computed else Metrics(),
            leaves_out=options.on_nonfinite == "refuse" and computed,
            first=saving.first,
            done=kept.used if kept else 0,
        )
        self._observer = Observer(training, terms, session.time.now(), saving.first)
        self._payloads: dict[int, Sequence[Any]] = {}
        self._handles = count(1)
        self._values: dict[int, Sequence[Any]] = {}
        self._own_states: dict[int, Sequence[Any]] = {}
        self._model = [list(leaves) for leaves in model]
        self._slots = Variant.of(handle).slots
        self._feeding = Feeding(handle, source, variant)
        self._orders: dict[int, np.ndarray] = {}
        self.lost: protocol.WorkerLost | None = None
        """The first loss of which this run has heard, and without which it has not gone on."""
        self._left: set[str] = set()
        """The lost workers without which it has gone on."""
        self.may_lose: Callable[[str], bool] = lambda worker: False
        """Whether the fit may go on without a worker."""
        self.goes_on: Callable[[str, str, int], None] = lambda worker, reason, step: None
        """Called when this run goes on without a worker, with the reason why that is lost, and the step."""
        self._now = 0.0
        """When the message arrived that is processed."""
        self._patient = not (saving.wanted or session.recorder.on)  # for messages that want no answer

    def run(
        self,
        params: Sequence[Any],
        state: Sequence[Any],
        callbacks: Sequence[Callable[[Record], Any]],
        held: Iterable[Record] = (),
        before_s: float = 0.0,
    ) -> Outcome:
        """Train to the end. If the fit ends early for any reason, the workers are told to stop.

        `held` are the records of an earlier run, `before_s` seconds ago, that this one is to show.
        """
        self._session.register(self._handle.plan_id, self)
        progress = Progress(self._options.total, self._options.progress)
        began = self._time.now() - before_s

        def show(records: Iterable[Record], *, over: bool = False) -> None:
            for record in self.saving.validated(records, hold=self._machine.hold if self._aligned else None, over=over):
                progress.show(record)
                for callback in callbacks:
                    callback(record)
                self.saving.shown(record["step"] + 1)
            _warn(self._history.loss_warning(over=over))

        try:
            show(held)
            self.saving.open(self._session, self._handle.workers)
            self._step(protocol.Begin(), params, state)
            saves = self.saving.wanted  # not asked after each of the very many messages of a simulation
            while not self._machine.over:
                self._take(self._next())
                if saves:
                    self.saving.tell()
                    for event in self.saving.events(self._machine, self._history.reached, self._time.now()):
                        self._step(event)
                records = self._history.ready()
                if records or self._observer.holds or self.saving.measures:
                    show(self._observer.ready(records, self._now - began))
            seconds = self._time.now() - began
            sent, crossed = totals(self._training, self._machine.traffic.values())
            show(self._observer.rest(self._history.rest(self._aligned * self.total), seconds, sent, crossed), over=True)
            seconds = self._time.now() - began
        finally:
            progress.close()
            self._stop()
            self.saving.finish()
        return self._outcome(params, state, seconds)

    def held(self, step: int, seconds: float) -> list[Record]:
        """The records before a step that this run, which has ended early after `seconds`, has not shown."""
        waited = self.saving.copies.go_back(step) if self.saving.copies else []
        rest = self._observer.rest(self._history.rest(step), seconds, {}, {})
        return [*waited, *(r for r in rest if r["step"] < step)]

    # The endpoint's threads.

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        self._inbox.put(Entry(peer, message, arrays, self._time.now()))

    def on_lost(self, peer: str, reason: str) -> None:
        if peer in self._handle.workers:
            self._inbox.put(Entry(peer, Lost(reason), (), self._time.now()))

    # The caller's thread.

    def _next(self) -> Entry:
        """The next message. Raises ClusterError if no more can arrive."""
        asked: float | None = None
        while True:
            gone = self._handle.steps.stopped
            until, heard = math.inf, 0 if self._patient else self._machine.heard
            if heard:
                until = self.saving.until(self._history.reached, self._time.now(), heard)
            try:
                return self._time.next(self._inbox, until, patient=self._patient)
            except queue.Empty:
                if self._time.now() >= until:
                    self._step(protocol.Withdraw())
                    self.saving.withdrawn()
                asked = time.monotonic() if asked is None else asked
                if time.monotonic() - asked >= self._session.deadline_s:  # the report of a failure may have been lost
                    asked = time.monotonic()
                    for worker in self._handle.workers:
                        check = wire.StepCheck(plan_id=self._handle.plan_id, step=self._options.run, device=worker)
                        self._session.tell(worker, check)
                if gone and self.lost is not None:  # it owed the driver nothing, but other workers wait for it
                    raise self._error(self.lost) from None
                if gone and self._left:
                    self._session.check_workers("training cannot go on")
                elif gone:  # and no worker was reported lost
                    raise closed_error(self._history.step) from None

    def _stop(self) -> None:
        """Tell the remaining workers to stop, and ignore later messages."""
        for action in self._decide(protocol.Stop()):
            if isinstance(action, Send):
                for worker in action.to:
                    with suppress(WorkerLostError):
                        self._session.endpoint.send(worker, action.message)
        self._session.register(self._handle.plan_id, IgnoreMessages())

    def _start_message(self) -> wire.StartTraining:
        options = self._options
        return wire.StartTraining(
            **self._ids,
            cause=1,  # Begin, the first event of the driver's machine
            total_clocks=options.total,
            seed=options.seed,
            shuffle=options.shuffle,
            examples=self._source.examples,
            source="fed" if self._source.arrays is None and self._session.arithmetic else "shipped",
            delays=options.delays,
            check_replicas=options.check_replicas,
            on_nonfinite=options.on_nonfinite,
            stopped=self.saving.resumed.content.stopped if self.saving.resumed else None,
            fit=self.saving.begin(self._handle.workers),
            copies=self.saving.copies.begin(self._handle.workers) if self.saving.copies else None,
        )

    def _take(self, entry: Entry) -> None:
        """Process a message."""
        self._now, message = entry.at, entry.message
        if type(message) is wire.Retired and message.run == self._options.run:
            self._observer.retired(message.replica, self._now)
        self._step(self._event(entry.peer, message, entry.arrays))

    def _event(self, peer: str, message: Any, arrays: Sequence[Any]) -> protocol.Event | None:
        if isinstance(message, wire.TrainingMessage):
            if not arrays:
                return Received(peer, message)
            handle = next(self._handles)
            self._payloads[handle] = arrays
            return Received(peer, message, handle)
        if isinstance(message, Lost):
            return self._lost_event(peer, message.reason)
        if isinstance(message, wire.StepFailed):
            return protocol.StepFailed(message)
        return None  # a message that does not belong to this fit

    def _step(self, event: protocol.Event | None, params: Sequence[Any] = (), state: Sequence[Any] = ()) -> None:
        """Give the state machine an event, and carry out its actions."""
        for action in self._decide(event) if event is not None else ():
            match action:
                case protocol.Note():
                    self._note(action.message, self._taken(action.handle))
                case Send():
                    for worker in action.to:
                        self._send(worker, action.message)
                case protocol.NoteFates() | protocol.Over():
                    pass
                case protocol.SendStore():
                    self._send_store(action, params, state)
                case protocol.SendBuffers():
                    self._send_buffers()
                case protocol.Save():
                    self._save(action)
                case protocol.SendModel():
                    self._send_model()
                case protocol.SendSource():
                    self._ship()
                case protocol.Feed(replica, item):
                    self._feed(replica, item)
                case protocol.NoteNonFinite(store, clock, replicas, weight):
                    _warn(self._history.refused(store, clock, replicas, weight=weight))
                case protocol.NoteCommit(clock, excluded, coefficients):
                    self._history.committed(clock, excluded, coefficients)
                case protocol.NoteWaits():
                    self._observer.committed(action)
                case protocol.NoteStaleness(stores):
                    self._observer.stale(stores)
                case protocol.NoteForwarded(message):
                    self._observer.forwarded(message)
                case protocol.Keep(store, handle):
                    self._values[store] = self._taken(handle)
                case protocol.KeepState(store, handle):
                    self._own_states[store] = self._taken(handle)
                case protocol.KeepModel(replica, stage, handle):
                    self._keep_model(replica, stage, self._taken(handle))
                case Release(handle):
                    self._payloads.pop(handle, None)
                case protocol.NoteLeftOut(replica, missed=missed):
                    self._history.missed(replica, missed)
                case protocol.LeaveOut(worker, replicas, reason):
                    self._leave_out(worker, replicas, reason)
                case protocol.Fail(reason):
                    raise self._error(reason)

    def _lost_event(self, worker: str, reason: str) -> protocol.WorkerLost:
        """The event that a worker is lost, which ends the run unless it goes on without the worker."""
        lost = protocol.WorkerLost(worker, reason, may_leave=self.may_lose(worker))
        if worker not in self._left:
            self.lost = self.lost or lost
        return lost

    def _leave_out(self, worker: str, replicas: Sequence[int], reason: str) -> None:
        """The run goes on without a lost worker."""
        self._left.add(worker)
        self.lost = None if self.lost is None or self.lost.worker == worker else self.lost
        self._training = left_out(self._training, replicas)
        for replica in replicas:
            self._observer.retired(replica, self._now)
        self.goes_on(worker, reason, self._history.step)

    def _note(self, report: wire.Report, arrays: Sequence[Any]) -> None:
        """Enter a report in the history. Raises WorkerError if its loss is not finite and that ends the fit."""
        self._observer.reported(report, self._now)
        if not report.slots:
            return
        wrong = self._history.why_not_finite(report, arrays) if self._options.on_nonfinite == "raise" else None
        if wrong is not None:
            raise WorkerError(f"training failed at step {report.clock}: {wrong}", step=report.clock, node="loss")
        self._history.report(report, arrays)

    def _decide(self, event: protocol.Event) -> list[protocol.Action]:
        actions, recorder = self._machine.step(event), self._session.recorder
        if recorder.on:
            me, run, number = self._session.endpoint.name, self._options.run, self._machine.number
            told = entry(me, run, number, event, actions)
            if told is not None:
                recorder.tell(told)
        return actions

    def _taken(self, handle: int | None) -> Sequence[Any]:
        return () if handle is None else self._payloads.pop(handle)

    def _send_store(self, action: protocol.SendStore, params: Sequence[Any], state: Sequence[Any]) -> None:
        store = self._training.stores[action.store]
        ids: dict[str, Any] = {**self._ids, "cause": action.cause, "store": action.store}

        def buffers(positions: Sequence[int], specs: Sequence[ArraySpec]) -> list[np.ndarray]:
            pairs = zip(positions, specs, strict=True)
            return [np.asarray(as_buffer(state[i]), buffer_struct(spec).dtype) for i, spec in pairs]

        arrays = [*(np.asarray(params[i]) for i in store.leaves), *buffers(store.state, store.state_specs)]
        resumed, version = self.saving.resumed, 0
        if resumed is not None:
            arrays, version = resumed.values(store) or arrays, resumed.version(action.store)
        message = wire.StoreValue(**ids, version=version, specs=(*store.specs, *store.state_specs))
        for worker in action.to:
            self._send(worker, message, arrays)
        if store.local is not None:
            own = wire.OwnState(**ids, specs=store.local.state_specs)
            arrays = buffers(store.local.state, store.local.state_specs)
            for worker in dict.fromkeys(map(worker_of, store.readers)):
                if worker in self._handle.workers:
                    self._send(worker, own, arrays)

    def _send_buffers(self) -> None:
        """Send the workers what they kept at the snapshot, before the values of homes."""
        assert self.saving.resumed is not None
        for worker, message, arrays in self.saving.resumed.messages(self._training, self._ids):
            self._send(worker, message, arrays)
        for worker in self._handle.workers:
            self._send(worker, wire.Buffers(**self._ids))

    def _save(self, action: protocol.Save) -> None:
        """Take a snapshot. Its step is the clock of all replicas, or what they have reported without common clocks."""
        ledger, key = self._machine.kept(action), key_of(self._handle.plan_id, self._options.run, action.number)
        step = self._history.filled(ledger.used) if ledger and not self._aligned else max(action.stopped.clocks)
        self.saving.save(self._training, step, action, ledger, self._taken, self._time.now(), key)

    def _send_model(self) -> None:
        """Send each stage the leaves of the model's state that stay there."""
        for stage in dict.fromkeys(leaf.stage for leaf in self._training.state):
            mine = [i for i, leaf in enumerate(self._training.state) if leaf.stage == stage]
            specs = tuple(self._training.state[i].spec for i in mine)
            for replica in self._training.live:
                arrays = [np.asarray(self._model[replica][i]) for i in mine]
                message = wire.ModelState(**self._ids, replica=replica, stage=stage, specs=specs)
                self._send(worker_of(self._training.replicas[replica][stage]), message, arrays)

    def _keep_model(self, replica: int, stage: int, arrays: Sequence[Any]) -> None:
        mine = [i for i, leaf in enumerate(self._training.state) if leaf.stage == stage]
        for leaf, array in zip(mine, arrays, strict=True):
            self._model[replica][leaf] = np.array(array)  # what arrived may lie in memory that its sender needs again

    def _ship(self) -> None:
        """Send each worker the whole leaves that its stages read, once."""
        if not self._session.arithmetic:
            return
        leaves = self._slots, self._source, self._training.batch_specs
        for worker, order, specs, arrays in shipments(*leaves, self._session.endpoint.way):
            self._send(worker, wire.Source(**self._ids, slots=order, specs=specs), arrays)

    def _send(self, worker: str, message: wire.Wire, arrays: Sequence[Any] = ()) -> None:
        """Send to a worker. Raises the error of a lost worker if it is lost, although that was not reported yet."""
        try:
            self._session.endpoint.send(worker, message, arrays)
        except WorkerLostError as error:
            if not (self.may_lose(worker) and self._machine.goes_on_without(worker)) and worker not in self._left:
                raise self._error(protocol.WorkerLost(worker, str(error))) from error
            self.on_lost(worker, str(error))

    def _error(self, failed: wire.StepFailed | protocol.WorkerLost) -> FlowmlError:
        if isinstance(failed, wire.StepFailed):
            return failed_error(failed, self._options.run)
        self.lost, step = self.lost or failed, self._history.step
        trains = not self._machine.trained and step < self._options.total
        names = None if trains else [self._training.stores[i].name for i in self._machine.unfinished(failed.worker)]
        return lost_error(failed.worker, failed.reason, self._session.remedy, step, names)

    @property
    def total(self) -> int:
        """The number of steps of the whole fit."""
        return self._options.total

    @property
    def step(self) -> int:
        """The step of the next record."""
        return self._history.step

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes of the batches so far, one for each variant of the plan."""
        return self._feeding.shapes

    def _feed(self, replica: int, item: wire.Item) -> None:
        """Send each stage of a replica the leaves that it reads, and word of the programs that run on them. Without
        arithmetic nothing reads them."""
        if not self._session.arithmetic:
            return
        order = self._order(item.epoch)
        mine = pieces(self._training, replica, item.sequence, item.start, item.size)
        variant, leaves = self._feeding.take(np.concatenate([order[p.start : p.start + p.size] for p in mine]))
        for device in self._training.replicas[replica]:
            slots = variant.slots.get(device, ())
            arrays = [np.ascontiguousarray(leaves[s], variant.specs[s].dtype) for s in slots]
            message = wire.Batch(
                **self._ids,
                device=device,
                sequence=item.sequence,
                slots=slots,
                variant="" if variant.plan_id == self._handle.plan_id else variant.plan_id,
                specs=tuple(whole(variant.specs[s], a) for s, a in zip(slots, arrays, strict=True)),
            )
            self._send(worker_of(device), message, arrays)

    def _outcome(self, params: Sequence[Any], state: Sequence[Any], seconds: float) -> Outcome:
        final, states = list(params), list(state)
        for index in self._machine.final_order():
            store, arrays = self._training.stores[index], self._values[index]
            for leaf, array in zip(store.leaves, arrays[: len(store.leaves)], strict=True):
                final[leaf] = array
            for leaf, spec, array in zip(store.state, store.state_specs, arrays[len(store.leaves) :], strict=True):
                states[leaf] = from_buffer(array, spec.dtype)
        for index, arrays in self._own_states.items():
            local = self._training.stores[index].local
            assert local is not None
            for leaf, spec, array in zip(local.state, local.state_specs, arrays, strict=True):
                states[leaf] = from_buffer(array, spec.dtype)
        self._machine.validate()
        summary = self._machine.ledger.summary(lambda epoch: self._order(epoch).tolist())
        summary = replace(
            summary,
            nonfinite=self._history.nonfinite_counts(),
            nonfinite_losses=dict(self._history.nonfinite_losses),
            kept=kept_norms(self._training, self._machine.traffic.values()),
        )
        return Outcome(
            final,
            states,
            self._history.records,
            summary,
            seconds,
            sent_bytes(self._training, self._machine.traffic.values()),
            self._observer.staleness(),
            self._observer.stragglers(summary, seconds, self._machine.traffic.values()),
            self._time.simulated(),
            tuple(map(tuple, self._model)),
        )

    def _order(self, epoch: int) -> np.ndarray:
        """The order of an epoch. Four orders are kept, because independent replicas may be in different epochs."""
        if epoch not in self._orders:
            order = epoch_order(self._source.examples, self._options.seed, epoch, shuffle=self._options.shuffle)
            self._orders = {**dict(list(self._orders.items())[-3:]), epoch: order}
        return self._orders[epoch]


def _warn(warning: str | None) -> None:
    if warning is not None:
        warn(warning)
