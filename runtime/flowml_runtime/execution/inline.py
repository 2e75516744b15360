"""Runs the steps of a single-program plan on the caller's thread, if its worker is in the caller's process.

Passing a step to the executor's thread and waiting for the answer costs several times as much as a small task. If one
device holds the whole plan and no step of it is in flight, the caller runs the instruction list itself. The results
are then as asynchronous as those of a jitted call. So are the values that stay on the worker: the caller takes its
inputs from the worker's kept values and leaves its outputs there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any

from flowml.instructions import Feed, Fetch, Free, Run
from flowml.ir._jax import explicit_transfers
from flowml.plan import Plan
from flowml_runtime.execution.kept import Cell, Kept, cells_of, value_of
from flowml_runtime.execution.programs import (
    Array,
    JaxDevice,
    LoadedProgram,
    TaskFunction,
    feed_slots,
    overwritten_slots,
)
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.execution.services import adopt, at_home, host_view, must_adopt, own_array
from flowml_runtime.execution.step_program import StepProgram, run_step


@dataclass(frozen=True)
class Held:
    """Which inputs of a call are kept on the worker, and what its step does with them."""

    which: bytes = b""
    """For each input whether it is kept."""
    slots: tuple[int, ...] = ()
    sole: tuple[bool, ...] = ()
    """For each of `slots` whether the step overwrites the value."""
    last: tuple[bool, ...] = ()
    """For each input whether it is kept, and given to the step for good."""
    own: tuple[int, ...] = ()
    """The inputs that the step overwrites and that are not kept."""


@dataclass(frozen=True)
class Taken:
    """The kept values that a step took, in the order of `held.slots`."""

    held: Held
    values: Sequence[Cell | Array]


class LocalStep:
    """Runs steps of a loaded program on the caller's thread. Safe to use from several threads at once."""

    def __init__(
        self, loaded: LoadedProgram, program: StepProgram, recorder: Recorder, kept: Kept, driver: str
    ) -> None:
        """`kept` has the values of `driver`, in whose process this is."""
        self._program = program
        self._recorder = recorder
        self._device = loaded.device
        self._slots = sum(len(i.slots) for i in loaded.program.instructions if isinstance(i, Fetch))
        self._adopts = must_adopt(loaded.device)
        self._home = at_home(loaded.device)
        self.direct = _direct(loaded) if self._home and not self._adopts else None
        """The task, from the plan's flat inputs to its flat outputs, if the plan consists of this task only."""
        self._kept = kept
        self._driver = driver
        self._overwritten = overwritten_slots(loaded)
        self._donated = frozenset(loaded.plan.donated).intersection(feed_slots(loaded.program))
        self._held = Held()
        """What the last call held."""
        self.value: Callable[[int], Array] = partial(kept.value, driver)
        """A kept value by its number."""
        self.keeps = all(task.kind == "xla" for task in loaded.plan.tasks)
        """Whether steps with values that stay may run here. One that calls Python would hold up its caller."""

    @property
    def recorded(self) -> bool:
        """Whether steps are recorded, which `direct` does not do."""
        return self._recorder.on

    def __call__(self, step: int, inputs: Sequence[Array]) -> list[Array]:
        """The fetched outputs by slot. Raises StepFault."""
        return self._run(step, inputs).outputs

    def take(self, names: Sequence[int]) -> Taken | None:
        """The kept values among the inputs: `names` has their numbers, and 0 for other inputs. `keep` gives them back.

        None if a step would have to wait for one. Those that the step overwrites are the driver's no more.
        """
        held = self._held_of(names)
        last = list(compress(names, held.last))
        values = self._kept.take(self._driver, list(filter(None, names)), held.sole, last)
        return None if values is None else Taken(held, values)

    def _held_of(self, names: Sequence[int]) -> Held:
        """Which inputs are kept. A loop has the same ones in every call."""
        which = bytes(map(bool, names))
        held = self._held
        if held.which != which:
            slots = tuple([slot for slot, there in enumerate(which) if there])
            held = self._held = Held(
                which,
                slots,
                tuple([slot in self._overwritten for slot in slots]),
                tuple([bool(there) and slot in self._donated for slot, there in enumerate(which)]),
                tuple(sorted(self._overwritten.difference(slots))),
            )
        return held

    def keep(self, step: int, inputs: Sequence[Array], taken: Taken, first: int) -> list[Array]:
        """Run a step with values that it took. Its outputs that stay get the numbers `first` + slot.

        Returns the fetched outputs by slot. Raises StepFault.
        """
        try:
            given = list(inputs)
            for slot in taken.held.own:
                given[slot] = own_array(given[slot])
            for slot, value in zip(taken.held.slots, map(value_of, taken.values), strict=True):
                given[slot] = value
            services = self._run(step, given)
        finally:
            self._kept.leave(cells_of(taken.values))
        kept = services.kept
        self._kept.put(self._driver, [first + slot for slot in kept], list(kept.values()))
        return services.outputs

    def _run(self, step: int, inputs: Sequence[Array]) -> _LocalServices:
        with explicit_transfers():
            given = adopt(inputs, self._device) if self._adopts else inputs
            services = _LocalServices(given, self._slots, self._device, self._recorder, home=self._home)
            run_step(self._program, step, services)
        return services


