"""Implements futures, the handles of submitted calls.

A `Future` is completed once, by the thread that receives the last result or the first fault. `finish`, which converts
raw results to the caller's result, runs in the first thread that asks for the result, so that it does not delay the
receiving threads. It is dropped then: a future that is kept keeps its result, and not the arguments of the call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, Generic, TypeVar, cast

from flowml.errors import DeadlineError
from flowml_runtime import service
from flowml_runtime.environment.forks import check_owner, this_process
from flowml_runtime.execution.callbacks import callbacks as threaded

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
        self._finish: Callable[[Any], T] | None = finish
        """None once it has run, or will never run because there is an error."""
        self._lock = threading.Lock()
        self._done = threading.Lock()  # a latch: held until completion
        self._done.acquire()  # no deadline: the lock is new
        self._completed = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._callbacks: list[Callable[[Future[T]], object]] = []
        self.at_once: Callable[[], T] | None = None
        """The result if nothing of it has to be waited for, because it consists of handles."""
        self.argument: Callable[[], T] | None = None
        """The result for another call, if that is not `result()`."""

    def done(self) -> bool:
        """True once there is a result or an error."""
        return self._completed

    def result(self, timeout: float | None = None) -> T:
        """The result. Raises the call's error, or DeadlineError after `timeout` seconds (the call continues)."""
        self._wait(timeout)
        if self._error is not None:
            raise self._error
        if self._finish is not None:
            with self._lock:
                if self._finish is not None:
                    self._value = self._finish(self._value)
                    self._finish = None
        return cast(T, self._value)

    def __jax_array__(self) -> Any:
        """Raises TypeError: JAX asks for the array where a future is an operand."""
        raise TypeError(self._no_value("is not an array"))

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Raises TypeError, as for JAX: NumPy would make an array of one object."""
        raise TypeError(self._no_value("is not an array"))

    def __getitem__(self, part: Any) -> Any:
        """Raises TypeError: a part is not known before the result is."""
        raise TypeError(self._no_value("has no parts"))

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError: it may be an attribute of the result."""
        raise AttributeError(self._no_value(f"has no attribute {name!r}"), name=name, obj=self)

    def _no_value(self, why: str) -> str:
        return (
            f"{self.__dict__.get('name', 'a call')}: a Future {why}; take its result() first, or pass the Future to a "
            "program as an argument, which then takes the values where they are"
        )

    def as_argument(self) -> T:
        """The result for another call, which itself waits for what the result's handles stand for."""
        at_once = self.at_once
        if at_once is not None and not self._completed:
            return at_once()
        if self.argument is not None:
            return self.argument()
        return self.result()  # no deadline: that of the call whose argument this is

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error of the call, or None. Waits like `result`."""
        self._wait(timeout)
        return self._error

    def add_done_callback(self, callback: Callable[[Future[T]], object]) -> None:
        """Call `callback(self)` once done: now if it is done, else on a thread for callbacks, where it may wait.

        All callbacks of a process run on that thread, one after another. An exception of one is logged.
        """
        if not callable(callback):
            raise TypeError(
                f"callback={callback!r} is of type {type(callback).__name__}; give a function of the future"
            )
        if self._completed:
            callback(self)
        else:
            self.when_done(lambda _: threaded.put(partial(self._call, callback)))

    def when_done(self, callback: Callable[[Future[T]], object]) -> None:
        """For the runtime: like `add_done_callback`, but on the completing thread, where the callback must not wait."""
        with self._lock:
            if not self._completed:
                self._callbacks.append(callback)
                return
        callback(self)

    def then(self, finish: Callable[[T], U]) -> Future[U]:
        """A future of the same call whose result is `finish(result)`."""
        # no deadline: `finish` runs once the call is done
        view: Future[U] = Future(self.name, lambda _: finish(self.result()))
        self.when_done(lambda _: view.complete(None, self._error))
        at_once = self.at_once
        if at_once is not None and not view.done():
            view.at_once = lambda: finish(at_once())
        return view

    def complete(self, value: Any, error: BaseException | None = None) -> bool:
        """Set the outcome. False if it is set already. For the runtime, not for callers of `submit`."""
        with self._lock:
            if self._completed:
                return False
            self._value, self._error, self._completed = value, error, True
            self.at_once = None  # it keeps the arguments of the call
            callbacks, self._callbacks = self._callbacks, []
            if error is not None:
                self._finish = None
        self._done.release()
        for callback in callbacks:
            self._call(callback)
        return True

    def _call(self, callback: Callable[[Future[T]], object]) -> None:
        with service.going_on(f"a done callback of {self.name} failed"):
            callback(self)

    def _wait(self, timeout: float | None) -> None:
        seconds = None if timeout is None else _seconds(timeout)
        if self._completed:
            return
        check_owner(self._owner, self.name)
        if seconds is None:
            while not self._done.acquire(timeout=HEEDS_SIGNALS_S):
                pass
        elif not self._done.acquire(timeout=seconds):
            raise DeadlineError(
                f"{self.name} is not done after {seconds:g} s; it continues: ask again or allow a longer timeout"
            )
        self._done.release()


def _seconds(timeout: object) -> float:
    """A timeout as threads wait for it. Raises TypeError unless it is a real number, ValueError for NaN."""
    remedy = "give a number of seconds, or None to wait until the call is done"
    if not isinstance(timeout, Real):
        raise TypeError(f"timeout={timeout!r}: {remedy}")
    try:
        seconds = float(cast(float, timeout))
    except OverflowError:  # an integer with hundreds of digits
        seconds = math.inf
    if math.isnan(seconds):
        raise ValueError(f"timeout={timeout!r}: {remedy}")
    return max(min(seconds, threading.TIMEOUT_MAX), 0.0)
