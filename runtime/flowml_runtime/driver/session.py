"""The driver's session: loads plans on workers, feeds steps, collects results, maps faults to typed errors.

    load    LoadPlan to every worker of the plan -> all Loaded (the barrier) -> a LoadedPlan
    submit  one feed a device, in step order -> workers run on their own -> fetches complete the Future
    fault   StepFailed or a lost worker -> that step's Future gets a typed error, the other workers drop the step

Nobody else takes part in a step: between feed and fetch workers talk to each other. Messages of training
plans are handed to the handler that the trainer registered.
"""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

from flowml.devices import Device, find_device
from flowml.errors import ClusterError, DeadlineError, FlowmlError, PlacementError, WorkerLostError
from flowml.plan import ArraySpec, Fetch, Plan, Program, Run
from flowml_runtime import wire
from flowml_runtime.driver.call_io import Feeder, Restorer
from flowml_runtime.driver.steps import Steps
from flowml_runtime.execution.faults import cluster_closed, load_failed, step_error, step_failed, worker_lost
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.inline import LocalStep
from flowml_runtime.execution.programs import Array, feed_slots, store_tasks
from flowml_runtime.execution.step_program import StepFault
from flowml_runtime.execution.window import IN_FLIGHT
from flowml_runtime.transport.endpoint import Sender

IN_FLIGHT_BYTES = 512 * 2**20
"""What the inputs and results of the calls under way may take, unless two calls take more."""

LOAD_DEADLINE_S = 1800.0
"""How long all workers together may take to compile a plan."""


class PlanHandler(Protocol):
    """Takes over the messages of one plan, as a trainer does. Called on receiving threads: must not wait."""

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None: ...
    def on_lost(self, peer: str, reason: str) -> None: ...


class LocalWorker(Protocol):
    """What the session asks of a worker in its own process."""

    name: str

    def local_step(self, plan_id: str) -> LocalStep | None: ...


@dataclass(frozen=True)
class _FeedPort:
    """What is sent to start a step on one device."""

    worker: str
    device: str
    slots: tuple[int, ...]
    specs: tuple[ArraySpec, ...]


