"""Binds a device's static instruction list to closures, and runs them as a step.

The closures are made when the plan is loaded, so that a step is a loop of calls without decisions. All waiting and
sending goes through a `StepServices` object, which differs between dataflow and training plans: in training a replica
begins the steps, parameters come from stores, and steps may be abandoned before their end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

from flowml.instructions import Feed, Fetch, Free, Instruction, Keep, Push, Read, Recv, Run, Send
from flowml.plan import Plan
from flowml_runtime.execution.left_out import binding
from flowml_runtime.execution.mailbox import Cancelled, Parked
from flowml_runtime.execution.programs import Array, LoadedProgram, TaskFunction
from flowml_runtime.execution.recorder import Recorder, now_ns


class StepServices(Protocol):
    """The operations that a step needs from the runtime. Any of them may raise `Cancelled` to end the step."""

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Sequence[Array]: ...
    def read(self, step: int, store: int, leaves: Sequence[int]) -> Sequence[Array]: ...
    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]: ...
    def send(self, step: int, message: int, microbatch: int, arrays: Sequence[Array]) -> None: ...
    def push(self, step: int, store: int, part: int, arrays: Sequence[Array]) -> None: ...
    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Sequence[Array]) -> None: ...
    def keep(self, step: int, slots: Sequence[int], done: int | None, arrays: Sequence[Array]) -> None: ...

    recorder: Recorder

    def way(self, message: int) -> str:
        """How a message is sent from this device, for traces."""
        ...

    def should_abandon(self, step: int) -> bool:
        """Called before every task. True ends the step there."""
        ...

    def leaves_out(self, microbatch: int, /) -> bool:
        """Whether the step leaves out this microbatch, if it may leave out any. See `left_out`."""
        ...

    def computed(self) -> None:
        """Called after the last task of a microbatch, if microbatches may be left out."""
        ...


class StepFault(Exception):
    """A step failed at `node` (the text of a task or an edge). `__cause__` is the reason."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


Buffers = list[Any]
Operation = Callable[[Buffers, int, StepServices], None]


@dataclass(frozen=True)
class StepProgram:
    """A loaded program as the executor runs it: closures, and the initial buffers of each step."""

    device: str
    operations: tuple[Operation, ...]
    nodes: tuple[str, ...]
    buffers: tuple[Any, ...]
    instructions: tuple[Instruction, ...]
    sizes: tuple[int, ...]
    """Bytes of the message that an instruction sends or receives, else 0."""


def prepare(loaded: LoadedProgram) -> StepProgram:
    """Bind every instruction to its task and buffers, so that a step looks nothing up."""
    instructions = loaded.program.instructions
    bind = binding(loaded.plan, instructions)
    used = [b for i in instructions for b in _buffers(i)] + list(loaded.constants)
    buffers: list[Any] = [None] * (max(used, default=-1) + 1)
    for buffer, array in loaded.constants.items():
        buffers[buffer] = array
    return StepProgram(
        device=loaded.name,
        operations=tuple(bind(n, _bind(i, loaded.runs.get(n))) for n, i in enumerate(instructions)),
        nodes=tuple(describe(loaded.plan, i) for i in instructions),
        buffers=tuple(buffers),
        instructions=instructions,
        sizes=tuple(loaded.plan.messages[i.message].nbytes if isinstance(i, Send | Recv) else 0 for i in instructions),
    )


class StepRun:
    """One running step. It can be parked where a value is missing, and resumed later."""

    __slots__ = ("_buffers", "_left_ns", "_position", "_program", "_services", "_step")

    def __init__(self, program: StepProgram, step: int, services: StepServices) -> None:
        self._program = program
        self._step = step
        self._services = services
        self._buffers: Buffers = list(program.buffers)
        self._position = 0
        self._left_ns = 0
        """Time at which it was parked at this position; 0 if it was not."""

    def advance(self) -> None:
        """Run to the end. Raises Parked where it must be resumed later, Cancelled if cancelled, StepFault if failed."""
        buffers, step, services = self._buffers, self._step, self._services
        operations = self._recorded() if services.recorder.on else self._program.operations
        first = position = self._position
        try:
            for position in range(self._position, len(operations)):
                operations[position](buffers, step, services)
        except Parked:
            if position > first or not self._left_ns:
                self._left_ns = now_ns()
            self._position = position
            raise
        except (Cancelled, KeyboardInterrupt):
            raise
        except BaseException as error:  # a callback's SystemExit must not end the executor either
            raise StepFault(self._program.nodes[position]) from error

    def _recorded(self) -> list[Operation]:
        """The operations, each of which records a span. The span of a parked operation begins when it was parked."""
        program = self._program
        operations = [
            op if isinstance(instruction, Free) else _recorded(op, program.device, instruction, node, nbytes, 0)
            for op, instruction, node, nbytes in zip(
                program.operations, program.instructions, program.nodes, program.sizes, strict=True
            )
        ]
        if self._left_ns:
            at = self._position
            operations[at] = _recorded(
                program.operations[at],
                program.device,
                program.instructions[at],
                program.nodes[at],
                program.sizes[at],
                self._left_ns,
            )
        return operations


def _recorded(
    operation: Operation, device: str, instruction: Instruction, node: str, nbytes: int, began_ns: int
) -> Operation:
    kind = _KINDS[type(instruction)]
    microbatch = getattr(instruction, "microbatch", 0)

    def recorded(buffers: Buffers, step: int, services: StepServices) -> None:
        way = services.way(instruction.message) if isinstance(instruction, Send) else ""
        with services.recorder.record(device, kind, node, step, microbatch, nbytes, way, began_ns):
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
    Keep: "keep",
}


def run_step(program: StepProgram, step: int, services: StepServices) -> None:
    """Run one step to its end with services that wait. Raises Cancelled if it was cancelled, StepFault if it failed."""
    StepRun(program, step, services).advance()


def describe(plan: Plan, instruction: Instruction) -> str:
    """The name of an instruction's task, edge or store in errors."""
    match instruction:
        case Run():
            return plan.tasks[instruction.task].name
        case Send() | Recv():
            return str(plan.messages[instruction.message])
        case Read() | Push() if plan.training is not None:
            return f"store {plan.training.stores[instruction.store].name}"
        case _:
            return type(instruction).__name__.lower()


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
        case Keep():
            return _bind_keep(instruction)
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

    if not buffers or buffers != tuple(range(buffers[0], buffers[0] + len(buffers))):
        return store
    here = slice(buffers[0], buffers[0] + len(buffers))

    def store_in_a_row(held: Buffers, values: Sequence[Any]) -> None:
        if len(values) != len(buffers):
            raise ValueError(f"{len(values)} values for {len(buffers)} buffers")
        held[here] = values

    return store_in_a_row


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


def _bind_keep(keep: Keep) -> Operation:
    gather = _gather(keep.buffers)
    slots, done = keep.slots, keep.done

    def operation(buffers: Buffers, step: int, services: StepServices) -> None:
        services.keep(step, slots, done, gather(buffers))

    return operation
