"""The driver's account of the steps of one plan that are in flight: what is missing, who waits, how many.

A step is complete when every output slot has been fetched, from whichever devices hold them. The number in
flight is bounded: `begin` waits for room, so that a caller who submits faster than the workers run is
slowed down instead of filling memory.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flowml.errors import ClusterError
from flowml_runtime.execution.future import HEEDS_SIGNALS_S, Future
from flowml_runtime.execution.programs import Array

_uses = itertools.count()
"""Orders the uses of all plans of this process."""


class UnloadedError(ClusterError):
    """A step that has not begun, of a plan that is not on the workers any more: try again once it is loaded again."""


def unloaded(step: int) -> UnloadedError:
    return UnloadedError("the plan was unloaded from its workers; load it again", step=step)


class _InFlight:
    __slots__ = ("future", "missing", "values")

    def __init__(self, future: Future[Any], slots: int) -> None:
        self.future = future
        self.missing = slots
        self.values: list[Any] = [None] * slots


class Steps:
    """Steps in flight of one plan, whose outputs are the fetch slots 0..`slots`-1. Safe to use from any thread."""

    def __init__(self, name: str, slots: int, limit: int) -> None:
        self._name = name
        self._slots = slots
        self._limit = limit
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting = 0
        """Callers who wait for room."""
        self._flying: dict[int, _InFlight] = {}
        self._next = 0
        self._stopped: Callable[[int], BaseException] | None = None
        self._on_idle: list[Callable[[], None]] = []
        self.last_use = next(_uses)
        """Later for the plan that was used later."""

    def use(self) -> None:
        """Note that the plan is used now."""
        self.last_use = next(_uses)

    def begin(self, finish: Callable[[list[Array]], Any]) -> tuple[int, Future[Any]]:
        """Open the next step, once there is room. Raises the reason if the plan cannot run any more."""
        with self._lock:
            while len(self._flying) >= self._limit and self._stopped is None:
                self._waiting += 1
                try:
                    self._room.wait(HEEDS_SIGNALS_S)  # again and again: every step in flight has its deadlines
                finally:
                    self._waiting -= 1
            step = self._next
            if self._stopped is not None:
                raise self._stopped(step)
            self._next = step + 1
            self.use()
            future: Future[Any] = Future(f"step {step} of {self._name}", finish)
            if self._slots:
                self._flying[step] = _InFlight(future, self._slots)
        if not self._slots:
            future.complete([])
        return step, future

    def skip(self) -> int:
        """Take the number of a step that runs outside this account. Raises like `begin`."""
        with self._lock:
            if self._stopped is not None:
                raise self._stopped(self._next)
            self._next += 1
            self.use()
            return self._next - 1

    @property
    def stopped(self) -> bool:
        """True once no step can begin any more."""
        return self._stopped is not None

    def collect(self, step: int, slots: Sequence[int], arrays: Sequence[Array]) -> None:
        """Take in fetched outputs. Those of a step that is over are ignored."""
        with self._lock:
            flying = self._flying.get(step)
            if flying is None:
                return
            for slot, array in zip(slots, arrays, strict=True):
                flying.values[slot] = array
            flying.missing -= len(slots)
            if flying.missing > 0:
                return
            self._end(step)
        flying.future.complete(flying.values)

    def fail(self, step: int, error: BaseException) -> bool:
        """End a step with an error; False if it was over already."""
        with self._lock:
            flying = self._flying.get(step)
            if flying is None:
                return False
            self._end(step)
        return flying.future.complete(None, error)

    def stop(self, error: Callable[[int], BaseException]) -> Iterable[int]:
        """Fail every step in flight with `error(step)`, and every later `begin`. Gives the steps that were failed."""
        with self._lock:
            if self._stopped is None:
                self._stopped = error
                self._room.notify_all()
            steps = list(self._flying)
        return [s for s in steps if self.fail(s, error(s))]

    def retire(self, error: Callable[[int], BaseException]) -> bool:
        """Let no step begin any more: `begin` raises `error(step)`. False, and nothing done, if some are in flight."""
        with self._lock:
            if self._flying:
                return False
            self._stopped = self._stopped or error
            return True

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call `call()` once no step is in flight, on any thread: it must not wait."""
        with self._lock:
            if self._flying:
                self._on_idle.append(call)
                return
        call()

    def _end(self, step: int) -> None:
        """The lock is held."""
        del self._flying[step]
        if self._on_idle and not self._flying:
            for call in self._on_idle:
                call()
            self._on_idle.clear()
        if self._waiting:
            self._room.notify_all()

    def __len__(self) -> int:
        return len(self._flying)
