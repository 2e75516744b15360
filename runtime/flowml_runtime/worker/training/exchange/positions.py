"""Sends the positions of changed elements ahead of their changes where a link is saturated (Gaia's selective barrier).

A filter that chooses elements makes two arrays: which elements, and their changes. If more of what was sent earlier
still waits for the link than the positions take, they go first, in a message of their own. Whoever has them and lacks
the changes waits before its next step, because it knows that what it would read has changed significantly. Without them
it goes on, as far as the staleness allows (Hsieh et al., *Gaia*, NSDI 2017).

Both clocks use these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from flowml.plan import StoreSpec
from flowml.policy import filters
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array

Which = tuple[bool, ...]
"""For each array that is sent of a change, whether it holds positions."""
Key = tuple[int, int, int, int]
"""(store, replica, source, clock)."""
Lists = Mapping[Key, Sequence[Array]]
"""The positions of changes that are still to come."""
NO_LISTS: Lists = {}
T = TypeVar("T", bound=Sequence[Array] | None)


def which(spec: StoreSpec) -> Which:
    """Those of the changes of a store between mirrors. With staleness 0 all changes are waited for in any case."""
    policy = spec.policy
    if not policy.mirrored or not policy.staleness:
        return ()
    forms = [form for s in spec.specs for form in filters.wire_forms(policy.filters, filters.Form.of(s))]
    return tuple(form.role == "keys" for form in forms)


def split(positions: Which, arrays: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
    """The positions, and the rest. No positions if none of the elements is sent, or arrays are sent whole."""
    if len(positions) != len(arrays) or not any(a.size for a, p in zip(arrays, positions, strict=True) if p):
        return (), arrays
    ahead = [a for a, p in zip(arrays, positions, strict=True) if p]
    return ahead, [a for a, p in zip(arrays, positions, strict=True) if not p]


def joined(positions: Which, ahead: Sequence[Array], rest: Sequence[Array]) -> Sequence[Array]:
    """The arrays that `split` has divided. What is missing, or too much, the decoder will refuse."""
    first, second = iter(ahead), iter(rest)
    return [a for p in positions for a in [next(first if p else second, None)] if a is not None]


def summed(part: int) -> int:
    """What stands in `Run.told` for the source of the sum of a site."""
    return -1 - part


def heard(message: wire.Gossip, value: T, told: dict[Key, T], lists: Lists, positions: Sequence[Which]) -> Lists:
    """Add what another replica has sent to what is `told`. Returns the positions whose changes are still to come."""
    source = message.source if message.part is None else summed(message.part)
    key = message.store, message.replica, source, message.clock
    if message.ahead:
        return {**lists, key: value or ()}
    if key in lists:
        value = cast("T", joined(positions[message.store], lists[key], value or ()))
        lists = {k: arrays for k, arrays in lists.items() if k != key}
    told[key] = value
    return lists


class Backlog:
    """What waits for the links of a sender, whose layers are sent one after the other in each step."""

    def __init__(self, waiting: Callable[[str, str], int]) -> None:
        """`waiting(sender, receiver)` are the bytes that wait at this moment."""
        self._waiting = waiting
        self._found: dict[tuple[int, str], tuple[int, int]] = {}
        """(replica, receiver) -> the newest step of which changes were sent, and the bytes that waited before them."""

    def saturated(self, replica: int, clock: int, sender: str, receiver: str, ahead: Sequence[Array]) -> bool:
        """Whether to send these positions ahead: whether more waited for the link when the first changes of the step
        were to be sent."""
        if not ahead:
            return False
        found = self._found.get((replica, receiver))
        if found is None or found[0] != clock:
            found = self._found[replica, receiver] = clock, self._waiting(sender, receiver)
        return found[1] > sum(a.nbytes for a in ahead)
