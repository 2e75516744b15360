"""Heeds signals that Python cannot raise.

Where a finalizer or a callback of the garbage collector runs, Python cannot pass an exception on: it hands it to
`sys.unraisablehook`, which prints it, and goes on. A KeyboardInterrupt is lost there as well. JAX has such a callback,
and imports, tracing and compiling call it so often that a Ctrl-C is lost easily. So a signal that was lost is sent
again a moment later.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from flowml_runtime import service

_AGAIN_S = 0.02
"""Time for the finalizer to end."""
_END = 0
_heeding = threading.Lock()


class Terminated(SystemExit):
    """What a handler of signals raises so that `with` blocks end, with the status that a shell gives such an end."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


@contextmanager
def heeding_interrupts() -> Generator[None]:
    """Send a lost KeyboardInterrupt or `Terminated` again, as its signal, until the block ends. Several that are lost
    at once count as one, and nothing is sent after the block. Python handles signals on the main thread alone, so
    other threads lose none. May be nested."""
    if threading.current_thread() is not threading.main_thread() or not _heeding.acquire(blocking=False):
        yield
        return
    try:
        with _sent_again():
            yield
    finally:
        _heeding.release()


@contextmanager
def _sent_again() -> Generator[None]:
    main, before = threading.get_ident(), sys.unraisablehook
    lost: SimpleQueue[int] = SimpleQueue()  # finalizers may put into it anywhere: it has no lock of Python's
    unsent = list[int]()

    def hook(unraisable: Any) -> None:
        signum = _signal_of(unraisable.exc_value)
        if signum:
            lost.put(signum)
        else:
            before(unraisable)

    def send() -> None:
        while signum := lost.get():  # no deadline: the block ends it
            time.sleep(_AGAIN_S)
            more = [lost.get() for _ in range(lost.qsize())]  # no deadline: nobody else takes from it
            if _END in more:
                unsent.append(signum)
                return
            signal.pthread_kill(main, signum)  # once for all that were lost

    sender = service.start("interrupts", send, lambda reason: None)
    sys.unraisablehook = hook
    raised = False
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        raised = True
        raise
    finally:
        sys.unraisablehook = before
        lost.put(_END)
        sender.join()  # no deadline: it only sleeps
        if unsent and not raised:
            signal.raise_signal(unsent[0])


def _signal_of(error: BaseException | None) -> int:
    """The signal whose handler has raised this; 0 if it is none of one."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    return error.signum if isinstance(error, Terminated) else 0
