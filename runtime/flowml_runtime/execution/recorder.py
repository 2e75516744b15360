"""What a worker did when: spans of its devices' instructions, kept while somebody asks for them.

Recording costs two clock readings an instruction; while nobody asks, it costs nothing, because steps then run the plain
list. The newest `MAX_SPANS` are kept. Times are this process's monotonic clock; whoever collects them knows how it
differs from others'.
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
    """Something that a device's executor, its sender, mailbox, homes or groups did; `lane` says which of them."""

    lane: _NAME
    kind: _NAME
    """"run", "send", "receive", "read", "push", "feed", "fetch", "apply", "reduce"; or "arrived", before its Recv.

    "story": what a machine of training was told and did about it (`name`), run (`microbatch`) and number (`step`) of
    that event, and the event that it follows from (`way`).
    """
    name: _NAME
    step: int
    microbatch: int
    nbytes: int
    way: _NAME
    """By which an array travelled; the schedule of an all-reduce."""
    began_ns: _Nanoseconds
    ended_ns: _Nanoseconds


class Recorder:
    """Of one worker. Safe to use from any thread."""

    def __init__(self) -> None:
        self.on = False
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        self._open: dict[object, Span] = {}
        """Those that have begun. What a result comes from may still be under way when its receiver has it."""
        self._lock = threading.Lock()

    def start(self) -> None:
        with self._lock:
            self._spans.clear()
            self._open.clear()
            self.on = True

    def stop(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """What was recorded, encoded. What is still under way ends here."""
        with self._lock:
            self.on = False
            under_way = list(self._open.values())  # at one stroke: `record` opens spans without the lock
            spans = [*self._spans, *map(_ended, under_way)]
            self._spans.clear()
            self._open.clear()
        return np.frombuffer(msgspec.msgpack.encode(spans), np.uint8)

    def add(self, span: Span) -> None:
        self._spans.append(span)

    def tell(self, entry: Entry) -> None:
        """Note what a machine of training was told, and what it did about it."""
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
        """Add what the block does, unless it raises. It began at `began_ns`, if that is given."""
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
    """What `stop` encoded. Raises msgspec.DecodeError for anything else."""
    return _decoder.decode(data.data)


def now_ns() -> int:
    return time.monotonic_ns()


@functools.cache
def clock_id() -> str:
    """Whose clock `now_ns` is: all processes of one kernel and time namespace share it. "" where that is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return ""
