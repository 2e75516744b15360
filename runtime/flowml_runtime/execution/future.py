"""Implements futures, the handles of submitted calls.

A `Future` is completed once, by the thread that receives the last result or the first fault. `finish`, which converts
raw results to the caller's result, runs in the first thread that asks for the result, so that it does not delay the
receiving threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from flowml.errors import DeadlineError
from flowml_runtime.execution.forks import check_owner, this_process

_log = logging.getLogger("flowml")

HEEDS_SIGNALS_S = 1.0
"""Waits are split into pieces of this length. A signal that arrives just before Python sleeps does not wake it, so that
Ctrl-C would have no effect until the end of the wait."""

T = TypeVar("T")
U = TypeVar("U")


def wait_heeding_signals(event: threading.Event) -> None:
    """Wait for an event on the main thread, and handle signals meanwhile."""
    while not event.wait(HEEDS_SIGNALS_S):
        pass


class Future(Generic[T]):
    """The result of a submitted call. Safe to use from any thread."""

    def __init__(self, name: str, finish: Callable[[Any], T]) -> None:
        """`name` is how errors call the work, e.g. "step 3 of f"."""
        self.name = name
        self._owner = this_process()
        self._finish = finish
        self._lock = threading.Lock()
        self._done = threading.Lock()  # a latch: held until completion
        self._done.acquire()  # no deadline: the lock is new
        self._completed = False
        self._finished = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Future[T]], object]] = []

    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._completed

    def result(self, timeout: float | None = None) -> T:
        """The result. Raises the call's error, or DeadlineError after `timeout` seconds (the call continues)."""
        self._wait(timeout)
        if self._error is not None:
            raise self._error
        if not self._finished:
            with self._lock:
                if not self._finished:
                    self._value = self._finish(self._value)
                    self._finished = True
        return cast(T, self._value)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error of the call, or None. Waits like `result`."""
        self._wait(timeout)
        return self._error

    def add_done_callback(self, callback: Callable[[Future[T]], object]) -> None:
        """Call `callback(self)` once done: now if it is done, else on a receiving thread, where it must not wait."""
        with self._lock:
            if not self._completed:
                self._callbacks.append(callback)
                return
        callback(self)

    def then(self, finish: Callable[[T], U]) -> Future[U]:
        """A future of the same call whose result is `finish(result)`."""
        # no deadline: `finish` runs once the call is done
        view: Future[U] = Future(self.name, lambda _: finish(self.result()))
        self.add_done_callback(lambda _: view.complete(None, self._error))
        return view

    def complete(self, value: Any, error: BaseException | None = None) -> bool:
        """Set the outcome. False if it is set already. For the runtime, not for callers of `submit`."""
        with self._lock:
            if self._completed:
                return False
            self._value, self._error, self._completed = value, error, True
            callbacks, self._callbacks = self._callbacks, []
        self._done.release()
        for callback in callbacks:
            try:
                callback(self)
            except BaseException:  # also SystemExit: it must not end the receiving thread
                _log.exception("a done callback of %s failed", self.name)
        return True

    def _wait(self, timeout: float | None) -> None:
        if self._completed:
            return
        check_owner(self._owner, self.name)
        if timeout is None:
            while not self._done.acquire(timeout=HEEDS_SIGNALS_S):
                pass
        elif not self._done.acquire(timeout=max(timeout, 0.0)):
            raise DeadlineError(
                f"{self.name} is not done after {timeout:g} s; it continues: ask again or allow a longer timeout"
            )
        self._done.release()
