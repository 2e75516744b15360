"""Hand-made plans: small programs with known instruction lists, so that the runtime is tested without the compiler."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import cloudpickle
import jax
import jax.numpy as jnp
import msgspec

from flowml.instructions import Feed, Fetch, Free, Instruction, Recv, Run, Send
from flowml.ir._jax import struct_of
from flowml.ir.exports import export
from flowml.plan import ArraySpec, Constant, Estimate, Message, Output, Plan, Program, Task, Transfer, fingerprint

W0, W1 = "worker:0/cpu:0", "worker:1/cpu:0"
VECTOR = ArraySpec((4,), "float32")
NO_ESTIMATE = Estimate(step_seconds=0.0, peak_bytes={}, transfer_bytes=0, single_device_seconds=0.0)

Function = Callable[..., Sequence[Any]]


class PlanBuilder:
    """Collects tasks, messages and programs; `build` makes the plan."""

    def __init__(self, name: str = "f") -> None:
        self.name = name
        self.tasks: list[Task] = []
        self.executables: dict[str, bytes] = {}
        self.messages: list[Message] = []
        self.programs: list[Program] = []
        self.constants: list[Constant] = []

    def xla(
        self,
        name: str,
        function: Function,
        inputs: Sequence[ArraySpec],
        outputs: Sequence[ArraySpec],
        donate: Sequence[int] = (),
    ) -> int:
        data = export(lambda *a: tuple(function(*a)), [struct_of(s) for s in inputs], ["cpu"])
        return self._task(Task(name, "xla", "", tuple(inputs), tuple(outputs), tuple(donate)), data)

    def python(self, name: str, function: Function, inputs: Sequence[ArraySpec], outputs: Sequence[ArraySpec]) -> int:
        data = cloudpickle.dumps(function)
        return self._task(Task(name, "python", "", tuple(inputs), tuple(outputs)), data)

    def message(self, source: str, destination: str, spec: ArraySpec = VECTOR, layer: str = "h") -> int:
        transfer = Transfer(source, destination, spec.shape, spec.dtype, spec.nbytes, layer)
        self.messages.append(Message(source, destination, (transfer,)))
        return len(self.messages) - 1

    def program(self, device: str, *instructions: Instruction, constants: Sequence[tuple[int, int]] = ()) -> None:
        self.programs.append(Program(device, instructions, tuple(constants)))

    def build(self, inputs: Sequence[ArraySpec], outputs: Sequence[Output]) -> Plan:
        return Plan(
            name=self.name,
            devices=tuple(p.device for p in self.programs),
            programs=tuple(self.programs),
            tasks=tuple(self.tasks),
            messages=tuple(self.messages),
            executables=self.executables,
            inputs=tuple(inputs),
            input_names=tuple(f"x{i}" for i in range(len(inputs))),
            outputs=tuple(outputs),
            constants=tuple(self.constants),
            estimate=NO_ESTIMATE,
        )

    def _task(self, task: Task, data: bytes) -> int:
        key = fingerprint(data)
        self.tasks.append(msgspec.structs.replace(task, executable=key))
        self.executables[key] = data
        return len(self.tasks) - 1


def fetched(spec: ArraySpec = VECTOR, index: int = 0) -> Output:
    return Output(spec, "fetch", index)


def one_device(function: Function = lambda x: (jnp.sin(x) * 2,), spec: ArraySpec = VECTOR, device: str = W0) -> Plan:
    """x -> function(x) on one device."""
    build = PlanBuilder()
    task = build.xla("only", function, [spec], [spec])
    build.program(device, Feed((0,), (0,)), Run(task, (0,), (1,)), Free((0,)), Fetch((0,), (1,)), Free((1,)))
    return build.build([spec], [fetched(spec)])


def chain(devices: Sequence[str] = (W0, W1), spec: ArraySpec = VECTOR) -> Plan:
    """x -> x + 1 on the first device, h * 2 on each of the others in turn."""
    build = PlanBuilder("chain")
    add = build.xla("add", lambda x: (x + 1,), [spec], [spec])
    double = build.xla("double", lambda h: (h * 2,), [spec], [spec])
    edges = [build.message(a, b, spec) for a, b in pairwise(devices)]
    for n, device in enumerate(devices):
        source = Feed((0,), (0,)) if n == 0 else Recv(edges[n - 1], (0,))
        sink = Fetch((0,), (1,)) if n == len(devices) - 1 else Send(edges[n], (1,))
        build.program(device, source, Run(add if n == 0 else double, (0,), (1,)), Free((0,)), sink, Free((1,)))
    return build.build([spec], [fetched(spec)])


def callback_then_double(callback: Callable[[Any], Any]) -> Plan:
    """x -> callback(x) as Python on worker 0, h * 2 on worker 1."""
    build = PlanBuilder("with_callback")
    python = build.python("callback", lambda x: [callback(x)], [VECTOR], [VECTOR])
    double = build.xla("double", lambda h: (h * 2,), [VECTOR], [VECTOR])
    edge = build.message(W0, W1)
    build.program(W0, Feed((0,), (0,)), Run(python, (0,), (1,)), Send(edge, (1,)), Free((0, 1)))
    build.program(W1, Recv(edge, (0,)), Run(double, (0,), (1,)), Fetch((0,), (1,)), Free((0, 1)))
    return build.build([VECTOR], [fetched()])


def never_sent() -> Plan:
    """Worker 1 waits for a value that worker 0 does not send: what a stuck transfer looks like."""
    build = PlanBuilder("stuck")
    double = build.xla("double", lambda h: (h * 2,), [VECTOR], [VECTOR])
    edge = build.message(W0, W1)
    build.program(W0, Feed((0,), (0,)), Free((0,)))
    build.program(W1, Recv(edge, (0,)), Run(double, (0,), (1,)), Fetch((0,), (1,)), Free((0, 1)))
    return build.build([VECTOR], [fetched()])


def split_key() -> Plan:
    """A typed key in; its two halves out, with a draw from the first on another device."""
    build = PlanBuilder("keys")
    key = ArraySpec((), "key<fry>")
    halves = ArraySpec((2,), key.dtype)
    split = build.xla("split", lambda k: (jax.random.split(k),), [key], [halves])
    draw = build.xla("draw", lambda k: (jax.random.normal(k[0], (4,)),), [halves], [VECTOR])
    edge = build.message(W0, W1, halves)
    build.program(W0, Feed((0,), (0,)), Run(split, (0,), (1,)), Send(edge, (1,)), Fetch((0,), (1,)))
    build.program(W1, Recv(edge, (0,)), Run(draw, (0,), (1,)), Fetch((1,), (1,)))
    return build.build([key], [fetched(halves), fetched(VECTOR, 1)])


class Gate:
    """Holds callbacks on thread workers until it is opened. Found by name, since callbacks travel pickled."""

    all: ClassVar[dict[str, Gate]] = {}

    def __init__(self, name: str) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        Gate.all[name] = self


def through_gate(name: str, x: Any) -> Any:
    gate = Gate.all[name]
    gate.entered.release()
    if not gate.opened.wait(60.0):
        raise TimeoutError(f"gate {name} was never opened")
    return x


def gated(name: str) -> Plan:
    """x -> x on worker 0, as soon as the gate `name` is open, doubled on worker 1."""
    return callback_then_double(functools.partial(through_gate, name))
