"""The executor: walks one device's static instruction list, once a step.

The list is turned into bound closures when the plan is loaded, so that a step is a loop over calls with
nothing left to decide. All waiting and sending goes through a `StepServices` object, which is what differs
between a dataflow plan (here) and a training plan (whose steps are begun by a replica, whose parameters
come from stores and whose steps may be abandoned half-way).

    feed queue -> executor thread: for each step { run_step(program, step, services) } -> fetches to the driver

A step that fails is reported to the driver and the executor goes on to the next.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

from flowml.plan import Feed, Fetch, Free, Instruction, Plan, Push, Read, Recv, Run, Send
from flowml_runtime.host.mailbox import Cancelled
from flowml_runtime.host.programs import Array, LoadedProgram, TaskFunction


class StepServices(Protocol):
    """What a step asks of its surroundings. Any of these may raise `Cancelled` to give the step up."""

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Sequence[Array]: ...
    def read(self, step: int, store: int, leaves: Sequence[int]) -> Sequence[Array]: ...
    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]: ...
    def send(self, step: int, message: int, microbatch: int, arrays: Sequence[Array]) -> None: ...
    def push(self, step: int, store: int, part: int, arrays: Sequence[Array]) -> None: ...
    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Sequence[Array]) -> None: ...
    def should_abandon(self, step: int) -> bool:
        """Asked before every task: True gives the step up there."""
        ...


class FedServices(StepServices, Protocol):
    """Services of steps that a driver feeds: `begin` takes the feed in, `end` lets go of it."""

    def begin(self, arrays: Sequence[Array]) -> None: ...
    def end(self, step: int) -> None: ...


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
    )


def run_step(program: StepProgram, step: int, services: StepServices) -> None:
    """Run one step to its end. Raises Cancelled if it was given up, StepFault if it failed."""
    buffers = list(program.buffers)
    position = 0
    try:
        for position, operation in enumerate(program.operations):  # noqa: B007  (names the node of a failure)
            operation(buffers, step, services)
    except (Cancelled, KeyboardInterrupt):
        raise
    except BaseException as error:  # a callback's SystemExit must not end the executor either
        raise StepFault(program.nodes[position]) from error


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


class Executor:
    """The thread of one (plan, device): runs the fed steps in the order in which they were fed."""

    def __init__(
        self,
        program: StepProgram,
        services: FedServices,
        on_fault: Callable[[int, str, BaseException], None],
        name: str,
    ) -> None:
        """`on_fault(step, node, error)` is called on the executor's thread for each step that fails."""
        self._program = program
        self._services = services
        self._on_fault = on_fault
        self._feeds: queue.SimpleQueue[tuple[int, Sequence[Array]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def feed(self, step: int, arrays: Sequence[Array]) -> None:
        """Queue a step. The driver bounds how many are in flight, and with them this queue."""
        self._feeds.put((step, arrays))

    def stop(self) -> None:
        """End after the step that runs now. Does not wait."""
        self._feeds.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait until the thread is gone. False if it is still there, e.g. inside a callback that never returns."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (fed := self._feeds.get()) is not None:
            step, arrays = fed
            self._step(step, arrays)
            del fed, arrays  # else they stay alive until the next feed comes

    def _step(self, step: int, arrays: Sequence[Array]) -> None:
        try:
            self._services.begin(arrays)
            run_step(self._program, step, self._services)
        except Cancelled:
            return
        except StepFault as fault:
            self._on_fault(step, fault.node, fault.__cause__ or fault)
        except BaseException as error:  # a feed that does not fit, or a callback that raised KeyboardInterrupt
            self._on_fault(step, "feed", error)
        finally:
            self._services.end(step)
