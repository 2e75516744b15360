"""Defines what a topology and a graph are, and how a new one says by which route replicas add up what they have.

A route is a list of rounds for each rank, and each worker is one rank. In a round a rank sends first, and then takes.
Every rank has the same number of rounds. `check` plays a route, and finds whether each rank ends with the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowml.errors import PolicyError
from flowml.policy.kinds import Knob

MOST_PLAYED = 64
"""The most ranks for which a route is played before it is used."""


Weights = dict[int, float]
"""Replica -> weight, for the nonzero entries of a row of W, in ascending order of replicas."""


@dataclass(frozen=True, slots=True)
class Round:
    """The steps of one rank in one round: sends as (peer, chunk), then takes as (chunk, peers).

    What it takes is added to what it has of the chunk, in the order of ranks, or with `add=False` takes its place.
    `complete`: afterwards the chunks that it takes are the sums over all ranks.
    """

    sends: tuple[tuple[int, int], ...]
    takes: tuple[tuple[int, tuple[int, ...]], ...]
    add: bool
    complete: bool = True


class Topology(Knob):
    """How contributions travel. A new kind says in `rounds` how replicas, or sites, add up gradients among themselves.

    Each then has the sum and applies it to its copy of the parameters, as with `AllReduce`.
    """

    __slots__ = ()

    def chunks(self, ranks: int) -> int:
        """Into how many chunks of equal size a gradient is divided."""
        return 1

    def rounds(self, rank: int, ranks: int) -> Sequence[Round]:
        """The rounds of one of at least two ranks."""
        raise NotImplementedError

    def describe(self) -> str:
        """A short name for tables; "" for the default topology."""
        return type(self).__name__.lower()


class Graph(Knob):
    """Which replicas average with which, and by what weights. A new kind has at least `row`."""

    __slots__ = ()

    def row(self, replica: int, members: int, turn: int = 0) -> Weights:
        """The weights of the average of one replica in a round, in ascending order of replicas. W is doubly stochastic
        in each round."""
        raise NotImplementedError

    @property
    def symmetric(self) -> bool:
        """Whether W is, so that a replica's own row says who averages with it. Else all rows are looked at."""
        return False

    @property
    def changes(self) -> bool:
        """Whether W differs from round to round."""
        return False

    def describe(self) -> str:
        """A short name for tables."""
        return type(self).__name__.removesuffix("Graph").lower()


def check(topology: Topology, ranks: int) -> None:
    """Play a route. Raises PolicyError if a rank ends without the sum, or if sends and takes do not fit."""
    chunks = topology.chunks(ranks)
    lists = [tuple(topology.rounds(rank, ranks)) for rank in range(ranks)]
    if len({len(rounds) for rounds in lists}) > 1:
        raise _wrong(topology, ranks, f"ranks have {sorted({len(r) for r in lists})} rounds; give each the same number")
    held = [[Counter({rank: 1}) for _ in range(chunks)] for rank in range(ranks)]
    everything = Counter(dict.fromkeys(range(ranks), 1))
    for number, rounds in enumerate(zip(*lists, strict=True)):
        sent = {(r, peer, chunk): held[r][chunk].copy() for r in range(ranks) for peer, chunk in rounds[r].sends}
        for rank, step in enumerate(rounds):
            for chunk, peers in step.takes:
                where = f"in round {number} rank {rank} takes chunk {chunk} of {sorted(peers)}"
                taken = [sent.pop((peer, rank, chunk), None) for peer in peers]
                if None in taken:
                    raise _wrong(topology, ranks, f"{where}, which is not sent to it then")
                total = held[rank][chunk] if step.add else Counter[int]()
                for part in taken:
                    total = total + (part or Counter[int]())
                held[rank][chunk] = total
                if step.complete != (total == everything):
                    what = f"complete={step.complete}, and has {_text(total, ranks)}"
                    raise _wrong(topology, ranks, f"{where} with {what}")
        if sent:
            rank, peer, chunk = min(sent)
            raise _wrong(
                topology, ranks, f"in round {number} rank {rank} sends chunk {chunk} to {peer}, which takes none"
            )
    for rank, found in enumerate(held):
        lacking = next((chunk for chunk, total in enumerate(found) if total != everything), None)
        if lacking is not None:
            raise _wrong(topology, ranks, f"rank {rank} ends with {_text(found[lacking], ranks)} in chunk {lacking}")


def sent_share(topology: Topology, ranks: int) -> float:
    """How many times its gradient a rank sends, as the mean over all ranks."""
    sends = sum(len(step.sends) for rank in range(ranks) for step in topology.rounds(rank, ranks))
    return sends / topology.chunks(ranks) / ranks


def _text(total: Counter[Any], ranks: int) -> str:
    return " + ".join(f"{total[r]} of rank {r}" for r in range(ranks) if total[r]) or "nothing"


def _wrong(topology: Topology, ranks: int, why: str) -> PolicyError:
    return PolicyError(f"topology={topology!r} is no sum over {ranks} ranks: {why}")
