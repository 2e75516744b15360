"""The executor: walks one device's static instruction list, once a step.

The list is turned into bound closures when the plan is loaded, so that a step is a loop over calls with
nothing left to decide. All waiting and sending goes through a `StepServices` object, which is what differs
between a dataflow plan (here) and a training plan (whose steps are begun by a replica, whose parameters
come from stores and whose steps may be abandoned half-way).

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
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

from flowml.plan import Feed, Fetch, Free, Instruction, Plan, Push, Read, Recv, Run, Send
from flowml_runtime.host.mailbox import Cancelled, Claim, Parked
from flowml_runtime.host.outbox import Outbox
from flowml_runtime.host.programs import Array, LoadedProgram, TaskFunction
from flowml_runtime.host.recorder import Recorder
from flowml_runtime.messages import DEADLINE_S


class StepServices(Protocol):
    """What a step asks of its surroundings. Any of these may raise `Cancelled` to give the step up."""

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Sequence[Array]: ...
    def read(self, step: int, store: int, leaves: Sequence[int]) -> Sequence[Array]: ...
    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]: ...
    def send(self, step: int, message: int, microbatch: int, arrays: Sequence[Array]) -> None: ...
    def push(self, step: int, store: int, part: int, arrays: Sequence[Array]) -> None: ...
    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Sequence[Array]) -> None: ...

    recorder: Recorder

    def way(self, message: int) -> str:
        """By which a message leaves this device, for whoever looks at a trace."""
        ...

    def should_abandon(self, step: int) -> bool:
        """Asked before every task: True gives the step up there."""
        ...


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
    def expect(self) -> None: ...  # the next message for a quick step is due within moments
    def expire(self, step: int) -> None:
        """Nobody waits for this step's values any longer: whoever does gets a DeadlineError."""
        ...