@dataclass(frozen=True)
class LoadedPlan:
    """A plan that every one of its workers has compiled and waits to be fed."""

    plan_id: str
    plan: Plan
    workers: tuple[str, ...]
    ports: tuple[_FeedPort, ...] = field(repr=False)
    steps: Steps = field(repr=False)
    prepare: Feeder = field(repr=False)
    restore: Restorer = field(repr=False)
    local: LocalStep | None = field(default=None, repr=False)
    order: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held while a step is fed, so that every device sees the same order of steps."""

    @property
    def direct(self) -> Callable[[Sequence[Any]], Sequence[Array]] | None:
        """The whole plan as a function of JAX arrays, where it is one task of this process and nobody records it."""
        return None if self.local is None or self.local.recorded else self.local.direct


class _Loading:
    """A load under way: the workers that have not answered, and the first thing that went wrong."""

    def __init__(self, plan: Plan, workers: Sequence[str]) -> None:
        self.plan = plan
        self.workers = tuple(workers)
        self.missing = set(workers)
        self.error: FlowmlError | None = None
        self.over = threading.Event()

    def loaded(self, worker: str) -> None:
        self.missing.discard(worker)
        if not self.missing:
            self.over.set()

    def fail(self, error: FlowmlError) -> None:
        self.error = self.error or error
        self.over.set()


class Session:
    """The driver's end of a cluster. Safe to use from any thread. `devices` are those plans may use."""

    def __init__(
        self,
        endpoint: Sender,
        devices: Sequence[Device],
        *,
        in_flight: int = IN_FLIGHT,
        deadline_s: float = wire.DEADLINE_S,
        remedy: str = "start the worker again",
    ) -> None:
        """`submit` waits while `in_flight` calls of a plan are under way, or fewer where they are large.

        `deadline_s` bounds each wait of a step; `remedy` is what the user can do when a worker is lost.
        """
        self.endpoint = endpoint
        self.remedy = remedy
        self.devices = tuple(devices)
        self._in_flight = in_flight
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._loading: dict[str, _Loading] = {}
        self._plans: dict[str, LoadedPlan] = {}
        self._handlers: dict[str, PlanHandler] = {}
        self._local: dict[str, LocalWorker] = {}
        self._closed = False

    def attach(self, worker: LocalWorker) -> None:
        """Make known a worker in this very process, so that `call` may go the short way."""
        with self._lock:
            self._local[worker.name] = worker

    def load(self, plan: Plan) -> LoadedPlan:
        """Have every worker of the plan compile its part; returns when all have.

        Raises PlacementError for a device that does not exist, WorkerError if a worker cannot load its
        part, WorkerLostError if one dies meanwhile, DeadlineError if they take too long.
        """
        for program in plan.programs:
            find_device(program.device, self.devices, f"plan {plan.name!r}")
        plan_id = f"{self.endpoint.name}-{uuid.uuid4().hex[:16]}"
        workers = tuple(dict.fromkeys(_worker(p) for p in plan.programs))
        loading = _Loading(plan, workers)
        with self._lock:
            self._check_open()
            self._loading[plan_id] = loading
        try:
            if workers:
                self._request(plan_id, loading)
                _wait_loaded(loading)
            only = self._local.get(workers[0]) if len(plan.programs) == 1 else None
            local = only.local_step(plan_id) if only is not None else None
            handle = _handle(plan_id, plan, workers, self._in_flight, local)
            with self._lock:
                self._check_open()
                self._plans[plan_id] = handle
                if loading.error is not None:  # a worker was lost between the barrier and here
                    raise loading.error
        except BaseException:
            with self._lock:
                self._plans.pop(plan_id, None)
            self._broadcast(workers, wire.Unload(plan_id=plan_id))
            raise
        finally:
            with self._lock:
                del self._loading[plan_id]
        return handle

    def reload(self, handle: LoadedPlan) -> LoadedPlan:
        """The plan of a handle that lost a worker, loaded again if every worker it needs is there; else as it was."""
        there = {d.name for d in self.devices}
        if not handle.steps.stopped or any(p.device not in there for p in handle.plan.programs):
            return handle
        self.unload(handle)
        try:
            return self.load(handle.plan)
        except PlacementError:  # it left just now; the handle says why it stopped
            return handle

    def submit(self, handle: LoadedPlan, inputs: Sequence[Any], *, copy: bool = True) -> Future[list[Any]]:
        """Start one step with the plan's flat inputs. Waits while too many steps are in flight.

        With `copy` the caller may overwrite NumPy inputs as soon as this returns. Raises at once if the plan
        lost a worker; whatever goes wrong later is raised by the future.
        """
        buffers = handle.prepare(inputs, copy=copy)
        step, future = handle.steps.begin(lambda fetched: handle.restore(fetched, buffers))
        try:
            self._feed(handle, step, buffers)
        except WorkerLostError as lost:
            self._fail_step(handle, step, self._lost(handle.plan, step, lost.worker or "a worker", str(lost)))
        except BaseException as error:
            self._fail_step(handle, step, error)
            raise
        return future

    def call(self, handle: LoadedPlan, inputs: Sequence[Any]) -> list[Any]:
        """Run one step and return its flat results. On a worker in this process nothing is waited for, as in jit."""
        local = handle.local
        if local is None or len(handle.steps):
            return self.submit(handle, inputs, copy=False).result()
        buffers = handle.prepare(inputs, copy=False)
        step = handle.steps.skip()
        try:
            fetched = local(step, buffers)
        except StepFault as fault:
            cause = fault.__cause__ or fault
            message = step_failed(handle.plan_id, step, handle.workers[0], fault.node, cause)
            raise step_error(handle.plan, message, self.remedy) from cause
        return handle.restore(fetched, buffers)

    def register(self, plan_id: str, handler: PlanHandler) -> None:
        """Hand every later message of this plan, and every lost peer, to `handler`."""
        with self._lock:
            self._handlers[plan_id] = handler

    def unregister(self, plan_id: str) -> None:
        """The handler of `plan_id` is not to be called any more."""
        with self._lock:
            self._handlers.pop(plan_id, None)

    def tell(self, worker: str, message: wire.Wire) -> None:
        """Send to a worker; nothing if it is lost, which `on_lost` says."""
        self._broadcast((worker,), message)

    def unload(self, handle: LoadedPlan) -> None:
        """Free the plan on its workers. Steps in flight fail."""
        with self._lock:
            self._handlers.pop(handle.plan_id, None)
            if self._plans.pop(handle.plan_id, None) is None:
                return
        handle.steps.stop(lambda step: ClusterError(f"plan {handle.plan.name!r} was unloaded", step=step))
        self._broadcast(handle.workers, wire.Unload(plan_id=handle.plan_id))

    def close(self) -> None:
        """Fail what is outstanding and unload every plan. Idempotent."""
        with self._lock:
            self._closed = True
            plans, loads = list(self._plans.values()), list(self._loading.values())
        for loading in loads:
            loading.fail(cluster_closed())
        for handle in plans:
            handle.steps.stop(cluster_closed)
            self.unload(handle)

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None:
        """Take one message in. Called by the endpoint on its receiving threads."""
        plan_id = getattr(message, "plan_id", "")
        handler = self._handlers.get(plan_id)
        if handler is not None:
            if isinstance(message, wire.Unreachable):
                handler.on_lost(message.peer, _unreachable(message))
            else:
                handler.on_message(peer, message, arrays)
            return
        handle = self._plans.get(plan_id)
        if handle is not None:
            self._on_plan_message(handle, message, arrays)
            return
        loading = self._loading.get(plan_id)
        if loading is not None and isinstance(message, wire.Loaded):
            loading.loaded(message.worker)
        elif loading is not None and isinstance(message, wire.Failed):
            loading.fail(load_failed(loading.plan, message))

    def on_lost(self, peer: str, reason: str) -> None:
        """A peer died or stopped answering: fail at once all that depends on it."""
        with self._lock:
            for loading in self._loading.values():
                if peer in loading.workers:
                    text = f"{peer} was lost while it compiled plan {loading.plan.name!r}: {reason}; {self.remedy}"
                    loading.fail(WorkerLostError(text, worker=peer))
            plans = [p for p in self._plans.values() if peer in p.workers]
            handlers = list(self._handlers.values())
        for handle in plans:
            self._stop(handle, lambda step, plan=handle.plan: self._lost(plan, step, peer, reason))
        for handler in handlers:
            handler.on_lost(peer, reason)

    def _feed(self, handle: LoadedPlan, step: int, buffers: Sequence[Array]) -> None:
        with handle.order:
            for port in handle.ports:
                value = wire.Value(
                    plan_id=handle.plan_id,
                    step=step,
                    kind="feed",
                    index=0,
                    device=port.device,
                    slots=port.slots,
                    specs=port.specs,
                )
                self.endpoint.send(port.worker, value, [buffers[s] for s in port.slots])

    def _on_plan_message(self, handle: LoadedPlan, message: wire.Wire, arrays: Sequence[Array]) -> None:
        if isinstance(message, wire.Value):
            handle.steps.collect(message.step, message.slots, arrays)
        elif isinstance(message, wire.StepFailed):
            self._fail_step(handle, message.step, step_error(handle.plan, message, self.remedy))
        elif isinstance(message, wire.Failed):
            self._stop(handle, lambda step: load_failed(handle.plan, message))
        elif isinstance(message, wire.Unreachable):
            self._stop(handle, lambda step: self._lost(handle.plan, step, message.peer, _unreachable(message)))

    def _fail_step(self, handle: LoadedPlan, step: int, error: BaseException) -> None:
        if handle.steps.fail(step, error):
            self._cancel(handle, step)

    def _stop(self, handle: LoadedPlan, error: Callable[[int], FlowmlError]) -> None:
        for step in handle.steps.stop(error):
            self._cancel(handle, step)

    def _cancel(self, handle: LoadedPlan, step: int) -> None:
        """Tell the workers that nobody needs this step any more, so that none waits for its values."""
        cancelled = wire.StepFailed(
            plan_id=handle.plan_id, step=step, worker=self.endpoint.name, node="", kind="cancelled", error=""
        )
        self._broadcast(handle.workers, cancelled)

    def _broadcast(self, workers: Sequence[str], message: wire.Wire) -> None:
        for worker in workers:
            try:
                self.endpoint.send(worker, message)
            except WorkerLostError:
                continue

    def _request(self, plan_id: str, loading: _Loading) -> None:
        for worker in loading.workers:
            data = np.frombuffer(_part(loading.plan, worker).encode(), np.uint8)
            specs = (ArraySpec(data.shape, "uint8"),)
            message = wire.LoadPlan(plan_id=plan_id, peers=loading.workers, deadline_s=self._deadline_s, specs=specs)
            self.endpoint.send(worker, message, [data])

    def _lost(self, plan: Plan, step: int, worker: str, reason: str) -> WorkerLostError:
        return worker_lost(plan, step, worker, reason, self.remedy)

    def _check_open(self) -> None:
        if self._closed:
            raise cluster_closed()


