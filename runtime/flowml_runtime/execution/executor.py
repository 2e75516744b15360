"""The executor: runs the steps of one device of a dataflow plan, in the order in which the driver feeds them.

    feed queue -> executor thread: for each step { StepRun(program, step, services) } -> fetches to the driver

Waking a thread costs more than a small step does. So steps that have shown themselves to be quick run on the
thread that brings what they wait for: the feed begins a step, and where a value is missing the step is left, to
be taken up by the thread that brings it. Slow steps stay on the executor's own thread, where they hold up nobody.

A step that fails is reported to the driver and the executor goes on to the next.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from flowml.plan import Fetch, Run, Send
from flowml_runtime import wire
from flowml_runtime.execution.mailbox import Cancelled, Claim, Parked
from flowml_runtime.execution.outbox import Outbox
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.step_program import StepFault, StepProgram, StepRun, StepServices


class FedServices(StepServices, Protocol):
    """Services of steps that a driver feeds: `begin` takes the feed in, `end` lets go of it."""

    outbox: Outbox
    waited_s: float
    """How long the step has waited for values on the executor's thread."""

    def begin(self, arrays: Sequence[Array], *, parks: bool) -> None:
        """With `parks`, a value that is missing raises Parked instead of being waited for."""
        ...

    def resume(self, claim: Claim) -> None:
        """The step goes on where it was parked: its next receive takes from this claim."""
        ...

    def end(self, step: int) -> None: ...
    def expect(self) -> None: ...  # what the step waits for, or the next feed, is due within moments
    def expire(self, step: int) -> None:
        """Nobody waits for this step's values any longer: whoever does gets a DeadlineError."""
        ...


def may_be_quick(loaded: LoadedProgram) -> bool:
    """Whether steps of this program may run on receiving threads: they run no Python of users, and send little."""
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


QUICK_S = 1e-3
"""A step that computes no longer than this may run on a receiving thread."""

ENDS_S = 100e-6
"""How long a receiving thread waits for the end of the step before the one that it brings."""

PROBATION = 4
"""So many quick steps make an executor trust that the next one is quick too; a slow one costs half of that trust."""

MAX_QUICK_BYTES = 2**16
"""What a quick step sends at most: sixteen such steps in flight never fill a queue, so sending never waits."""

MAX_LOOK_S = 60.0


class Executor:
    """Runs the steps of one (plan, device) in the order in which they were fed: on a thread of its own, or quickly."""

    def __init__(
        self,
        program: StepProgram,
        services: FedServices,
        on_fault: Callable[[int, str, BaseException], None],
        name: str,
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
        self._may_be_quick = may_be_quick
        self._deadline_s = deadline_s
        self._look_s = min(deadline_s / 8, MAX_LOOK_S)
        self._lock = threading.Lock()
        self._unfinished = 0
        """Steps that were fed and are not over."""
        self._queued = 0
        """Those of them that wait for the thread to begin them."""
        self._trust = 0
        self._proven = False
        """Whether steps count as quick: from full trust on, until none is left."""
        self._turn = threading.Lock()
        """Held from the beginning of a step to its end, on whatever threads that happens."""
        self._parked: tuple[int, float] | None = None
        """(step, since when) it waits for a value without a thread that does."""
        self._feeds: queue.SimpleQueue[tuple[int, Sequence[Array]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def feed(self, step: int, arrays: Sequence[Array]) -> None:
        """Run a step now if it is bound to be quick, else queue it. The driver bounds how many are in flight."""
        with self._lock:
            under_way = self._unfinished
            quick = self._proven and not self._queued and (not under_way or (under_way == 1 and self._parked is None))
            self._unfinished += 1
        # The step before this one may just have been answered: it is over before another thread could be woken.
        if quick and self._turn.acquire(timeout=ENDS_S if under_way else -1):
            self._begin(step, arrays, parks=True)
            return
        with self._lock:
            self._queued += 1
        self._feeds.put((step, arrays))

    def stop(self) -> None:
        """End after the step that runs now. Does not wait."""
        self._feeds.put(None)
        self._services.outbox.close()

    def join(self, timeout_s: float) -> bool:
        """Wait until the threads are gone. False if one is still there, e.g. inside a callback that never returns."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return self._services.outbox.join(timeout_s) and not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            try:
                fed = self._feeds.get(timeout=self._look_s)
            except queue.Empty:
                self._look()
                continue
            if fed is None:
                return
            while not self._turn.acquire(timeout=self._look_s):
                self._look()
            with self._lock:
                self._queued -= 1
            step, arrays = fed
            self._begin(step, arrays, parks=False)
            del fed, arrays  # else they stay alive until the next feed comes

    def _look(self) -> None:
        """End a parked step that waits for too long."""
        parked = self._parked
        if parked is not None and time.monotonic() - parked[1] > self._deadline_s:
            self._services.expire(parked[0])

    def _begin(self, step: int, arrays: Sequence[Array], *, parks: bool) -> None:
        began = time.perf_counter()
        try:
            self._services.begin(arrays, parks=parks)
        except BaseException as error:  # a feed that does not fit
            self._end(step, QUICK_S)
            self._on_fault(step, "feed", error)
            return
        self._advance(StepRun(self._program, step, self._services), step, began, 0.0)

    def _advance(self, run: StepRun, step: int, since: float, ran_s: float) -> None:
        """Run the step to its end, or to where it has to be left. `ran_s` is what it has run before `since`."""
        fault: StepFault | None = None
        while True:
            try:
                run.advance()
            except Parked as parked:
                if self._park(parked.claim, run, step, ran_s + time.perf_counter() - since):
                    return
                continue
            except Cancelled:
                pass
            except StepFault as error:
                fault = error
            except BaseException as error:  # a callback that raised KeyboardInterrupt
                fault = StepFault("step")
                fault.__cause__ = error
            break
        self._end(step, ran_s + time.perf_counter() - since - self._services.waited_s)
        if fault is not None:
            self._on_fault(step, fault.node, fault.__cause__ or fault)

    def _park(self, claim: Claim, run: StepRun, step: int, ran_s: float) -> bool:
        """Leave the step until the claim is done. False if it is, by now."""

        def resume() -> None:
            self._parked = None
            self._services.resume(claim)
            self._advance(run, step, time.perf_counter(), ran_s)

        self._parked = step, time.monotonic()
        if claim.then(resume):
            self._services.expect()
            return True
        self._parked = None
        self._services.resume(claim)
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
        if proven:
            self._services.expect()
