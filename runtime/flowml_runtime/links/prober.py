"""Measures links between peers: small round trips give the latency, a few larger messages the rate.

Every peer has a `Prober`. It answers other peers' probes, measures its own link to a peer, and asks a worker to measure
one of its links. Probes use the same endpoint as values. Answers are sent by a thread other than the receiving one,
because an arriving value wakes another thread too.

Payloads grow until one takes long enough to be timed, so that a slow link takes no longer to measure than a fast one.
They never exceed `wire.MAX_PROBE_BYTES`. A prober measures one link at a time.
"""

from __future__ import annotations

import itertools
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowml.errors import DeadlineError, FlowmlError, WorkerLostError
from flowml.placement.links import Link
from flowml.plan import ArraySpec
from flowml_runtime import service, wire
from flowml_runtime.transport.endpoint import Sender

ROUND_TRIPS = 20
TRANSFERS = 4
"""Number of messages of each size."""
LEAST_BYTES = 2**14
GROWTH = 16
TRANSFERS_S = 0.25
"""Once the transfers have taken this long in all, no larger size is tried and none is repeated."""

ANSWER_S = 2.0
"""Deadline for one answer."""
MEASURE_S = 10.0
"""Deadline for a worker to measure a link."""
MAX_WAITING = 64
"""The most probes that wait for an answer. Further probes are dropped, and their senders get no figure."""


class Prober:
    """The prober of one endpoint, which passes every `Probe` and `Probed` to it. Safe to use from any thread."""

    def __init__(self, endpoint: Sender) -> None:
        self._endpoint = endpoint
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._answers: dict[tuple[str, int], wire.Probed | None] = {}
        """(peer, number) -> the answer, or None, for every probe whose answer is awaited."""
        self._lost: dict[tuple[str, int], str] = {}
        """The reason, for the awaited answers of lost peers."""
        self._inbox: queue.Queue[tuple[str, wire.Probe] | None] = queue.Queue(MAX_WAITING)
        self._measuring = threading.Lock()
        self._answering: threading.Thread | None = None
        self._closed = False

    def on_message(self, peer: str, message: wire.Probe | wire.Probed) -> None:
        """Process one message; returns at once."""
        if isinstance(message, wire.Probed):
            with self._changed:
                if (peer, message.number) in self._answers:
                    self._answers[peer, message.number] = message
                    self._changed.notify_all()
            return
        with self._changed:
            if self._closed or self._inbox.full():
                return
            self._inbox.put_nowait((peer, message))
            if self._answering is None:
                self._answering = service.start("flowml-probe", self._answer, self._fail)

    def on_lost(self, peer: str, reason: str) -> None:
        """A peer is lost: end the waits for its answers."""
        with self._changed:
            for key in self._answers:
                if key[0] == peer:
                    self._lost[key] = reason
            self._changed.notify_all()

    def measure(self, peer: str, nbytes: int = wire.MAX_PROBE_BYTES) -> Link:
        """The link from here to `peer`. Raises FlowmlError if the peer is lost or does not answer in time."""
        with self._measuring:
            self._exchange(
                peer, wire.Probe(number=next(self._numbers))
            )  # opens the connection, whose time must not count
            pings = (self._seconds(peer, None) for _ in range(ROUND_TRIPS))
            round_trip_s = statistics.median(pings)
            rate = self._rate(peer, round_trip_s, nbytes)
        return Link(round_trip_s / 2, rate, self._endpoint.way(peer), measured=True)

    def ask(self, worker: str, peer: str) -> Link:
        """The link from a worker to another peer, measured by that worker. Raises FlowmlError as `measure` does."""
        probe = wire.Probe(number=next(self._numbers), peer=peer, nbytes=wire.MAX_PROBE_BYTES)
        found = self._exchange(worker, probe, deadline_s=MEASURE_S)
        if found.error or not found.bytes_per_s:
            raise FlowmlError(f"{worker} could not measure its link to {peer}: {found.error or 'it has no figures'}")
        return Link(found.latency_s, found.bytes_per_s, found.way, measured=True)

    def close(self) -> None:
        """End the thread and all waits for answers. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            thread = self._answering
        if thread is not None:
            self._inbox.put(None)
            thread.join(ANSWER_S)

    def _rate(self, peer: str, round_trip_s: float, most: int) -> float:
        began = time.perf_counter()
        nbytes = min(LEAST_BYTES, most)
        while True:
            payload = np.ones(nbytes, np.uint8)
            taken_s = [self._seconds(peer, payload)]
            while len(taken_s) < TRANSFERS and time.perf_counter() - began < TRANSFERS_S:
                taken_s.append(self._seconds(peer, payload))
            if nbytes >= most or time.perf_counter() - began >= TRANSFERS_S:
                break
            nbytes = min(nbytes * GROWTH, most)
        # The fastest counts: the first of a size also allocates memory that the others reuse, and any may meet a busy
        # core.
        best_s = min(taken_s)
        return nbytes / max(best_s - round_trip_s, best_s / 10)

    def _seconds(self, peer: str, payload: np.ndarray[Any, Any] | None) -> float:
        specs = () if payload is None else (ArraySpec(payload.shape, "uint8"),)
        probe = wire.Probe(number=next(self._numbers), specs=specs)
        began = time.perf_counter()
        self._exchange(peer, probe, () if payload is None else (payload,))
        return time.perf_counter() - began

    def _exchange(
        self, peer: str, probe: wire.Probe, arrays: Sequence[Any] = (), deadline_s: float = ANSWER_S
    ) -> wire.Probed:
        key = (peer, probe.number)
        with self._changed:
            self._answers[key] = None
        try:
            self._endpoint.send(peer, probe, arrays)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or self._answers[key] is not None or key in self._lost, deadline_s
                )
                answer, lost = self._answers[key], self._lost.get(key)
        finally:
            with self._changed:
                del self._answers[key]
                self._lost.pop(key, None)
        if answer is None and lost is not None:
            raise WorkerLostError(f"{peer} was lost: {lost}", worker=peer)
        if answer is None:
            raise DeadlineError(f"{peer} did not answer a probe of its link within {deadline_s:g} s")
        return answer

    def _answer(self) -> None:
        while (asked := self._inbox.get()) is not None:  # no deadline: the thread sleeps until it has work or is closed
            with service.going_on("a probe could not be answered"):
                self._answer_one(*asked)

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._answering = None  # the next probe starts another thread

    def _answer_one(self, peer: str, probe: wire.Probe) -> None:
        if not probe.peer:
            self._tell(peer, wire.Probed(number=probe.number))
        elif self._measuring.locked():
            self._tell(peer, wire.Probed(number=probe.number, error="it measures another link at the moment"))
        else:  # on another thread, because the peer may measure its link to us at the same time

            def failed(reason: str) -> None:
                self._tell(peer, wire.Probed(number=probe.number, error=reason))

            service.start("flowml-measure", lambda: self._serve(peer, probe), failed)

    def _serve(self, peer: str, probe: wire.Probe) -> None:
        try:
            link = self.measure(probe.peer, probe.nbytes)
        except FlowmlError as error:
            answer = wire.Probed(number=probe.number, error=service.text_of(error))
        else:
            answer = wire.Probed(
                number=probe.number, way=link.way, latency_s=link.latency_s, bytes_per_s=link.bytes_per_s
            )
        self._tell(peer, answer)

    def _tell(self, peer: str, answer: wire.Probed) -> None:
        try:
            self._endpoint.send(peer, answer)
        except FlowmlError:
            return  # the asking peer is lost
