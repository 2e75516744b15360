"""buckets: which parameters are reduced together, where replicas add up their gradients among themselves.

Every all-reduce costs a few messages however small it is, so small gradients share one. Those that the backward pass
makes one after the other go together: the first bucket is on its way while the rest is computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from flowml.policy.topology import DOUBLING_BYTES

BUCKET_BYTES = DOUBLING_BYTES
"""Up to here an all-reduce takes the time of its messages more than that of its bytes, so sharing one pays. A larger
bucket would save less than its last gradient keeps the first waiting."""


@dataclass(frozen=True)
class Bundle:
    """Leaves that stay together anyway. Bundles of one `kind` may share a bucket, those of None share none.

    `ready` orders bundles by when the backward pass has finished them.
    """

    leaves: tuple[int, ...]
    nbytes: int
    ready: int
    kind: Hashable | None


def pack(bundles: Iterable[Bundle], most_bytes: int = BUCKET_BYTES) -> list[tuple[int, ...]]:
    """The leaves of each bucket; buckets in the order of their first leaf. What is larger than a bucket has its own."""
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
