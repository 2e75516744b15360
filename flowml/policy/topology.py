"""Defines topologies, which say how contributions travel, and chooses the schedule of an all-reduce.

`ParameterServer` has one home for each layer. With `SharedMemory` the replicas are on one worker, and share it. With
`Gossip` each replica has parameters of its own, and averages them with its neighbours. With all other topologies each
replica keeps a copy, and replicas add up their gradients among themselves. A `Hierarchy` nests two: one inside each
site, one between sites. The schedules of these sums are named here and implemented in the runtime.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import real, whole
from flowml.policy.arrivals import Completion
from flowml.policy.graphs import (
    Graph,
    NestedGraph,
    OwnMatrix,
    RingGraph,
    Weights,
    as_graph,
    name_of,
    readers,
    sites_of,
)
from flowml.policy.kinds import register
from flowml.policy.quorum import Quorum
from flowml.policy.routes import Topology, sent_share
from flowml.policy.wording import Value, wrong_kind

DOUBLING_BYTES = 2 * 2**20
"""Largest gradient on one host for which fewer hops are faster than fewer bytes. The measured limit is 3 to 8 MiB for
2 and 4 ranks."""

DOUBLING_BYTES_APART = 256 * 2**10
"""The same between hosts. The measured limit is 1 MiB over gRPC on loopback; a network has a lower rate than that but
a similar latency, so the limit is lower."""


@register
class ParameterServer(Topology, Value, frozen=True, tag=True):
    """Each layer has one home, which holds its parameters and optimizer state and applies the contributions."""

    def describe(self) -> str:
        return ""


@register
class AllReduce(Topology, Value, frozen=True, tag=True):
    """Every replica keeps a copy, and replicas add up their gradients among themselves.

    Small gradients use recursive doubling. Large gradients use reduce-scatter and all-gather: directly on one host,
    around a ring between hosts, and both where hosts have several replicas.
    """

    def describe(self) -> str:
        return "all-reduce"


@register
class Ring(Topology, Value, frozen=True, tag=True):
    """Like `AllReduce`, but always around a ring: each of N replicas sends 2 (N-1)/N of the gradient."""


@register
class Tree(Topology, Value, frozen=True, tag=True):
    """Like `AllReduce`, but always up a tree to the first replica and down again; each node has `fanout` children."""

    fanout: int = 4

    def __post_init__(self) -> None:
        fanout = whole(self.fanout)
        if fanout is None or fanout < 1:
            raise PolicyError(f"Tree(fanout={self.fanout!r}): the number of children is an int of at least 1")
        msgspec.structs.force_setattr(self, "fanout", fanout)

    def describe(self) -> str:
        return f"tree {self.fanout}"


_SHOWN_ROWS = 4
"""A user's matrix of more rows is a name where a policy is shown, as other arrays are."""


