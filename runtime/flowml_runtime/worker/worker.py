"""A worker receives messages, loads plans, and runs them on one thread per device.

Messages arrive on the endpoint's receiving threads, which never wait here: a value goes to the mailbox or to an
executor's queue, a plan to the loader thread. A training plan has its own handler, `TrainingHost`. It gets every
message that a plan without training does not use.

    LoadPlan -> loader: compile -> Loaded | Failed        (to the peer that sent it, the plan's driver)
    Value    -> mailbox (edge) | executor (feed)
    StepFailed -> cancel the step     Unload, driver lost -> stop and forget the plan
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from flowml.devices import worker_of
from flowml.errors import FlowmlError, WorkerLostError
from flowml.placement.links import Link
from flowml.plan import ArraySpec, Plan
from flowml_runtime import service, wire
from flowml_runtime.execution.device_thread import Deadlines, DeviceThread, moves_arrays
from flowml_runtime.execution.executor import Executor, may_be_quick, may_run_ahead
from flowml_runtime.execution.faults import MAX_TEXT, one_line, own_traceback, step_failed
from flowml_runtime.execution.inline import LocalStep
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.mailbox import Mailbox
from flowml_runtime.execution.programs import (
    Array,
    ExecutableCache,
    JaxDevice,
    LoadedProgram,
    kept_slots,
    load_programs,
    overwritten_slots,
)
from flowml_runtime.execution.recorder import Recorder, Span, clock_id, now_ns
from flowml_runtime.execution.results import Results
from flowml_runtime.execution.services import DataflowServices, reserve_edges
from flowml_runtime.execution.step_program import StepProgram, prepare
from flowml_runtime.execution.task_functions import own_calls
from flowml_runtime.execution.window import Windows
from flowml_runtime.links.prober import Prober
from flowml_runtime.links.traffic import Traffic
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.transport.endpoint import Sender
from flowml_runtime.worker.arriving import Arriving
from flowml_runtime.worker.checkpoint_parts import CheckpointParts
from flowml_runtime.worker.keeping import Keeping
from flowml_runtime.worker.kept_fits import KeptFits

MAX_REASON = 1024
JOIN_S = 5.0
"""How long `close` waits for each thread. A thread in a callback that never returns is abandoned."""


class TrainingHandler(Protocol):
    """Hosts a training plan on this worker. It is called on receiving threads, so only `close` may wait."""

    @property
    def busy(self) -> bool: ...

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None: ...
    def on_lost(self, peer: str, reason: str) -> None: ...
    def close(self) -> None: ...


def _training_handler(
    worker: Worker, plan_id: str, plan: Plan, programs: Mapping[str, LoadedProgram], driver: str, deadline_s: float
) -> TrainingHandler:
    from flowml_runtime.worker.training.host import TrainingHost  # imported only where something is trained

    return TrainingHost(worker, plan_id, plan, programs, driver, deadline_s)


_Stays = tuple[tuple[int, ...], frozenset[int], frozenset[int]]
"""The slots of the outputs that steps keep, and of the inputs that they overwrite, and that their callers donate."""


@dataclass
class _Hosted:
    """A plan on this worker. It exists as soon as its LoadPlan arrives; `executors` is set when it is compiled."""

    driver: str
    deadline_s: float
    peers: tuple[str, ...]
    """All workers of the plan."""
    held: tuple[tuple[str, int, int], ...]
    """The constants that are here already: (device, constant, name of the kept value)."""
    arriving: Arriving = field(default_factory=Arriving)
    complete: bool = False
    """Whether all of it has arrived."""
    executors: dict[str, Executor] = field(default_factory=dict[str, Executor])
    windows: dict[str, Windows] = field(default_factory=dict[str, Windows])
    stays: dict[str, _Stays] = field(default_factory=dict[str, "_Stays"])
    """By device."""
    local: LocalStep | None = None
    devices: tuple[str, ...] = ()
    training: TrainingHandler | None = None
    programs: Mapping[str, LoadedProgram] = field(default_factory=dict[str, LoadedProgram])
    """Of a training plan, by device: steps of another plan of its driver may run them, see `variant`."""
    closed: bool = False

    @property
    def busy(self) -> bool:
        """Whether it is being loaded, or something of it runs here."""
        if self.training is not None:
            return self.training.busy
        return not self.devices or any(executor.busy for executor in list(self.executors.values()))


class Worker:
    """Runs this process's part of plans. `devices` maps device names ("worker:0/cpu:0") to JAX devices."""

    def __init__(
        self,
        name: str,
        devices: Mapping[str, JaxDevice],
        endpoint: Sender,
        *,
        python: bool = False,
        cache: ExecutableCache | None = None,
        orphan_s: float = 0.0,
    ) -> None:
        """The workers of one process share one `cache`. The newest snapshot of a fit without driver is kept for
        `orphan_s`."""
        self.name = name
        self.devices = dict(devices)
        self.endpoint = endpoint
        self.python = python
        self.mailbox = Mailbox()
        self.recorder = Recorder()
        self._prober = Prober(endpoint)
        self._keeping = Keeping(name, endpoint, self.devices)
        self.kept_fits = KeptFits(name, endpoint, orphan_s, lambda plan_id: plan_id in self._plans)
        self.checkpoints = CheckpointParts(name, endpoint)
        self.traffic = Traffic(self._contradicted)
        self._cache = cache or ExecutableCache()
        self._lock = threading.Lock()
        self._plans: dict[str, _Hosted] = {}
        self._threads: dict[str, DeviceThread] = {}
        """The thread of each device that has been used."""
        self._results: dict[str, Lane] = {}
        self._deadlines = Deadlines(f"{name}-deadlines")
        self._ending: list[threading.Thread] = []
        """Each closes the handler of a training plan that was unloaded."""
        self._loader = ThreadPoolExecutor(1, f"{name}-load", moves_arrays)

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None:
        """Process one message. The endpoint calls this on its receiving threads; it returns at once."""
        match message:
            case wire.Value(kind="edge"):
                self._put(message, arrays)
            case wire.LoadPlan():
                self._accept(peer, message, arrays)
            case wire.StepCheck():
                self._check_step(peer, message)
            case wire.Unreachable(heard=False):
                self._tell(peer, msgspec.structs.replace(message, heard=True))
            case wire.Trace():
                self._trace(peer, message)
            case wire.Probe() | wire.Probed():
                self._prober.on_message(peer, message)
            case wire.Bring() | wire.BringPiece() | wire.Recall() | wire.Write() | wire.ReadFile() | wire.Drop():
                self._keeping.on_message(peer, message, arrays)
            case wire.AskWrote():
                self.checkpoints.say_again(peer, message.plan_id)
            case wire.Claim() | wire.Completed() | wire.Recover() | wire.Released():
                self.kept_fits.on_message(peer, message, arrays)
            case _:
                hosted = self._plans.get(getattr(message, "plan_id", ""))
                if hosted is not None:
                    self._on_plan_message(hosted, peer, message, arrays)

    def on_lost(self, peer: str, reason: str) -> None:
        """A peer is lost. End the plans it drove, and tell the drivers of the other plans it took part in."""
        self._prober.on_lost(peer, reason)
        self._keeping.forget(peer)
        for plan_id, hosted in list(self._plans.items()):
            if hosted.driver == peer:
                self.unload(plan_id)
                continue
            if peer in hosted.peers:
                # The peer may still run for others. Then only this worker knows that the peer's values will not come.
                text = reason[:MAX_REASON]
                self._tell(hosted.driver, wire.Unreachable(plan_id=plan_id, worker=self.name, peer=peer, reason=text))
                for executor in list(hosted.executors.values()):
                    executor.lose(peer, text)
            if hosted.training is not None:
                hosted.training.on_lost(peer, reason)
        self.kept_fits.on_lost(peer)

    @property
    def idle(self) -> bool:
        """Whether no driver would miss this worker now: no fit runs here, no call, no value is kept here, and no
        checkpoint is being written."""
        if self._keeping.kept.sizes() or self.kept_fits.writes or self.checkpoints.writes:
            return False
        return not any(hosted.busy for hosted in list(self._plans.values()))

    def local_step(self, plan_id: str) -> LocalStep | None:
        """A direct way to run a plan from this process, if the whole plan is one program on this worker."""
        hosted = self._plans.get(plan_id)
        return hosted.local if hosted is not None else None

    def variant(self, plan_id: str, device: str, driver: str) -> LoadedProgram:
        """The program on `device` of a training plan that its driver loaded. Raises FlowmlError if there is none."""
        hosted = self._plans.get(plan_id)
        loaded = hosted.programs.get(device) if hosted is not None and hosted.driver == driver else None
        if loaded is None:
            raise FlowmlError(
                f"{device} is to run the programs of plan {plan_id!r}, which {driver} has not loaded there; fit again"
            )
        return loaded

    def unload(self, plan_id: str) -> None:
        """Stop and remove a plan. Does not wait for a running task."""
        with self._lock:
            hosted = self._plans.pop(plan_id, None)
            if hosted is None:
                return
            hosted.closed = True
            executors = list(hosted.executors.values())
        self.mailbox.close(plan_id)
        for windows in hosted.windows.values():
            windows.close()
        for executor in executors:
            executor.stop()
        self._keeping.kept.abandon(plan_id)
        if hosted.training is not None:
            self._end(hosted.training)

    def _end(self, training: TrainingHandler) -> None:
        """Close a handler on a new thread, because closing waits and plans are unloaded on receiving threads."""
        with self._lock:
            self._ending = [t for t in self._ending if t.is_alive()]
            self._ending.append(service.start(f"{self.name}-unload", training.close, lambda _: None))

    def close(self) -> None:
        """Unload every plan and end every thread. Idempotent."""
        self._prober.close()
        for plan_id in list(self._plans):
            self.unload(plan_id)
        self._loader.shutdown(wait=True, cancel_futures=True)
        for plan_id in list(self._plans):  # plans that arrived meanwhile
            self.unload(plan_id)
        with self._lock:
            ending, threads, lanes = list(self._ending), list(self._threads.values()), list(self._results.values())
        for device in threads:
            device.close()
        for device in threads:
            device.join(JOIN_S)
        for lane in lanes:
            lane.close()
        for lane in lanes:
            lane.join(JOIN_S)
        self._deadlines.close(JOIN_S)
        self._keeping.close()
        self.kept_fits.close()
        self.checkpoints.close()
        self._keeping.join(JOIN_S)
        self.kept_fits.join(JOIN_S)
        self.checkpoints.join(JOIN_S)
        for thread in ending:
            thread.join(JOIN_S)

    def _trace(self, peer: str, message: wire.Trace) -> None:
        """Start to record, or send the recording. The answer has this machine's time, to compare clocks."""
        spans = np.empty(0, np.uint8)
        if message.on:
            self.recorder.start()
        else:
            spans = self.recorder.stop()
        specs = (ArraySpec(spans.shape, "uint8"),)
        answer = wire.Traced(plan_id=message.plan_id, worker=self.name, clock=clock_id(), now_ns=now_ns(), specs=specs)
        with contextlib.suppress(WorkerLostError):
            self.endpoint.send(peer, answer, [spans])

    def _arrived(self, value: wire.Value, arrays: Sequence[Array]) -> None:
        nbytes, at = sum(a.nbytes for a in arrays), now_ns()
        lane, name = f"{value.device} arrive", f"message {value.index}"
        self.recorder.add(Span(lane, "arrived", name, value.step, value.microbatch, nbytes, "", at, at))

    def _put(self, value: wire.Value, arrays: Sequence[Array]) -> None:
        if self.recorder.on:
            self._arrived(value, arrays)
        try:
            scope = (value.plan_id, value.step, value.device)
            self.mailbox.put(scope, (value.kind, value.index, value.microbatch), arrays)
        except ProtocolError as error:
            hosted = self._plans.get(value.plan_id)
            if hosted is not None:
                self._tell(hosted.driver, step_failed(value.plan_id, value.step, self.name, value.device, error))

    def _check_step(self, driver: str, message: wire.StepCheck) -> None:
        """Tell the driver of a step that is not under way here any more."""
        hosted = self._plans.get(message.plan_id)
        if hosted is not None and hosted.driver != driver:
            return
        if hosted is not None and hosted.training is not None:
            hosted.training.on_message(driver, message, ())
            return
        executor = hosted.executors.get(message.device) if hosted is not None else None
        if executor is None or not executor.has(message.step):
            lost = FlowmlError(
                f"{message.device} does not run this step any more, but its result or the reason of its failure never "
                f"came; see the log of {self.name}, and call again"
            )
            self._tell(driver, step_failed(message.plan_id, message.step, self.name, message.device, lost))

    def _on_plan_message(self, hosted: _Hosted, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None:
        if isinstance(message, wire.Failed) or (isinstance(message, wire.StepFailed) and message.kind != "cancelled"):
            self._tell(hosted.driver, message)  # a peer has refused what this worker sent
        elif hosted.training is not None and not isinstance(message, wire.Unload):
            hosted.training.on_message(peer, message, arrays)
        elif isinstance(message, wire.Taken):
            if message.device in hosted.windows:
                hosted.windows[message.device].leave(message.index, message.step)
        elif peer != hosted.driver:
            return  # only the peer that loaded a plan may drive it
        elif isinstance(message, wire.Value):
            executor = hosted.executors.get(message.device)
            if executor is not None and message.kind == "feed":
                stays = hosted.stays[message.device]
                executor.feed(message.step, self._keeping.inputs(peer, message, arrays, *stays))
        elif isinstance(message, wire.StepFailed):
            for device in hosted.devices:
                scope = message.plan_id, message.step, device
                self._keeping.kept.explain(scope, message.error, message.worker if message.worker != peer else "")
                self.mailbox.cancel(scope)
            for windows in hosted.windows.values():
                windows.cancel(message.step)
        elif isinstance(message, wire.Unload):
            self.unload(message.plan_id)

    def _accept(self, driver: str, message: wire.LoadPlan, arrays: Sequence[Array]) -> None:
        """Add a piece of a plan. After the last piece, load the plan."""
        plan_id = message.plan_id
        with self._lock:
            hosted = self._plans.get(plan_id)
            if hosted is None and not message.part and not message.start:
                hosted = self._plans[plan_id] = _Hosted(driver, message.deadline_s, message.peers, message.held)
                self.mailbox.open(plan_id)
        if hosted is None or hosted.driver != driver or hosted.complete:
            return
        (data,) = arrays
        try:
            hosted.complete = hosted.arriving.take(message, np.asarray(data))
        except (ProtocolError, MemoryError) as error:
            self.unload(plan_id)
            self._tell(driver, wire.Failed(plan_id=plan_id, worker=self.name, node="load", error=one_line(error)))
            return
        if hosted.complete:
            try:
                self._loader.submit(self._load, plan_id, hosted, message.rehearse)
            except RuntimeError:  # closing
                self.unload(plan_id)

    def _load(self, plan_id: str, hosted: _Hosted, rehearse: bool) -> None:
        if hosted.closed:  # unloaded before its turn
            return
        try:
            data, parts = hosted.arriving.taken()
            plan = own_calls.put_into(plan_id, Plan.decode(data.tobytes(), f"plan {plan_id}"))
            held = self._keeping.held(hosted.driver, hosted.held, f"plan {plan.name!r}")
            about: dict[str, Any] = {"python": self.python, "parts": parts, "held": held, "rehearse": rehearse}
            programs = load_programs(plan, self.devices, self._cache, **about)
            del data, parts, held, about
            for link in plan.links:
                if link.measured and worker_of(link.source) == self.name:
                    known = Link(link.latency_s, link.bytes_per_s, link.way, measured=True)
                    self.traffic.expect(worker_of(link.destination), known)
            for loaded in programs.values():
                reserve_edges(self.endpoint, loaded)
                plan = loaded.plan
            self._install(plan_id, hosted, plan, programs)
        except BaseException as error:  # unpickling a user's module may raise anything, SystemExit included
            self.unload(plan_id)
            trace = "" if isinstance(error, FlowmlError) else own_traceback(error)
            answer: wire.Wire = wire.Failed(
                plan_id=plan_id, worker=self.name, node="load", error=one_line(error)[:MAX_TEXT], traceback=trace
            )
        else:
            answer = wire.Loaded(plan_id=plan_id, worker=self.name)
        self._tell(hosted.driver, answer)

    def _install(self, plan_id: str, hosted: _Hosted, plan: Plan, programs: Mapping[str, LoadedProgram]) -> None:
        if plan.training is not None:
            handler = _training_handler(self, plan_id, plan, programs, hosted.driver, hosted.deadline_s)
            with self._lock:
                hosted.devices, hosted.training, hosted.programs = tuple(programs), handler, programs
                closed = hosted.closed
            if closed:
                handler.close()
            return
        with self._lock:
            if not hosted.closed:
                hosted.devices = tuple(programs)
                steps = {d: prepare(p) for d, p in programs.items()}
                hosted.executors = {d: self._executor(plan_id, hosted, p, steps[d]) for d, p in programs.items()}
                if len(plan.programs) == 1 and programs:
                    ((device, loaded),) = programs.items()
                    kept = self._keeping.kept
                    hosted.local = LocalStep(loaded, steps[device], self.recorder, kept, hosted.driver)

    def _executor(self, plan_id: str, hosted: _Hosted, loaded: LoadedProgram, program: StepProgram) -> Executor:
        driver = hosted.driver
        services = DataflowServices(
            plan_id,
            loaded,
            self.mailbox,
            self.endpoint,
            driver,
            hosted.deadline_s,
            self.recorder,
            self._keeping.kept,
            Results(self._lane_of(loaded.name)) if may_run_ahead(loaded) else None,
        )
        stays = kept_slots(loaded.program), overwritten_slots(loaded), frozenset(loaded.plan.donated)
        hosted.stays[loaded.name] = stays
        hosted.windows[loaded.name] = services.windows

        def on_fault(step: int, node: str, error: BaseException) -> None:
            lost = error.worker if isinstance(error, WorkerLostError) else None
            self._keeping.kept.end((plan_id, step, loaded.name), one_line(error), lost or "")
            self._tell(driver, step_failed(plan_id, step, self.name, node, error))

        services.on_fault = on_fault
        return Executor(
            program,
            services,
            on_fault,
            self._thread_of(loaded.name),
            self._deadlines,
            may_be_quick=may_be_quick(loaded),
            deadline_s=hosted.deadline_s,
        )

    def _contradicted(self, peer: str, bytes_per_s: float) -> None:
        for driver in {hosted.driver for hosted in list(self._plans.values())}:
            self._tell(driver, wire.Contradicted(peer=peer, bytes_per_s=bytes_per_s))

    def _thread_of(self, device: str) -> DeviceThread:
        """The thread of a device. The caller holds the lock."""
        if device not in self._threads:
            self._threads[device] = DeviceThread(device)
        return self._threads[device]

    def _lane_of(self, device: str) -> Lane:
        """Where the results of a device's steps are waited for. The caller holds the lock."""
        if device not in self._results:
            self._results[device] = Lane(f"{device} results")
        return self._results[device]

    def _tell(self, driver: str, message: wire.Wire) -> None:
        try:
            self.endpoint.send(driver, message)
        except FlowmlError:
            return  # the driver is lost; on_lost unloads its plans