def _unreachable(message: wire.Unreachable) -> str:
    return f"{message.worker} cannot reach it: {message.reason}"


def _worker(program: Program) -> str:
    return program.device.split("/", 1)[0]


def _handle(plan_id: str, plan: Plan, workers: tuple[str, ...], in_flight: int, local: LocalStep | None) -> LoadedPlan:
    slots = {s for p in plan.programs for i in p.instructions if isinstance(i, Fetch) for s in i.slots}
    ports: list[_FeedPort] = []
    for program in plan.programs if plan.training is None else ():
        fed = feed_slots(program)
        ports.append(_FeedPort(_worker(program), program.device, fed, tuple(plan.inputs[i] for i in fed)))
    nbytes = sum(s.nbytes for s in (*plan.inputs, *(o.spec for o in plan.outputs)))
    steps = Steps(plan.name, len(slots), min(in_flight, max(2, IN_FLIGHT_BYTES // max(nbytes, 1))))
    return LoadedPlan(plan_id, plan, workers, tuple(ports), steps, Feeder(plan), Restorer(plan), local)


def _part(plan: Plan, worker: str) -> Plan:
    """The plan without what this worker has no use for: other workers' executables, the graph for drawing."""
    mine = [p for p in plan.programs if _worker(p) == worker]
    used = {i.task for p in mine for i in p.instructions if isinstance(i, Run)}
    used.update(t for p in mine for t in store_tasks(plan, p.device))
    keys = {plan.tasks[t].executable for t in used}
    executables = {k: v for k, v in plan.executables.items() if k in keys}
    return msgspec.structs.replace(plan, executables=executables, nodes=(), choices=(), notes=())


def _wait_loaded(loading: _Loading) -> None:
    """The barrier. Shows that it waits once it takes longer than a second and somebody can see it."""
    began = time.monotonic()
    shown = False
    while not loading.over.wait(1.0):
        seconds = time.monotonic() - began
        if seconds > LOAD_DEADLINE_S:
            waiting = ", ".join(sorted(loading.missing))
            raise DeadlineError(f"{waiting} did not compile plan {loading.plan.name!r} within {LOAD_DEADLINE_S:g} s")
        if sys.stderr.isatty():
            ready = len(loading.workers) - len(loading.missing)
            text = f"flowml: compiling {loading.plan.name}, {ready} of {len(loading.workers)} workers ready"
            print(f"\r{text}, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)
            shown = True
    if shown:
        print(f"\r{' ' * 79}\r", end="", file=sys.stderr, flush=True)
    if loading.error is not None:
        raise loading.error
