"""Says which replicas add up gradients together, and how: all of them, or those of each site of a hierarchy."""

from __future__ import annotations

from collections.abc import Sequence

from flowml.errors import PolicyError
from flowml.placement.links import Links, machines
from flowml.plan import Part, Reduction, Site
from flowml.policy import Gossip, Hierarchy, Policy, Topology, Tree
from flowml.policy.compose import check_sites
from flowml.policy.graphs import check_members
from flowml.policy.routes import MOST_PLAYED, check
from flowml.policy.topology import OWN, schedule_name


def reduction_of(
    topology: Topology, nbytes: int, devices: Sequence[str], links: Links, *, exchanges: bool = False
) -> Reduction:
    """How the workers of these devices, one for each replica, add up `nbytes`, or exchange slots of them."""
    workers = tuple(dict.fromkeys(map(_worker, devices)))
    hosts = machines(links, workers)
    if isinstance(topology, Hierarchy) and topology.sites is not None:
        sites = topology.split(tuple(map(_worker, devices)))
        number = {_worker(devices[r]): n for n, site in enumerate(sites) for r in site}
        hosts = tuple(number[worker] for worker in workers)
    fanout = topology.fanout if isinstance(topology, Tree) else 0
    schedule = schedule_name(topology, nbytes, hosts, exchanges=exchanges)
    if schedule == OWN and 1 < len(workers) <= MOST_PLAYED:
        check(topology, len(workers))
    return Reduction(schedule, workers, hosts, fanout, topology if schedule == OWN else None)


def split(topology: Topology, replicas: Sequence[Sequence[str]], links: Links) -> tuple[tuple[int, ...], ...]:
    """The replicas of each site; () if there are no sites."""
    if not isinstance(topology, Hierarchy):
        return ()
    workers = [_worker(devices[0]) for devices in replicas]
    distinct = tuple(dict.fromkeys(workers))
    machine = dict(zip(distinct, machines(links, distinct), strict=True))
    return topology.split([machine[worker] for worker in workers])


def sites_of(
    name: str, policy: Policy, parts: Sequence[Part], replicas: Sequence[Sequence[str]], links: Links
) -> tuple[Site, ...]:
    """The sites of a store whose replicas push these parts; () if it has none.

    Raises:
        PolicyError: if these replicas cannot form the sites, or the sites cannot do what the policy says.
    """
    if not policy.sited or not isinstance(policy.topology, Hierarchy):
        return ()
    found = split(policy.topology, replicas, links)
    check_sites(name, policy, found)
    if isinstance(policy.remote, Gossip):
        check_members(policy.remote.graph, len(found), "sites")
    if len(found) < len(replicas) and any(len({s.dtype for s in part.payload}) > 1 for part in parts):
        raise PolicyError(
            f"{name!r} ({policy.describe()}): its gradients have several dtypes, and a site adds up arrays of one; "
            "give parameters of different dtypes layers of their own"
        )
    local = policy.topology.local
    return tuple(
        Site(site, tuple(reduction_of(local, p.nbytes, [replicas[r][p.stage] for r in site], links) for p in parts))
        if len(site) > 1
        else Site(site)
        for site in found
    )


def alone(name: str, policy: Policy, sites: Sequence[Site], replicas: int) -> tuple[str, ...]:
    """A warning if sites are to send each other changes, and there is one."""
    if len(sites) != 1 or not isinstance(policy.remote, Gossip):
        return ()
    fix = "give sites=2 or more" if replicas > 1 else "give Trainer(replicas=2) or more"
    return (
        f"{name!r} ({policy.describe()}): all replicas are in one site, so nothing is exchanged between sites; {fix}",
    )


def _worker(device: str) -> str:
    return device.partition("/")[0]


def one_a_worker(devices: Sequence[str]) -> tuple[str, ...]:
    """The devices, each replaced by the first one of its worker, because replicas on one worker share a copy."""
    first: dict[str, str] = {}
    return tuple(first.setdefault(_worker(d), d) for d in devices)
