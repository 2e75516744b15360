"""Hosts training on one worker: the thread that steps the worker's state machine and carries out its actions.

    inbox -> machine.step(event) -> actions: start a step, apply and publish, send a message

Messages go to an inbox. One thread takes them out, gives them to the machine (`protocol.training.worker`) and carries
out its actions. The machine makes all decisions, and this module makes none. Executors run on other threads and wait
only for what this thread provides. In a running fit, chunks of sums among replicas bypass it: they go directly to the
group that adds them up.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from flowml.arrays import ArraySpec
from flowml.errors import FlowmlError
from flowml.plan import Plan
from flowml.policy import Coded
from flowml.policy.filters import on_numpy
from flowml_runtime import service, wire
from flowml_runtime.execution.faults import step_failed
from flowml_runtime.execution.kernels import Kernels
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.protocol.errors import InboxLimitError
from flowml_runtime.protocol.training import actions as protocol
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.story import entry
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms
from flowml_runtime.protocol.training.worker import TrainingWorker
from flowml_runtime.worker.training.copying import Copying
from flowml_runtime.worker.training.exchange.agreement import Agreement
from flowml_runtime.worker.training.exchange.positions import heard
from flowml_runtime.worker.training.exchange.reductions import Given, Reductions
from flowml_runtime.worker.training.exchange.relays import Relays
from flowml_runtime.worker.training.filtered import Encoded
from flowml_runtime.worker.training.homes import HomeAction, Homes
from flowml_runtime.worker.training.published import Reader
from flowml_runtime.worker.training.resident import Arrays, Resident, loaded, of_waiting, row, told_whole
from flowml_runtime.worker.training.run import Run
from flowml_runtime.worker.training.stage_runner import StageRunner

if TYPE_CHECKING:
    from flowml_runtime.worker.worker import Worker

_Entry = tuple[str, wire.TrainingMessage, Sequence[Array]]
_FromExecutors = protocol.StepFinished | protocol.Updated | protocol.Computed


MAX_INBOX = 65536
"""Messages that wait for the training thread. It takes a message in within microseconds and leaves XLA work to others,
so that peers, which are a few clocks ahead at most, come nowhere near this unless the thread is stuck."""


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
        training = plan.training
        if training is None:
            raise FlowmlError(f"plan {plan.name!r} is not a training plan")
        self.worker = worker
        self.programs = programs
        self.changed = threading.Condition()
        """Guards the machine, and the state that executors read."""
        self.machine = TrainingWorker(worker.name, driver, Terms.of(training, 0), Places.of(training))
        self.payloads: dict[int, Sequence[Array]] = {}
        """The arrays of the machine's handles."""
        self.encoded = Encoded()
        self._handles = count(1)
        self._plan_id = plan_id
        self._plan = plan
        self._driver = driver
        self._deadline_s = deadline_s
        self._fit: _Fit | None = None
        self._failed: wire.StepFailed | None = None
        """The last failure, to be told again if the driver asks."""
        self._inbox: queue.SimpleQueue[_Entry | _FromExecutors | None] = queue.SimpleQueue()
        self._wakes: list[tuple[float, int]] = []
        """(time, run) of the Wakes that have not been answered, as a heap."""
        self._thread = service.start(f"{worker.name} training", self._work, self._end)

    @property
    def busy(self) -> bool:
        """Whether a fit runs here."""
        return self._fit is not None

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None:
        fit = self._fit
        if isinstance(message, wire.Collective) and fit is not None and fit.run.number == message.run:
            fit.reductions.on_message(peer, message, arrays)
        elif isinstance(message, wire.StepCheck):
            if self._failed is not None and self._failed.step >= message.step:
                self._tell(self._failed)
        elif isinstance(message, wire.TrainingMessage):
            if self._inbox.qsize() < MAX_INBOX:
                self._inbox.put((peer, message, arrays))
            elif self._failed is None or self._failed.step < message.run:  # once a fit: each message is one too many
                self.fail(message.run, "training", _too_many(self.worker.name, peer, message))

    def on_lost(self, peer: str, reason: str) -> None:
        """Tell the groups that add up gradients. The driver also learns of the loss, and ends the fit."""
        fit = self._fit
        if fit is not None:
            fit.reductions.on_lost(peer, reason)

    def on_event(self, event: _FromExecutors) -> None:
        """An executor has finished or given up a step, has updated a store that it shares, or has computed a part."""
        self._inbox.put(event)

    def close(self) -> None:
        self._inbox.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def fail(self, step: int, node: str, error: BaseException) -> None:
        """Report a failure to the driver. The step tells it which run failed; that run may have ended already."""
        self._failed = step_failed(self._plan_id, step, self.worker.name, node, error)
        self._tell(self._failed)

    def _tell(self, failed: wire.StepFailed) -> None:
        with suppress(FlowmlError):
            self.worker.endpoint.send(self._driver, failed)

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                self._step(self._received(*entry) if isinstance(entry, tuple) else entry)
            except BaseException as error:  # the user's optimizer may call sys.exit()
                run = entry[1].run if isinstance(entry, tuple) else entry.run
                self.fail(run, "training", error)
            del entry  # otherwise it would keep arrays alive until the next entry
        self._close()

    def _next(self) -> _Entry | _FromExecutors | protocol.Tick | None:
        """The next message or event, or the Tick for a Wake whose time has come. None when the host is closed."""
        if not self._wakes:
            return self._inbox.get()  # no deadline: the thread sleeps until it has work or is closed
        with suppress(queue.Empty):
            return self._inbox.get(timeout=max(self._wakes[0][0] - time.monotonic(), 0.0))
        return protocol.Tick(heapq.heappop(self._wakes)[1])

    def _end(self, reason: str) -> None:
        self.fail(self.machine.newest, "training", FlowmlError(reason))

    def _received(self, peer: str, message: wire.TrainingMessage, arrays: Sequence[Array]) -> protocol.Received:
        if not arrays:
            return protocol.Received(peer, message)
        handle = next(self._handles)
        self.payloads[handle] = arrays
        if isinstance(message, wire.Contribution) and peer != self._driver:  # which sends what a snapshot has decoded
            self._note_encoded(handle, message)
        return protocol.Received(peer, message, handle)

    def _note_encoded(self, handle: int, message: wire.Contribution) -> None:
        """Note a contribution that a home decodes. What replicas send to the leader of their site, or to a parent in a
        tree, is not encoded."""
        stores, store = self._plan.training.stores if self._plan.training else (), message.store
        encoded = store < len(stores) and (message.of_site or not stores[store].relayed)
        quorum = stores[store].policy.quorum if encoded else None
        if isinstance(quorum, Coded):
            tree = quorum.tree
            encoded = tree is None or tree.adder_of(message.replica, summed=message.of_site) is None
        if encoded and stores[store].policy.home_filters:
            self.encoded.add(handle, message, stores[store].policy)

    def _step(self, event: protocol.Event) -> None:
        with self.changed:
            actions = self.machine.step(event, time.monotonic())
            self._record(event, actions)
            later = [action for action in actions if not self._at_once(action)]
            self.changed.notify_all()
        if self._fit is not None:
            self._fit.stores(later)
        for action in later:
            self._later(action)

    def _record(self, event: protocol.Event, actions: Sequence[protocol.Action]) -> None:
        recorder = self.worker.recorder
        if recorder.on and not isinstance(event, ReplicaLost):
            run = event.message.run if isinstance(event, protocol.Received) else event.run
            told = entry(self.worker.name, run, self.machine.number, event, actions)
            if told is not None:
                recorder.tell(told)

    def _at_once(self, action: protocol.Action) -> bool:
        """Carry out an action that changes state that executors read, under the lock. False for any other action."""
        match action:
            case protocol.Open():
                self._open(action)
            case protocol.Close():
                if self._fit is not None:
                    self._fit.run.stopped = True  # the rest is done without the lock
                return False
            case _:
                return self._fit is not None and self._fit.at_once(action)
        return True

    def _later(self, action: protocol.Action) -> None:
        if isinstance(action, protocol.Close):
            self._close()
        elif isinstance(action, protocol.Fail):
            self.fail(action.run, "training", action.error)
        elif isinstance(action, protocol.Wake):
            heapq.heappush(self._wakes, (action.at, action.run))
        elif isinstance(action, protocol.Release):
            self.payloads.pop(action.handle, None)  # the homes take those that they still have to decode
            self.encoded.drop(action.handle)
        elif self._fit is not None:
            self._fit.later(action)

    def _open(self, action: protocol.Open) -> None:
        run = Run(
            me=self.worker.name,
            plan_id=self._plan_id,
            plan=self._plan,
            start=action.start,
            driver=self._driver,
            sender=self.worker.endpoint,
            deadline_s=self._deadline_s,
            recorder=self.worker.recorder,
            changed=self.changed,
        )
        self._fit = _Fit(run, self)

    def _close(self) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.stop()


