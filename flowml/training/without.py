"""Leaves replicas out of a training plan whose workers are lost.

The executables and the instruction lists of the others stay as they are, so that nothing is compiled again. Stores that
were on devices of those replicas move to the same stage of one that is left. Where each replica has a copy, the sums of
gradients are among the workers that are left, and the graph of a gossip is among the replicas that are left. The number
of replicas stays too: each clock has as many places as before, and the machines know from its beginning that some are
lost.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from flowml.devices import worker_of
from flowml.errors import UnsupportedError, named
from flowml.plan import Part, Plan, StoreSpec, Training
from flowml.policy import Gossip
from flowml.policy.graphs import OwnMatrix


def without(plan: Plan, workers: Collection[str]) -> Plan:
    """The plan without the replicas that have a stage on one of these workers. At least one must be left."""
    training = plan.training
    assert training is not None
    lost = tuple(r for r, devices in enumerate(training.replicas) if not {*map(worker_of, devices)}.isdisjoint(workers))
    gone = {device for r in lost for device in training.replicas[r]}
    left = [devices for r, devices in enumerate(training.replicas) if r not in lost]

    def moved(number: int, store: StoreSpec) -> StoreSpec:
        if store.collective:
            return _among(store, training, lost)
        if store.home not in gone:
            return store
        stage = next(devices.index(store.home) for devices in training.replicas if store.home in devices)
        return msgspec.structs.replace(store, home=left[number % len(left)][stage])

    stores = tuple(moved(number, store) for number, store in enumerate(training.stores))
    programs = tuple(program for program in plan.programs if program.device not in gone)
    shrunk = msgspec.structs.replace(training, lost=lost, stores=stores)
    return msgspec.structs.replace(plan, programs=programs, training=shrunk)


def why_too_few(training: Training, left: Collection[int]) -> str:
    """Why these replicas cannot go on without the others, if they cannot."""
    if training.code is None or training.code.decode(left) is not None:
        return ""
    rules = named(sorted({store.policy.describe() for store in training.stores}))
    return (
        f"replicas {named([str(r) for r in left])} are left, of which the code cannot decode a batch (policy: {rules})"
    )


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
        left = {worker_of(training.replicas[r][one.stage]) for r in live}
        ranks = [(w, h) for w, h in zip(one.reduction.workers, one.reduction.hosts, strict=True) if w in left]
        workers, hosts = zip(*ranks, strict=True)
        return msgspec.structs.replace(
            one, reduction=msgspec.structs.replace(one.reduction, workers=workers, hosts=hosts)
        )

    parts = tuple(map(part, store.parts))
    return msgspec.structs.replace(store, home=homes[0], homes=homes, readers=readers, parts=parts)


def check_shrinks(training: Training) -> None:
    """Raise UnsupportedError if a fit of this plan cannot go on with fewer replicas."""
    why = ""
    for store in training.stores:
        if store.sites:
            why = f"the replicas of layer {store.name!r} are in sites"
        elif isinstance(store.policy.remote, Gossip):
            why = _why_graph_stays(store, store.policy.remote) or why
    if why:
        raise UnsupportedError(f"on_loss='shrink': {why}, so none can be left out; give on_loss='replace'")


def _why_graph_stays(store: StoreSpec, gossip: Gossip) -> str:
    """Why the graph of a gossip cannot be formed anew among fewer replicas, if it cannot."""
    if isinstance(gossip.graph, OwnMatrix):
        return f"the mixing matrix of layer {store.name!r} is for {len(gossip.graph.rows)} replicas"
    if store.policy.tracked or store.policy.mirrored:
        return f"the replicas of layer {store.name!r} know of each other's parameters what filters or changes have told"
    return ""
