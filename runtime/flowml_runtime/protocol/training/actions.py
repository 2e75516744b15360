"""What a worker's machine is told, and what it wants done: the events and actions of `TrainingWorker`.

The host of a worker and the simulator carry the actions out and decide nothing; their duties are numbered in `worker`.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.home import Handle
from flowml_runtime.protocol.training.terms import ReplicaLost

# Events. `ReplicaLost` is one too.


@dataclass(frozen=True, slots=True)
class Received:
    """A message from `peer`. `handle` stands for its arrays, if it has any."""

    peer: str
    message: wire.TrainingMessage
    handle: Handle | None = None


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The executor of a stage has left the step that `Start` began; `cause` is that of the Start."""

    run: int
    replica: int
    stage: int
    clock: int
    cause: int


Event = Received | StepFinished | ReplicaLost


# Actions. `cause` is the number of the event that they follow from.


@dataclass(frozen=True, slots=True)
class Open:
    """Make ready what runs the stages and holds the stores of this run."""

    start: wire.StartTraining
    cause: int


@dataclass(frozen=True, slots=True)
class Close:
    """Stop all that belongs to the run, whatever it is doing."""

    run: int
    cause: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send the message to each of these, in this order; this worker itself may be one of them."""

    to: tuple[str, ...]
    message: wire.Wire


@dataclass(frozen=True, slots=True)
class Start:
    """Run the step of `clock` on this stage."""

    replica: int
    stage: int
    clock: int
    item: wire.Item
    cause: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop the step of `clock` at the next task boundary if it runs, and refuse what still comes for it."""

    replica: int
    stage: int
    clock: int
    cause: int


@dataclass(frozen=True, slots=True)
class Count:
    """What the step of `clock` left in the accumulators of this stage counts, or does not: see `accumulator`."""

    replica: int
    stage: int
    clock: int
    counts: bool
    cause: int


@dataclass(frozen=True, slots=True)
class Show:
    """The executors here read this version from now on."""

    store: int
    version: int
    handle: Handle
    cause: int


@dataclass(frozen=True, slots=True)
class Load:
    """Hold the first value of a store: parameters and optimizer state."""

    store: int
    handle: Handle
    cause: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Make the next version of a store here: see `home.Apply`."""

    store: int
    version: int
    contributions: tuple[tuple[tuple[Handle, ...], float], ...]
    cause: int


@dataclass(frozen=True, slots=True)
class Publish:
    """Send `Published` to the readers in `to`, with the value that the store has now if `value`."""

    store: int
    version: int
    floor: int
    value: bool
    to: tuple[str, ...]
    cause: int


@dataclass(frozen=True, slots=True)
class Return:
    """Send the driver a `StoreValue`: the store is finished. With the value if this is its first home.

    What was sent for each store goes first, as with TellTraffic, and after all that was published before.
    """

    store: int
    version: int
    value: bool
    cause: int


@dataclass(frozen=True, slots=True)
class TellTraffic:
    """Send the driver what was sent for each store so far."""

    cause: int


@dataclass(frozen=True, slots=True)
class Hand:
    """Hand a Source, a Batch or a Collective to the executors."""

    peer: str
    message: wire.TrainingMessage
    handle: Handle | None
    cause: int


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the driver that the run cannot go on here."""

    run: int
    error: ProtocolError
    cause: int


@dataclass(frozen=True, slots=True)
class Release:
    """Forget the arrays of a handle."""

    handle: Handle
    cause: int


Action = (
    Open
    | Close
    | Send
    | Start
    | Abandon
    | Count
    | Show
    | Load
    | Apply
    | Publish
    | Return
    | TellTraffic
    | Hand
    | Fail
    | Release
)