@register
class Gossip(Topology, Value, frozen=True, tag=True):
    """Replicas have parameters of their own, and average them with those of their neighbours in a graph.

    Args:
        graph: `"ring"`, `"torus"`, `"exponential"`, `"complete"`, `"random_pairs"`, a doubly stochastic matrix with a
            row for each replica, or a graph of `flowml.policy.graphs`.
        every: the number of steps between two rounds. In `Policy(topology=Gossip(...), every=k)` k is meant.
        pull: with `apply=Outer(optimizer)`, how much of a replica's distance from the average of its neighbours is
            added to the gradient of the outer optimizer: any number above 0. With filters that lose something, by what
            share of the distance of the public copies a replica moves in a round, in (0, 1]. Else it has no effect,
            and a policy refuses another than 1.
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
        pull = real(self.pull)
        if pull is None or not 0 < pull < 2:
            raise PolicyError(
                f"Gossip(pull={self.pull!r}): it multiplies the distance from the mean of neighbours: with 0 replicas "
                "would never agree, and from 2 on each would land farther from the mean than it was; give a number "
                "between 0 and 2, such as 1"
            )
        msgspec.structs.force_setattr(self, "pull", pull)

    def __repr__(self) -> str:
        if isinstance(self.graph, NestedGraph):
            inside, between = self.within()
            return repr(Hierarchy(inside, between, self.graph.sites))
        graph = repr(self.graph)
        if isinstance(self.graph, OwnMatrix):
            graph = repr(self.graph.rows) if len(self.graph.rows) <= _SHOWN_ROWS else "matrix"
        elif (name := name_of(self.graph)) is not None:
            graph = repr(name)
        more = [f"{n}={getattr(self, n):g}" for n in ("every", "pull") if getattr(self, n) != 1]
        return f"fm.Gossip({', '.join([graph, *more])})"

    def within(self) -> tuple[Gossip, Gossip]:
        """The two that a graph with sites nests: inside a site and between sites."""
        assert isinstance(self.graph, NestedGraph)
        between = Gossip(self.graph.remote, self.every * self.graph.often, self.pull)
        return Gossip(self.graph.local, self.every, self.pull), between

    def due(self, clock: int) -> bool:
        """Whether the step of `clock` ends with a round."""
        return (clock + 1) % self.every == 0

    def weights(self, replica: int, members: int, clock: int) -> Weights:
        """The weight of each replica's parameters in the average of `replica` in the round of `clock`."""
        return self.graph.row(replica, members, clock // self.every)

    def readers(self, replica: int, members: int, clock: int) -> tuple[int, ...]:
        """The replicas that get the parameters of `replica` in the round of `clock`."""
        return readers(self.graph, replica, members, clock // self.every)

    def describe(self) -> str:
        if isinstance(self.graph, NestedGraph):
            inside, between = (part.describe() for part in self.within())
            return f"{inside} in sites, {between} between"
        often = f" every {self.every}" if self.every > 1 else ""
        return f"gossip {self.graph.describe()}{often}"


@register
class Hierarchy(Topology, Value, frozen=True, tag=True):
    """Replicas form sites. Each site keeps in step inside by `local`, and sites keep in step by `remote`.

    The replicas of a site add up the gradients of each step by `local`. The site then takes part in `remote` as one
    replica would, through its leader, the replica with the lowest number. All other knobs of the policy (`every`,
    `payload`, `filters`, `staleness`, `apply`) are about the way between sites.

    Args:
        local: `ParameterServer()`: replicas send gradients to the leader, which sends back parameters. `AllReduce()`,
            `Ring()`, `Tree()`, or a `Hierarchy` of these: they add up gradients among themselves. `Gossip(graph)`, with
            a gossip between sites: each has parameters of its own, and averages them with neighbours in its site.
        remote: `ParameterServer()`: leaders send to the layer's home. `AllReduce()`, `Ring()`, `Tree()`: leaders add up
            gradients among themselves, and each applies the sum for its site. `Gossip(graph)`: leaders average
            parameters with, or send changes to, their neighbours.
        sites: the number of sites, of neighbouring replicas in numbers as equal as possible; or the replicas of each
            site, as `((0, 1), (2, 3, 4))`. By default the replicas of one machine are a site.
        quorum: how many replicas of a site complete the site's sum of a step, with `local=ParameterServer()`. By
            default all do. The quorum of the policy counts sites.
    """

    local: Topology = AllReduce()
    remote: Topology = Ring()
    sites: int | tuple[tuple[int, ...], ...] | None = None
    quorum: Completion | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            local: Topology = ...,
            remote: Topology = ...,
            sites: object = ...,
            quorum: Completion | None = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        _check_local(self.local)
        _check_remote(self.remote)
        msgspec.structs.force_setattr(self, "sites", _sites(self.sites))
        if isinstance(self.local, Gossip):
            _check_gossips(self, self.local)
        if self.quorum is not None:
            _check_inside(self.local, self.quorum)

    def split(self, hosts: Sequence[Hashable]) -> tuple[tuple[int, ...], ...]:
        """The replicas of each site, where `hosts` is the machine of each replica.

        Raises:
            PolicyError: if these replicas cannot form the sites.
        """
        replicas = len(hosts)
        if self.sites is None:
            return tuple(tuple(r for r in range(replicas) if hosts[r] == host) for host in dict.fromkeys(hosts))
        return sites_of(self.sites, replicas)

    def describe(self) -> str:
        if not is_sited(self):
            return "hierarchy"
        share = "" if self.quorum is None else f" {self.quorum.describe()}"
        inside = f"{self.local.describe() or 'server'}{share} in sites"
        return f"{inside}, {self.remote.describe() or 'server'} between"


def _check_local(local: Topology) -> None:
    """Check that the replicas of a site hold equal parameters, so that one of them can stand for all."""
    if isinstance(local, Hierarchy):
        if local.local != AllReduce() or local.remote != Ring():
            raise PolicyError(
                f"Hierarchy(local={local!r}): inside a site, a hierarchy is a way to add up gradients; give "
                "local=fm.Hierarchy(), which adds up inside each machine and then between them"
            )
    elif isinstance(local, SharedMemory):
        raise PolicyError(
            f"Hierarchy(local={local!r}) is not sound: replicas that share memory update it at any time, so there is "
            "no step at whose end the site has one gradient to send; give local=fm.AllReduce(), which adds up "
            "directly between the replicas of one machine"
        )
    elif type(local) not in INSIDE and not is_own(local):
        raise wrong_kind("local", local, INSIDE)


def _check_gossips(hierarchy: Hierarchy, local: Gossip) -> None:
    """Check that the rounds inside sites and those between sites are the rounds of one gossip."""
    remote, given = hierarchy.remote, f"Hierarchy(local={local!r}, remote={hierarchy.remote!r})"
    if not isinstance(remote, Gossip):
        raise PolicyError(
            f"{given} is not sound: replicas of a site have parameters of their own, so the gradient of none stands "
            f"for all; give remote=fm.Gossip('complete', every={2 * local.every}), with which sites average "
            "parameters, or local=fm.AllReduce()"
        )
    if isinstance(local.graph, NestedGraph) or isinstance(remote.graph, NestedGraph):
        raise PolicyError(
            f"{given}: a graph of sites nests two graphs of replicas; give local=fm.Gossip('ring'), or another by "
            "its name"
        )
    if hierarchy.sites is None:
        raise PolicyError(
            f"{given} does not say which replicas form a site, and where workers run does not change a graph; give "
            "sites=2, or the replicas of each, such as ((0, 1), (2, 3))"
        )
    if remote.every % local.every or remote.every == local.every:
        raise PolicyError(
            f"{given} is not sound: a round between sites takes the place of one inside them, so that each is an "
            f"average by weights that add up to 1; give the gossip between sites every={2 * local.every}, or another "
            f"multiple of {local.every} from there on"
        )
    if local.pull != remote.pull:
        raise PolicyError(f"{given}: one outer optimizer pulls a replica to its neighbours; give both the same pull")


def as_gossip(topology: Topology) -> Topology:
    """A hierarchy of two gossips as one, whose rounds are inside sites and between sites in turn."""
    if not isinstance(topology, Hierarchy) or not isinstance(topology.local, Gossip):
        return topology
    local, remote, sites = topology.local, topology.remote, topology.sites
    assert isinstance(remote, Gossip) and sites is not None
    assert not isinstance(local.graph, NestedGraph) and not isinstance(remote.graph, NestedGraph)
    return Gossip(NestedGraph(local.graph, remote.graph, sites, remote.every // local.every), local.every, local.pull)


def _check_inside(local: Topology, quorum: Completion) -> None:
    """Check that a site can do with some of its replicas."""
    given = f"Hierarchy(local={local!r}, quorum={quorum})"
    if not isinstance(quorum, Completion) or quorum.by_replica:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PolicyError(
            f"Hierarchy(quorum={quorum!r}): a Quorum or a Deadline completes the sum of a site; a code and copies of "
            "portions are about the batch of all replicas, and belong to the quorum of the policy"
        )
    if quorum.cuts or (isinstance(quorum, Quorum) and quorum.ends_epoch):
        raise PolicyError(
            f"{given} is not sound: when a replica stops between microbatches, and when an epoch ends, is one rule for "
            "all replicas; give it as the quorum of the policy, or give Quorum(0.75) here"
        )
    if not isinstance(local, ParameterServer):
        raise PolicyError(
            f"{given} is not sound: replicas that add up gradients among themselves take the gradient of each, so none "
            "can be left out; give local=fm.ParameterServer(), with which the leader of the site gathers them"
        )


def _check_remote(remote: Topology) -> None:
    if isinstance(remote, SharedMemory):
        raise PolicyError(
            f"Hierarchy(remote={remote!r}) is not sound: sites are on different workers, which share no memory; give "
            "remote=fm.ParameterServer() with staleness=fm.UNBOUNDED, which applies what arrives at once"
        )
    if is_own(remote):
        return
    if type(remote) not in TOPOLOGIES:
        raise wrong_kind("remote", remote, BETWEEN)
    if type(remote) not in BETWEEN:
        raise PolicyError(
            f"Hierarchy(remote={remote!r}): between sites give fm.ParameterServer(), fm.Ring(), "
            "fm.AllReduce(), fm.Tree() or fm.Gossip(); a hierarchy of more levels is nested in `local`"
        )


def _sites(sites: object) -> int | tuple[tuple[int, ...], ...] | None:
    if sites is None:
        return None
    count = whole(sites)
    if count is not None:
        if count < 1:
            raise PolicyError(f"Hierarchy(sites={count}): the number of sites is an int of at least 1")
        return count
    try:
        found = tuple(tuple(sorted(operator.index(r) for r in site)) for site in sites)  # pyright: ignore
    except TypeError:
        found = ()
    members = [r for site in found for r in site]
    if not found or not all(found) or len(set(members)) < len(members) or min(members) < 0:
        raise PolicyError(
            f"Hierarchy(sites={sites!r}): give the number of sites, or the numbers of the replicas of each, such as "
            "((0, 1), (2, 3)), where each replica belongs to one site and no site is empty"
        )
    return tuple(sorted(found))


@register
class SharedMemory(Topology, Value, frozen=True, tag=True):
    """The replicas are devices of one worker, and share the parameters: each updates them itself, at once.

    No message is sent, and no replica waits for another (Recht et al., *Hogwild*, NeurIPS 2011). A layer is replaced as
    a whole, so that no update is lost and no reader sees half of one (Viebke et al., *CHAOS*, 2017).
    """

    def describe(self) -> str:
        return "shared memory"


TOPOLOGIES = (ParameterServer, AllReduce, Ring, Tree, Hierarchy, Gossip, SharedMemory)
INSIDE = BETWEEN = (ParameterServer, AllReduce, Ring, Tree, Gossip)
"""What may be inside a site, beside a hierarchy, and between sites."""


def is_own(topology: object) -> bool:
    """Whether it is a kind that says by itself how replicas add up gradients."""
    return isinstance(topology, Topology) and type(topology) not in TOPOLOGIES


def is_sited(topology: Topology) -> bool:
    """Whether one replica of each site stands for the others. One sum over all replicas needs no sites."""
    return isinstance(topology, Hierarchy) and (topology.local != AllReduce() or topology.remote != Ring())


def remote_of(topology: Topology) -> Topology:
    """The topology between sites, or between replicas if there are none."""
    return topology.remote if isinstance(topology, Hierarchy) and is_sited(topology) else topology


OWN = "own"
"""The name of a schedule that the topology itself makes."""


def choose(nbytes: int, hosts: Sequence[Hashable]) -> str:
    """The name of the schedule for `nbytes`, where `hosts` is the machine of each rank."""
    different = len(set(hosts))
    if nbytes <= (DOUBLING_BYTES if different == 1 else DOUBLING_BYTES_APART):
        return "doubling"
    return "direct" if different == 1 else "ring" if different == len(hosts) else "hierarchical"


def schedule_name(topology: Topology, nbytes: int, hosts: Sequence[Hashable], *, exchanges: bool = False) -> str:
    """The name of the schedule with which replicas add up gradients, or exchange them. A parameter server only gathers
    them, and a tree passes all slots of an exchange up and down."""
    if exchanges and not isinstance(topology, Tree):
        return "around" if isinstance(topology, Ring) else "spread"
    if is_own(topology):
        return OWN
    if isinstance(topology, AllReduce):
        return choose(nbytes, hosts)
    if isinstance(topology, ParameterServer):
        return "gather"
    return "ring" if isinstance(topology, Ring) else "tree" if isinstance(topology, Tree) else "hierarchical"


def sent_bytes(schedule: str, nbytes: float, ranks: int, route: Topology | None = None) -> float:
    """The bytes that a rank sends for a gradient of `nbytes`, as the mean over all ranks."""
    if route is not None:
        return sent_share(route, ranks) * nbytes if ranks > 1 else 0.0
    if schedule in ("gather", "spread", "around"):
        return (ranks - 1) / ranks * nbytes
    if schedule != "doubling":  # N-1 sends add up the gradient, N-1 sends distribute the sum
        return 2 * (ranks - 1) / ranks * nbytes
    power = 1 << (ranks.bit_length() - 1)
    return (2 * (ranks - power) + power * (power.bit_length() - 1)) / ranks * nbytes
