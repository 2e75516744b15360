"""What arrays are in a simulation: nothing at all, real ones (`arithmetic`), or what a test counts with.

The simulator passes values along with messages and never looks at them. `Values` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flowml.policy.filters import Talk
from flowml_runtime import wire
from flowml_runtime.protocol.collective import SendChunk
from flowml_runtime.protocol.schedules import Schedule
from flowml_runtime.protocol.training.actions import Couple, Start
from flowml_runtime.sim.program import At
from flowml_runtime.worker.training.resident import Resident

Value = Any
"""The arrays of one message. None stands for a message without arrays."""

Contributed = Sequence[tuple[Sequence[Value], float]]
"""The parts of each contribution, and its coefficient."""

Report = tuple[tuple[int, ...], Sequence[Any]]
"""The fetch slots of a step and their arrays."""


class Flight(Protocol):
    """One rank's part of a sum. It runs the schedule's machine on values."""

    @property
    def done(self) -> bool: ...

    def started(self) -> Sequence[Chunk]:
        """This rank's own values are there. Returns what to send."""
        ...

    def received(self, peer: int, chunk: Chunk) -> Sequence[Chunk]:
        """A chunk has arrived from rank `peer`."""
        ...

    def total(self) -> Value:
        """The sum, with the same bits on every rank. None if the flight has no values."""
        ...


@dataclass(frozen=True)
class Chunk:
    """A chunk for rank `peer`: `action` says which, and `value` holds its elements."""

    peer: int
    action: SendChunk
    value: Any
    nbytes: int


