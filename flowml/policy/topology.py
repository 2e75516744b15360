"""Who sends to whom: the values of a policy's topology, and what they come to for so many bytes on given machines.

`ParameterServer` has one home a layer. With all others each replica keeps a copy, and replicas add up their gradients
among themselves; the schedules of that are named here and drafted in the runtime.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from flowml.errors import PolicyError
from flowml.numbers import whole

DOUBLING_BYTES = 2 * 2**20
"""Up to here, on one host, fewer hops beat fewer bytes. Measured: the ways cross at 3 to 8 MiB for 2 and 4 ranks."""

DOUBLING_BYTES_APART = 256 * 2**10
"""The same among hosts. Measured: 1 MiB over gRPC on loopback; a network is slower in bytes than that, not in hops."""


@dataclass(frozen=True)
class ParameterServer:
    """Every layer has one home, which holds its parameters and optimizer state and applies what replicas send."""


@dataclass(frozen=True)
class AllReduce:
    """Every replica keeps a copy, and gradients are added up among replicas: by which schedule, their size decides.

    Small ones take recursive doubling, large ones reduce-scatter and all-gather: directly on one host, around a
    ring among hosts, both where hosts have several replicas.
    """


@dataclass(frozen=True)
class Ring:
    """As `AllReduce`, always around a ring: each of N replicas sends 2 (N-1)/N of the gradient."""


@dataclass(frozen=True)
class Tree:
    """As `AllReduce`, always up a tree to the first replica and down again, `fanout` children each."""

    fanout: int = 4

    def __post_init__(self) -> None:
        fanout = whole(self.fanout)
        if fanout is None or fanout < 1:
            raise PolicyError(f"Tree(fanout={self.fanout!r}): the number of children is an int of at least 1")
        object.__setattr__(self, "fanout", fanout)


@dataclass(frozen=True)
class Hierarchy:
    """As `AllReduce`, always added up inside each host first (`local`), then around the hosts (`remote`)."""

    local: AllReduce = field(default_factory=AllReduce)
    remote: Ring = field(default_factory=Ring)

    def __post_init__(self) -> None:
        for name, value, kind in (("local", self.local, AllReduce), ("remote", self.remote, Ring)):
            if type(value) is not kind:
                raise PolicyError(
                    f"Hierarchy({name}={value!r}) is not available yet; give {name}=flowml.{kind.__name__}()"
                )


Topology = ParameterServer | AllReduce | Ring | Tree | Hierarchy

TOPOLOGIES = (ParameterServer, AllReduce, Ring, Tree, Hierarchy)


def choose(nbytes: int, hosts: Sequence[Hashable]) -> str:
    """The name of the schedule for `nbytes` among ranks on `hosts`, the machine of each."""
    different = len(set(hosts))
    if nbytes <= (DOUBLING_BYTES if different == 1 else DOUBLING_BYTES_APART):
        return "doubling"
    return "direct" if different == 1 else "ring" if different == len(hosts) else "hierarchical"


def schedule_name(topology: Topology, nbytes: int, hosts: Sequence[Hashable]) -> str:
    """The schedule that an all-reduce topology takes."""
    if isinstance(topology, AllReduce):
        return choose(nbytes, hosts)
    return "ring" if isinstance(topology, Ring) else "tree" if isinstance(topology, Tree) else "hierarchical"


def sent_bytes(schedule: str, nbytes: float, ranks: int) -> float:
    """What a rank sends for a gradient of `nbytes`, in the mean over all ranks."""
    if schedule != "doubling":  # N-1 times to be added up, N-1 times to be spread
        return 2 * (ranks - 1) / ranks * nbytes
    power = 1 << (ranks.bit_length() - 1)
    return (2 * (ranks - power) + power * (power.bit_length() - 1)) / ranks * nbytes


def describe(topology: Topology) -> str:
    """A word or two for tables; none for the usual."""
    names = {ParameterServer: "", AllReduce: "all-reduce", Ring: "ring", Hierarchy: "hierarchy"}
    return f"tree {topology.fanout}" if isinstance(topology, Tree) else names[type(topology)]
