"""Heeds a Ctrl-C that Python cannot raise.

Where a finalizer or a callback of the garbage collector runs, Python cannot pass an exception on: it hands it to
`sys.unraisablehook`, which prints it, and goes on. A KeyboardInterrupt is lost there as well. JAX has such a callback,
and tracing and compiling call it so often that one Ctrl-C in a hundred does nothing. A fit may take days, so it notes
such an interrupt and raises it at the next place where it can.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """The interrupt that Python could not raise, if there was one."""

    def __init__(self) -> None:
        self._lost = False

    def note(self) -> None:
        self._lost = True

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was lost."""
        if self._lost:
            self._lost = False
            raise KeyboardInterrupt


@contextmanager
def heeding_interrupts() -> Generator[Interrupts]:
    """Note lost interrupts until the block ends. Python interrupts only the main thread, so other threads lose none."""
    interrupts, before = Interrupts(), sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            interrupts.note()
        else:
            before(unraisable)

    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    sys.unraisablehook = hook
    try:
        yield interrupts
        interrupts.check()
    finally:
        sys.unraisablehook = before
