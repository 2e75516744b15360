"""The events and actions of a worker's state machine, `TrainingWorker`.

The host of a worker and the simulator carry the actions out and make no decisions. Their duties are listed in `worker`.
"""

from __future__ import annotations

from typing import final

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.store import Handle
from flowml_runtime.protocol.training.terms import ReplicaLost

# Events. `ReplicaLost` is also one.


@final
class Received(msgspec.Struct, frozen=True):
    """A message from `peer`. `handle` stands for its arrays, if it has any."""

    peer: str
    message: wire.TrainingMessage
    handle: Handle | None = None


@final
class StepFinished(msgspec.Struct, frozen=True):
    """The executor of a stage has left the step that `Start` began; `cause` is that of the Start."""

    run: int
    replica: int
    stage: int
    clock: int
    cause: int


class Updated(msgspec.Struct, frozen=True):
    """A step has updated a store that the replicas here share, unless its gradient was not `applied`."""

    run: int
    replica: int
    store: int
    clock: int
    applied: bool


class Computed(msgspec.Struct, frozen=True):
    """A stage has computed a microbatch of its running step, and `Cut.finish` has asked for this event."""

    run: int
    replica: int
    stage: int


class Tick(msgspec.Struct, frozen=True):
    """The time that a Wake of this run named has come."""

    run: int


Event = Received | StepFinished | Updated | Computed | ReplicaLost | Tick


# Actions. `cause` is the number of the event that caused them.


class Open(msgspec.Struct, frozen=True):
    """Create the stage runners and the stores of this run."""

    start: wire.StartTraining
    cause: int


class Close(msgspec.Struct, frozen=True):
    """Stop everything that belongs to the run, even in the middle of its work."""

    run: int
    cause: int


class Send(msgspec.Struct, frozen=True):
    """Send the message to each of these, in this order. This worker may be one of them."""

    to: tuple[str, ...]
    message: wire.Wire


class Start(msgspec.Struct, frozen=True):
    """Run the step of `clock` on this stage."""

    run: int
    replica: int
    stage: int
    clock: int
    item: wire.Item
    cause: int


class Abandon(msgspec.Struct, frozen=True):
    """Stop the step of `clock` at the next task boundary if it runs, and refuse later values for it."""

    replica: int
    stage: int
    clock: int
    cause: int


class Count(msgspec.Struct, frozen=True):
    """Say whether the gradients that the step of `clock` left in this stage's accumulators count; see `accumulator`.

    `stores` are those that gather several steps.
    """

    replica: int
    stage: int
    clock: int
    counts: bool
    stores: tuple[int, ...]
    cause: int


class Wake(msgspec.Struct, frozen=True):
    """Give the machine a Tick for this run at time `at`, in seconds, or soon after."""

    run: int
    at: float
    cause: int


class Show(msgspec.Struct, frozen=True):
    """Let the executors here read this version from now on. `base` is as in `wire.Published`."""

    store: int
    version: int
    handle: Handle
    cause: int
    base: int = -1


class Load(msgspec.Struct, frozen=True):
    """Hold the first value of a store: parameters and optimizer state."""

    store: int
    handle: Handle
    cause: int


class Apply(msgspec.Struct, frozen=True):
    """Make the next version of a store here; see `home.Apply`."""

    store: int
    version: int
    contributions: tuple[tuple[tuple[Handle, ...], float], ...]
    cause: int
    staleness: tuple[int, ...] = ()
    full: float = 1.0
    decays: tuple[float, ...] = ()


class Couple(msgspec.Struct, frozen=True):
    """Compute one round of a coupling at the homes of these stores here, and send `Shared` to the workers in `to`.

    In round 0 `applies` says what each store applies. In a later one `given` has what all homes have shared in the one
    before, as (stores, handle). After the last round there is no `to`: update the stores.
    """

    coupling: int
    clock: int
    round: int
    stores: tuple[int, ...]
    applies: tuple[Apply, ...]
    given: tuple[tuple[tuple[int, ...], Handle], ...]
    to: tuple[str, ...]
    cause: int


class Uncouple(msgspec.Struct, frozen=True):
    """Forget what these stores have gathered for the rounds of a coupling. They are not updated."""

    stores: tuple[int, ...]
    cause: int


class Forward(msgspec.Struct, frozen=True):
    """Send the home the sum of a site, or its leader if sites decide alone: `parts` are the messages, one for each part
    of the contributions, and `to` says to whom each goes.

    Each of `contributions` has a handle for each part, and a factor. The host adds the arrays of the messages. `share`
    is as in `site.Forward`.
    """

    to: tuple[str, ...]
    parts: tuple[wire.Contribution | wire.Gossip, ...]
    contributions: tuple[tuple[tuple[Handle, ...], float], ...]
    share: float | None = None


class CountSum(msgspec.Struct, frozen=True):
    """Say whether the sums that the site of `leader` has forwarded at `clock` to these stores count, after they have
    been filtered. What filters with error feedback keep follows that."""

    leader: int
    clock: int
    counts: bool
    stores: tuple[int, ...]


class PassOn(msgspec.Struct, frozen=True):
    """Pass a message about a store on to these workers, with the value that is shown here if it has one."""

    to: tuple[str, ...]
    message: wire.Published
    value: bool


class Publish(msgspec.Struct, frozen=True):
    """Send `Published` to the readers in `to`, with the current value of the store if `value`."""

    store: int
    version: int
    floor: int
    value: bool
    to: tuple[str, ...]
    cause: int


class Return(msgspec.Struct, frozen=True):
    """Send the driver a `StoreValue`, because the store is finished. It has the value if this is its first home.

    The traffic of each store is sent before it, as with Leave, and after all earlier publications.
    """

    store: int
    version: int
    value: bool
    cause: int


class Leave(msgspec.Struct, frozen=True):
    """Send the driver that a stage has retired, after everything that the worker has to send before: the sums of sites,
    then the model's state on the stage `of` (replica, stage) if it has some, and the traffic of each store."""

    to: tuple[str, ...]
    message: wire.Retired
    cause: int
    of: tuple[int, int] | None = None


class Export(msgspec.Struct, frozen=True):
    """Tell the driver what lives here between steps: where the machines stand, and all buffers. Replicas have these
    next clocks; what they have sent before is applied by the actions so far, or `waiting`: the handle stays with the
    machine. `whole`, `copied`, `complete`, `folder` and `token` are as in `wire.Export`."""

    stages: tuple[wire.StageState, ...]
    stores: tuple[wire.StoreState, ...]
    clocks: tuple[int, ...]
    cause: int
    sites: tuple[wire.SiteState, ...] = ()
    waiting: tuple[tuple[wire.Waiting, Handle], ...] = ()
    number: int = 0
    whole: bool = True
    copied: bool = False
    complete: int | None = None
    folder: str = ""
    token: str = ""


class Hand(msgspec.Struct, frozen=True):
    """Give a Source, a Batch, an OwnState, a ModelState, a Gossip, a Collective, Buffers or a Copy to the executors."""

    peer: str
    message: wire.TrainingMessage
    handle: Handle | None
    cause: int


class Fail(msgspec.Struct, frozen=True):
    """Tell the driver that the run cannot continue here."""

    run: int
    error: ProtocolError
    cause: int


class Release(msgspec.Struct, frozen=True):
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
    | Couple
    | Uncouple
    | Forward
    | CountSum
    | PassOn
    | Publish
    | Return
    | Leave
    | Export
    | Hand
    | Fail
    | Release
)
