"""`LoadedPlan` is the driver's handle of a plan that its workers have compiled: what its steps take and return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowml.devices import worker_of
from flowml.instructions import Fetch
from flowml.plan import ArraySpec, Plan
from flowml_runtime.driver.call_io import Feeder, Restorer
from flowml_runtime.driver.steps import Steps
from flowml_runtime.execution.inline import LocalStep
from flowml_runtime.execution.programs import Array, feed_slots

IN_FLIGHT_BYTES = 512 * 2**20
"""The most memory for inputs and results of the calls in flight. Two calls are allowed even if they need more."""


@dataclass(frozen=True)
class _FeedPort:
    """The inputs that are sent to one device to start a step."""

    worker: str
    device: str
    slots: tuple[int, ...]
    specs: tuple[ArraySpec, ...]


@dataclass(eq=False)
class LoadedPlan:
    """A plan that all of its workers have compiled. They wait for inputs."""

    plan_id: str
    plan: Plan
    workers: tuple[str, ...]
    ports: tuple[_FeedPort, ...] = field(repr=False)
    sources: dict[int, str] = field(repr=False)
    """The device that sends each fetched output."""
    steps: Steps = field(repr=False)
    prepare: Feeder = field(repr=False)
    restore: Restorer = field(repr=False)
    forget: Callable[[], None] = field(default=lambda: None, repr=False)
    """Makes the owner forget the plan. Called some time after it was unloaded to make room."""
    local: LocalStep | None = field(default=None, repr=False)
    """A direct way to run the plan in this process, if there is one; None after the plan is unloaded."""
    order: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held while a step is numbered and fed, so that every device gets the steps in the order of their numbers."""

    @property
    def direct(self) -> Callable[[Sequence[Any]], Sequence[Array]] | None:
        """The whole plan as a function of JAX arrays, if it is one task in this process and no trace is recorded."""
        return None if self.local is None or self.local.recorded else self.local.direct


def loaded(plan_id: str, plan: Plan, workers: tuple[str, ...], in_flight: int, local: LocalStep | None) -> LoadedPlan:
    """The handle of a plan that `workers` have loaded."""
    sources = {s: p.device for p in plan.programs for i in p.instructions if isinstance(i, Fetch) for s in i.slots}
    ports: list[_FeedPort] = []
    for program in plan.programs if plan.training is None else ():
        fed = feed_slots(program)
        ports.append(_FeedPort(worker_of(program.device), program.device, fed, tuple(plan.inputs[i] for i in fed)))
    nbytes = sum(s.nbytes for s in (*plan.inputs, *(o.spec for o in plan.outputs)))
    steps = Steps(plan.name, len(sources), min(in_flight, max(2, IN_FLIGHT_BYTES // max(nbytes, 1))))
    return LoadedPlan(plan_id, plan, workers, tuple(ports), sources, steps, Feeder(plan), Restorer(plan), local=local)
