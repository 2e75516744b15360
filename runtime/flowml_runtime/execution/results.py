"""Sends the results of steps that are still being computed.

XLA computes on threads of its own, so a step only starts its tasks. If its results take long, another thread waits for
them. The thread that started the step is then free, and may be the one that receives messages: a thread that has to be
woken first would delay the step. A short wait costs less than that thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import jax

from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array

SHORT_S = 0.5e-3
"""The thread that started a step waits for results that take no longer than this."""


class Results:
    """The results of one plan on one device. `lane` waits for all plans of the device, in the order of their steps."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._lock = threading.Lock()
        self._unsent: Counter[int] = Counter()
        """Step -> its results that are not sent."""
        self._waited_s = 0.0
        """For the last results."""

    @property
    def pending(self) -> bool:
        """Whether results are being waited for."""
        return bool(self._unsent)

    def has(self, step: int) -> bool:
        """Whether results of a step are being waited for."""
        return step in self._unsent

    def send(
        self,
        step: int,
        arrays: Sequence[Array],
        send: Callable[[Sequence[Array]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Call `send(arrays)` when they are computed, or `failed(error)` if they cannot be: then, on another thread.

        Raises the error if this thread waits.
        """
        if self._waited_s <= SHORT_S and not self._unsent:
            self._wait(arrays, send)
            return
        with self._lock:
            self._unsent[step] += 1

        def sent() -> None:
            with self._lock:
                self._unsent[step] -= 1
                if not self._unsent[step]:
                    del self._unsent[step]

        def wait() -> None:
            self._wait(arrays, send)
            sent()

        def fail(error: BaseException) -> None:
            failed(error)
            sent()

        self._lane.put(wait, fail)

    def _wait(self, arrays: Sequence[Array], send: Callable[[Sequence[Array]], None]) -> None:
        began_s = time.perf_counter()
        _made(arrays)
        self._waited_s = time.perf_counter() - began_s
        send(arrays)


def _made(arrays: Sequence[Array]) -> None:
    """Wait until arrays are computed. Raises the error of their computation.

    The next step may have taken one of them already, to overwrite it. That step waits for it, and fails if it failed.
    """
    try:
        jax.block_until_ready(arrays)
    except RuntimeError:
        for array in arrays:
            try:
                jax.block_until_ready(array)
            except RuntimeError:
                if not (isinstance(array, jax.Array) and array.is_deleted()):
                    raise
