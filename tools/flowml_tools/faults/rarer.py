"""Puts rarer values of knobs into policies that are drawn: what a value like it would do, with other numbers.

They are drawn from numbers of their own, so that the other cases stay as they are. A composition that they make unsound
stays as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec

from flowml import filters
from flowml.errors import PolicyError
from flowml.policy import (
    UNBOUNDED,
    Deadline,
    Gossip,
    Hierarchy,
    Mean,
    Mix,
    Outer,
    ParameterServer,
    Policy,
    Prox,
    Quorum,
    StalenessScaled,
    Sum,
)
from flowml.policy.graphs import CompleteGraph, NestedGraph, RandomPairs, RingGraph, TorusGraph
from flowml_tools.faults.draws import REDUCTIONS, check_drawn

LIMITS = (1.0, 5.0, 20.0, 100.0)
_BASES = (Sum(), Outer(), Mix(0.3), StalenessScaled(0.5), StalenessScaled())


def rarer(policies: tuple[Policy, ...], replicas: int, seed: int) -> tuple[Policy, ...]:
    """The policies of the stores, where equal ones stay equal."""
    policies = _changed(policies, replicas, random.Random(f"limits {seed}"), 0.7, _limited_inside)
    policies = _changed(policies, replicas, random.Random(f"rarer {seed}"), 0.2, _rarer)
    return _changed(policies, replicas, random.Random(f"counts and sums {seed}"), 0.3, _counted)


def _changed(
    policies: tuple[Policy, ...],
    replicas: int,
    rng: random.Random,
    share: float,
    change: Callable[[random.Random, Policy], Policy],
) -> tuple[Policy, ...]:
    """A share of the policies, changed if they are then sound."""
    if rng.random() >= share:
        return policies
    found = {policy: change(rng, policy) for policy in dict.fromkeys(policies)}
    chosen = tuple(found[policy] for policy in policies)
    if chosen == policies:
        return policies
    try:
        check_drawn(chosen, replicas)
    except PolicyError:
        return policies
    return chosen


def _rarer(rng: random.Random, policy: Policy) -> Policy:
    changes: dict[str, Any] = {
        "topology": _topology(rng, policy.topology),
        "filters": tuple(_filter(rng, f) for f in policy.filters),
        "pull_filters": tuple(_filter(rng, f) for f in policy.pull_filters),
        "apply": _apply(rng, policy.apply),
        "quorum": _limited(rng, policy),
    }
    return _with(policy, changes)


def _with(policy: Policy, changes: dict[str, Any]) -> Policy:
    """The policy with those of the changes that it can have."""
    for name, value in changes.items():
        try:
            policy = msgspec.structs.replace(policy, **{name: value})
        except PolicyError:
            continue
    return policy


def _counted(rng: random.Random, policy: Policy) -> Policy:
    """Numbers in place of shares, and sums over the replicas' own parameters in place of a home for them."""
    changes: dict[str, Any] = {"filters": tuple(_number(rng, f) for f in policy.filters)}
    if isinstance(policy.quorum, Deadline) and not policy.quorum.cuts:
        changes["quorum"] = msgspec.structs.replace(policy.quorum, share=rng.randint(1, 3))
    if policy.local and policy.topology == ParameterServer():
        changes["topology"] = rng.choice((ParameterServer(), *REDUCTIONS))
    return _with(policy, changes)


def _number(rng: random.Random, one: Any) -> Any:
    return msgspec.structs.replace(one, share=rng.randint(1, 3)) if isinstance(one, filters.RandomK) else one


def _topology(rng: random.Random, topology: Any) -> Any:
    if isinstance(topology, Hierarchy):
        return msgspec.structs.replace(topology, remote=_topology(rng, topology.remote))
    if isinstance(topology, Gossip) and topology.graph == TorusGraph():
        local, remote = (rng.choice((RingGraph(), RandomPairs(1), CompleteGraph())) for _ in range(2))
        nested = NestedGraph(local, remote, rng.choice((1, 2)), rng.choice((2, 3)))
        return Gossip(nested, topology.every, topology.pull)
    if isinstance(topology, Gossip) and topology.graph == RandomPairs():
        return Gossip(RandomPairs(rng.randint(1, 9)), topology.every, topology.pull)
    return topology


def _filter(rng: random.Random, one: Any) -> Any:
    if isinstance(one, filters.Quantise) and one.bits > 1:
        return msgspec.structs.replace(one, block=rng.choice([one.block, 2, 3]), stochastic=rng.choice([False, True]))
    if isinstance(one, filters.Compress):
        return filters.compress(rng.choice([1, 9]))
    return one


def _apply(rng: random.Random, apply: Any) -> Any:
    if isinstance(apply, StalenessScaled):
        return StalenessScaled(rng.choice([0.5, 2.0]))
    if isinstance(apply, Prox) and apply.after == Mean():
        return msgspec.structs.replace(apply, after=rng.choice(_BASES))
    return apply


def _limited_inside(rng: random.Random, policy: Policy) -> Policy:
    """A limit of the quorum inside sites, if there is one."""
    topology = policy.topology
    if not isinstance(topology, Hierarchy) or not isinstance(topology.quorum, Quorum | Deadline):
        return policy
    quorum = msgspec.structs.replace(topology.quorum, limit_s=rng.choice((0.3, 1.0, 5.0, 20.0)))
    return msgspec.structs.replace(policy, topology=msgspec.structs.replace(topology, quorum=quorum))


def _limited(rng: random.Random, policy: Policy) -> Any:
    """A limit that some clocks meet, and which ends the fit at others."""
    quorum = policy.quorum
    if not isinstance(quorum, Quorum) or policy.staleness == UNBOUNDED or not policy.clocked or quorum.cuts:
        return quorum
    return msgspec.structs.replace(quorum, limit_s=rng.choice(LIMITS))
