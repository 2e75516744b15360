"""Records what the devices of a cluster do on one time axis, as a file for Perfetto or chrome://tracing.

Every worker records with the clock of its machine. For another machine, the difference to the driver's clock is
estimated from the round trip of the request that starts the trace: its answer was written about half-way through it
(Cristian, 1989). The error is less than the latency of the link.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from flowml.errors import ClusterError
from flowml_runtime import wire
from flowml_runtime.driver.session import Session
from flowml_runtime.execution.programs import Array
from flowml_runtime.execution.recorder import Span, clock_id, decode, now_ns

ANSWER_S = 30.0
"""How long the workers may take to send their recordings."""


@dataclass(frozen=True)
class Answer:
    """The answer of one worker."""

    clock: str
    now_ns: int
    received_ns: int
    spans: Sequence[Span]


class Tracing:
    """One trace of a cluster. It covers the time inside the `with` block."""

    def __init__(self, session: Session, path: Path) -> None:
        self._session = session
        self._path = path
        self._id = f"trace-{uuid.uuid4().hex[:16]}"
        self._workers = tuple(dict.fromkeys(d.worker for d in session.devices))
        self._changed = threading.Condition()
        self._answers: dict[str, Answer] = {}
        self._lost: set[str] = set()
        self._offsets: dict[str, int] = {}
        """Worker -> what to add to its clock to get the driver's clock."""

    def __enter__(self) -> Tracing:
        self._path.touch()  # raises now, and not after the work, if the file cannot be written
        self._session.register(self._id, self)
        try:
            self._session.recorder.start()
            asked = now_ns()
            answers = self._ask(on=True)
            self._began_ns = asked
            self._offsets = {w: offset(asked, a) for w, a in answers.items()}
        except BaseException:
            self._session.recorder.stop()
            self._session.unregister(self._id)
            raise
        self._offsets[self._session.endpoint.name] = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            answers = self._ask(on=False)
        finally:
            self._session.unregister(self._id)
        spans = {w: a.spans for w, a in answers.items() if w in self._offsets}
        spans[self._session.endpoint.name] = decode(self._session.recorder.stop())
        events = list(_events(spans, self._offsets, self._began_ns))
        self._path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Array]) -> None:
        if isinstance(message, wire.Traced):
            received = now_ns()
            spans = decode(np.asarray(arrays[0])) if arrays and arrays[0].nbytes else []
            with self._changed:
                self._answers[peer] = Answer(message.clock, message.now_ns, received, spans)
                self._changed.notify_all()

    def on_lost(self, peer: str, reason: str) -> None:
        """A lost worker's recording is lost; those of the other workers are not."""
        with self._changed:
            self._lost.add(peer)
            self._changed.notify_all()

    def _ask(self, *, on: bool) -> dict[str, Answer]:
        with self._changed:
            self._answers.clear()
        for worker in self._workers:
            if worker not in self._lost:
                self._session.tell(worker, wire.Trace(plan_id=self._id, on=on))
        with self._changed:
            there = self._changed.wait_for(lambda: {*self._answers, *self._lost} >= {*self._workers}, ANSWER_S)
            if not there:
                missing = ", ".join(sorted({*self._workers} - {*self._answers, *self._lost}))
                raise ClusterError(
                    f"{missing} did not answer about a trace within {ANSWER_S:g} s; see whether it is stuck"
                )
            return dict(self._answers)


def offset(asked_ns: int, answer: Answer) -> int:
    """What to add to a worker's clock to get the driver's clock."""
    if answer.clock and answer.clock == clock_id():
        return 0
    return (asked_ns + answer.received_ns) // 2 - answer.now_ns


def _events(spans: dict[str, Sequence[Span]], offsets: dict[str, int], began_ns: int) -> Iterable[dict[str, Any]]:
    """The spans in Chrome's format: one process per worker, one thread per lane, complete events ("X") in us."""
    for pid, (worker, own) in enumerate(sorted(spans.items())):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": worker}}
        lanes = {lane: tid for tid, lane in enumerate(sorted({s.lane for s in own}))}
        for lane, tid in lanes.items():
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": lane}}
        for span in own:
            if span.kind == "story":
                yield {
                    "ph": "i",
                    "name": span.name,
                    "cat": "story",
                    "pid": pid,
                    "tid": lanes[span.lane],
                    "ts": (span.began_ns + offsets[worker] - began_ns) / 1e3,
                    "args": {"event": f"{worker}#{span.microbatch}.{span.step}", "cause": span.way},
                }
                continue
            yield {
                "ph": "i" if span.kind == "arrived" else "X",
                "name": span.name,
                "cat": span.kind,
                "pid": pid,
                "tid": lanes[span.lane],
                "ts": (span.began_ns + offsets[worker] - began_ns) / 1e3,
                "dur": (span.ended_ns - span.began_ns) / 1e3,
                "args": {"step": span.step, "microbatch": span.microbatch, "bytes": span.nbytes, "way": span.way},
            }
