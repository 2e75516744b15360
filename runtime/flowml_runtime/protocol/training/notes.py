"""What the driver's state machine says for the history of a fit, for a simulation, or for a test: actions that change
nothing in the run."""

from __future__ import annotations

import msgspec

from flowml.policy.waits import Waits
from flowml_runtime import wire
from flowml_runtime.protocol.training.ledger import Fate
from flowml_runtime.protocol.training.store import Handle


class Note(msgspec.Struct, frozen=True):
    """Enter a report in the history."""

    message: wire.Report
    handle: Handle | None
    cause: int


class NoteFates(msgspec.Struct, frozen=True):
    """The fate of work items, for a simulation or a test. The ledger already has it."""

    fates: tuple[tuple[wire.Item, Fate], ...]
    missing: tuple[int, ...]
    late: tuple[int, ...]
    cause: int


class NoteCommit(msgspec.Struct, frozen=True):
    """Enter in the history which replicas' work of a clock counts, and with a code with which coefficients."""

    clock: int
    excluded: tuple[int, ...]
    coefficients: tuple[tuple[int, float], ...]
    cause: int


class NoteWaits(msgspec.Struct, frozen=True):
    """What the decision of a group waited for at `clock`, and which replicas it leaves out."""

    group: int
    clock: int
    waits: Waits
    excluded: tuple[int, ...]
    cause: int


class NoteStaleness(msgspec.Struct, frozen=True):
    """How stale applied contributions were, as in `wire.Staleness`."""

    stores: tuple[tuple[int, int, tuple[tuple[int, int, int], ...]], ...]
    cause: int


class NoteForwarded(msgspec.Struct, frozen=True):
    """The sum of a site was sent, as in `wire.Forwarded`."""

    message: wire.Forwarded
    cause: int


class NoteNonFinite(msgspec.Struct, frozen=True):
    """Count the gradients of these replicas for a store and clock as left out, and warn. Their `weight` may be at
    fault."""

    store: int
    clock: int
    replicas: tuple[int, ...]
    weight: bool
    cause: int


class NoteLeftOut(msgspec.Struct, frozen=True):
    """The items of a lost replica are settled. Store i has what it did before clock `reached[i]`. No store has the
    `returned` items. Those that are `missed` are used, and their steps will never be reported."""

    replica: int
    reached: tuple[int, ...]
    returned: tuple[wire.Item, ...]
    missed: tuple[wire.Item, ...]
    cause: int