def _direct(loaded: LoadedProgram) -> Callable[[Sequence[Any]], Sequence[Array]] | None:
    """The plan's only task; None unless the plan is one task of its inputs and its outputs are distinct results."""
    plan, buffers = loaded.plan, dict[int, int]()
    task: TaskFunction | None = None
    inputs: tuple[int, ...] = ()
    outputs: dict[int, int] = {}
    results: tuple[int, ...] = ()
    for position, instruction in enumerate(loaded.program.instructions):
        match instruction:
            case Feed():
                buffers.update(zip(instruction.buffers, instruction.slots, strict=True))
            case Run() if (
                task is None and plan.tasks[instruction.task].kind == "xla" and set(instruction.inputs) <= set(buffers)
            ):
                task, inputs, results = loaded.runs[position], instruction.inputs, instruction.outputs
            case Fetch():
                outputs.update(zip(instruction.slots, instruction.buffers, strict=True))
            case Free():
                pass
            case _:
                return None
    if task is None or not _is_plain(plan):
        return None
    taken = [buffers[b] for b in inputs]
    given = [results.index(outputs[o.index]) for o in plan.outputs if outputs[o.index] in results]
    if len(given) < len(plan.outputs) or len(set(given)) < len(given):
        return None
    if given == list(range(len(results))):
        return lambda leaves: task(*[leaves[i] for i in taken])

    def call(leaves: Sequence[Any]) -> Sequence[Array]:
        values = task(*[leaves[i] for i in taken])
        return [values[i] for i in given]

    return call


def _is_plain(plan: Plan) -> bool:
    """Whether arrays pass unchanged: no typed keys or weak types, and no outputs that are constants or arguments."""
    outputs = all(o.kind == "fetch" and not o.spec.weak_type and o.spec.dtype != "float0" for o in plan.outputs)
    specs = (*plan.inputs, *(o.spec for o in plan.outputs))
    return outputs and not any(s.dtype.startswith("key<") for s in specs)


class _LocalServices:
    """The services of one local step: it holds the inputs and collects the outputs."""

    def __init__(
        self, inputs: Sequence[Array], slots: int, device: JaxDevice, recorder: Recorder, *, home: bool
    ) -> None:
        self.recorder = recorder
        self._inputs = inputs
        self._device = device
        self._home = home
        self.outputs: list[Array] = [None] * slots
        self.kept: dict[int, Array] = {}
        """The outputs that stay, by slot."""

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Sequence[Array]:
        return [self._inputs[s] for s in slots]

    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Sequence[Array]) -> None:
        held = arrays if self._home else host_view(arrays, self._device)
        for slot, array in zip(slots, held, strict=True):
            self.outputs[slot] = array

    def keep(self, step: int, slots: Sequence[int], done: int | None, arrays: Sequence[Array]) -> None:
        self.kept.update(zip(slots, arrays, strict=True))

    def should_abandon(self, step: int) -> bool:
        return False

    def leaves_out(self, microbatch: int) -> bool:
        return False

    def computed(self) -> None:
        return

    def way(self, message: int) -> str:
        return ""

    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]:
        raise NotImplementedError("a program that is the whole plan receives nothing")

    def send(self, step: int, message: int, microbatch: int, arrays: Sequence[Array]) -> None:
        raise NotImplementedError("a program that is the whole plan sends nothing")

    def read(self, step: int, store: int, leaves: Sequence[int]) -> Sequence[Array]:
        raise NotImplementedError("a dataflow plan has no stores to read")

    def push(self, step: int, store: int, part: int, arrays: Sequence[Array]) -> None:
        raise NotImplementedError("a dataflow plan has no stores to push to")
