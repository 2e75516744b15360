"""What a replica has done in a run before, and has not pushed to all stores.

A run with other members begins at one clock, so clocks do not say what of earlier work stores have. Each item that some
store lacks is written down instead, and with it those stores, until the first push of its replica has come to them.
With common clocks these are stores without decisions beside others.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flowml_runtime import wire
from flowml_runtime.protocol.training.clocks import contained
from flowml_runtime.protocol.training.terms import RETIRED, Terms


class Owed(msgspec.Struct, frozen=True):
    """A used item of an earlier run, which had other members. The replica has it in what it has gathered, and sends it
    with its next push to the stores that lack it, but for those that have lost it: it is noted as in part there. It is
    in the account of the replica that has done it."""

    replica: int
    done_by: int
    item: wire.Item
    lacking: tuple[int, ...]
    lost: tuple[int, ...] = ()


def lacking(clock: int, reached: Sequence[int]) -> tuple[int, ...]:
    """The stores that do not have a step of a replica of which they have so much."""
    return tuple(store for store, known in enumerate(reached) if clock >= known)


def reached(terms: Terms, stopped: wire.Stopped, replica: int) -> tuple[int, ...]:
    """The next clock of a replica at each store of a snapshot; RETIRED if none is to come. With common clocks a store
    to which a replica sends nothing itself has it in sums."""
    clocks = {state.store: state.clocks for state in stopped.stores}
    found: list[int] = []
    for number, store in enumerate(terms.stores):
        known = clocks[number][replica] if clocks.get(number) else RETIRED
        if known == RETIRED and terms.aligned:
            known = contained(terms, store.policy.every, stopped.clocks[replica])
        found.append(known)
    return tuple(found)
