"""Encodes the pushes of a stage by the filters of their policies, and decodes them at a home.

    stage: gradients -> Encoder.encode -> wire arrays -> Contribution -> Decoder.decode -> gradients: home

The filters are pure functions (`flowml.policy.filters`). What they keep between pushes are buffers that live here: the
residuals of error feedback, the basis of a low-rank approximation, and cached keys.

* A push that a decision leaves out takes nothing from a residual: `settle` restores the residual of before. The
  gradient of the dropped step stays dropped, as without filters. The next push starts only when the fate of the last
  one is known (`protocol.training.terms`).
* A home decodes a contribution before it applies it. Cached keys are those of the last contribution that was sent, so
  where keys are cached the home decodes all contributions in the order in which they came. It may apply them in
  another order, because a late one can be folded in after a newer one, or not at all.
* A contribution that waits is kept decoded in a snapshot, so that it does not depend on what the decoder remembers.
* What replicas add up, or exchange, among themselves is encoded and decoded by a conversation of each with all others
  (`Encoder.talk`), and homes get the sum whole. A sum that is refused takes nothing from a residual.
* The weight that ends a weighted part, or a set of factors, is not filtered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec
import numpy as np

from flowml.errors import FlowmlError
from flowml.plan import ArraySpec, StoreSpec
from flowml.policy import Policy, filters
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array
from flowml_runtime.transport.arrays import Buffer
from flowml_runtime.worker.training.finite import all_finite
from flowml_runtime.worker.training.resident import Arrays, states, states_of

Kept = Mapping[int, float]

Key = tuple[int, ...]
"""Names a filtered array: (store, part, array) on a stage, (store, part, array, replica, incarnation) at a home."""


class Encoder:
    """Encodes the pushes of one stage of one replica."""

    def __init__(
        self, stores: Sequence[StoreSpec], replica: int, seed: int, kernels: filters.Run = filters.on_numpy
    ) -> None:
        self.buffers: dict[Key, filters.State] = {}
        self._stores = stores
        self._kernels = kernels
        self._seed = (seed, replica)
        self._before: dict[int, dict[Key, Buffer | None]] = {}
        """By clock the residuals from before its pushes, until its fate is known."""
        self._lock = threading.Lock()
        """Guards the buffers: a step sends small pushes itself, and a thread beside it large ones."""

    def filters(self, store: int) -> bool:
        """Whether the pushes to a store are filtered."""
        return bool(self._stores[store].policy.home_filters)

    def compares(self, store: int) -> bool:
        """Whether the filters of a store need its parameters."""
        return filters.compares(self._stores[store].policy.home_filters)

    def encode(
        self, message: wire.Contribution, arrays: Sequence[Array], parameters: Sequence[Array] | None
    ) -> tuple[wire.Contribution, Sequence[Array]]:
        """The message and the arrays to send. `parameters` are those of the store, where the filters compare."""
        store = self._stores[message.store]
        part = store.parts[message.part]
        weight = () if part.factors else arrays[len(part.leaves) :]
        number = 1.0 if store.policy.local else message.weight  # a change or parameters are no sum of gradients
        number = float(np.real(np.asarray(weight[0]))) if weight else number
        context = filters.Context(clock=message.clock, weight=number, run=self._kernels)
        sent: list[Buffer] = []
        for i, array in enumerate(arrays):
            if i not in part.filtered:
                sent.append(np.asarray(array))
                continue
            key = (message.store, message.part, i)
            parameter = None if parameters is None else parameters[part.leaves[i]]
            about = context._replace(seed=(*self._seed, *key, message.clock), parameter=parameter)
            sent += self._encode(store.policy.home_filters, key, array, about)
        specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in sent)
        return msgspec.structs.replace(message, specs=specs), sent

    def talk(
        self,
        store: int,
        part: int,
        clock: int,
        arrays: Sequence[Array],
        *,
        refuses: bool = True,
        seat: filters.Seat | None = None,
    ) -> filters.Talk | None:
        """The part of this replica in a filtered sum; None if the sum is of whole arrays. One that `refuses` makes the
        sum NaN if its arrays are not finite. `seat` is that of an exchange of what cannot be added up."""
        chain, spec = self._stores[store].policy.summed_filters, self._stores[store].parts[part]
        if not chain:
            return None
        keys = [(store, part, i) for i in range(len(arrays))]
        with self._lock:
            before = [self.buffers.get(key, {}) for key in keys]

        def commit(after: Sequence[filters.State]) -> None:
            with self._lock:
                self.buffers.update((key, state) for key, state in zip(keys, after, strict=True) if state)

        given, spoiled = [np.asarray(a) for a in arrays], refuses and not all_finite(arrays)
        seeded = self._seed[:1] if seat is None else self._seed  # what is added up is drawn alike by all replicas
        contexts = [filters.Context((*seeded, *key, clock), clock, run=self._kernels) for key in keys]
        about = list(zip(before, contexts, strict=True))
        if seat is not None:
            return filters.Exchange(chain, given, spec.filtered, about, seat, commit, spoiled=spoiled)
        summings = [
            filters.add_up(chain if i in spec.filtered else (), array, *about[i]) for i, array in enumerate(given)
        ]
        return filters.Adding(summings, commit, spoiled=spoiled)

    def _encode(self, chain: filters.Chain, key: Key, value: Buffer, context: filters.Context) -> Sequence[Buffer]:
        with self._lock:
            before = self.buffers.get(key, {})
        sent, after = filters.encode(chain, value, before, context)
        with self._lock:
            self.buffers[key] = after
            if filters.feeds_back(chain):
                self._before.setdefault(context.clock, {})[key] = before.get(filters.RESIDUAL)
        return sent

    def settle(self, clock: int, stores: Sequence[int], *, counts: bool) -> None:
        """The fate of an ended step for these stores is known. No effect if it pushed nothing that is kept."""
        with self._lock:
            kept = self._before.get(clock, {})
            for key in [k for k in kept if k[0] in stores]:
                residual = kept.pop(key)
                if not kept:
                    del self._before[clock]
                if not counts:
                    others = {n: a for n, a in self.buffers[key].items() if n != filters.RESIDUAL}
                    self.buffers[key] = others if residual is None else {**others, filters.RESIDUAL: residual}

    def export(self, store: int) -> Arrays:
        """The buffers of a store, for a snapshot between two steps."""
        with self._lock:
            return states("push", {key[1:]: state for key, state in self.buffers.items() if key[0] == store})

    def restore(self, store: int, arrays: Arrays) -> None:
        """Go on with the buffers of a snapshot."""
        with self._lock:
            self.buffers.update(((store, *key), state) for key, state in states_of(arrays, "push").items())

    def kept(self) -> Kept:
        """By store the sum of squares of what error feedback has not sent yet."""
        with self._lock:
            buffers = list(self.buffers.items())
        found = [(key[0], state[filters.RESIDUAL]) for key, state in buffers if filters.RESIDUAL in state]
        total: dict[int, float] = {}
        for store, residual in found:
            total[store] = total.get(store, 0.0) + float(np.sum(np.square(residual, dtype=np.float64)))
        return total


def added(kept: Iterable[Kept]) -> tuple[tuple[int, float], ...]:
    """What several stages have not sent yet, for `wire.Traffic`."""
    total: dict[int, float] = {}
    for store, squares in (pair for one in kept for pair in one.items()):
        total[store] = total.get(store, 0.0) + squares
    return tuple((store, squares) for store, squares in sorted(total.items()) if squares)


@dataclass
class Encoded:
    """The messages of the contributions to the homes of a worker that came encoded, by the handles of their arrays."""

    alone: dict[int, wire.Contribution] = field(default_factory=dict[int, wire.Contribution])
    """Those that can be decoded without others."""
    in_turn: dict[int, wire.Contribution] = field(default_factory=dict[int, wire.Contribution])
    """Those that depend on the ones before them, in the order in which they came."""

    def add(self, handle: int, message: wire.Contribution, policy: Policy) -> None:
        (self.in_turn if filters.remembers(policy.home_filters) else self.alone)[handle] = message

    def drop(self, handle: int) -> None:
        self.alone.pop(handle, None)
        self.in_turn.pop(handle, None)


class Decoder:
    """Decodes the contributions to the stores of one worker.

    One thread at a time decodes those of a store, in the order in which each replica sent them.
    """

    def __init__(self, stores: Sequence[StoreSpec], kernels: Mapping[int, filters.Run] | None = None) -> None:
        """`kernels` run those of each store."""
        self.buffers: dict[Key, filters.State] = {}
        self._stores = stores
        self._kernels = kernels or {}

    def export(self, store: int) -> Arrays:
        """What it remembers of a store, for a snapshot."""
        return states("push", {key[1:]: state for key, state in self.buffers.items() if key[0] == store})

    def restore(self, store: int, arrays: Arrays) -> None:
        """Go on with the buffers of a snapshot."""
        self.buffers.update(((store, *key), state) for key, state in states_of(arrays, "push").items())

    def decode(self, message: wire.Contribution, arrays: Sequence[Array]) -> list[Array]:
        """The arrays of the part. Raises FlowmlError if its filters cannot have made those that came."""
        store = self._stores[message.store]
        part = store.parts[message.part]
        left = iter([np.asarray(a) for a in arrays])
        found: list[Array] = []
        try:
            for i, spec in enumerate(part.payload):
                if i not in part.filtered:
                    found += islice(left, 1)
                    continue
                key = (message.store, message.part, i, message.replica, message.incarnation)
                form, before = filters.Form.of(spec), self.buffers.get(key, {})
                run = self._kernels.get(message.store, filters.on_numpy)
                value, self.buffers[key] = filters.decode(store.policy.home_filters, left, form, before, run)
                found.append(value)
        except filters.EncodingError as error:
            raise FlowmlError(
                f"replica {message.replica} sent for layer {store.name!r} at clock {message.clock} what its filters "
                f"cannot have made: {error}; see whether all workers run the same version of flowml"
            ) from None
        found += left
        if len(found) != len(part.payload):
            raise FlowmlError(
                f"replica {message.replica} sent {len(found)} arrays for layer {store.name!r} at clock "
                f"{message.clock}, where {len(part.payload)} are expected"
            )
        return found


def packed(chain: filters.Chain, arrays: Sequence[Array]) -> Sequence[Array]:
    """Arrays as filters that lose nothing, and remember nothing, send them."""
    return [a for v in arrays for a in filters.encode(chain, np.asarray(v), {}, filters.Context())[0]]


def unpacked(chain: filters.Chain, specs: Sequence[ArraySpec], arrays: Sequence[Array], whose: str) -> Sequence[Array]:
    """The arrays, of these specs, that `packed` has packed. Raises FlowmlError for others."""
    left = iter([np.asarray(a) for a in arrays])
    try:
        return [filters.decode(chain, left, filters.Form.of(spec), {})[0] for spec in specs]
    except filters.EncodingError as error:
        raise FlowmlError(
            f"{whose} sent what filters cannot have made: {error}; see whether all workers run the same version of "
            "flowml"
        ) from None
