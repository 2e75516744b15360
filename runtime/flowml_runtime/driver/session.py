"""The driver's session loads plans on workers, feeds steps, collects results and turns faults into typed errors.

    load    LoadPlan to every worker of the plan -> all Loaded (the barrier) -> a LoadedPlan
    submit  one feed per device, in step order -> workers run the step -> fetches complete the Future
    fault   StepFailed or a lost worker -> that step's Future gets a typed error, the other workers drop the step

The driver takes no other part in a step: between feed and fetch, workers talk to each other. Messages of training plans
go to the handler that the trainer registered.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from flowml.devices import Device, find_device, worker_of
from flowml.errors import ClusterError, DeadlineError, FlowmlError, PlacementError, WorkerLostError
from flowml.plan import Plan
from flowml_runtime import wire
from flowml_runtime.driver import loading as shipping
from flowml_runtime.driver import own_thread, staying
from flowml_runtime.driver.captures import Captured
from flowml_runtime.driver.holdings import Holdings
from flowml_runtime.driver.loaded_plan import LoadedPlan, loaded
from flowml_runtime.driver.loading import Loading
from flowml_runtime.driver.real_time import RealTime
from flowml_runtime.driver.remote import Remote
from flowml_runtime.driver.residents import MAX_PROGRAMS, Residents
from flowml_runtime.driver.steps import unloaded
from flowml_runtime.driver.turns import Turns
from flowml_runtime.driver.unreachable import Reports, unreachable
from flowml_runtime.environment.forks import check_owner, is_foreign, this_process
from flowml_runtime.execution.device_thread import Deadlines
from flowml_runtime.execution.faults import (
    cluster_closed,
    load_failed,
    missing_workers,
    one_line,
    step_cancelled,
    step_error,
    worker_lost,
)
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.inline import LocalStep
from flowml_runtime.execution.programs import Array
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.execution.task_functions import own_calls
from flowml_runtime.execution.window import IN_FLIGHT
from flowml_runtime.transport.endpoint import Sender

TELL_S = 1.0
"""How long sending a message about an ended step or plan may wait for room. Receiving threads send such messages."""
CHECK_S = 60.0
"""How often steps are looked at whose workers have sent nothing for long, or more often with short deadlines."""


class PlanHandler(Protocol):
    """Handles the messages of one plan, for a trainer. It is called on receiving threads and must not wait."""

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None: ...
    def on_lost(self, peer: str, reason: str) -> None: ...


class LocalWorker(Protocol):
    """The part of a worker in the same process that the session uses."""

    name: str

    def local_step(self, plan_id: str) -> LocalStep | None: ...


class Session:
    """The driver's side of a cluster. Safe to use from any thread. Plans may use its `devices`."""

    def __init__(
        self,
        endpoint: Sender,
        devices: Sequence[Device],
        *,
        in_flight: int = IN_FLIGHT,
        deadline_s: float = wire.DEADLINE_S,
        remedy: str = "start the worker again",
    ) -> None:
        """`submit` waits while `in_flight` calls of a plan are in flight, or fewer if they are large.

        `deadline_s` bounds each wait of a step; `remedy` says what the user can do when a worker is lost. If a spare or
        a launcher has it again, `back` comes before that.
        """
        self._owner = this_process()
        self.endpoint = endpoint
        self.remedy, self.back = remedy, ""
        self.arithmetic = True
        self.time = RealTime()
        self.recorder = Recorder()
        """Records the decisions of the driver's state machines while a trace is taken."""
        self._devices = tuple(devices)
        self._gone: dict[str, str] = {}
        """Lost worker -> reason."""
        self._in_flight = in_flight
        self._deadline_s = deadline_s
        self._deadlines = Deadlines(f"{endpoint.name} deadlines")
        self._turns = Turns()
        self._lock = threading.Lock()
        self._loading: dict[str, Loading] = {}
        self._plans: dict[str, LoadedPlan] = {}
        self._handlers: dict[str, PlanHandler] = {}
        self._reports = Reports(self.tell, endpoint.settle)
        self._local: dict[str, LocalWorker] = {}
        self._told: set[str] = set()
        """The warnings of plans."""
        self._residents: Residents[LoadedPlan] = Residents(self.unload)
        self.max_programs = MAX_PROGRAMS
        """The number of dataflow plans that stay loaded; calls in flight may keep more."""
        self.held = Holdings(endpoint, deadline_s)
        """The values that stay on the workers."""
        self._captured = Captured(self.held, lambda worker: worker in self._local)
        self.before_loading: Callable[[], None] = lambda: None
        """Called before a plan is loaded."""
        self._closed = False

    @property
    def deadline_s(self) -> float:
        """Bounds each wait of a step."""
        return self._deadline_s

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the current workers."""
        return self._devices

    @devices.setter
    def devices(self, devices: Sequence[Device]) -> None:
        there = {d.worker for d in devices}
        with self._lock:
            left = {d.worker: "it left the cluster" for d in self._devices if d.worker not in there}
            self._gone = {w: r for w, r in (left | self._gone).items() if w not in there}
            self._devices = tuple(devices)

    def check_owner(self) -> None:
        """Raises ClusterError in a fork of the process that made this session."""
        check_owner(self._owner)

    def attach(self, worker: LocalWorker) -> None:
        """Register a worker in this process, so that `call` may run its plans directly."""
        with self._lock:
            self._local[worker.name] = worker

    def load(
        self, plan: Plan, meanwhile: Callable[[], None] = lambda: None, rehearsing: Collection[str] = ()
    ) -> LoadedPlan:
        """Make the workers of a plan compile their part, and the `rehearsing` run it once. Calls `meanwhile`, waits.

        Raises PlacementError for a device that does not exist, WorkerError if a worker cannot load its
        part, WorkerLostError if one dies meanwhile, DeadlineError if they take too long.
        """
        self.check_owner()
        self.before_loading()
        try:
            for program in plan.programs:
                find_device(program.device, self.devices, f"plan {plan.name!r}")
        except PlacementError as error:
            raise self.explained(error, repr(plan.name)) from None
        if not self._local:
            shipping.warn_of_copies(plan, self._told)
        plan_id = f"{self.endpoint.name}-{uuid.uuid4().hex[:16]}"
        workers = tuple(dict.fromkeys(worker_of(p.device) for p in plan.programs))
        loading = Loading(plan, workers)
        with self._lock:
            self._check_open()
            self._loading[plan_id] = loading
        self._residents.open()
        if plan.training is None:
            self._residents.make_room(self._dataflow_plans(), self.max_programs - 1)
        try:
            with own_calls.offered(plan_id, plan):
                captures = shipping.send(self.endpoint, plan_id, loading, self._captured, self, rehearsing)
                meanwhile()
                if workers:
                    loading.wait()  # no deadline: the wait itself is bounded by LOAD_DEADLINE_S
            only = self._local.get(workers[0]) if len(plan.programs) == 1 else None
            local = only.local_step(plan_id) if only is not None else None
            handle = loaded(plan_id, plan, workers, self._in_flight, local, captures)
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
        if plan.training is None:
            every_s = min(self._deadline_s / 4, CHECK_S)
            self._deadlines.watch(handle, lambda: self._ask_for_overdue(handle), every_s)
        return handle

    def reload(self, handle: LoadedPlan) -> LoadedPlan:
        """Load the plan of a handle again that was unloaded or lost a worker, if all workers it needs are present.

        Otherwise returns the handle unchanged; a call of it raises the reason why it stopped.
        """
        if not handle.steps.stopped:
            return handle
        there = {d.name for d in self.devices}
        lost = handle.plan_id in self._plans  # else it was unloaded, and no worker was lost
        if lost and any(p.device not in there for p in handle.plan.programs):
            return handle
        self.unload(handle)
        self._residents.loads_again(handle)
        try:
            return self.load(handle.plan)
        except WorkerLostError:  # the worker has just left
            if lost:
                return handle
            raise

    def explained(self, error: PlacementError, what: str) -> FlowmlError:
        """The error to raise for `error`. If `what` cannot be placed because the cluster is closed, or workers were
        lost, it says so."""
        if self._closed:
            return cluster_closed()
        if not (gone := self._missing()) or (error.worker is not None and error.worker not in gone):
            return error
        gone = gone if error.worker is None else {error.worker: gone[error.worker]}
        left = f"without it {error}" if self.devices else "no worker is left to run it"
        return missing_workers(gone, f"{what} cannot be placed: {left}", self.back + self.remedy)

    def check_workers(self, what: str) -> None:
        """Raises WorkerLostError if all workers are lost, ClusterError if there are none or the cluster is closed.

        `what` says what cannot be done without workers, as in "no link can be measured".
        """
        with self._lock:
            self._check_open()
        if self.devices:
            return
        if gone := self._missing():
            raise missing_workers(gone, what, self.back + self.remedy)
        raise ClusterError(f"the cluster has no workers, so {what}; {self.remedy}")

    @property
    def lost(self) -> tuple[str, ...]:
        """The workers that were lost and are not back."""
        return tuple(self._missing())

    def lost_elsewhere(self, gone: Mapping[str, str]) -> None:
        """Workers that are lost, or have left, perhaps before this driver came."""
        with self._lock:
            self._gone |= {w: r for w, r in gone.items() if w not in self._gone}

    def _missing(self) -> dict[str, str]:
        """Lost workers that are not back, with the reasons."""
        there = {d.worker for d in self.devices}
        with self._lock:
            return {w: reason for w, reason in self._gone.items() if w not in there}

    def submit(self, handle: LoadedPlan, inputs: Sequence[Any], *, copy: bool = True) -> Future[list[Any]]:
        """Start one step with the plan's flat inputs. Waits while too many steps are in flight.

        With `copy` the caller may overwrite NumPy inputs as soon as this returns. Raises at once if the plan
        lost a worker; the future raises every later error.
        """
        start = partial(self._start, handle, inputs, copy=copy)
        return self._turns.take(start) if handle.plan.ordered else start()

    def _start(self, handle: LoadedPlan, inputs: Sequence[Any], *, copy: bool) -> Future[list[Any]]:
        self.check_owner()
        buffers = handle.prepare(inputs, copy=copy)
        return self._begin(handle, buffers, *staying.outputs(handle, buffers, self.held, self.devices))

    def _begin(
        self, handle: LoadedPlan, buffers: Sequence[Any], kept: Sequence[Remote], first: int
    ) -> Future[list[Any]]:
        finish = partial(staying.results, handle, buffers, kept, self.held, self.devices)
        future = handle.steps.future(finish)
        if not handle.waits:
            future.at_once = partial(finish, ())
        step: int | None = None
        try:
            with handle.order:  # numbered and fed under one lock: a device refuses a step older than its last one
                step = handle.steps.begin(future)
                if kept:
                    kept[0].made_by(future)
                self._feed(handle, step, buffers, first)
            if handle.overwrites:
                handle.donate(future.name, buffers, future)
            return future
        except BaseException as error:  # a Ctrl-C comes at any line; the future finds what had begun by then
            begun = handle.steps.step_of(future)
            lost = isinstance(error, WorkerLostError)
            if begun is None:
                if lost and step is not None:  # the loss was reported meanwhile, and fails the step with the advice
                    return future
                raise
            told = worker_lost(handle.plan, begun, error.worker or "", str(error), self.remedy) if lost else error
            self._fail_step(handle, begun, told, one_line(error))
            if lost or isinstance(error, DeadlineError):
                return future
            raise

    def call(self, handle: LoadedPlan, inputs: Sequence[Any]) -> list[Any]:
        """Run one step and return its flat results. On a worker in this process it does not wait for them, like jit."""
        local = handle.local
        if local is None or handle.plan.ordered or len(handle.steps):
            return self._submitted(handle, inputs)
        if handle.kinds or handle.brought or Remote in set(map(type, inputs)):
            if not local.keeps or self.held.asked or any(len(p.steps) for p in self._dataflow_plans()):
                return self._submitted(handle, inputs)  # messages that are under way come first
            return self._call_kept(handle, local, inputs)
        buffers = handle.prepare(inputs, copy=False)
        return handle.restore(own_thread.run(handle, local, buffers, self.remedy), buffers)

    def _submitted(self, handle: LoadedPlan, inputs: Sequence[Any]) -> list[Any]:
        if not handle.waits:  # everything stays: the call need not wait, and later calls may start
            return self.submit(handle, inputs).as_argument()
        # no deadline: the worker bounds each wait of the step, and a computation may take any time
        return self.submit(handle, inputs, copy=False).result()

    def _call_kept(self, handle: LoadedPlan, local: LocalStep, inputs: Sequence[Any]) -> list[Any]:
        """Run a step that takes or leaves values on its worker in this process."""
        self.check_owner()
        buffers = handle.prepare(inputs, copy=not handle.waits)
        kept, first = staying.outputs(handle, buffers, self.held, self.devices)
        fetched = own_thread.run_kept(handle, local, buffers, kept, first, self.remedy)
        if fetched is None:  # it has to wait for another call
            return self._begin(handle, buffers, kept, first).as_argument()
        return staying.results(handle, buffers, kept, self.held, self.devices, fetched)

    def register(self, plan_id: str, handler: PlanHandler) -> None:
        """Pass every later message of this plan, and every lost peer, to `handler`."""
        with self._lock:
            self._handlers[plan_id] = handler

    def unregister(self, plan_id: str) -> None:
        """Stop calling the handler of `plan_id`."""
        with self._lock:
            self._handlers.pop(plan_id, None)
        self._reports.forget(plan_id)

    def tell(self, worker: str, message: wire.Wire) -> None:
        """Send to a worker. Does nothing if the worker is lost, because `on_lost` reports that."""
        self._broadcast((worker,), message)

    def unload(self, handle: LoadedPlan) -> None:
        """Free the plan on its workers. Steps in flight fail."""
        if is_foreign(self._owner):  # the plan belongs to the parent process
            return
        with self._lock:
            self._handlers.pop(handle.plan_id, None)
            if self._plans.pop(handle.plan_id, None) is None:
                return
        self._deadlines.forget(handle)
        self._reports.forget(handle.plan_id)
        handle.steps.stop(unloaded)
        handle.local = None  # it keeps the executable
        self._broadcast(handle.workers, wire.Unload(plan_id=handle.plan_id))
        handle.captures = {}

    def release(self, handle: LoadedPlan) -> None:
        """Unload the plan of a deleted owner when no call is in flight. Finalizers may call this: it never waits."""
        self._residents.release(handle)

    def _dataflow_plans(self) -> list[LoadedPlan]:
        with self._lock:
            return [p for p in self._plans.values() if p.plan.training is None]

    def close(self) -> None:
        """Fail all steps in flight and unload every plan. Idempotent."""
        if is_foreign(self._owner):
            return
        with self._lock:
            self._closed = True
            plans, loads = list(self._plans.values()), list(self._loading.values())
        for loading in loads:
            loading.fail(cluster_closed())
        for handle in plans:
            handle.steps.stop(cluster_closed)
            self.unload(handle)
        self._deadlines.close(TELL_S)
        self._residents.close()
        self.held.close()

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None:
        """Process one message. The endpoint calls this on its receiving threads."""
        if isinstance(message, wire.Recalled | wire.Written | wire.FileRead):
            self.held.on_message(message, arrays)
            return
        if isinstance(message, wire.Unreachable) and not self._reports.counts(peer, message):
            return
        plan_id = getattr(message, "plan_id", "")
        handler = self._handlers.get(plan_id)
        if handler is not None:
            if isinstance(message, wire.Unreachable):
                handler.on_lost(message.peer, unreachable(message))
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
        """A peer died or stopped answering: fail everything that depends on it at once."""
        self.held.on_lost(peer, reason)
        with self._lock:
            if peer in self._gone or any(d.worker == peer for d in self._devices):
                self._gone[peer] = reason
            for loading in self._loading.values():
                if peer in loading.workers:
                    text = f"{peer} was lost while it compiled plan {loading.plan.name!r}: {reason}; {self.remedy}"
                    loading.fail(WorkerLostError(text, worker=peer))
            plans, handlers = [p for p in self._plans.values() if peer in p.workers], list(self._handlers.values())
        for handle in plans:
            self._without(handle, peer, reason)
        for handler in handlers:
            handler.on_lost(peer, reason)

    def _feed(self, handle: LoadedPlan, step: int, buffers: Sequence[Array], keep: int) -> None:
        """Send a step's inputs. The caller holds `handle.order`."""
        for port in handle.ports:
            value, arrays = port.feed(handle.plan_id, step, buffers, keep)
            try:
                self.endpoint.send(port.worker, value, arrays, self._deadline_s)
            except TimeoutError:
                raise DeadlineError(
                    f"step {step} of plan {handle.plan.name!r}: {port.worker} did not take its input for "
                    f"{self._deadline_s:g} s; see whether it is stuck, or allow a longer deadline: deadline_s= where "
                    "the cluster is made",
                    worker=port.worker,
                    step=step,
                    node="feed",
                ) from None

    def _ask_for_overdue(self, handle: LoadedPlan) -> None:
        """A computation may take any time, but the report of its end may be lost: ask where an output is missing."""
        for step, slots in handle.steps.overdue(self._deadline_s):
            for device in dict.fromkeys(handle.sources[s] for s in slots):
                self.tell(worker_of(device), wire.StepCheck(plan_id=handle.plan_id, step=step, device=device))

    def _on_plan_message(self, handle: LoadedPlan, message: wire.Wire, arrays: Sequence[Array]) -> None:
        if isinstance(message, wire.Value):
            handle.steps.collect(message.step, message.slots, arrays)
        elif isinstance(message, wire.StepFailed):
            self._fail_step(handle, message.step, step_error(handle.plan, message, self.remedy), message.error)
        elif isinstance(message, wire.Failed):
            self._stop(handle, lambda _, plan=handle.plan: load_failed(plan, message), message.error)
        elif isinstance(message, wire.Unreachable):
            self._without(handle, message.peer, unreachable(message))

    def _fail_step(self, handle: LoadedPlan, step: int, error: BaseException, reason: str) -> None:
        if handle.steps.fail(step, error):
            self._cancel(handle, step, error, reason)

    def _without(self, handle: LoadedPlan, peer: str, reason: str) -> None:
        """A worker of the plan is lost. No step can begin, and those that miss an output of the worker fail.

        The others may have all of its values already. The workers that still need one report their steps as failed.
        """
        slots = {slot for slot, device in handle.sources.items() if worker_of(device) == peer}
        error = partial(worker_lost, handle.plan, worker=peer, reason=reason, remedy=self.remedy)
        self._stop(handle, error, reason, slots)

    def _stop(
        self,
        handle: LoadedPlan,
        error: Callable[[int], FlowmlError],
        reason: str,
        slots: Collection[int] | None = None,
    ) -> None:
        for step in handle.steps.stop(error, slots):
            self._cancel(handle, step, error(step), reason)

    def _cancel(self, handle: LoadedPlan, step: int, error: BaseException, reason: str) -> None:
        """Tell the workers that this step is no longer needed, so that none waits for its values. The steps that read
        its outputs fail for the same reason."""
        self._broadcast(handle.workers, step_cancelled(handle.plan_id, step, self.endpoint.name, error, reason))

    def _broadcast(self, workers: Sequence[str], message: wire.Wire) -> None:
        for worker in workers:
            try:
                self.endpoint.send(worker, message, (), TELL_S)
            except (WorkerLostError, TimeoutError):
                continue  # a worker that takes no message is lost soon; its own deadlines end the step without it

    def _check_open(self) -> None:
        if self._closed:
            raise cluster_closed()
