"""Exchanges filtered arrays that cannot be added up: each replica gets what all others have encoded, and adds it up.

`top_k` chooses other elements on each replica, and `quantise` rounds by another scale, so what they make of several
arrays is not what they make of the sum. Sums of gradients still need not come from a home: replicas send each other the
encoded arrays, as all-gather does for sparse gradients (Renggli et al., *SparCML*, 2019), and each decodes them in the
same order. That saves bytes while the number of replicas is smaller than the factor by which a filter makes an array
smaller.

What travels is one array of bytes with a *slot* for each replica. A replica fills its own slot and leaves the others
zero, so any sum of these arrays is the whole, and schedules that pass whole slots on need not add anything. Slots have
one size, so the filters are those whose size does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from flowml.arrays import ArraySpec, dtype_of, unheard
from flowml.policy.filters.base import Array, Context, EncodingError, Form, State, on_numpy, wide
from flowml.policy.filters.chain import Chain, compares, decode, encode, remembers, wire_forms
from flowml.policy.filters.sums import is_additive

_SAMPLES = Form((64,), dtype_of("float32")), Form((64, 64), dtype_of("float32"))
_EMPTY, _SOUND, _SPOILED = 0, 1, 2
"""The first byte of a slot: nobody's, finite, or of a replica whose arrays are not."""


class Seat(NamedTuple):
    """The slot of a replica, and the number of slots."""

    slot: int
    slots: int


def is_exchanged(chain: Chain) -> bool:
    """Whether replicas exchange what the chain encodes: it cannot be added up, its size is known, and all decode the
    same bits, because each applies the sum to a copy of its own."""
    if is_additive(chain) or remembers(chain) or compares(chain) or not all(f.exact for f in chain):
        return False
    return all(part.exact for form in _SAMPLES for part in wire_forms(chain, form))


def slot_bytes(chain: Chain, payload: Sequence[ArraySpec], filtered: Collection[int]) -> int:
    """The size of a slot for arrays of which those at positions `filtered` are filtered."""
    return _size(_forms(chain, [Form.of(spec) for spec in payload], filtered))


class Exchange:
    """One replica's part in the exchange of a payload: a conversation of one sum, as `sums.Adding`."""

    def __init__(
        self,
        chain: Chain,
        arrays: Sequence[Array],
        filtered: Collection[int],
        about: Sequence[tuple[State, Context]],
        seat: Seat,
        commit: Callable[[Sequence[State]], None],
        *,
        spoiled: bool = False,
    ) -> None:
        """`about` holds the buffers and the context of each array. Given a `spoiled` payload the sum is NaN for all
        replicas. `commit` is given the buffers for the next push."""
        self._given = [Form(a.shape, a.dtype) for a in arrays]
        self._chains = [chain if i in filtered else () for i in range(len(arrays))]
        self._forms = _forms(chain, self._given, filtered)
        self._seat, self._size, self._commit = seat, _size(self._forms), commit
        found = [encode(c, a, *known) for c, a, known in zip(self._chains, arrays, about, strict=True)]
        self._after = [after for _, after in found]
        mine = b"".join(array.tobytes() for wire, _ in found for array in wire)
        whole = np.zeros((seat.slots, self._size), np.uint8)
        whole[seat.slot, 0] = _SPOILED if spoiled else _SOUND
        whole[seat.slot, 1:] = np.frombuffer(mine, np.uint8)
        self.sent = [whole.reshape(-1)]
        """What this replica adds: bytes, of shape (slots × bytes of a slot,)."""
        self._total: Array | None = None

    def take(self, totals: Sequence[Array]) -> bool:
        """Go on with what all replicas have sent. Returns that there is no other sum."""
        (self._total,) = totals
        return False

    def total(self) -> list[Array]:
        """The sums of all arrays, with the same bits on every machine. Raises EncodingError for what no replica can
        have sent."""
        assert self._total is not None, "no sum has come"
        slots = np.asarray(self._total).reshape(self._seat.slots, self._size)
        sums: list[Array] | None = None
        for slot in slots[slots[:, 0] != _EMPTY]:
            if slot[0] == _SPOILED:
                return [np.full(form.shape, np.nan, form.dtype) for form in self._given]
            if slot[0] != _SOUND:
                raise EncodingError(f"a slot begins with {slot[0]}, which says nothing")
            arrays = [wide(array) for array in self._decoded(slot)]
            with unheard():
                sums = arrays if sums is None else [a + b for a, b in zip(sums, arrays, strict=True)]
        if sums is None:
            raise EncodingError("no slot has anything")
        return [a.astype(form.dtype, copy=False) for a, form in zip(sums, self._given, strict=True)]

    def _decoded(self, slot: Array) -> list[Array]:
        found: list[Array] = []
        at = 1
        for chain, form, parts in zip(self._chains, self._given, self._forms, strict=True):
            wire: list[Array] = []
            for part in parts:
                wire.append(np.frombuffer(slot[at : at + part.nbytes].tobytes(), part.dtype).reshape(part.shape))
                at += part.nbytes
            found.append(decode(chain, iter(wire), form, {}, on_numpy)[0])
        return found

    def commit(self) -> None:
        """The sum is applied: keep the buffers for the next push."""
        self._commit(self._after)


def _forms(chain: Chain, payload: Sequence[Form], filtered: Collection[int]) -> list[tuple[Form, ...]]:
    return [wire_forms(chain if i in filtered else (), form) for i, form in enumerate(payload)]


def _size(forms: Sequence[Sequence[Form]]) -> int:
    return 1 + sum(form.nbytes for parts in forms for form in parts)
