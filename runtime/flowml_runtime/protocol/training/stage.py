"""What a stage of a replica is told and does: its events, its actions, and the life of one of its steps as a table.

`Replica` decides with them for whole work items, and `Portions` for parts of them.
"""

from __future__ import annotations

from typing import Literal, final

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.accounts import Settle
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost


class Started(msgspec.Struct, frozen=True):
    """The run begins."""


class Granted(msgspec.Struct, frozen=True):
    """The answer to one Ask, in the order of the Asks. A clock without an item here will never get one."""

    items: tuple[tuple[int, wire.Item], ...]
    exhausted: bool = False


class BeginReceived(msgspec.Struct, frozen=True):
    """The leading stage has begun `clock`."""

    clock: int
    item: wire.Item
    last: bool = False


@final  # as other events of each step: `type(event) is` tells them apart, isinstance is slow where it is False
class StepFinished(msgspec.Struct, frozen=True):
    """The executor has left the step of `clock`: it has pushed everything, or has abandoned the step."""

    clock: int


@final
class StorePublished(msgspec.Struct, frozen=True):
    """A store that this stage reads is at `version`. It holds all pushes before `floor` of the replicas that count."""

    store: int
    version: int
    floor: int


@final
class Applied(msgspec.Struct, frozen=True):
    """`version` of a store that applies on arrival holds the push of this replica at `clock`."""

    store: int
    clock: int
    version: int


class LeaderRetired(msgspec.Struct, frozen=True):
    """The leading stage begins no more clocks."""


class Hold(msgspec.Struct, frozen=True):
    """Begin no clock from this one on, and do not retire; `items.NO_HOLD` allows everything. One whose number is not
    larger than those before changes nothing. If the next push is `within` so many clocks, begin them until then."""

    clock: int
    number: int = 0
    within: int = 0


class Paused(msgspec.Struct, frozen=True):
    """The replica has stopped as the newest Hold says, before the clock `hold`: its next clock is `clock`. `pushed` are
    pairs (store, clock) of the newest pushes that may wait at a home."""

    hold: int
    clock: int
    pushed: tuple[tuple[int, int], ...] = ()
    number: int = 0


class Ask(msgspec.Struct, frozen=True):
    """Ask the driver for one item for each of `clocks` (the answer is one Granted), and give `returned` back."""

    clocks: tuple[int, ...]
    returned: tuple[wire.Item, ...] = ()
    copy: int | None = None


class Begin(msgspec.Struct, frozen=True):
    """Tell the other stages of this replica to begin `clock`."""

    clock: int
    item: wire.Item
    last: bool


class Start(msgspec.Struct, frozen=True):
    """Run `clock` on this stage. StepFinished must follow."""

    clock: int
    item: wire.Item
    last: bool


class Abandon(msgspec.Struct, frozen=True):
    """Stop `clock` at the next task boundary if it runs, and drop all values for it."""

    clock: int


class Count(msgspec.Struct, frozen=True):
    """Whether the gradients of `clock` count for these stores, which gather several steps: see `accumulator`."""

    clock: int
    counts: bool
    stores: tuple[int, ...]


class Retire(msgspec.Struct, frozen=True):
    """This stage pushes nothing more: tell the homes. The leading stage also tells all other stages."""


Event = (
    Started
    | Granted
    | BeginReceived
    | StepFinished
    | Committed
    | StorePublished
    | Applied
    | LeaderRetired
    | Hold
    | ReplicaLost
)
Action = Paused | Ask | Begin | Start | Abandon | Count | Settle | Retire


State = Literal[
    "queued",  # begun, and not started
    "queued, used",
    "running",
    "running, used",
    "abandoned",  # still runs, but does not count
    "finished",  # its fate is unknown
    "used",
    "dropped",
    "skipped",  # dropped before it started
]
Change = Literal["start", "finish", "include", "exclude"]

STEPS: dict[tuple[State, Change], State] = {
    ("queued", "start"): "running",
    ("queued", "include"): "queued, used",
    ("queued", "exclude"): "skipped",
    ("queued, used", "start"): "running, used",
    ("running", "finish"): "finished",
    ("running", "include"): "running, used",
    ("running", "exclude"): "abandoned",
    ("running, used", "finish"): "used",
    ("abandoned", "finish"): "dropped",
    ("finished", "include"): "used",
    ("finished", "exclude"): "dropped",
}
"""The life of a step. Its stage starts and finishes it. Commits include it if one of them does, and exclude it when
each group that is due at its clock has left it out.

A step begins as "queued". It begins as "queued, used" if it counts anyway or a commit has already included it, and
as "skipped" if the commits have already excluded it.
"""
UNDECIDED = frozenset[State]({"queued", "running", "finished"})
WAITING = frozenset[State]({"queued", "queued, used"})
RUNNING = frozenset[State]({"running", "running, used", "abandoned"})
OVER = frozenset[State]({"used", "dropped", "skipped"})


class Step(msgspec.Struct):
    """A clock that has begun, and whose fate has not taken effect here yet."""

    clock: int
    item: wire.Item
    last: bool
    state: State
    undecided: frozenset[int] = frozenset()
    """The groups whose decision about it is still to come."""
    lost: frozenset[int] = frozenset()
    """The groups that have left it out."""

    def take(self, change: Change) -> None:
        after = STEPS.get((self.state, change))
        if after is None:
            raise ProtocolError(f"a step that is {self.state!r} cannot {change}, at clock {self.clock}")
        self.state = after
