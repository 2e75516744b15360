"""The events and actions of a worker's state machine, `TrainingWorker`.

The host of a worker and the simulator carry the actions out and make no decisions. Their duties are listed in `worker`.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.store import Handle
from flowml_runtime.protocol.training.terms import ReplicaLost

# Events. `ReplicaLost` is also one.


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


@dataclass(frozen=True, slots=True)
class Updated:
    """A step has updated a store that the replicas here share, unless its gradient was not `applied`."""

    run: int
    replica: int
    store: int
    clock: int
    applied: bool


@dataclass(frozen=True, slots=True)
class Computed:
    """A stage has computed a microbatch of its running step, and `Cut.finish` has asked for this event."""

    run: int
    replica: int
    stage: int


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that a Wake of this run named has come."""

    run: int


Event = Received | StepFinished | Updated | Computed | ReplicaLost | Tick


# Actions. `cause` is the number of the event that caused them.


@dataclass(frozen=True, slots=True)
class Open:
    """Create the stage runners and the stores of this run."""

    start: wire.StartTraining
    cause: int


@dataclass(frozen=True, slots=True)
class Close:
    """Stop everything that belongs to the run, even in the middle of its work."""

    run: int
    cause: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send the message to each of these, in this order. This worker may be one of them."""

    to: tuple[str, ...]
    message: wire.Wire


@dataclass(frozen=True, slots=True)
class Start:
    """Run the step of `clock` on this stage."""

    run: int
    replica: int
    stage: int
    clock: int
    item: wire.Item
    cause: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop the step of `clock` at the next task boundary if it runs, and refuse later values for it."""

    replica: int
    stage: int
    clock: int
    cause: int


@dataclass(frozen=True, slots=True)
class Count:
    """Say whether the gradients that the step of `clock` left in this stage's accumulators count; see `accumulator`.

    `stores` are those that gather several steps.
    """

    replica: int
    stage: int
    clock: int
    counts: bool
    stores: tuple[int, ...]
    cause: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Give the machine a Tick for this run at time `at`, in seconds, or soon after."""

    run: int
    at: float
    cause: int


@dataclass(frozen=True, slots=True)
class Show:
    """Let the executors here read this version from now on."""

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
    """Make the next version of a store here; see `home.Apply`."""

    store: int
    version: int
    contributions: tuple[tuple[tuple[Handle, ...], float], ...]
    cause: int
    staleness: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Publish:
    """Send `Published` to the readers in `to`, with the current value of the store if `value`."""

    store: int
    version: int
    floor: int
    value: bool
    to: tuple[str, ...]
    cause: int


@dataclass(frozen=True, slots=True)
class Return:
    """Send the driver a `StoreValue`, because the store is finished. It has the value if this is its first home.

    The traffic of each store is sent before it, as with TellTraffic, and after all earlier publications.
    """

    store: int
    version: int
    value: bool
    cause: int


@dataclass(frozen=True, slots=True)
class TellTraffic:
    """Send the driver the traffic of each store so far."""

    cause: int


@dataclass(frozen=True, slots=True)
class Hand:
    """Give a Source, a Batch, an OwnState, a Gossip or a Collective to the executors."""

    peer: str
    message: wire.TrainingMessage
    handle: Handle | None
    cause: int


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell the driver that the run cannot continue here."""

    run: int
    error: ProtocolError
    cause: int


@dataclass(frozen=True, slots=True)
class Release:
    """Free the arrays of a handle."""

    handle: Handle
    cause: int


Action = (
    Open
    | Close
    | Send
    | Start
    | Abandon
    | Count
    | Wake
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
