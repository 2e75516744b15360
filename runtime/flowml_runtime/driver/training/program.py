"""A training step that is compiled for one cluster, and the plans of it that workers have loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowml.devices import worker_of
from flowml.numbers import whole_number
from flowml.plan import Training
from flowml.training.compiler import TrainingCompiled, TrainingSpec
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.training.training_session import TrainingSession
from flowml_runtime.protocol.training.terms import Terms


@dataclass(eq=False)
class Program:
    """A training step compiled for one cluster, shapes, dtypes and JAX settings. The first fit loads it."""

    compiled: TrainingCompiled
    session: TrainingSession
    spec: TrainingSpec
    handle: LoadedPlan | None = None
    next_step: int = 0

    @property
    def training(self) -> Training:
        training = self.compiled.plan.training
        assert training is not None
        return training

    @property
    def parameters(self) -> int:
        """The number of leaves of the parameters."""
        return sum(len(store.leaves) for store in self.training.stores)

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers that run it."""
        return tuple(dict.fromkeys(worker_of(p.device) for p in self.compiled.plan.programs))

    def load(self) -> LoadedPlan:
        """Load the plan on its workers, or load it again if one of them was lost and is back."""
        known = self.handle
        self.handle = self.session.load(self.compiled.plan) if known is None else self.session.reload(known)
        return self.handle

    def load_again(self) -> LoadedPlan:
        """Load the plan under a new name, because workers of the old one were lost. The others still have their
        executables then, so they compile nothing."""
        old, self.handle = self.handle, self.session.load(self.compiled.plan)
        if old is not None:
            self.session.release(old)
        return self.handle

    def reserve(self, total: int) -> int:
        """Reserve step numbers for a fit of `total` steps; returns the first. No other fit of the plan uses them."""
        first = self.next_step
        end = first + Terms.of(self.training, total).most_clocks
        whole_number("the number of work items of all fits of this Trainer", end * len(self.training.replicas))
        self.next_step = end
        return first


def discard(programs: Mapping[Any, Program]) -> None:
    """Request that the plans of a deleted trainer be unloaded. A finalizer may run on any thread, so it never waits."""
    for program in programs.values():
        if program.handle is not None:
            program.session.release(program.handle)
