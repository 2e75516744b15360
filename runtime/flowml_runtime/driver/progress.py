"""Shows lines of progress on stderr: of a fit, and of other work of the caller that takes more than a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from flowml_runtime import service
from flowml_runtime.environment.streams import on_terminal

SLOW_S = 1.0
"""Work that takes less time shows no line. The line is written again as often."""

JOIN_S = 5.0
"""How long the end of the work waits for the line to be removed."""

CLEAR = "\r\x1b[K"


@contextmanager
def shown(text: Callable[[], str]) -> Generator[None]:
    """Show a line on stderr while the block runs, if that takes more than a second and stderr is a terminal.

    The line is `text()` with the seconds so far. A thread writes it, because the block computes on the caller's.
    """
    if not on_terminal():
        yield
        return
    over, began = threading.Event(), time.monotonic()

    def show() -> None:
        open_ = False
        while not over.wait(SLOW_S):
            open_ = True
            _write(f"{CLEAR}flowml: {text()}, {time.monotonic() - began:.0f} s ")
        if open_:
            _write(CLEAR)

    thread = service.start("flowml-progress", show, lambda _: None)
    try:
        yield
    finally:
        over.set()
        thread.join(JOIN_S)


def _write(text: str) -> None:
    with service.going_on("the progress could not be shown"):
        sys.stderr.write(text)
        sys.stderr.flush()


class Progress:
    """One line on stderr that is rewritten a few times a second, if stderr is a terminal."""

    def __init__(self, total: int, wanted: bool | None) -> None:
        self._total = total
        self._shown = on_terminal() if wanted is None else wanted and sys.stderr is not None
        self._began_s = time.monotonic()
        self._next_s = self._began_s + 0.5
        self._open = False

    def show(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if not self._shown or now < self._next_s:
            return
        self._next_s = now + 0.25
        self._open = True
        rate = (record["step"] + 1) / (now - self._began_s)  # not by the record, whose seconds may be virtual
        line = f"step {record['step'] + 1}/{self._total}  epoch {record['epoch']}  loss {record['loss']:.4f}"
        sys.stderr.write(f"\r\x1b[K{line}  {rate:.1f} steps/s")
        sys.stderr.flush()

    def close(self) -> None:
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
