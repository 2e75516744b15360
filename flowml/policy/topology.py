"""Defines topologies, which say how contributions travel, and chooses the schedule of an all-reduce.

`ParameterServer` has one home for each layer. With `SharedMemory` the replicas are on one worker, and share it. With
`Gossip` each replica has parameters of its own, and averages them with its neighbours. With all other topologies each
replica keeps a copy, and replicas add up their gradients among themselves. The schedules of these sums are named here
and implemented in the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.graphs import Graph, RingGraph, Weights, as_graph, name_of, readers

DOUBLING_BYTES = 2 * 2**20
"""Largest gradient on one host for which fewer hops are faster than fewer bytes. The measured limit is 3 to 8 MiB for
2 and 4 ranks."""

DOUBLING_BYTES_APART = 256 * 2**10
"""The same between hosts. The measured limit is 1 MiB over gRPC on loopback; a network has a lower rate than that but
a similar latency, so the limit is lower."""


class ParameterServer(msgspec.Struct, frozen=True, tag=True):
    """Each layer has one home, which holds its parameters and optimizer state and applies the contributions."""


class AllReduce(msgspec.Struct, frozen=True, tag=True):
    """Every replica keeps a copy, and replicas add up their gradients among themselves.

    Small gradients use recursive doubling. Large gradients use reduce-scatter and all-gather: directly on one host,
    around a ring between hosts, and both where hosts have several replicas.
    """


class Ring(msgspec.Struct, frozen=True, tag=True):
    """Like `AllReduce`, but always around a ring: each of N replicas sends 2 (N-1)/N of the gradient."""


class Tree(msgspec.Struct, frozen=True, tag=True):
    """Like `AllReduce`, but always up a tree to the first replica and down again; each node has `fanout` children."""

    fanout: int = 4

    def __post_init__(self) -> None:
        fanout = whole(self.fanout)
        if fanout is None or fanout < 1:
            raise PolicyError(f"Tree(fanout={self.fanout!r}): the number of children is an int of at least 1")
        msgspec.structs.force_setattr(self, "fanout", fanout)


class Hierarchy(msgspec.Struct, frozen=True, tag=True):
    """Like `AllReduce`, but always adds up inside each host (`local`), then around a ring of hosts (`remote`)."""

    local: AllReduce = AllReduce()
    remote: Ring = Ring()

    def __post_init__(self) -> None:
        for name, value, kind in (("local", self.local, AllReduce), ("remote", self.remote, Ring)):
            if type(value) is not kind:
                raise PolicyError(
                    f"Hierarchy({name}={value!r}) is not available yet; give {name}=flowml.{kind.__name__}()"
                )


class Gossip(msgspec.Struct, frozen=True, tag=True):
    """Replicas have parameters of their own, and average them with those of their neighbours in a graph.

    Args:
        graph: `"ring"`, `"torus"`, `"exponential"`, `"complete"`, `"random_pairs"`, a doubly stochastic matrix with a
            row for each replica, or a graph of `flowml.policy.graphs`.
        every: the number of steps between two rounds. In `Policy(topology=Gossip(...), every=k)` k is meant.
        pull: with `apply=Outer(optimizer)`, how much of a replica's distance from the average of its neighbours is
            added to the gradient of the outer optimizer.
    """

    graph: Graph = RingGraph()
    every: int = 1
    pull: float = 1.0

    if TYPE_CHECKING:

        def __init__(self, graph: object = ..., every: int = 1, pull: float = 1.0) -> None: ...

    def __post_init__(self) -> None:
        every = whole(self.every)
        if every is None or every < 1:
            raise PolicyError(
                f"Gossip(every={self.every!r}): the number of steps between rounds is an int of at least 1"
            )
        msgspec.structs.force_setattr(self, "every", every)
        msgspec.structs.force_setattr(self, "graph", as_graph(self.graph))
        if isinstance(self.pull, bool) or not isinstance(self.pull, Real) or not 0 <= self.pull < math.inf:
            raise PolicyError(f"Gossip(pull={self.pull!r}): it multiplies a distance; give a number of at least 0")
        msgspec.structs.force_setattr(self, "pull", float(self.pull))

    def due(self, clock: int) -> bool:
        """Whether the step of `clock` ends with a round."""
        return (clock + 1) % self.every == 0

    def weights(self, replica: int, members: int, clock: int) -> Weights:
        """The weight of each replica's parameters in the average of `replica` in the round of `clock`."""
        return self.graph.row(replica, members, clock // self.every)

    def readers(self, replica: int, members: int, clock: int) -> tuple[int, ...]:
        """The replicas that get the parameters of `replica` in the round of `clock`."""
        return readers(self.graph, replica, members, clock // self.every)


class SharedMemory(msgspec.Struct, frozen=True, tag=True):
    """The replicas are devices of one worker, and share the parameters: each updates them itself, at once.

    No message is sent, and no replica waits for another (Recht et al., *Hogwild*, NeurIPS 2011). A layer is replaced as
    a whole, so that no update is lost and no reader sees half of one (Viebke et al., *CHAOS*, 2017).
    """


Topology = ParameterServer | AllReduce | Ring | Tree | Hierarchy | Gossip | SharedMemory

TOPOLOGIES = (ParameterServer, AllReduce, Ring, Tree, Hierarchy, Gossip, SharedMemory)


def choose(nbytes: int, hosts: Sequence[Hashable]) -> str:
    """The name of the schedule for `nbytes`, where `hosts` is the machine of each rank."""
    different = len(set(hosts))
    if nbytes <= (DOUBLING_BYTES if different == 1 else DOUBLING_BYTES_APART):
        return "doubling"
    return "direct" if different == 1 else "ring" if different == len(hosts) else "hierarchical"


def schedule_name(topology: Topology, nbytes: int, hosts: Sequence[Hashable]) -> str:
    """The name of the schedule that an all-reduce topology uses."""
    if isinstance(topology, AllReduce):
        return choose(nbytes, hosts)
    return "ring" if isinstance(topology, Ring) else "tree" if isinstance(topology, Tree) else "hierarchical"


def sent_bytes(schedule: str, nbytes: float, ranks: int) -> float:
    """The bytes that a rank sends for a gradient of `nbytes`, as the mean over all ranks."""
    if schedule != "doubling":  # N-1 sends add up the gradient, N-1 sends distribute the sum
        return 2 * (ranks - 1) / ranks * nbytes
    power = 1 << (ranks.bit_length() - 1)
    return (2 * (ranks - power) + power * (power.bit_length() - 1)) / ranks * nbytes


def describe(topology: Topology) -> str:
    """A short name for tables; "" for the default topology."""
    if isinstance(topology, Gossip):
        often = f" every {topology.every}" if topology.every > 1 else ""
        return f"gossip {name_of(topology.graph)}{often}"
    names = {
        ParameterServer: "",
        SharedMemory: "shared memory",
        AllReduce: "all-reduce",
        Ring: "ring",
        Hierarchy: "hierarchy",
    }
    return f"tree {topology.fanout}" if isinstance(topology, Tree) else names[type(topology)]
