"""Groups parameters into buckets, whose gradients replicas add up in one all-reduce.

Even a small all-reduce costs a few messages, so small gradients share one. A bucket holds gradients that the backward
pass makes one after the other, so the first bucket is sent while the rest is computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from flowml.ir.label import layer_of
from flowml.plan import StoreSpec
from flowml.policy.topology import DOUBLING_BYTES

BUCKET_BYTES = DOUBLING_BYTES
"""Largest bucket. Up to this size the number of messages dominates the time of an all-reduce, so sharing is faster. A
larger bucket would save less time than its first gradient waits for its last one."""


@dataclass(frozen=True)
class Bundle:
    """Leaves that stay together in any case. Bundles of equal `kind` may share a bucket; with kind None they never do.

    `ready` orders bundles by the time when the backward pass finishes them.
    """

    leaves: tuple[int, ...]
    nbytes: int
    ready: int
    kind: Hashable | None


def pack(bundles: Iterable[Bundle], most_bytes: int = BUCKET_BYTES) -> list[tuple[int, ...]]:
    """The leaves of each bucket, in the order of their first leaf. A bundle that is too large has its own bucket."""
    full: list[tuple[int, ...]] = []
    open_: dict[Hashable, tuple[tuple[int, ...], int]] = {}
    for bundle in sorted(bundles, key=lambda b: b.ready):
        if bundle.kind is None:
            full.append(bundle.leaves)
            continue
        leaves, nbytes = open_.pop(bundle.kind, ((), 0))
        if leaves and nbytes + bundle.nbytes > most_bytes:
            full.append(leaves)
            leaves, nbytes = (), 0
        open_[bundle.kind] = (*leaves, *bundle.leaves), nbytes + bundle.nbytes
    return sorted(tuple(sorted(b)) for b in (*full, *(leaves for leaves, _ in open_.values())))


def layers_of(store: StoreSpec) -> tuple[str, ...]:
    """The layers in a bucket; the name of the store, if several stores share one of its layers."""
    layers = tuple(dict.fromkeys(map(layer_of, store.paths)))
    return layers if joined(layers) == store.name else (store.name,)


def joined(names: Sequence[str]) -> str:
    """The name of a bucket of these layers."""
    found = tuple(dict.fromkeys(names))
    return "+".join(found) if len(found) <= 3 else f"{found[0]}+{len(found) - 1} more"