def _too_many(me: str, peer: str, message: wire.TrainingMessage) -> InboxLimitError:
    return InboxLimitError(
        f"{MAX_INBOX} messages wait for the training thread of {me}, and {type(message).__name__} from {peer} is one "
        f"too many; see whether {me} is stuck, and start the fit again"
    )


class _Fit:
    """The stage runners and stores of one run on this worker."""

    def __init__(self, run: Run, host: TrainingHost) -> None:
        self.run, self._machine = run, host.machine
        self.reductions = Reductions(run, host.fail)
        self._payloads = host.payloads
        agreement = Agreement(run, self.reductions.group, host.fail)
        self._homes = Homes(run, host.programs, host.payloads, host.encoded, agreement, host.fail)
        self._relays = Relays(run, host.payloads, host.fail)
        stages = Places.of(run.training).stages_on(run.me)
        programs = [host.programs[run.training.replicas[r][s]] for r, s in stages]
        kernels = Kernels(programs[0].device) if programs else on_numpy
        self._readers = [Reader(spec, kernels) for spec in run.training.stores]
        for store, spec in enumerate(run.training.stores):
            if spec.policy.pull_filters and spec.policy.clocked:
                reader = self._readers[store]
                run.residents.add(
                    Resident(f"reader/{run.me}/{spec.name}", partial(self._decoded, store), reader.restore)
                )
        self._exports = Lane(f"{run.me} snapshots run {run.number}")
        """Tells the driver what no other lane uses."""
        self._kept_fits, self._checkpoints = host.worker.kept_fits, host.worker.checkpoints
        self._copying = Copying(run, run.start.copies or wire.Copies(0, "", ()), self._kept_fits)
        self._fail = partial(host.fail, run.number, "a snapshot")
        self._stages = {
            (r, s): StageRunner(run, host, (r, s), host.programs[run.training.replicas[r][s]], self.reductions)
            for r, s in stages
        }

    def _decoded(self, store: int) -> Arrays:
        """What the filters of a reader remember, once they have decoded the newest version."""
        view = self.run.stores.get(store)
        _ = view and view.values
        return self._readers[store].export()

    def stop(self) -> None:
        with self.run.changed:
            self.run.stopped = True
            self.run.changed.notify_all()
        for stage in self._stages.values():
            stage.stop()
        self._homes.close()
        self._relays.close()
        self._exports.close()
        self.reductions.close()
        self.run.residents.forget()

    def at_once(self, action: protocol.Action) -> bool:
        """Carry out an action that changes what executors read; the caller holds the lock. False for any other."""
        match action:
            case protocol.Start(_, replica, stage):
                self._stages[replica, stage].start(action)
            case protocol.Abandon(replica, stage, clock):
                self._stages[replica, stage].abandon(clock)
            case protocol.Count(replica, stage, clock, counts, stores):
                self._stages[replica, stage].settle(clock, stores, counts=counts)
            case protocol.Show(store, version, handle, _, base):
                arrays, before = self._payloads.pop(handle), self.run.stores.get(store)
                self.run.stores[store] = self._readers[store].view(version, base, arrays, before)
            case protocol.Hand(_, wire.Source(slots=slots), handle):
                self.run.source.update(zip(slots, self._take(handle), strict=True))
            case protocol.Hand(_, wire.OwnState(store=store), handle):
                self.run.states[store] = self._take(handle)
            case protocol.Hand(_, wire.ModelState(replica=replica, stage=stage), handle):
                self.run.model[replica, stage] = self._take(handle)
            case protocol.Hand(_, wire.Gossip() as told, handle) if not self._adds_up(told):
                run = self.run
                run.lists = heard(told, self._take(handle), run.told, run.lists, run.positions)
            case protocol.Hand(_, wire.Buffers(owner=owner, names=names), handle):
                arrays = self._take(handle)
                if owner:
                    self.run.residents.restore(owner, dict(zip(names, arrays, strict=True)))
                else:
                    self.run.restored = True
            case protocol.Hand(_, wire.Batch() as batch, handle):
                arrays = self._take(handle)
                for stage in self._stages.values():
                    if stage.device == batch.device:
                        stage.give(batch, arrays)
            case _:
                return False
        return True

    def stores(self, actions: Sequence[protocol.Action]) -> None:
        """Queue the actions on the stores here. Does not wait: the threads of their devices carry them out in order."""
        mine = [a for a in actions if isinstance(a, HomeAction)]
        if mine:
            self._homes.carry_out(mine)

    def later(self, action: protocol.Action) -> None:
        """Carry out all other actions, in order."""
        run = self.run
        match action:
            case protocol.Send(to, message):
                for worker in to:
                    run.send(worker, message)
            case _ if isinstance(action, HomeAction):
                pass  # `stores` has queued it
            case protocol.Forward():
                self._relays.forward(action)
            case protocol.CountSum():
                self._relays.settle(action)
            case protocol.PassOn():
                self._relays.pass_on(action)
            case protocol.Export():
                self._export(action)
            case protocol.Hand(_, wire.Gossip(store=store, part=int(part)) as told, handle):
                spec = run.training.stores[store]
                given = Given(store, part, told.replica, told.clock, told.weight, told.cause)
                run.count_push(store, part, spec.part_bytes(spec.parts[part]), run.me)
                leader = self._stages[told.replica, spec.parts[part].stage]
                self.reductions.push(leader.encoder, given, self._take(handle))
            case protocol.Leave(_, message, cause, of):
                if of is not None:
                    self._stages[of].model.send(cause)
                self._relays.after(partial(self._leave, message))
            case protocol.Hand(_, wire.Copy() as copy, handle):
                arrays = dict(zip(copy.names, self._take(handle), strict=not copy.same))
                self._exports.put(partial(self._copying.take, copy, arrays), self._fail)
            case protocol.Hand(peer, wire.Collective() as message, handle):
                self.reductions.on_message(peer, message, self._take(handle))
            case _:
                raise FlowmlError(f"a worker cannot carry out {type(action).__name__}")

    def _leave(self, message: wire.Retired) -> None:
        """Tell the driver that a stage has retired, and first what was sent."""
        self.run.send(self.run.driver, self.run.traffic(message.cause))
        self.run.send(self.run.driver, message)

    def _export(self, action: protocol.Export) -> None:
        """Send what lives here between steps to the driver, to other workers, or to both. Does not wait."""
        run, found = self.run, self.run.residents.found.values()
        ids: dict[str, Any] = {"plan_id": run.plan_id, "run": run.number, "cause": action.cause}
        ids["number"] = action.number
        waiting = [self._waiting(part, handle) for part, handle in action.waiting if not part.empty]
        parts, expected = tuple(part for part, _ in action.waiting), len(found) + len(waiting)
        about: dict[str, Any] = {"stages": action.stages, "stores": action.stores, "sites": action.sites}
        run.send(run.driver, wire.Exported(**ids, **about, waiting=parts, buffers=expected))
        where = run.driver, action.folder, action.token
        written = self._checkpoints.begin(*where, expected) if action.folder else None

        def tell(resident: Resident) -> None:
            try:
                arrays = resident.export()
            except BaseException:
                if self._machine.held > action.number:  # the snapshot was withdrawn, and a step has begun meanwhile
                    return
                raise
            names, sent, lent = tuple(arrays), arrays, True
            if written is not None:
                sent = arrays if told_whole(resident.owner) else {}
                if resident.state is None:  # a step may overwrite them
                    arrays, lent = {name: np.array(array) for name, array in arrays.items()}, False
                written.add(resident.owner, {} if sent else arrays)
            if run.start.fit and self._machine.held <= action.number:
                of = run.plan_id, run.number, action.number
                self._kept_fits.export(run.driver, run.start.fit, of, resident.owner, arrays, lent=lent)
            if action.copied:
                self._copying.send(action, resident, arrays)
            if not action.whole:
                return
            specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in sent.values())
            message = wire.Buffers(**ids, owner=resident.owner, names=names, specs=specs)
            run.send(run.driver, message, list(sent.values()))

        for resident in (*found, *waiting):
            (resident.lane or self._exports).put(partial(tell, resident), self._fail)

    def _waiting(self, part: wire.Waiting, handle: int) -> Resident:
        """A part of a contribution that waits for a later clock, decoded. It is restored by coming again."""
        spec = self.run.training.stores[part.store]
        if spec.relayed and not part.of_site:  # it waits at the leader of a site
            arrays, lane = partial(self._payloads.__getitem__, handle), None
        else:
            arrays, lane = self._homes.waiting(part.store, handle)
        return Resident(of_waiting(spec.name, part), lambda: row("array", arrays()), loaded, lane)

    def _adds_up(self, told: wire.Gossip) -> bool:
        """Whether it is the sum of a site, and leaders add these up among themselves."""
        return told.part is not None and self.run.training.stores[told.store].collective

    def _take(self, handle: int | None) -> Sequence[Array]:
        return () if handle is None else self._payloads.pop(handle)
