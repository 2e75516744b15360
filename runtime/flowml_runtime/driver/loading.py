"""Loads a plan: splits it into messages for each worker, and waits until all workers have compiled their part.

LoadPlan    the worker's programs, with all small constants and executables
PlanPiece   large constants and executables, each only to the workers that use it, one piece at a time, so that
            neither side holds a second copy of a large array and no message exceeds the size limit
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from flowml.devices import worker_of
from flowml.errors import DeadlineError, FlowmlError
from flowml.instructions import Run
from flowml.plan import ArraySpec, Plan
from flowml_runtime import wire
from flowml_runtime.driver.progress import shown
from flowml_runtime.execution.programs import constant_key, executable_key, store_tasks

LOAD_DEADLINE_S = 1800.0
"""How long all workers together may take to compile a plan."""

PART_BYTES = 2**20
"""A constant or executable from this size on is sent in pieces of its own."""

PIECE_BYTES = 8 * 2**20


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


def messages(
    plan_id: str, plan: Plan, worker: str, peers: tuple[str, ...], deadline_s: float
) -> Iterator[tuple[wire.LoadPlan, np.ndarray]]:
    """The messages that make `worker` load its part of the plan, each with its array of bytes."""
    part, large = _part(plan, worker)
    whole = {"": part.encode(), **large}
    pieces = [(key, start) for key, data in whole.items() for start in range(0, len(data), PIECE_BYTES)]
    for number, (key, start) in enumerate(pieces, 1):
        data = np.frombuffer(whole[key], np.uint8)
        piece = data[start : start + PIECE_BYTES]
        message = wire.LoadPlan(
            plan_id=plan_id,
            peers=peers,
            deadline_s=deadline_s,
            part=key,
            start=start,
            nbytes=data.nbytes,
            last=number == len(pieces),
            specs=(ArraySpec(piece.shape, "uint8"),),
        )
        yield message, piece


def _part(plan: Plan, worker: str) -> tuple[Plan, dict[str, bytes]]:
    """This worker's part of the plan: a plan with the small constants and executables, and the large ones by key.

    It leaves out other workers' executables and constants, and the graph for drawing. Constants keep their numbers.
    """
    mine = [p for p in plan.programs if worker_of(p.device) == worker]
    tasks = {i.task for p in mine for i in p.instructions if isinstance(i, Run)}
    tasks.update(t for p in mine for t in store_tasks(plan, p.device))
    needed = {plan.tasks[t].executable for t in tasks}
    executables = {k: v for k, v in plan.executables.items() if k in needed}
    used = {index for p in mine for _, index in p.constants}
    large = {executable_key(k): v for k, v in executables.items() if len(v) >= PART_BYTES}
    large |= {constant_key(i): plan.constants[i].data for i in sorted(used) if _is_large(plan, i)}
    constants = tuple(
        c if i in used and not _is_large(plan, i) else msgspec.structs.replace(c, data=b"")
        for i, c in enumerate(plan.constants)
    )
    small = {k: v for k, v in executables.items() if len(v) < PART_BYTES}
    part = msgspec.structs.replace(plan, executables=small, constants=constants, nodes=(), choices=(), notes=())
    return part, large


def _is_large(plan: Plan, constant: int) -> bool:
    return len(plan.constants[constant].data) >= PART_BYTES
