"""Loads a plan: splits it into messages for each worker, and waits until all workers have compiled their part.

The plan itself has the worker's programs, with all small constants and executables. Large executables follow, each only
to the workers that use it, one piece at a time, so that no message exceeds the size limit. Large constants are on the
devices before; see `captures`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import msgspec
import numpy as np

from flowml.callers import warn
from flowml.devices import Device, worker_of
from flowml.errors import DeadlineError, FlowmlError, WorkerLostError
from flowml.instructions import Run
from flowml.lowering.pickling import copied_state
from flowml.plan import ArraySpec, Plan
from flowml_runtime import wire
from flowml_runtime.driver.captures import Captured, Captures
from flowml_runtime.driver.progress import shown
from flowml_runtime.execution.programs import executable_key, store_tasks
from flowml_runtime.transport.endpoint import Sender

LOAD_DEADLINE_S = 1800.0
"""How long all workers together may take to compile a plan."""

PART_BYTES = 2**20
"""An executable from this size on is sent in pieces of its own."""

PIECE_BYTES = 8 * 2**20

AT_ONCE = 8
"""The workers whose messages are encoded before the first of them is sent."""


class Loading:
    """The state of a load: the workers that have not answered yet, and the first error."""

    def __init__(self, plan: Plan, workers: Sequence[str]) -> None:
        self.plan = plan
        self.workers = tuple(workers)
        self.missing = set(workers)
        self.error: FlowmlError | None = None
        self._over = threading.Event()

    def loaded(self, worker: str) -> None:
        self.missing.discard(worker)
        if not self.missing:
            self._over.set()

    def fail(self, error: FlowmlError) -> None:
        self.error = self.error or error
        self._over.set()

    def wait(self) -> None:
        """Wait for all workers. Shows a line if that takes longer than a second and stderr is a terminal.

        Raises the first error, or DeadlineError after LOAD_DEADLINE_S.
        """
        with shown(self._progress):
            if not self._over.wait(LOAD_DEADLINE_S):
                waiting = ", ".join(sorted(self.missing))
                raise DeadlineError(f"{waiting} did not compile plan {self.plan.name!r} within {LOAD_DEADLINE_S:g} s")
        if self.error is not None:
            raise self.error

    def _progress(self) -> str:
        ready = len(self.workers) - len(self.missing)
        return f"compiling {self.plan.name}, {ready} of {len(self.workers)} workers ready"


class Sending(Protocol):
    """The part of a session that sends a plan."""

    remedy: str

    @property
    def deadline_s(self) -> float: ...
    @property
    def devices(self) -> tuple[Device, ...]: ...


def send(
    endpoint: Sender,
    plan_id: str,
    loading: Loading,
    captured: Captured,
    session: Sending,
    rehearsing: Collection[str] = (),
) -> Captures:
    """Send a plan to its workers, which run it once if they are `rehearsing`. Returns the arrays that it closes over,
    which are there before it.

    Raises WorkerLostError for a worker that is lost meanwhile, and what `Captured.of` raises.
    """
    plan, workers = loading.plan, loading.workers
    try:
        captures = captured.of(plan, session.devices)
        for start in range(0, len(workers), AT_ONCE):  # a worker that compiles takes the cores from what encodes
            some = workers[start : start + AT_ONCE]
            pieces = {w: list(messages(plan_id, plan, w, workers, session.deadline_s, captures)) for w in some}
            for worker in some:
                for message, data in pieces[worker]:
                    message = msgspec.structs.replace(message, rehearse=worker in rehearsing)
                    endpoint.send(worker, message, [data], LOAD_DEADLINE_S)
    except WorkerLostError as lost:
        text = f"{lost.worker} was lost before it had plan {plan.name!r}: {lost}; {session.remedy}"
        raise WorkerLostError(text, worker=lost.worker) from None
    return captures


def warn_of_copies(plan: Plan, told: set[str]) -> None:
    """Warn, once for a program, of effects that change objects of this process: other processes change copies of them.

    `told` are the texts of earlier warnings.
    """
    calls = [call for task in plan.tasks if task.own.call is not None for call in task.own.call.calls if not call.pure]
    for call in calls:
        state = copied_state(call.function)
        if state:
            text = (
                f"{plan.name}: what {call.construct} changes stays on a worker of another process, which has a copy of "
                f"{state}; return the value from the function, or use fm.Cluster.threads"
            )
            if text not in told:
                told.add(text)
                warn(text)
            return


def messages(
    plan_id: str, plan: Plan, worker: str, peers: tuple[str, ...], deadline_s: float, captures: Captures
) -> Iterator[tuple[wire.LoadPlan, np.ndarray]]:
    """The messages that make `worker` load its part of the plan, each with its array of bytes."""
    part, large = _part(plan, worker)
    held = tuple((d, i, remote.number) for (d, i), remote in captures.items() if worker_of(d) == worker)
    whole = {"": part.encode(), **large}
    pieces = [(key, start) for key, data in whole.items() for start in range(0, len(data), PIECE_BYTES)]
    for number, (key, start) in enumerate(pieces, 1):
        data = np.frombuffer(whole[key], np.uint8)
        piece = data[start : start + PIECE_BYTES]
        message = wire.LoadPlan(
            plan_id=plan_id,
            peers=peers,
            deadline_s=deadline_s,
            held=held if number == 1 else (),
            part=key,
            start=start,
            nbytes=data.nbytes,
            last=number == len(pieces),
            specs=(ArraySpec(piece.shape, "uint8"),),
        )
        yield message, piece


def _part(plan: Plan, worker: str) -> tuple[Plan, dict[str, bytes]]:
    """This worker's part of the plan: a plan with the constants and small executables, and the large ones by key.

    It leaves out other workers' executables and constants, and the graph for drawing. Constants keep their numbers.
    """
    mine = [p for p in plan.programs if worker_of(p.device) == worker]
    tasks = {i.task for p in mine for i in p.instructions if isinstance(i, Run)}
    tasks.update(t for p in mine for t in store_tasks(plan, p.device))
    needed = {plan.tasks[t].executable for t in tasks}
    executables = {k: v for k, v in plan.executables.items() if k in needed}
    used = {index for p in mine for _, index in p.constants}
    large = {executable_key(k): v for k, v in executables.items() if len(v) >= PART_BYTES}
    constants = tuple(c if i in used else msgspec.structs.replace(c, data=b"") for i, c in enumerate(plan.constants))
    small = {k: v for k, v in executables.items() if len(v) < PART_BYTES}
    part = msgspec.structs.replace(plan, executables=small, constants=constants, nodes=(), choices=(), notes=())
    return part, large