class StepFault(Exception):
    """A step failed at `node` (a task or an edge, as text); the reason is `__cause__`."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


Buffers = list[Any]
Operation = Callable[[Buffers, int, StepServices], None]


@dataclass(frozen=True)
class StepProgram:
    """A loaded program as the executor runs it: closures, and the buffers as they stand before each step."""

    device: str
    operations: tuple[Operation, ...]
    nodes: tuple[str, ...]
    buffers: tuple[Any, ...]
    instructions: tuple[Instruction, ...]
    sizes: tuple[int, ...]
    """Bytes of the message that an instruction sends or receives, else 0."""


def prepare(loaded: LoadedProgram) -> StepProgram:
    """Bind every instruction to what it needs, so that nothing is looked up during a step."""
    instructions = loaded.program.instructions
    used = [b for i in instructions for b in _buffers(i)] + list(loaded.constants)
    buffers: list[Any] = [None] * (max(used, default=-1) + 1)
    for buffer, array in loaded.constants.items():
        buffers[buffer] = array
    return StepProgram(
        device=loaded.name,
        operations=tuple(_bind(i, loaded.runs.get(n)) for n, i in enumerate(instructions)),
        nodes=tuple(describe(loaded.plan, i) for i in instructions),
        buffers=tuple(buffers),
        instructions=instructions,
        sizes=tuple(loaded.plan.messages[i.message].nbytes if isinstance(i, Send | Recv) else 0 for i in instructions),
    )


class StepRun:
    """One step under way, which can be left where a value is missing and taken up again."""

    __slots__ = ("_buffers", "_position", "_program", "_services", "_step")

    def __init__(self, program: StepProgram, step: int, services: StepServices) -> None:
        self._program = program
        self._step = step
        self._services = services
        self._buffers: Buffers = list(program.buffers)
        self._position = 0

    def advance(self) -> None:
        """Run to the end. Raises Parked where it can be taken up later, Cancelled if given up, StepFault if failed."""
        buffers, step, services = self._buffers, self._step, self._services
        operations = self._recorded() if services.recorder.on else self._program.operations
        position = self._position
        try:
            for position in range(self._position, len(operations)):
                operations[position](buffers, step, services)
        except Parked:
            self._position = position
            raise
        except (Cancelled, KeyboardInterrupt):
            raise
        except BaseException as error:  # a callback's SystemExit must not end the executor either
            raise StepFault(self._program.nodes[position]) from error

    def _recorded(self) -> list[Operation]:
        """The operations, each of which leaves a span."""
        program = self._program
        return [
            op if isinstance(instruction, Free) else _recorded(op, program.device, instruction, node, nbytes)
            for op, instruction, node, nbytes in zip(
                program.operations, program.instructions, program.nodes, program.sizes, strict=True
            )
        ]


def _recorded(operation: Operation, device: str, instruction: Instruction, node: str, nbytes: int) -> Operation:
    kind = _KINDS[type(instruction)]
    microbatch = getattr(instruction, "microbatch", 0)

    def recorded(buffers: Buffers, step: int, services: StepServices) -> None:
        way = services.way(instruction.message) if isinstance(instruction, Send) else ""
        with services.recorder.record(device, kind, node, step, microbatch, nbytes, way):
            operation(buffers, step, services)

    return recorded


_KINDS: dict[type, str] = {
    Feed: "feed",
    Read: "read",
    Recv: "receive",
    Run: "run",
    Send: "send",
    Push: "push",
    Fetch: "fetch",
}


def run_step(program: StepProgram, step: int, services: StepServices) -> None:
    """Run one step to its end, with services that wait. Raises Cancelled if it was given up, StepFault if it failed."""
    StepRun(program, step, services).advance()


def describe(plan: Plan, instruction: Instruction) -> str:
    """The node that an instruction stands for, as errors name it."""
    match instruction:
        case Run():
            return plan.tasks[instruction.task].name
        case Send() | Recv():
            return str(plan.messages[instruction.message])
        case Read() | Push() if plan.training is not None:
            return f"store {plan.training.stores[instruction.store].name}"
        case _:
            return type(instruction).__name__.lower()


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


def _buffers(instruction: Instruction) -> tuple[int, ...]:
    return instruction.inputs + instruction.outputs if isinstance(instruction, Run) else instruction.buffers


def _bind(instruction: Instruction, function: TaskFunction | None) -> Operation:
    match instruction:
        case Feed():
            return _bind_feed(instruction)
        case Read():
            return _bind_read(instruction)
        case Recv():
            return _bind_recv(instruction)
        case Run():
            assert function is not None
            return _bind_run(instruction, function)
        case Send():
            return _bind_send(instruction)
        case Push():
            return _bind_push(instruction)
        case Fetch():
            return _bind_fetch(instruction)
        case Free():
            return _bind_free(instruction)


def _gather(buffers: tuple[int, ...]) -> Callable[[Buffers], Sequence[Any]]:
    if len(buffers) == 1:
        only = buffers[0]
        return lambda held: (held[only],)
    return itemgetter(*buffers) if buffers else lambda held: ()


def _scatter(buffers: tuple[int, ...]) -> Callable[[Buffers, Sequence[Any]], None]:
    if len(buffers) == 1:
        only = buffers[0]

        def store_one(held: Buffers, values: Sequence[Any]) -> None:
            (held[only],) = values

        return store_one

    def store(held: Buffers, values: Sequence[Any]) -> None:
        for buffer, value in zip(buffers, values, strict=True):
            held[buffer] = value

    return store


def _bind_run(run: Run, function: TaskFunction) -> Operation:
    gather, scatter = _gather(run.inputs), _scatter(run.outputs)

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        if services.should_abandon(step):
            raise Cancelled
        scatter(buffers, function(*gather(buffers)))

    return operation


def _bind_free(free: Free) -> Operation:
    freed = free.buffers

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        for buffer in freed:
            buffers[buffer] = None

    return operation


def _bind_feed(feed: Feed) -> Operation:
    scatter = _scatter(feed.buffers)
    slots, microbatch = feed.slots, feed.microbatch

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        scatter(buffers, services.feed(step, slots, microbatch))

    return operation


def _bind_read(read: Read) -> Operation:
    scatter = _scatter(read.buffers)
    store, leaves = read.store, read.leaves

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        scatter(buffers, services.read(step, store, leaves))

    return operation


def _bind_recv(recv: Recv) -> Operation:
    scatter = _scatter(recv.buffers)
    message, microbatch = recv.message, recv.microbatch

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        scatter(buffers, services.receive(step, message, microbatch))

    return operation


def _bind_send(send: Send) -> Operation:
    gather = _gather(send.buffers)
    message, microbatch = send.message, send.microbatch

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        services.send(step, message, microbatch, gather(buffers))

    return operation


def _bind_push(push: Push) -> Operation:
    gather = _gather(push.buffers)
    store, part = push.store, push.part

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        services.push(step, store, part, gather(buffers))

    return operation


def _bind_fetch(fetch: Fetch) -> Operation:
    gather = _gather(fetch.buffers)
    slots, microbatch = fetch.slots, fetch.microbatch

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        services.fetch(step, slots, microbatch, gather(buffers))

    return operation


QUICK_S = 300e-6
"""A step that computes no longer than this may run on a receiving thread."""

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
        deadline_s: float = DEADLINE_S,
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
            quick = not self._unfinished and self._proven
            self._unfinished += 1
        if quick:
            self._turn.acquire()
            self._begin(step, arrays, parks=True)
        else:
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
