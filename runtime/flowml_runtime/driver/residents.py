"""Decides which plans stay on the workers. It unloads plans of deleted owners and the least recently used plans.

A plan that was unloaded to make room is loaded again when it is called again. The driver keeps its executables, so that
only the workers compile again. It keeps as many unloaded plans as loaded ones. The owners of older ones forget them and
compile them from the start if they are called again. Calls in flight always finish first.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Generic, Protocol, TypeVar

from flowml_runtime import service
from flowml_runtime.driver.steps import Steps, unloaded

MAX_PROGRAMS = 128
"""The default number of dataflow programs that one driver keeps loaded."""

CLOSE_S = 5.0
"""How long `close` waits for an unload message that is being sent."""


class Resident(Protocol):
    """A loaded plan."""

    @property
    def steps(self) -> Steps: ...
    def forget(self) -> None:
        """Make the owner forget the plan."""
        ...


T = TypeVar("T", bound=Resident)


class Residents(Generic[T]):
    """Unloads plans by `unload(plan)`. Safe to use from any thread."""

    def __init__(self, unload: Callable[[T], None]) -> None:
        self._unload = unload
        self._released: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._unloaded: deque[weakref.ref[T]] = deque()
        """Plans that were unloaded to make room, in this order."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start to process `release`. Called before the first plan is loaded."""
        with self._lock:
            if self._thread is None:
                self._thread = service.start("flowml-unload", self._free, self._free_on)

    def release(self, plan: T) -> None:
        """Unload the plan of a deleted owner when no call is in flight. For finalizers: takes no lock, never waits."""
        self._released.put(plan)

    def make_room(self, plans: Iterable[T], most: int) -> None:
        """Unload the least recently used plans until at most `most` remain. Plans with calls in flight are kept."""
        oldest = sorted(plans, key=lambda p: p.steps.last_use)
        excess = len(oldest) - most
        for plan in oldest:
            if excess <= 0:
                break
            if plan.steps.retire(unloaded):
                self._unload(plan)
                self._unloaded.append(weakref.ref(plan))
                excess -= 1
        while len(self._unloaded) > most + 1:
            plan = self._unloaded.popleft()()
            if plan is not None:
                plan.forget()

    def loads_again(self, plan: T) -> None:
        """Do not make the owner of an unloaded plan forget it: it is being loaded again."""
        with suppress(ValueError, IndexError):  # it is not there, or another thread makes room at the same time
            self._unloaded.remove(weakref.ref(plan))

    def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._released.put(None)
            if thread is not threading.current_thread():
                thread.join(CLOSE_S)

    def _free(self) -> None:
        # no deadline: the thread sleeps until it has work or is closed
        while (plan := self._released.get()) is not None:
            with service.going_on("a plan could not be unloaded"):
                if plan.steps.retire(unloaded):
                    self._unload(plan)
                else:
                    plan.steps.when_idle(partial(self._released.put, plan))
            del plan

    def _free_on(self, reason: str) -> None:
        """The thread has failed: start another one, unless it was told to end."""
        with self._lock:
            if self._thread is threading.current_thread():
                self._thread = service.start("flowml-unload", self._free, self._free_on)
