"""Leaves replicas out of a training plan whose workers are lost.

The executables and the instruction lists of the others stay as they are, so that nothing is compiled again. Stores that
were on devices of those replicas move to the same stage of one that is left. The number of replicas stays too: each
clock has as many places as before, and the machines know from its beginning that some are lost.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from flowml.devices import worker_of
from flowml.errors import UnsupportedError
from flowml.plan import Plan, StoreSpec, Training
from flowml.policy import Gossip


def without(plan: Plan, workers: Collection[str]) -> Plan:
    """The plan without the replicas that have a stage on one of these workers. At least one must be left."""
    training = plan.training
    assert training is not None
    lost = tuple(r for r, devices in enumerate(training.replicas) if not {*map(worker_of, devices)}.isdisjoint(workers))
    gone = {device for r in lost for device in training.replicas[r]}
    left = [devices for r, devices in enumerate(training.replicas) if r not in lost]

    def moved(number: int, store: StoreSpec) -> StoreSpec:
        if store.home not in gone:
            return store
        stage = next(devices.index(store.home) for devices in training.replicas if store.home in devices)
        return msgspec.structs.replace(store, home=left[number % len(left)][stage])

    stores = tuple(moved(number, store) for number, store in enumerate(training.stores))
    programs = tuple(program for program in plan.programs if program.device not in gone)
    shrunk = msgspec.structs.replace(training, lost=lost, stores=stores)
    return msgspec.structs.replace(plan, programs=programs, training=shrunk)


def check_shrinks(training: Training) -> None:
    """Raise UnsupportedError if a fit of this plan cannot go on with fewer replicas."""
    why = ""
    if training.code is not None:
        why = "the replicas of a code compute examples for each other"
    elif training.speculation is not None:
        why = "the replicas take portions of one batch"
    elif training.state:
        why = "the state of the model is joined from all replicas"
    for store in training.stores:
        if store.collective or isinstance(store.policy.remote, Gossip):
            why = f"the replicas exchange layer {store.name!r} among themselves"
        elif store.sites:
            why = f"the replicas of layer {store.name!r} are in sites"
    if why:
        raise UnsupportedError(f"on_loss='shrink': {why}, so none can be left out; give on_loss='replace'")
