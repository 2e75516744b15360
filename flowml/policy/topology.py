"""Defines topologies, which say how contributions travel, and chooses the schedule of an all-reduce.

`ParameterServer` has one home for each layer. With all other topologies each replica keeps a copy, and replicas add up
their gradients among themselves. The schedules of these sums are named here and implemented in the runtime.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import whole

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


Topology = ParameterServer | AllReduce | Ring | Tree | Hierarchy

TOPOLOGIES = (ParameterServer, AllReduce, Ring, Tree, Hierarchy)


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
    names = {ParameterServer: "", AllReduce: "all-reduce", Ring: "ring", Hierarchy: "hierarchy"}
    return f"tree {topology.fanout}" if isinstance(topology, Tree) else names[type(topology)]
