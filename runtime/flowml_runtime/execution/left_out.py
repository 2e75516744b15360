"""Binds the instructions of a step that may leave out its last microbatches; see `flowml.training.cuts`.

What belongs to a microbatch that is left out does nothing, with two exceptions. A message is sent without arrays, so
that its receiver leaves the microbatch out too. A task that adds the microbatch to a sum passes the sum on, so that the
push at the end of the list finds it.

A task is waited for, because XLA computes asynchronously, and the time that it takes decides what is left out. If a
number of microbatches is enough for all replicas, the services hear of the last task of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flowml.instructions import Feed, Fetch, Instruction, Recv, Run, Send
from flowml.plan import Plan
from flowml.training.cuts import cuts, ends
from flowml_runtime.execution.services import ready

if TYPE_CHECKING:
    from flowml_runtime.execution.step_program import Buffers, Operation, StepServices


def binding(plan: Plan, code: Sequence[Instruction]) -> Callable[[int, Operation], Operation]:
    """How the operations of the instructions at these positions are changed, so that a step may leave out
    microbatches."""
    if plan.training is None or not cuts(plan.training):
        return lambda position, operation: operation
    last = ends(code)
    return lambda position, operation: _bind(code[position], operation, position in last)


def _bind(instruction: Instruction, operation: Operation, ends_microbatch: bool) -> Operation:
    match instruction:
        case Run():
            return _run(instruction, operation, ends_microbatch)
        case Recv() if instruction.microbatch:
            return _recv(instruction)
        case Send() if instruction.microbatch:
            return _send(instruction, operation)
        case Feed() | Fetch() if instruction.microbatch:
            return _skipped(instruction, operation)
        case _:
            return operation


def _skipped(instruction: Feed | Fetch, operation: Operation) -> Operation:
    microbatch = instruction.microbatch

    def either(buffers: Buffers, step: int, services: StepServices) -> None:
        if not services.leaves_out(microbatch):
            operation(buffers, step, services)

    return either


def _run(run: Run, operation: Operation, ends_microbatch: bool) -> Operation:
    outputs, microbatch, adds = run.outputs, run.microbatch, run.role == "add"
    always = microbatch == 0 or run.role == "finish"

    def either(buffers: Buffers, step: int, services: StepServices) -> None:
        if always or not services.leaves_out(microbatch):
            operation(buffers, step, services)
            ready([buffers[b] for b in outputs])
            if ends_microbatch:
                services.computed()
        elif adds:
            for old, new in zip(run.inputs, outputs, strict=False):  # the sum, and then the microbatch's own values
                buffers[new] = buffers[old]

    return either


def _recv(recv: Recv) -> Operation:
    message, microbatch = recv.message, recv.microbatch

    def either(buffers: Buffers, step: int, services: StepServices) -> None:
        if services.leaves_out(microbatch):
            return
        arrays = services.receive(step, message, microbatch)
        if not services.leaves_out(microbatch):  # as the message may have said
            for buffer, array in zip(recv.buffers, arrays, strict=True):
                buffers[buffer] = array

    return either


def _send(send: Send, operation: Operation) -> Operation:
    message, microbatch = send.message, send.microbatch

    def either(buffers: Buffers, step: int, services: StepServices) -> None:
        if services.leaves_out(microbatch):
            services.send(step, message, microbatch, ())
        else:
            operation(buffers, step, services)

    return either
