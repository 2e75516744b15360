"""What a fit needs of a cluster: that of real workers (`session.Session`), or a simulated one (`sim.session`)."""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from flowml.devices import Device
from flowml.errors import FlowmlError, PlacementError
from flowml.placement import Placement
from flowml.placement.links import Links
from flowml.plan import Plan
from flowml_runtime import wire
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.session import PlanHandler
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.protocol.training.driver import TrainingDriver

T = TypeVar("T")


@dataclass(frozen=True)
class Simulated:
    """The clock of a simulated fit at its end: virtual seconds, the hash of all events, and their number."""

    virtual_seconds: float
    trace_hash: str
    events: int


class FitEndpoint(Protocol):
    """Sends the driver's messages."""

    name: str

    def send(self, peer: str, message: wire.Wire, arrays: Sequence[Any] = ()) -> None: ...
    def way(self, peer: str) -> str: ...


class Time(Protocol):
    """The time of a fit, real or virtual."""

    @property
    def driver(self) -> type[TrainingDriver]:
        """The class of the driver's machine. A simulation as machine code has its own."""
        ...

    def now(self) -> float:
        """The time in seconds, from some beginning."""
        ...

    def next(self, inbox: queue.SimpleQueue[T], until: float, /, *, patient: bool) -> T:
        """The next message of a fit. Raises queue.Empty if none comes for about a second, or before `until`. `patient`:
        those that want no answer may come later than they arrive, behind others that want one."""
        ...

    def begin_fit(self, *, goes_on: bool) -> None:
        """A fit begins. `goes_on`: not only until a worker is lost."""
        ...

    def beside(self, name: str, act: Callable[[], None], failed: Callable[[str], None], /) -> None:
        """Do something while a run goes on. Calls `failed` with the reason if it raises an exception."""
        ...

    def simulated(self) -> Simulated | None:
        """The clock of the last fit, if it was simulated."""
        ...


class TrainingSession(Protocol):
    """The driver's side of a cluster, as far as training uses it."""

    remedy: str
    recorder: Recorder
    arithmetic: bool
    """Whether workers compute. A simulation may keep clocks and bytes only."""

    @property
    def time(self) -> Time: ...
    @property
    def endpoint(self) -> FitEndpoint: ...
    @property
    def deadline_s(self) -> float: ...

    def check_owner(self) -> None: ...
    def check_workers(self, so: str, /) -> None: ...
    def load(
        self, plan: Plan, meanwhile: Callable[[], None] = ..., rehearsing: Collection[str] = ..., /
    ) -> LoadedPlan: ...
    def reload(self, handle: LoadedPlan) -> LoadedPlan: ...
    def release(self, handle: LoadedPlan) -> None: ...
    def explained(self, error: PlacementError, what: str) -> FlowmlError: ...
    def register(self, plan_id: str, handler: PlanHandler) -> None: ...
    def unregister(self, plan_id: str) -> None: ...
    def tell(self, worker: str, message: wire.Wire) -> None: ...


class TrainingCluster(Protocol):
    """A cluster, as far as training uses it."""

    @property
    def session(self) -> TrainingSession: ...
    @property
    def devices(self) -> tuple[Device, ...]: ...
    @property
    def lost(self) -> tuple[str, ...]: ...

    def links_for(self, placement: Placement, devices: int | None = None) -> Links: ...


class IgnoreMessages:
    """Handles the messages of a plan between fits: late messages of stopped workers, which are dropped."""

    def on_message(self, peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None: ...

    def on_lost(self, peer: str, reason: str) -> None: ...