class Values(Protocol):
    """Computes the values of a run. `state` is what `begin` returned for a step of a stage."""

    computes: bool
    """Whether there are values at all."""

    def begin(self, at: At, start: Start, leaves_out: Callable[[int], bool]) -> Any:
        """The state of a step that begins. `leaves_out` says whether it leaves out a microbatch."""
        ...

    def perform(self, state: Any, position: int, given: Any) -> Value:
        """Carry out the instruction at `position`. Returns what a Send or a Push sends.

        `given` is the value that a Recv takes, or the (version, value) that a Read reads, else None.
        """
        ...

    def report(self, state: Any) -> Report | None:
        """What a step reports to the driver at its end."""
        ...

    def add(self, at: At, store: int, part: int, a: Value, b: Value) -> Value:
        """The sum of two gradients of one part, for a push of several steps."""
        ...

    def update(self, at: At, store: int, gradient: Value, *, refused: bool) -> None:
        """Update the parameters that a replica keeps itself. A Read with something `given` takes that before. With a
        refused gradient they stay as they are, and are those that a `mix` of this step begins with."""
        ...

    def told(self, at: At, store: int, clock: int) -> tuple[Value, int | None]:
        """What a replica sends its neighbours of such parameters in a round, and the bytes that filters make of it."""
        ...

    def mix(self, at: At, store: int, weights: Mapping[int, float], theirs: Mapping[int, Value]) -> None:
        """Average such parameters with those of the neighbours. `weights` are by replica, the own one included."""
        ...

    def own(self, at: At, store: int, clock: int, mixed: Value) -> Value:
        """What a replica sends of such parameters. It is pulled to the global ones, `mixed`, if they are given."""
        ...

    def own_state(self, at: At, store: int) -> Value:
        """The optimizer state for such parameters."""
        ...

    def model_state(self, at: At) -> Value:
        """The state of the model on a stage, after the last step there."""
        ...

    def params(self, at: At, store: int) -> Value:
        """Such parameters themselves."""
        ...

    def follow(self, at: At, store: int, value: Value) -> None:
        """Replace such parameters by those of the leader of a site."""
        ...

    def changes(self, at: At, store: int, clock: int, *, sends: bool, last: bool) -> tuple[Value, int | None]:
        """A step has ended that sends changes to other mirrors, if it `sends`: these, and their bytes; None if that
        depends on arithmetic."""
        ...

    def join(self, at: At, store: int, theirs: Sequence[tuple[int, Value, bool]]) -> None:
        """Add the changes of other mirrors: (sender, changes, whether they are its last ones)."""
        ...

    def is_finite(self, store: int, part: int, value: Value) -> bool:
        """Whether a gradient may be applied."""
        ...

    def blames_weight(self, store: int, part: int, value: Value) -> bool:
        """Whether the weight with which such a value ends is not finite."""
        ...

    def filtered(self, at: At, message: wire.Contribution, value: Value, parameters: Value = None) -> tuple[Value, int]:
        """What the home decodes of a gradient that the filters of its policy have encoded, and the bytes that are
        sent. `parameters` are those with which filters may compare it; None: those of the step of the stage."""
        ...

    def settle(self, at: At, clock: int, stores: Sequence[int], counts: bool) -> None:
        """The fate of a step is known. A filtered push that does not count returns to what the filters keep."""
        ...

    def kept(self, at: At) -> Mapping[int, float]:
        """By store the sum of squares of what the filters of a stage have not sent yet."""
        ...

    def talk(self, at: At, store: int, part: int, clock: int, value: Value) -> Talk | None:
        """The part of a replica in the sum of what filters make of a push; None if nothing filters it."""
        ...

    def flight(self, schedule: Schedule, rank: int, values: Sequence[Value]) -> Flight | None:
        """One rank's part of a sum of all replicas, with the values of its own. None if `total` makes the sum."""
        ...

    def total(self, values: Sequence[Value]) -> Value:
        """The sum of the values of all replicas."""
        ...

    def weighted(self, store: int, part: int, given: Sequence[tuple[Value, float]], share: float | None) -> Value:
        """The sum of values, each times its factor."""
        ...

    def of_site(self, message: wire.Gossip, given: Sequence[tuple[Value, float]], share: float | None) -> Value:
        """The same for the leader of a site that decides alone; see `relays.for_leader`."""
        ...

    def load(self, worker: str, store: int, value: Value) -> None:
        """Hold the first value of a store at a home."""
        ...

    def apply(
        self,
        worker: str,
        store: int,
        version: int,
        given: Sequence[tuple[Sequence[Value], float]],
        staleness: Sequence[int],
        full: float = 1.0,
        decays: Sequence[float] = (),
    ) -> None:
        """Make the next version of a store from the parts of each contribution, its coefficient, and its staleness;
        all as in `home.Apply`."""
        ...

    def couple(
        self, worker: str, action: Couple, sent: Mapping[int, Contributed], heard: Sequence[tuple[Sequence[int], Value]]
    ) -> Value:
        """Compute a round of a coupling from what each store applies, and what all have shared in the round before.
        Returns what the stores here share in it."""
        ...

    def uncouple(self, worker: str) -> None:
        """Forget what was gathered for the rounds of couplings."""
        ...

    def current(self, worker: str, store: int, version: int) -> tuple[Value, int | None]:
        """The value of a version of a store to publish, and the bytes that filters make of it; None: not known."""
        ...

    def forget(self, worker: str, store: int) -> None:
        """A reader gets the version that was published last whole, because it has not been sent the one before."""
        ...

    def final(self, worker: str, store: int) -> Value:
        """The value of a store to return to the driver."""
        ...

    def hand(self, worker: str, message: wire.TrainingMessage, value: Value) -> None:
        """A Source, a Batch, an OwnState or a ModelState has arrived."""
        ...

    def residents(self, worker: str) -> Iterable[Resident]:
        """The values that live on a worker between steps."""
        ...


NAN = np.array(np.nan, np.float32)
NO_ARRAYS: Value = ()
"""The arrays of a message that would have some."""


