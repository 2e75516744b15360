"""Tracks the steps of one plan that are in flight in the driver: their missing outputs, futures and number.

A step is complete when all output slots have been fetched from the devices that hold them. The number of steps in
flight is bounded: `begin` waits for room, so that a caller who submits faster than the workers run is slowed down
instead of filling memory.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from flowml.errors import ClusterError
from flowml_runtime.execution.future import HEEDS_SIGNALS_S, Future
from flowml_runtime.execution.programs import Array

_uses = itertools.count()
"""Orders the uses of all plans of this process."""


class UnloadedError(ClusterError):
    """The plan of a step was unloaded before the step began. Load the plan again and retry."""


def unloaded(step: int) -> UnloadedError:
    return UnloadedError("the plan was unloaded from its workers; load it again", step=step)


class _InFlight:
    __slots__ = ("future", "heard", "missing", "values")

    def __init__(self, future: Future[Any], slots: int) -> None:
        self.future = future
        self.missing = slots
        self.values: list[Any] = [None] * slots
        self.heard = time.monotonic()
        """When something was last heard of the step, or asked."""


class Steps:
    """The steps of one plan in flight. Its outputs are the fetch slots 0..`slots`-1. Safe to use from any thread."""

    def __init__(self, name: str, slots: int, limit: int) -> None:
        self._name = name
        self._slots = slots
        self._limit = limit
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting = 0
        """The number of callers that wait for room."""
        self._flying: dict[int, _InFlight] = {}
        self._next = 0
        self._stopped: Callable[[int], BaseException] | None = None
        self._on_idle: list[Callable[[], None]] = []
        self.last_use = next(_uses)
        """Orders plans by their last use: a later use has a larger number."""

    def use(self) -> None:
        """Record that the plan is used now."""
        self.last_use = next(_uses)

    def future(self, finish: Callable[[list[Array]], Any]) -> Future[Any]:
        """The future of a step that has not begun. It is made first, so that an interrupted `begin` can be undone."""
        return Future(f"a step of {self._name}", finish)

    def begin(self, future: Future[Any]) -> int:
        """Open the next step when there is room. Raises the reason if the plan can no longer run."""
        with self._lock:
            while len(self._flying) >= self._limit and self._stopped is None:
                self._waiting += 1
                try:
                    self._room.wait(HEEDS_SIGNALS_S)  # the loop needs no deadline: every step in flight has one
                finally:
                    self._waiting -= 1
            step = self._next
            if self._stopped is not None:
                raise self._stopped(step)
            self._next = step + 1
            self.use()
            future.name = f"step {step} of {self._name}"
            if self._slots:
                self._flying[step] = _InFlight(future, self._slots)
        if not self._slots:
            future.complete([])
        return step

    def step_of(self, future: Future[Any]) -> int | None:
        """The step in flight whose result this is."""
        with self._lock:
            return next((step for step, flying in self._flying.items() if flying.future is future), None)

    def overdue(self, deadline_s: float) -> list[tuple[int, list[int]]]:
        """The steps in flight without news for `deadline_s`, and their missing slots. Each now counts as asked for."""
        now = time.monotonic()
        with self._lock:
            late = [(step, flying) for step, flying in self._flying.items() if now - flying.heard >= deadline_s]
            for _, flying in late:
                flying.heard = now
            return [(step, [s for s, v in enumerate(f.values) if v is None]) for step, f in late]

    def skip(self) -> int:
        """Take the number of a step that is not tracked here. Raises like `begin`."""
        with self._lock:
            if self._stopped is not None:
                raise self._stopped(self._next)
            self._next += 1
            self.use()
            return self._next - 1

    @property
    def stopped(self) -> bool:
        """Whether no step can begin any more."""
        return self._stopped is not None

    def collect(self, step: int, slots: Sequence[int], arrays: Sequence[Array]) -> None:
        """Store fetched outputs. Outputs of a step that has ended are ignored."""
        with self._lock:
            flying = self._flying.get(step)
            if flying is None:
                return
            for slot, array in zip(slots, arrays, strict=True):
                flying.values[slot] = array
            flying.missing -= len(slots)
            flying.heard = time.monotonic()
            if flying.missing > 0:
                return
            self._end(step)
        flying.future.complete(flying.values)

    def fail(self, step: int, error: BaseException) -> bool:
        """End a step with an error. Returns False if it had already ended."""
        with self._lock:
            flying = self._flying.get(step)
            if flying is None:
                return False
            self._end(step)
        return flying.future.complete(None, error)

    def stop(self, error: Callable[[int], BaseException], slots: Collection[int] | None = None) -> Iterable[int]:
        """Fail the steps in flight, and every later `begin`, with `error(step)`. Returns the failed steps.

        If `slots` is given, only steps that miss one of these outputs fail; the others may still end by themselves. The
        first error counts, also for steps that a later call fails.
        """
        with self._lock:
            reason = self._stopped = self._stopped or error
            self._room.notify_all()
            steps = [s for s, f in self._flying.items() if slots is None or any(f.values[k] is None for k in slots)]
        return [s for s in steps if self.fail(s, reason(s))]

    def retire(self, error: Callable[[int], BaseException]) -> bool:
        """Make `begin` raise `error(step)` from now on. If steps are in flight, does nothing and returns False."""
        with self._lock:
            if self._flying:
                return False
            self._stopped = self._stopped or error
            return True

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call `call()` when no step is in flight. It may run on any thread and must not wait."""
        with self._lock:
            if self._flying:
                self._on_idle.append(call)
                return
        call()

    def _end(self, step: int) -> None:
        """Remove a step. The caller holds the lock."""
        del self._flying[step]
        if self._on_idle and not self._flying:
            for call in self._on_idle:
                call()
            self._on_idle.clear()
        if self._waiting:
            self._room.notify_all()

    def __len__(self) -> int:
        return len(self._flying)
