"""Records spans of a worker's instructions for traces.

Recording costs two clock readings for each instruction. It costs nothing while it is off, because steps then run the
plain list. The newest `MAX_SPANS` spans are kept. Times are of this process's monotonic clock. The driver corrects them
by the difference between the clocks.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from flowml_runtime.protocol.training.story import Entry

MAX_SPANS = 200_000
_LONGEST = 1024
_NAME = Annotated[str, msgspec.Meta(max_length=_LONGEST)]
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Span(msgspec.Struct, frozen=True, array_like=True):
    """An action of a device's executor, sender, mailbox, homes or groups; `lane` says which of them."""

    lane: _NAME
    kind: _NAME
    """"run", "send", "receive", "read", "push", "feed", "fetch", "apply", "reduce"; "arrived": a value before its Recv.

    "story": an event of a training machine and its actions (`name`), the event's run (`microbatch`) and number
    (`step`), and the event that caused it (`way`).
    """
    name: _NAME
    step: int
    microbatch: int
    nbytes: int
    way: _NAME
    """How an array was sent, or the schedule of an all-reduce."""
    began_ns: _Nanoseconds
    ended_ns: _Nanoseconds


class Recorder:
    """Records the spans of one worker. Safe to use from any thread."""

    def __init__(self) -> None:
        self.on = False
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._open: dict[object, Span] = {}
        """Spans that have not ended. A result may reach its receiver before the span that produced it ends."""
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            self._spans.clear()
            self._open.clear()
            self.on = True

    def stop(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The recorded spans, encoded. Open spans end now."""
        with self._lock:
            self.on = False
            under_way = list(self._open.values())  # one atomic copy: `record` opens spans without the lock
            spans = [*self._spans, *map(_ended, under_way)]
            self._spans.clear()
            self._open.clear()
        return np.frombuffer(msgspec.msgpack.encode(spans), np.uint8)

    def add(self, span: Span) -> None:
        self._spans.append(span)

    def tell(self, entry: Entry) -> None:
        """Record an event of a training machine and its actions."""
        now = now_ns()
        self.add(Span("decisions", "story", entry.text[:_LONGEST], entry.number, entry.run, 0, entry.cause, now, now))

    @contextmanager
    def record(
        self,
        lane: str,
        kind: str,
        name: str,
        step: int,
        microbatch: int = 0,
        nbytes: int = 0,
        way: str = "",
        began_ns: int = 0,
    ) -> Generator[None]:
        """Record the block as a span, unless it raises. The span begins at `began_ns`, if that is given."""
        if not self.on:
            yield
            return
        key, began = object(), began_ns or now_ns()
        self._open[key] = Span(lane, kind, name, step, microbatch, nbytes, way, began, began)
        try:
            yield
        except BaseException:
            self._open.pop(key, None)
            raise
        with self._lock:
            span = self._open.pop(key, None)
            if span is not None:
                self._spans.append(_ended(span))


def _ended(span: Span) -> Span:
    return msgspec.structs.replace(span, ended_ns=now_ns())


_decoder = msgspec.msgpack.Decoder(list[Span])


def decode(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> list[Span]:
    """The spans that `stop` encoded. Raises msgspec.DecodeError for other data."""
    return _decoder.decode(data.data)


def now_ns() -> int:
    return time.monotonic_ns()


@functools.cache
def clock_id() -> str:
    """Identifies the clock of `now_ns`, which all processes of one kernel and time namespace share. "" if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return ""
