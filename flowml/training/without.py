"""Leaves replicas out of a training plan whose workers are lost.

The executables and the instruction lists of the others stay as they are, so that nothing is compiled again. Stores that
were on devices of those replicas move to the same stage of one that is left, and those of a lost worker that only held
parameters to another such worker, or if none is left to a replica: each to the one that has least by then. Where each
replica has a copy, the sums of gradients are among the workers that are left, and the graph of a gossip is among the
replicas that are left. The number of replicas stays too: each clock has as many places as before, and the machines know
from its beginning that some are lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from flowml.devices import worker_of
from flowml.errors import PolicyError, UnsupportedError, named
from flowml.placement.homes import homes_only
from flowml.plan import Part, Plan, Reduction, Site, StoreSpec, Training
from flowml.policy import Completion, Gossip, Quorum
from flowml.policy.compose import check_batch, check_count
from flowml.policy.graphs import NestedGraph, OwnMatrix, among
from flowml.training.adapted import has_inside
from flowml.training.private import PrivateOptimizer


def without(plan: Plan, workers: Collection[str]) -> Plan:
    """The plan without these workers, and the replicas that have a stage on one. At least one replica must be left."""
    training = plan.training
    assert training is not None
    lost = tuple(r for r, devices in enumerate(training.replicas) if not {*map(worker_of, devices)}.isdisjoint(workers))
    gone = {device for r in lost for device in training.replicas[r]}
    alone = homes_only(training)
    gone.update(home for home in alone if worker_of(home) in workers)
    left = [devices for r, devices in enumerate(training.replicas) if r not in lost]
    homes = [home for home in alone if home not in gone]

    held = Counter[str]()
    """Worker -> the bytes of the stores that it has when some have moved."""
    for store in training.stores:
        held[worker_of(store.home)] += 0 if store.collective or store.home in gone else store.nbytes

    def given(store: StoreSpec, places: Sequence[str]) -> StoreSpec:
        """The store at that one of these devices whose worker has least."""
        place = min(places, key=lambda place: held[worker_of(place)])
        held[worker_of(place)] += store.nbytes
        return msgspec.structs.replace(store, home=place)

    def moved(store: StoreSpec) -> StoreSpec:
        if store.sites:
            store = _in_sites(store, training, lost)
        if store.collective:
            return _among(store, training, lost)
        if isinstance(store.policy.topology, Gossip):
            store = _with_graph(store, store.policy.topology, len(training.replicas), lost)
        if store.home not in gone:
            return store
        if store.home in alone:
            return given(store, homes or [devices[store.parts[0].stage] for devices in left])
        stage = next(devices.index(store.home) for devices in training.replicas if store.home in devices)
        return given(store, [devices[stage] for devices in left])

    stores = tuple(map(moved, training.stores))
    programs = tuple(program for program in plan.programs if program.device not in gone)
    shrunk = msgspec.structs.replace(training, lost=lost, stores=stores)
    return msgspec.structs.replace(plan, programs=programs, training=shrunk)


def left_out(training: Training, replicas: Iterable[int]) -> Training:
    """The training without replicas that had no store, and whose layers are neither added up nor mixed among replicas:
    nothing else moves."""
    return msgspec.structs.replace(training, lost=tuple(sorted({*training.lost, *replicas})))


class TooFew(NamedTuple):
    """Why the replicas that are left cannot go on, and what to give so that they can."""

    why: str
    remedy: str


def goes_on(quorum: Completion | None) -> bool:
    """Whether a clock is complete with whichever replicas are there, once a time limit is over."""
    return quorum is not None and quorum.goes_on()


def too_few(training: Training, left: Collection[int]) -> TooFew | None:
    """Why these replicas cannot go on without the others, if they cannot."""
    if training.code is not None and training.code.decode(left) is None:
        rules = named(sorted({store.policy.describe() for store in training.stores}))
        these = named([str(r) for r in left])
        why = f"replicas {these} are left, of which the code cannot decode a batch (policy: {rules})"
        return TooFew(why, "a code for more stragglers")
    for store in training.stores:
        quorum = store.policy.quorum
        try:
            check_met(training, store, len(left))
        except PolicyError:
            of_samples = isinstance(quorum, Quorum) and quorum.of == "samples"
            most = len(left) * (training.item_size if of_samples else 1)
            why = f"{len(left)} of {len(training.replicas)} replicas are left, too few for {quorum} of {store.name!r}"
            return TooFew(why, f"a count of at most {most}, or a fraction such as 0.75")
    return None


def check_met(training: Training, store: StoreSpec, replicas: int) -> None:
    """Raise PolicyError if so few replicas can never meet the quorum of a store."""
    if store.sites or goes_on(store.policy.quorum):
        return
    check_count(store.name, store.policy.quorum, replicas)
    if store.policy.clocked:
        check_batch((store.policy,), replicas * training.item_size)


def _among(store: StoreSpec, training: Training, lost: Collection[int]) -> StoreSpec:
    """A store of which each replica has a copy, without the lost ones, in whose place stands that of another."""
    live = [r for r in range(len(training.replicas)) if r not in lost]
    share = len(store.readers) // len(training.replicas)
    stands = [live[0] if r in lost else r for r in range(len(training.replicas))]
    homes = tuple(store.homes[r] for r in stands)
    readers = tuple(reader for r in stands for reader in store.readers[r * share : (r + 1) * share])

    def part(one: Part) -> Part:
        if one.reduction is None:
            return one
        return msgspec.structs.replace(one, reduction=_fewer(one.reduction, one.stage, training, live))

    parts = tuple(map(part, store.parts))
    return msgspec.structs.replace(store, home=homes[0], homes=homes, readers=readers, parts=parts)


def _fewer(how: Reduction, stage: int, training: Training, live: Iterable[int]) -> Reduction:
    """How the workers of this stage of these replicas add up, of those that did so before."""
    left = {worker_of(training.replicas[r][stage]) for r in live}
    workers, hosts = zip(*((w, h) for w, h in zip(how.workers, how.hosts, strict=True) if w in left), strict=True)
    return msgspec.structs.replace(how, workers=workers, hosts=hosts)


def _with_graph(store: StoreSpec, gossip: Gossip, replicas: int, lost: Collection[int]) -> StoreSpec:
    """A store whose gossip is among the replicas that are left."""
    graph = among(gossip.graph, replicas, lost)
    topology = msgspec.structs.replace(gossip, graph=graph)
    return msgspec.structs.replace(store, policy=msgspec.structs.replace(store.policy, topology=topology))


def _in_sites(store: StoreSpec, training: Training, lost: Collection[int]) -> StoreSpec:
    """A store whose sites are of the replicas that are left. The first of each leads it; a site without any is gone."""
    sites: list[Site] = []
    for site in store.sites:
        live = tuple(r for r in site.replicas if r not in lost)
        pairs = zip(store.parts, site.reductions, strict=True) if len(live) > 1 and site.reductions else ()
        sites += [Site(live, tuple(_fewer(how, p.stage, training, live) for p, how in pairs))] if live else []
    return msgspec.structs.replace(store, sites=tuple(sites))


def check_shrinks(training: Training, optimizer: Any, given: str) -> None:
    """Raise UnsupportedError if a fit of this plan cannot go on with fewer replicas, which `given` asks for."""
    why = ""
    if has_inside(optimizer, PrivateOptimizer):
        why = "the noise of the optimizer is for the whole batch of each step, and that of fewer replicas needs more"
    for store in training.stores:
        others = store.relayed or store.collective or store.local or not store.policy.clocked
        if store.sites and (others or isinstance(store.policy.remote, Gossip)):
            why = f"the leader of a site of layer {store.name!r} keeps more for the others than their sum"
        elif isinstance(store.policy.remote, Gossip):
            why = _why_graph_stays(store, store.policy.remote) or why
    if why:
        raise UnsupportedError(f"{given}: {why}, so none can be left out; give on_loss='replace' in its place")


def _why_graph_stays(store: StoreSpec, gossip: Gossip) -> str:
    """Why the graph of a gossip cannot be formed anew among fewer replicas, if it cannot."""
    if isinstance(gossip.graph, NestedGraph) and isinstance(gossip.graph.local, OwnMatrix):
        return f"the mixing matrix of layer {store.name!r} is for the {len(gossip.graph.local.rows)} replicas of a site"
    if store.policy.tracked or store.policy.mirrored:
        return f"the replicas of layer {store.name!r} know of each other's parameters what filters or changes have told"
    return ""
