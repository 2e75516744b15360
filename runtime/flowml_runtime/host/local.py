"""The short way: a plan that is one program, on a worker inside the caller's own process.

Handing a step to the executor's thread and waiting for its answer costs several times what a small task
does. Where one device holds the whole plan and nothing of it is under way, the caller may as well walk the
instruction list itself. The results are then as asynchronous as those of a jitted call.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowml.plan import Fetch
from flowml_runtime.host.executor import StepProgram, run_step
from flowml_runtime.host.programs import Array, JaxDevice, LoadedProgram
from flowml_runtime.host.services import adopt, at_home, lendable, must_adopt


class LocalStep:
    """Runs steps of a loaded program on the caller's thread. Safe to use from several threads at once."""

    def __init__(self, loaded: LoadedProgram, program: StepProgram) -> None:
        self._program = program
        self._device = loaded.device
        self._slots = sum(len(i.slots) for i in loaded.program.instructions if isinstance(i, Fetch))
        self._adopts = must_adopt(loaded.device)
        self._home = at_home(loaded.device)

    def __call__(self, step: int, inputs: Sequence[Array]) -> list[Array]:
        """The fetched outputs by slot. Raises StepFault."""
        given = adopt(inputs, self._device) if self._adopts else inputs
        services = _LocalServices(given, self._slots, self._device, home=self._home)
        run_step(self._program, step, services)
        return services.outputs


class _LocalServices:
    """The services of one local step: inputs at hand, outputs kept."""

    def __init__(self, inputs: Sequence[Array], slots: int, device: JaxDevice, *, home: bool) -> None:
        self._inputs = inputs
        self._device = device
        self._home = home
        self.outputs: list[Array] = [None] * slots

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Sequence[Array]:
        return [self._inputs[s] for s in slots]

    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Sequence[Array]) -> None:
        held = arrays if self._home else lendable(arrays, self._device)
        for slot, array in zip(slots, held, strict=True):
            self.outputs[slot] = array

    def should_abandon(self, step: int) -> bool:
        return False

    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]:
        raise NotImplementedError("a program that is the whole plan receives nothing")

    def send(self, step: int, message: int, microbatch: int, arrays: Sequence[Array]) -> None:
        raise NotImplementedError("a program that is the whole plan sends nothing")

    def read(self, step: int, store: int, leaves: Sequence[int]) -> Sequence[Array]:
        raise NotImplementedError("a dataflow plan has no stores to read")

    def push(self, step: int, store: int, part: int, arrays: Sequence[Array]) -> None:
        raise NotImplementedError("a dataflow plan has no stores to push to")