class Nothing:
    """No arithmetic: messages carry no arrays, and stores keep their first values. Losses are NaN."""

    computes = False

    def __init__(self, slots: Sequence[tuple[int, ...]]) -> None:
        """`slots` are those that each stage fetches."""
        self._held: dict[int, Value] = {}
        self._states: dict[int, Value] = {}
        self._models: dict[At, Value] = {}
        self._reports = tuple((found, (NAN,) * len(found)) if found else None for found in slots)

    def begin(self, at: At, start: Start, leaves_out: Callable[[int], bool]) -> Any:
        return at[1]

    def perform(self, state: Any, position: int, given: Any) -> Value:
        return NO_ARRAYS

    def report(self, state: Any) -> Report | None:
        return self._reports[state]

    def add(self, at: At, store: int, part: int, a: Value, b: Value) -> Value:
        return NO_ARRAYS

    def update(self, at: At, store: int, gradient: Value, *, refused: bool) -> None:
        return None

    def told(self, at: At, store: int, clock: int) -> tuple[Value, None]:
        return NO_ARRAYS, None

    def mix(self, at: At, store: int, weights: Mapping[int, float], theirs: Mapping[int, Value]) -> None:
        return None

    def own(self, at: At, store: int, clock: int, mixed: Value) -> Value:
        return NO_ARRAYS

    def params(self, at: At, store: int) -> Value:
        return NO_ARRAYS

    def follow(self, at: At, store: int, value: Value) -> None:
        return None

    def changes(self, at: At, store: int, clock: int, *, sends: bool, last: bool) -> tuple[Value, None]:
        return NO_ARRAYS, None

    def join(self, at: At, store: int, theirs: Sequence[tuple[int, Value, bool]]) -> None:
        return None

    def own_state(self, at: At, store: int) -> Value:
        return self._states.get(store, NO_ARRAYS)

    def model_state(self, at: At) -> Value:
        return self._models[at]

    def is_finite(self, store: int, part: int, value: Value) -> bool:
        return True

    def blames_weight(self, store: int, part: int, value: Value) -> bool:
        return False

    def filtered(self, at: At, message: wire.Contribution, value: Value, parameters: Value = None) -> tuple[Value, int]:
        return value, 0

    def settle(self, at: At, clock: int, stores: Sequence[int], counts: bool) -> None:
        return None

    def kept(self, at: At) -> Mapping[int, float]:
        return {}

    def talk(self, at: At, store: int, part: int, clock: int, value: Value) -> None:
        return None

    def flight(self, schedule: Schedule, rank: int, values: Sequence[Value]) -> None:
        return None

    def total(self, values: Sequence[Value]) -> Value:
        return NO_ARRAYS

    def weighted(self, store: int, part: int, given: Sequence[tuple[Value, float]], share: float | None) -> Value:
        return NO_ARRAYS

    def of_site(self, message: wire.Gossip, given: Sequence[tuple[Value, float]], share: float | None) -> Value:
        return NO_ARRAYS

    def load(self, worker: str, store: int, value: Value) -> None:
        self._held[store] = value

    def apply(
        self,
        worker: str,
        store: int,
        version: int,
        given: Sequence[tuple[Sequence[Value], float]],
        staleness: Sequence[int],
        full: float = 1.0,
        decays: Sequence[float] = (),
    ) -> None:
        return None

    def couple(
        self, worker: str, action: Couple, sent: Mapping[int, Contributed], heard: Sequence[tuple[Sequence[int], Value]]
    ) -> Value:
        return NO_ARRAYS

    def uncouple(self, worker: str) -> None:
        return None

    def current(self, worker: str, store: int, version: int) -> tuple[Value, None]:
        return NO_ARRAYS, None

    def forget(self, worker: str, store: int) -> None:
        return None

    def final(self, worker: str, store: int) -> Value:
        return self._held[store]

    def hand(self, worker: str, message: wire.TrainingMessage, value: Value) -> None:
        if isinstance(message, wire.OwnState):
            self._states[message.store] = value
        elif isinstance(message, wire.ModelState):
            self._models[message.replica, message.stage] = value

    def residents(self, worker: str) -> Iterable[Resident]:
        return ()
