"""Runs one step of a simulated stage with the instructions of the real one, whose services it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowml_runtime.execution.programs import Array
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.execution.step_program import StepProgram
from flowml_runtime.protocol.training.actions import Start
from flowml_runtime.sim.program import At
from flowml_runtime.worker.training.examples import Fetched
from flowml_runtime.worker.training.model_state import ModelState

Arrays = Sequence[Array]


@dataclass
class Step:
    """A step of one stage: its buffers, and the services that its operations call."""

    at: At
    start: Start
    program: StepProgram
    buffers: list[Any]
    batch: Mapping[int, Array] | None
    """The leaves of the batch, if the driver feeds it."""
    feeds: Callable[[Step, Sequence[int], int], Arrays]
    reads: Callable[[Step, int], Arrays]
    model: ModelState
    leaves_out: Callable[[int], bool]
    recorder: Recorder
    given: Any = None
    """What a Read or a Recv takes."""
    sent: Arrays = ()
    fetched: Fetched = field(default_factory=Fetched)

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Arrays:
        return self.feeds(self, slots, microbatch)

    def read(self, step: int, store: int, leaves: Sequence[int]) -> Arrays:
        values = self.reads(self, store)
        return [values[i] for i in leaves]

    def receive(self, step: int, message: int, microbatch: int) -> Arrays:
        return self.given

    def send(self, step: int, message: int, microbatch: int, arrays: Arrays) -> None:
        self.sent = arrays

    def push(self, step: int, store: int, part: int, arrays: Arrays) -> None:
        self.sent = arrays

    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Arrays) -> None:
        for slot, array in zip(slots, arrays, strict=True):
            if not self.model.fetch(slot, microbatch, array):
                self.fetched.add(slot, microbatch, array)

    def keep(self, step: int, slots: Sequence[int], done: int | None, arrays: Arrays) -> None:
        raise NotImplementedError("a training plan keeps no outputs")

    def way(self, message: int) -> str:
        return ""

    def should_abandon(self, step: int) -> bool:
        return False

    def computed(self) -> None:
        return  # the executor knows when a task ends
