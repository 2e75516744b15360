"""The history of a training run: what happened to its machines, in the order of time, and what it was about.

Both clocks step the same machines, so one form of history serves both: an entry has an event of one machine and the
actions that it wanted. A simulation also notes what steps read, what versions contain, and what it sent. `checker`
finds violations of the promises in a history; it decides nothing and calls no machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.ledger import LedgerState, Summary, Work
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.snapshot import Rhythm
from flowml_runtime.protocol.training.story import entry
from flowml_runtime.protocol.training.terms import Terms

DRIVER = "driver"
Matrix = np.ndarray[Any, Any]


class Turn(msgspec.Struct, frozen=True):
    """One event of the machine of `who`, and what the machine wanted."""

    at: float
    who: str
    number: int
    event: actions.Event | driver.Event
    wanted: Sequence[actions.Action | driver.Action]


class Read(msgspec.Struct, frozen=True):
    """A step of `replica` at `clock` has read a version of a store, with this value if there are values."""

    store: int
    replica: int
    clock: int
    version: int
    value: Matrix | None = None


class Holds(msgspec.Struct, frozen=True):
    """The parameters of its own, or of its site, with which a step of `replica` at `clock` computes."""

    store: int
    replica: int
    clock: int
    value: Matrix


class Made(msgspec.Struct, frozen=True):
    """A home has made a version, whose value is `value`, from these contributions: (replica, clock, payload).

    A payload is a sum of gradients: an integer whose digit q, in base 16, says how often work item q is in it, or a
    matrix whose coordinate q says so (then replica and clock are -1).
    """

    home: str
    store: int
    version: int
    contributions: tuple[tuple[int, int, int | Matrix], ...]
    value: Matrix | None = None


class Shown(msgspec.Struct, frozen=True):
    """The home of a store publishes a version through filters, and its readers hold `value` then."""

    store: int
    version: int
    value: Matrix


class Gave(msgspec.Struct, frozen=True):
    """What a replica pushes at `clock`: the change of its own parameters since what it took, or a gradient that filters
    of a sum have not changed yet. Where sites add up, their leaders push."""

    store: int
    replica: int
    clock: int
    content: Matrix


class Encoded(msgspec.Struct, frozen=True):
    """The filters of a policy have made `got`, as the home decodes it, from the gradient `given`."""

    store: int
    part: int
    replica: int
    clock: int
    given: Matrix
    got: Matrix


class Kept(msgspec.Struct, frozen=True):
    """What the error feedback of a replica has not sent yet. The newest counts."""

    store: int
    part: int
    replica: int
    residual: Matrix


class Sent(msgspec.Struct, frozen=True):
    """`nbytes` of a store have been given to the network: gradients, or parameters if `published`."""

    store: int
    nbytes: int
    published: bool


class Saved(msgspec.Struct, frozen=True):
    """The driver has a snapshot: where the machines stand, and by owner and name what lives between steps."""

    stopped: wire.Stopped
    buffers: Mapping[str, Mapping[str, Matrix]]
    last: bool
    without: tuple[int, ...] = ()
    """The silent replicas of which it has nothing."""
    ledger: LedgerState | None = None
    """The accounts without them."""


Fact = Turn | Read | Holds | Made | Shown | Gave | Encoded | Kept | Sent | Saved


@dataclass
class History:
    """One run. `summary` is that of the ledger if the run has ended well, and `traffic` what workers said they sent:
    store -> bytes of gradients and of parameters that crossed between workers."""

    run: int
    terms: Terms
    places: Places
    work: Work
    facts: list[Fact] = field(default_factory=list[Fact])
    summary: Summary | None = None
    crashed: frozenset[str] = frozenset()
    """The workers that have stopped."""
    traffic: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    rhythm: Rhythm | None = None
    """When snapshots are taken; None: never."""

    def given(self) -> Iterator[tuple[str, int, object]]:
        """The workers that got payloads, the numbers of these, and the messages that brought them."""
        for f in self.facts:
            if isinstance(f, Turn) and f.who != DRIVER and isinstance(f.event, actions.Received) and f.event.handle:
                yield f.who, f.event.handle, f.event.message

    def story(self) -> tuple[str, ...]:
        """The events in sentences, without those that only passed values on."""
        turns = ((f, entry(f.who, self.run, f.number, f.event, f.wanted)) for f in self.facts if isinstance(f, Turn))
        return tuple(f"{turn.at:8.3f} s  {turn.who} {told.text}" for turn, told in turns if told is not None)
