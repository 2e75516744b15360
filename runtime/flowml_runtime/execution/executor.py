"""Runs the steps of one device of a dataflow plan, in the order in which the driver feeds them.

    feeds of a plan -> its Executor -> the DeviceThread, which all plans of a device share -> fetches to the driver

A step never waits on the device's thread: two plans whose devices run their steps in different orders would wait for
each other for ever. If a value, or the room to send one, is missing, the step is parked, the thread continues with
other plans, and the step is resumed when the value or the room is there.

Waking a thread costs more than a small step. Therefore steps that have proven quick run on the thread that receives
the value they wait for. Slow steps run on the device's thread, where they do not delay messages.

A failed step is reported to the driver, and the executor continues with the next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from flowml.errors import FlowmlError
from flowml.instructions import Fetch, Recv, Run, Send
from flowml_runtime import wire
from flowml_runtime.execution.device_thread import Deadlines, DeviceThread
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.mailbox import Cancelled, Claim, Parked
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.step_program import StepFault, StepProgram, StepRun, StepServices

_log = logging.getLogger("flowml")


class FedServices(StepServices, Protocol):
    """Services of steps that a driver feeds: `begin` accepts the feed, `end` releases it."""

    outbox: Lane

    def begin(self, arrays: Sequence[Array]) -> None: ...
    def release(self, arrays: Sequence[Array]) -> None:
        """A step that was fed with this will not begin."""
        ...

    def sends(self, step: int) -> bool:
        """Whether results of a step that has ended are still to be sent."""
        ...

    def resume(self) -> None:
        """The step continues where it was parked."""
        ...

    def end(self, step: int) -> None: ...
    def expect(self) -> None: ...  # the awaited value, or the next feed, is due very soon
    def lose(self, peer: str, reason: str) -> None: ...
    def in_vain(self) -> bool:
        """Whether the step is parked for something that a lost worker will not send."""
        ...

    def expire(self, step: int, claim: Claim) -> None:
        """End the wait for this claim, and the step with an error, unless the value is here already."""
        ...


def may_be_quick(loaded: LoadedProgram) -> bool:
    """Whether steps of this program may run on receiving threads: they call no Python of the user and send little."""
    plan = loaded.plan
    specs = {o.index: o.spec for o in plan.outputs if o.kind == "fetch"}
    sent = 0
    for instruction in loaded.program.instructions:
        match instruction:
            case Run() if plan.tasks[instruction.task].kind != "xla":
                return False
            case Send():
                sent += plan.messages[instruction.message].nbytes
            case Fetch():
                sent += sum(specs[s].nbytes for s in instruction.slots)
            case _:
                pass
    return sent <= MAX_QUICK_BYTES


def may_run_ahead(loaded: LoadedProgram) -> bool:
    """Whether steps may begin while the results of earlier ones are still computed.

    One that receives values may not: it takes them out of the windows that bound their memory.
    """
    return may_be_quick(loaded) and not any(isinstance(i, Recv) for i in loaded.program.instructions)


QUICK_S = 1e-3
"""A step that computes no longer than this may run on a receiving thread."""

ENDS_S = 100e-6
"""How long a receiving thread waits for the end of the previous step."""

PROBATION = 4
"""Number of quick steps after which the next ones count as quick too. A slow step takes away half of that trust."""

MAX_QUICK_BYTES = 2**16
"""The most bytes that a quick step sends. Sixteen such steps in flight never fill a queue, so sending never waits."""

MAX_LOOK_S = 60.0


class Executor:
    """Runs the steps of one (plan, device) in the order of their feeds, on the device's or on receiving threads."""

    def __init__(
        self,
        program: StepProgram,
        services: FedServices,
        on_fault: Callable[[int, str, BaseException], None],
        device: DeviceThread,
        deadlines: Deadlines,
        *,
        may_be_quick: bool = False,
        deadline_s: float = wire.DEADLINE_S,
    ) -> None:
        """`on_fault(step, node, error)` is called for each step that fails, on the thread that ran it.

        `may_be_quick` says that steps neither call back into Python nor send more than MAX_QUICK_BYTES.
        """
        self._program = program
        self._services = services
        self._on_fault = on_fault
        self._device = device
        self._deadlines = deadlines
        self._may_be_quick = may_be_quick
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._unfinished = 0
        """Number of steps that were fed and have not ended."""
        self._open: set[int] = set()
        """Steps that were fed and whose results or failure have not all been sent."""
        self._feeds: deque[tuple[int, Sequence[Array]]] = deque()
        """The feeds of those that the device's thread has not begun."""
        self._stopped = False
        self._trust = 0
        self._proven = False
        """Whether steps count as quick: true once the trust is full, until it is zero."""
        self._turn = threading.Lock()
        """Held from the beginning of a step to its end, across the threads that run it."""
        self._parked: tuple[int, float, Claim] | None = None
        """The step that waits for a value or for room without blocking a thread: (step, since when, claim)."""
        deadlines.watch(self, self._look, min(deadline_s / 8, MAX_LOOK_S))

    def feed(self, step: int, arrays: Sequence[Array]) -> None:
        """Run a step now if it counts as quick, else queue it. The driver bounds the steps in flight."""
        with self._lock:
            under_way = self._unfinished
            quick = self._proven and not self._feeds and (not under_way or (under_way == 1 and self._parked is None))
            self._unfinished += 1
            self._open.add(step)
        # The previous step may have sent its result already, and end sooner than another thread could be woken.
        if quick and self._turn.acquire(timeout=ENDS_S if under_way else -1):
            self._begin(step, arrays, quick=True)
            return
        with self._lock:
            stopped = self._stopped
            if not stopped:
                self._feeds.append((step, arrays))
        if stopped:
            self._services.release(arrays)
        self._pump()

    def has(self, step: int) -> bool:
        """Whether this step was fed and something of it is still to be sent."""
        return step in self._open or self._services.sends(step)

    @property
    def busy(self) -> bool:
        """Whether a step was fed and something of it is still to be sent."""
        return any(self.has(step) for step in tuple(self._open))

    def lose(self, peer: str, reason: str) -> None:
        """A worker of the plan is lost, and its last message has arrived. Steps that need more of it fail."""
        self._services.lose(peer, reason)
        self._give_up()

    def _give_up(self) -> None:
        """End a parked step that waits for a lost worker."""
        parked = self._parked
        if parked is not None and self._services.in_vain():
            self._services.expire(parked[0], parked[2])

    def stop(self) -> None:
        """End after the running step and drop the others. Does not wait."""
        with self._lock:
            self._stopped = True
            dropped, self._feeds = self._feeds, deque()
        for _, arrays in dropped:
            self._services.release(arrays)
        self._deadlines.forget(self)
        self._services.outbox.close()
        self._device.leave(self)

    def _pump(self) -> None:
        """Have the device's thread begin the next step, unless a step runs: then its end does that."""
        if self._feeds and self._turn.acquire(blocking=False):
            self._device.put(self, self._begin_queued)

    def _begin_queued(self) -> None:
        with self._lock:
            fed = self._feeds.popleft() if self._feeds else None
        if fed is None:
            self._turn.release()
            self._pump()  # a feed may have come meanwhile and found the turn taken
        else:
            self._begin(*fed, quick=False)

    def _look(self) -> None:
        """End a parked step whose wait is overdue."""
        parked = self._parked
        if parked is not None and time.monotonic() - parked[1] > self._deadline_s:
            self._services.expire(parked[0], parked[2])

    def _begin(self, step: int, arrays: Sequence[Array], *, quick: bool) -> None:
        """Begin a step on this thread. If it is parked, it resumes on the device's thread.

        A quick step resumes on the thread that receives its value.
        """
        began = time.perf_counter()
        try:
            self._services.begin(arrays)
        except BaseException as error:  # a feed that does not fit
            self._end(step, QUICK_S)
            self._report(step, "feed", error)
            self._open.discard(step)
            return
        self._advance(StepRun(self._program, step, self._services), step, began, 0.0, quick=quick)

    def _advance(self, run: StepRun, step: int, since: float, ran_s: float, *, quick: bool) -> None:
        """Run the step until it ends or is parked. `ran_s` is the time that it ran before `since`."""
        fault: StepFault | None = None
        while True:
            try:
                run.advance()
            except Parked as parked:
                if self._park(parked.claim, run, step, ran_s + time.perf_counter() - since, quick=quick):
                    return
                continue
            except Cancelled:  # the driver may not know; it ignores the report if it cancelled the step itself
                fault = StepFault("step")
                fault.__cause__ = FlowmlError("the step was cancelled")
            except StepFault as error:
                fault = error
            except BaseException as error:  # a callback that raised KeyboardInterrupt
                fault = StepFault("step")
                fault.__cause__ = error
            break
        self._end(step, ran_s + time.perf_counter() - since)
        if fault is not None:
            self._report(step, fault.node, fault.__cause__ or fault)
        self._open.discard(step)

    def _report(self, step: int, node: str, error: BaseException) -> None:
        """Report a failed step. An exception of the report is logged, because others need this thread."""
        try:
            self._on_fault(step, node, error)
        except Exception:
            _log.exception("the failure of step %d at %s could not be reported", step, node)

    def _park(self, claim: Claim, run: StepRun, step: int, ran_s: float, *, quick: bool) -> bool:
        """Park the step until the claim is done. False if it is done already."""

        def go_on() -> None:
            self._advance(run, step, time.perf_counter(), ran_s, quick=quick)

        def resume() -> None:
            self._parked = None
            self._services.resume()
            if quick:
                go_on()
            else:
                self._device.put(self, go_on)

        self._parked = step, time.monotonic(), claim
        if claim.then(resume):
            self._give_up()  # the worker may have been lost before the step was parked
            if quick:
                self._services.expect()
            return True
        self._parked = None
        self._services.resume()
        return False

    def _end(self, step: int, ran_s: float) -> None:
        self._services.end(step)
        quick = self._may_be_quick and ran_s < QUICK_S
        self._turn.release()
        with self._lock:
            self._trust = min(self._trust + 1, PROBATION) if quick else max(self._trust - PROBATION // 2, 0)
            self._proven = self._trust >= PROBATION or (self._proven and self._trust > 0)
            self._unfinished -= 1
            proven = self._proven
        self._pump()
        if proven:
            self._services.expect()
