"""Chooses the workers that keep copies of what another one keeps: on a ring, weighted by memory, two choices for each.

Each worker has points on a ring of hashes, the more the larger its memory (virtual nodes, as in DeCandia et al.,
*Dynamo*, SOSP 2007). The copies of an owner of buffers are on the next workers clockwise from the hash of its name.
There are two such places, and the emptier one is taken (Mitzenmacher, *The power of two choices*, 2001). So a worker
that comes or goes moves few copies, and the copies of one worker are spread over all others, who share the work when
it is lost.

All of it follows from names and sizes, so that nobody has to be told who keeps what.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from hashlib import blake2b

POINTS = 32
"""Of a worker with as much memory as the mean."""
MOST_POINTS = 1024


class Ring:
    """The places of the copies of what one worker keeps."""

    def __init__(self, me: str, memory: Mapping[str, int], copies: int) -> None:
        """`memory` is that of all workers in bytes, or any number of the same kind, such as 1 for each."""
        self._memory = {worker: max(size, 1) for worker, size in memory.items() if worker != me}
        self._copies = min(copies, len(self._memory))
        mean = sum(self._memory.values()) / max(len(self._memory), 1)
        self._points = sorted(
            (_hash(f"{worker}#{number}"), worker)
            for worker, size in self._memory.items()
            for number in range(min(max(round(POINTS * size / mean), 1), MOST_POINTS))
        )
        self._placed: dict[str, tuple[str, ...]] = {}
        self._bytes = dict.fromkeys(self._memory, 0)

    def chain(self, owner: str, nbytes: int) -> tuple[str, ...]:
        """The workers that keep the copies of an owner, in the order of the chain: the same as long as the ring is."""
        found = self._placed.get(owner)
        if found is None and self._copies:
            first, second = (self._clockwise(_hash(f"{choice}/{owner}")) for choice in range(2))
            found = first if self._load(first, nbytes) <= self._load(second, nbytes) else second
            self._placed[owner] = found
            for worker in found:
                self._bytes[worker] += nbytes
        return found or ()

    def _load(self, chain: tuple[str, ...], nbytes: int) -> float:
        """How full the fullest of these workers would be."""
        return max((self._bytes[worker] + nbytes) / self._memory[worker] for worker in chain)

    def _clockwise(self, at: int) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for worker in self._from(bisect_right(self._points, (at, ""))):
            found[worker] = None
            if len(found) == self._copies:
                break
        return tuple(found)

    def _from(self, place: int) -> Iterator[str]:
        yield from (worker for _, worker in self._points[place:])
        yield from (worker for _, worker in self._points[:place])


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
