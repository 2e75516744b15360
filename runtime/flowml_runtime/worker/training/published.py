"""Encodes the versions that a home publishes by the filters of its policy, and decodes them where they are read.

A home and the readers of a store hold the same *public copy* of its parameters. With a new version the home encodes the
difference between the parameters and the copy, and home and readers add what is decoded to their copies. What a filter
leaves out is part of the next difference, so nothing is lost (Koloskova, Stich & Jaggi, *Decentralized stochastic
optimization and gossip algorithms with compressed communication*, ICML 2019). All readers have the same bits.

The first version travels whole, and so does one for a reader that has not been sent the copy before it. Filters that
lose nothing encode each version by itself, so that readers have the bits of the home.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from flowml.errors import FlowmlError
from flowml.plan import StoreSpec
from flowml.policy import filters
from flowml_runtime.execution.programs import Array
from flowml_runtime.worker.training.filtered import packed
from flowml_runtime.worker.training.resident import Arrays, number, row, row_of, states, states_of

WHOLE = -1
"""The `base` of a version that is not encoded."""

MOST_PENDING = 8
"""Differences that a reader keeps encoded until they are read."""


class PublicCopy:
    """What the readers of one store hold of it. Its home uses it in the order of versions."""

    def __init__(
        self,
        spec: StoreSpec,
        seed: tuple[int, ...],
        kernels: filters.Run = filters.on_numpy,
        chain: filters.Chain | None = None,
    ) -> None:
        """`chain`: the filters, by default those of what the home publishes."""
        self.values: Sequence[Array] = ()
        self.buffers: list[filters.State] = []
        self._spec = spec
        self._chain = spec.policy.pull_filters if chain is None else chain
        self._seed = seed
        self._kernels = kernels
        self._version = WHOLE

    def advance(self, version: int, values: Sequence[Array]) -> tuple[int, Sequence[Array]]:
        """Make the copy of a version. Returns the version that readers need for what is sent, and that: the version
        itself where it is encoded, but no difference."""
        if filters.is_lossless(self._chain):
            return version, packed(self._chain, values)
        base, self._version = self._version, version
        if base == version:  # the copy of a snapshot
            return WHOLE, self.values
        if base == WHOLE:
            self.values = list(values)
            self.forget()
            return WHOLE, self.values
        sent: list[Array] = []
        copies: list[Array] = []
        for i, (value, copy) in enumerate(zip(values, self.values, strict=True)):
            context = filters.Context((*self._seed, i, version), version, 1.0, copy, feedback=True, run=self._kernels)
            difference = _subtracted(value, copy)
            wire, self.buffers[i], decoded = filters.rebuilt(self._chain, difference, self.buffers[i], context)
            sent += wire
            copies.append(_added(copy, decoded))
        self.values = copies
        return base, sent

    def export(self) -> Arrays:
        """The copy and what its filters remember, for a snapshot."""
        kept = states("filter", {(i,): state for i, state in enumerate(self.buffers)})
        return {**row("copy", self.values), **kept, "version": number(self._version)}

    def restore(self, arrays: Arrays) -> None:
        """Go on with the copy of a snapshot, which readers get whole."""
        self.values, self._version = row_of(arrays, "copy"), int(arrays["version"])
        known = states_of(arrays, "filter")
        self.buffers = [known.get((i,), {}) for i in range(len(self._spec.specs))]

    def restart(self, arrays: Arrays) -> None:
        """Go on with the copy of a snapshot, for readers that remember nothing."""
        self.restore(arrays)
        self.forget()

    def forget(self) -> None:
        """A reader gets the copy whole, so nothing that comes next may refer to what was sent before."""
        self.buffers = [{} for _ in self._spec.specs]


class Reader:
    """Decodes the versions of one store on one worker. They come in order."""

    def __init__(
        self,
        spec: StoreSpec,
        kernels: filters.Run = filters.on_numpy,
        chain: filters.Chain | None = None,
        whose: str = "the home",
    ) -> None:
        """`chain` is as in `PublicCopy`; `whose` are the versions."""
        self._spec = spec
        self._kernels = kernels
        self._chain = spec.policy.pull_filters if chain is None else chain
        self._whose = whose
        self.buffers: list[filters.State] = [{} for _ in spec.specs]

    def export(self) -> Arrays:
        """What its filters remember, for a snapshot, when all versions are decoded."""
        return states("filter", {(i,): state for i, state in enumerate(self.buffers)})

    def restore(self, arrays: Arrays) -> None:
        """Go on with the buffers of a snapshot."""
        known = states_of(arrays, "filter")
        self.buffers = [known.get((i,), {}) for i in range(len(self._spec.specs))]

    def view(self, version: int, base: int, arrays: Sequence[Array], before: StoreView | None) -> StoreView:
        """The view of a version that has come after `before`. Raises FlowmlError if it refers to another."""
        if base in (WHOLE, version):
            return StoreView(version, arrays, None if base == WHOLE else self._decoded)
        if before is None or before.version != base:
            raise FlowmlError(f"version {version} of layer {self._spec.name!r} refers to version {base}, not here")
        view = StoreView(version, arrays, partial(self._add, before), before.pending + 1)
        return view if view.pending <= MOST_PENDING else StoreView(version, view.values)

    def _add(self, before: StoreView, arrays: Sequence[Array]) -> Sequence[Array]:
        return self.added(before.values, arrays)

    def added(self, copy: Sequence[Array], arrays: Sequence[Array]) -> Sequence[Array]:
        """The copy after the one that the difference refers to."""
        return [_added(value, decoded) for value, decoded in zip(copy, self._decoded(arrays), strict=True)]

    def _decoded(self, arrays: Sequence[Array]) -> Sequence[Array]:
        left, found = iter([np.asarray(a) for a in arrays]), list[Array]()
        for i, form in enumerate(map(filters.Form.of, self._spec.specs)):
            before = self.buffers[i]
            try:
                value, self.buffers[i] = filters.decode(self._chain, left, form, before, self._kernels)
            except filters.EncodingError as error:
                raise FlowmlError(
                    f"{self._whose} of layer {self._spec.name!r} published what its filters cannot have made: "
                    f"{error}; see whether all workers run the same version of flowml"
                ) from None
            found.append(value)
        return found


class StoreView:
    """The newest published version of a store, as a worker reads it. What is encoded is decoded at the first read."""

    def __init__(
        self,
        version: int,
        values: Sequence[Array],
        decode: Callable[[Sequence[Array]], Sequence[Array]] | None = None,
        pending: int = 0,
    ) -> None:
        """`pending` is the number of versions, this one included, that are not decoded."""
        self.version = version
        self.pending = pending
        self._values = values
        self._decode = decode
        self._lock = threading.Lock()

    @property
    def values(self) -> Sequence[Array]:
        """The parameters."""
        with self._lock:
            if self._decode is not None:
                self._values = self._decode(self._values)
                self._decode, self.pending = None, 0  # and forget the versions before
            return self._values


def _subtracted(value: Any, copy: Any) -> Any:
    """The difference in the dtype of the parameters, computed in one that is wide enough."""
    return (filters.wide(value) - filters.wide(copy)).astype(copy.dtype, copy=False)


def _added(copy: Any, decoded: Any) -> Any:
    return (filters.wide(copy) + filters.wide(decoded)).astype(copy.dtype, copy=False)
