"""A training step that is compiled for one cluster, and the plans of it that workers have loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flowml.devices import worker_of
from flowml.numbers import whole_number
from flowml.plan import Training
from flowml.training.compiler import TrainingCompiled
from flowml.training.spec import TrainingSpec
from flowml.training.valued import is_given
from flowml.training.without import without
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.training.fingerprint import fingerprint
from flowml_runtime.driver.training.initial import by_optimizer
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
    gone: frozenset[str] = frozenset()
    """The workers whose replicas `handle` leaves out."""
    _update: str | None = None
    """What `update_name` has found. Tracing takes time, and JAX remembers something of each trace."""

    def update_name(self, state: Any, params: Any) -> str:
        """The name of the update for a state and parameters of the shapes of the program, as in `fingerprint`."""
        if self._update is None:
            self._update = fingerprint(by_optimizer(self.spec.optimizer, self.compiled.outer, state), params)
        return self._update

    @property
    def training(self) -> Training:
        training = self.compiled.plan.training
        assert training is not None
        return training

    @property
    def parameters(self) -> int:
        """The number of leaves of the parameters."""
        return sum(not is_given(path) for store in self.training.stores for path in store.paths)

    def workers(self, gone: Collection[str] = ()) -> tuple[str, ...]:
        """The workers that run it, without replicas that have a stage on those that are `gone`."""
        plan = without(self.compiled.plan, gone) if gone else self.compiled.plan
        return tuple(dict.fromkeys(worker_of(p.device) for p in plan.programs))

    def load(
        self, gone: Collection[str] = (), *, anew: bool = False, meanwhile: Callable[[], None] = lambda: None
    ) -> LoadedPlan:
        """Load the plan on its workers, or load it again if one of them was lost and is back.

        Calls `meanwhile` while they compile. Replicas with a stage on workers that are `gone` are left out. `anew`:
        under a new name, because workers of the old one were lost. The others still have their executables then, so
        they compile nothing.
        """
        known, left_out = self.handle, frozenset(gone)
        if known is not None and left_out == self.gone and not anew:
            meanwhile()
            self.handle = self.session.reload(known)
            return self.handle
        plan = self.compiled.plan
        self.handle, self.gone = self.session.load(without(plan, gone) if gone else plan, meanwhile), left_out
        if known is not None:
            self.session.release(known)
        return self.handle

    def load_beside(self, gone: Collection[str]) -> LoadedPlan:
        """Load the plan without replicas with a stage on these workers, beside the one that is loaded and in use.
        Workers that have joined run it once, so that their first step does not take longer than others."""
        plan, there = self.compiled.plan, () if self.handle is None else self.handle.workers
        joined = tuple(worker for worker in self.workers(gone) if worker not in there)
        return self.session.load(without(plan, gone) if gone else plan, lambda: None, joined)

    def take(self, handle: LoadedPlan, gone: Collection[str]) -> None:
        """Use a plan that `load_beside` has loaded."""
        if self.handle is not None:
            self.session.release(self.handle)
        self.handle, self.gone = handle, frozenset(gone)

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
