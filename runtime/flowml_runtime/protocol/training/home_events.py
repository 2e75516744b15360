"""The events and actions of a home's state machine, `home.Home`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from flowml_runtime.protocol.training import exchange
from flowml_runtime.protocol.training.store import ContributionReceived, Handle
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost


class StoreLoaded(msgspec.Struct, frozen=True):
    """The store's first value has arrived."""

    store: int
    version: int = 0


class Updated(msgspec.Struct, frozen=True):
    """A replica has updated a store that it shares, unless its gradient was not `applied`."""

    store: int
    replica: int
    clock: int
    applied: bool = True


class Flush(msgspec.Struct, frozen=True):
    """Apply what waits for others: all replicas have stopped at the end."""


class StageRetired(msgspec.Struct, frozen=True):
    """Stage `stage` of `replica` sends no more contributions."""

    replica: int
    stage: int


class Apply(msgspec.Struct, frozen=True):
    """Make version `version` of the store from the payloads of each replica's parts and their coefficient.

    `staleness` has, for each contribution, the number of versions between the one that it is based on and the newest;
    it is empty if the policy does not ask for it. `full` is the weight of the contributions by that of all that a mean
    is over, for gradients that carry weights of their own, to which coefficients are only relative. `decays` has for
    each contribution what part of its coefficient is the decay of a late one, which its own weight does not have; it is
    empty if none is late. The host may free the handles afterwards.
    """

    store: int
    version: int
    contributions: tuple[tuple[tuple[Handle, ...], float], ...]
    staleness: tuple[int, ...] = ()
    full: float = 1.0
    decays: tuple[float, ...] = ()


class Publish(msgspec.Struct, frozen=True):
    """Send the store's floor to its readers, and its value too if `value`, after every preceding Apply.

    With a `replica` only those of this replica get it.
    """

    store: int
    version: int
    floor: int
    value: bool = True
    replica: int | None = None


class SendApplied(msgspec.Struct, frozen=True):
    """Tell the stages of `replica` that `version` of the store holds its contribution of `clock`."""

    store: int
    replica: int
    clock: int
    version: int


class SendArrived(msgspec.Struct, frozen=True):
    """Tell the leader that this contribution is complete."""

    store: int
    replica: int
    clock: int
    weight: int = 1
    copy: int = 0
    terms: tuple[tuple[int, float], ...] = ()


class SharedReceived(msgspec.Struct, frozen=True):
    """What stores of a coupling share in a round has arrived. Without a handle one of them has nothing to apply."""

    coupling: int
    round: int
    clock: int
    stores: tuple[int, ...]
    handle: Handle | None


class Couple(msgspec.Struct, frozen=True):
    """Compute a round of a coupling, as in `actions.Couple`."""

    coupling: int
    clock: int
    round: int
    stores: tuple[int, ...]
    applies: tuple[Apply, ...] = ()
    given: tuple[exchange.Given, ...] = ()
    last: bool = False


class Forgo(msgspec.Struct, frozen=True):
    """The stores of a coupling are not updated at this clock. If the others are not `told`, tell them. If it has
    `begun`, forget what was gathered."""

    coupling: int
    clock: int
    stores: tuple[int, ...]
    told: bool
    begun: bool


class Release(msgspec.Struct, frozen=True):
    """Free a payload that will never be applied."""

    handle: Handle


def releases(parts: Iterable[ContributionReceived]) -> list[Any]:
    """A `Release` of each payload of these parts. It is an action of homes, sites and branches."""
    return [Release(part.handle) for part in parts if not part.empty]


class Finished(msgspec.Struct, frozen=True):
    """Nothing can change this store any more."""

    store: int


Event = StoreLoaded | ContributionReceived | Updated | Committed | Flush | StageRetired | ReplicaLost | SharedReceived
Action = Apply | Publish | SendApplied | SendArrived | Couple | Forgo | Release | Finished
