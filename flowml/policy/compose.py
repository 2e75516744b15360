"""Finds the policy of each parameter, and checks that the policies of one model are sound together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from flowml.errors import PolicyError, named, shadowed
from flowml.policy.apply import Distill, Mean, Sum, base_of
from flowml.policy.codes import Code
from flowml.policy.completion import Completion, Speculate
from flowml.policy.filters import is_lossless
from flowml.policy.graphs import check_members
from flowml.policy.payload import LocalPayload
from flowml.policy.quorum import ROUNDING, Coded, Deadline, Quorum
from flowml.policy.replicas import check_pull, weighs_otherwise
from flowml.policy.rhythm import Once
from flowml.policy.spec import Policy
from flowml.policy.topology import Gossip, Ring, Tree

DEFAULT_PATTERN = "*"
"""The pattern that `resolve` reports for a parameter without a match, whose policy is `Policy()`."""

_ROOT = "params/"  # the collection of a flax model's parameters; patterns may leave it out


def resolve(
    policies: Mapping[str, Policy], paths: Iterable[str], untrained: Sequence[str] = ()
) -> dict[str, tuple[str, Policy]]:
    """For each parameter path (`"conv1/kernel"`), the first pattern that matches it and the pattern's policy.

    Patterns are fnmatch patterns, where `*` also matches `/`, or literal paths. They are tried in the mapping's order
    on the path, and on the path without a leading `params/`. `untrained` are the paths of parameters without gradients.

    Raises:
        PolicyError: for a pattern that matches no path, or only paths that patterns before it match too (except for
            "*", which is for the others, if there are any), or a value that is not a Policy.
    """
    known = tuple(paths)
    for pattern, policy in policies.items():
        _check_entry(pattern, policy, known, untrained)
    found = {path: _first_match(policies, path) for path in known}
    effective = {DEFAULT_PATTERN, *(pattern for pattern, _ in found.values())}
    for pattern in policies:
        if pattern not in effective:
            takers = {path: taker for path, (taker, _) in found.items() if _matches(pattern, path)}
            raise PolicyError(shadowed(f"policies[{pattern!r}]", takers))
    return found


def check_composition(policies: Mapping[str, Policy], replicas: int) -> tuple[str, ...]:
    """Check that the policies of one model are sound for `replicas` replicas.

    Layers whose quorum, late rule or rhythm differ are decided alone, so their policies do not restrict each other.
    Returns notes for the user on policies that are sound but may not be what was meant. `policies` maps any name
    (a pattern, a store) to its policy.

    Raises:
        PolicyError: for a quorum of more replicas than there are, or a topology of fewer than it needs.
    """
    if replicas < 1:
        raise PolicyError(f"replicas={replicas}: training needs at least one replica")
    for name, policy in policies.items():
        check_count(name, policy.quorum, replicas)
        _check_alone(name, policy, replicas)
        if not policy.sited:  # sites are checked once machines are known
            check_pull(name, policy, replicas)
            _check_softsync(name, policy, replicas)
    coded_by(policies.values(), replicas)
    speculated_by(policies.values())
    _check_epochs(policies.values())
    _check_distilling(policies)
    clocked = {name: p for name, p in policies.items() if p.clocked}
    for policy in policies.values():
        if isinstance(policy.topology, Gossip):  # one among sites is checked once machines are known
            check_members(policy.topology.graph, replicas)
    collective = [name for name, p in policies.items() if p.collective]
    notes = _idle_quorums(clocked, replicas)
    alone = [name for name, policy in policies.items() if replicas == 1 and _averages_only(policy)]
    if alone:
        notes.append(f"{named(alone)}: one replica has no other to average with, so this is plain training")
    if collective and replicas == 1:
        notes.append(f"{collective[0]!r} ({policies[collective[0]].describe()}): one replica has nothing to add up")
    return tuple(notes)


def coded_by(policies: Iterable[Policy], replicas: int) -> Code | None:
    """The code that says what each of the replicas computes; None if the layers have none.

    Raises:
        PolicyError: if layers have different codes, or some have one and others none, or if there is no such code.
    """
    coded = _alike(
        policies,
        Coded,
        "a code says which examples a replica computes, and in what combination it sends their gradients, for the "
        "whole model; give all layers the same code",
    )
    return coded.among(replicas) if coded else None


def speculated_by(policies: Iterable[Policy]) -> Speculate | None:
    """How the batch is cut into portions, of which some are computed twice; None if it is not.

    Raises:
        PolicyError: if layers differ in that.
    """
    return _alike(
        policies,
        Speculate,
        "a portion of the batch is computed once, or twice, for the whole model; give all layers the same",
    )


def _check_epochs(policies: Iterable[Policy]) -> None:
    """Check that all layers agree on when an epoch ends."""
    quorums = {p.quorum for p in policies}
    ending = [p.quorum for p in policies if p.epoch_share is not None]
    if ending and len(quorums) > 1:
        other = next(q for q in quorums if q != ending[0])
        raise PolicyError(
            f"quorum={ending[0]} of an epoch for one layer with quorum={other} for another is not sound: an epoch ends "
            "for the whole model; give all layers the same quorum"
        )


def _check_distilling(policies: Mapping[str, Policy]) -> None:
    """Check that all layers are distilled together, if any is."""
    distilled = next((n for n, p in policies.items() if isinstance(base_of(p.apply), Distill)), None)
    other = next((n for n, p in policies.items() if distilled is not None and p != policies[distilled]), None)
    if distilled is not None and other is not None:
        raise PolicyError(
            f"{policies[distilled].describe()} for {distilled!r} with {policies[other].describe()} for {other!r} is "
            "not sound: what is distilled are the outputs of the whole model; give all layers the same policy, such as "
            "policies=policy"
        )


_Kind = TypeVar("_Kind", bound=Completion)


def _alike(policies: Iterable[Policy], kind: type[_Kind], why: str) -> _Kind | None:
    """The quorum of a kind that all layers must share; None if no layer has one of that kind."""
    quorums = {p.quorum for p in policies}
    found = sorted((q for q in quorums if isinstance(q, kind)), key=str)
    if not found:
        return None
    if len(quorums) > 1:
        other = next(q for q in quorums if q != found[0])
        raise PolicyError(f"quorum={found[0]} of one layer with quorum={other} of another is not sound: {why}")
    return found[0]


def _check_alone(name: str, policy: Policy, replicas: int) -> None:
    """Check that a ring, a tree or a graph has two members. An all-reduce of one replica is that replica's gradient."""
    if replicas == 1 and isinstance(policy.topology, Ring | Tree | Gossip):
        raise PolicyError(
            f"{name!r}: topology={policy.topology} needs at least 2 replicas, and there is one, which has no other to "
            "exchange with; give replicas=2 or more, or leave topology out"
        )


def lonely(policies: Mapping[str, Policy], replicas: int) -> tuple[str, ...]:
    """A warning if one replica has a policy that does nothing but average replicas at the end."""
    found = [name for name, policy in policies.items() if policy.every == Once() and _averages_only(policy)]
    if replicas > 1 or not found:
        return ()
    return (
        f"{named(found)} ({policies[found[0]].describe()}): one replica has no other to average with, so this is plain "
        "training; give Trainer(replicas=2) or more",
    )


def unweighed(policies: Mapping[str, Policy], replicas: int) -> tuple[str, ...]:
    """Warnings if batches have weights, which count within the steps of a replica and not between replicas."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, policy in policies.items():
        how = weighs_otherwise(policy) if replicas > 1 else None
        if how is not None:
            found.setdefault((policy.describe(), how), []).append(name)
    return tuple(
        f"{named(names)} ({described}): the weight of a batch counts in the steps of a replica, and not between "
        f"replicas, because {how}"
        for (described, how), names in found.items()
    )


def _averages_only(policy: Policy) -> bool:
    """Whether the home does nothing but average, or add up, what replicas have made of parameters of their own."""
    payload = policy.payload
    plain = isinstance(payload, LocalPayload) and not payload.alpha and isinstance(policy.apply, Mean | Sum)
    return plain and is_lossless(policy.filters) and not policy.collective


def _check_softsync(name: str, policy: Policy, replicas: int, what: str = "replicas") -> None:
    """Check that a home that applies the gradients of a share of the replicas, or sites, at a time has one at least.
    A single one is no share of others: what it gives is applied as it arrives."""
    quorum = policy.quorum
    if replicas == 1:
        return
    if policy.clocked or policy.epoch_share is not None or not isinstance(quorum, Quorum) or quorum.counted:
        return
    if quorum.count_or_fraction * replicas < 1 - ROUNDING:
        n = f"{1 / quorum.count_or_fraction:.6g}"
        raise PolicyError(
            f"{name!r}: {quorum} without clocks, as softsync({n}), applies 1/{n} of the gradients of {replicas} {what} "
            f"at a time, which is less than one; give softsync({replicas}) or less, or asynchronous(), which applies "
            "each as it arrives"
        )


def check_sites(name: str, policy: Policy, sites: Sequence[Sequence[int]]) -> None:
    """Check that the quorums of a hierarchy can be met by these sites and by the replicas of each, and that sites do
    not pull a centre too far."""
    check_count(name, policy.quorum, len(sites), "sites")
    check_pull(name, policy, len(sites), "sites")
    _check_softsync(name, policy, len(sites), "sites")
    if policy.site_quorum is not None:
        check_count(name, policy.site_quorum, min(map(len, sites)), "replicas of the smallest site")


def check_count(name: str, quorum: Completion, replicas: int, what: str = "replicas") -> None:
    """Check that a quorum can be met by so many replicas, or sites."""
    if isinstance(quorum, Deadline):
        given, of = quorum.quorum, "replicas"
    elif isinstance(quorum, Quorum):
        given, of = quorum, quorum.of
    else:
        return
    if of == "replicas" and given.counted and given.count_or_fraction > replicas:
        raise PolicyError(
            f"{name!r}: {quorum} asks for more {what} than there are ({replicas}), so no step could be complete; "
            f"give a count of at most {replicas}, a fraction such as 0.75, or more {what}"
        )


def check_batch(policies: Iterable[Policy], examples: int) -> None:
    """Raise PolicyError for a quorum of more examples than the `examples` of a batch."""
    for quorum in {p.quorum for p in policies}:
        if not isinstance(quorum, Quorum) or quorum.of != "samples" or not quorum.counted:
            continue
        if quorum.count_or_fraction > examples:
            raise PolicyError(
                f"Quorum({quorum.count_or_fraction}, of='samples') asks for more examples than a batch has "
                f"({examples}), so no step could be complete; give a count of at most {examples}, a fraction such as "
                "0.75, or a larger batch"
            )


def _check_entry(pattern: str, policy: object, paths: tuple[str, ...], untrained: Sequence[str]) -> None:
    if not isinstance(policy, Policy):
        name = getattr(policy, "__name__", "")
        fix = f"call {name}(…)" if callable(policy) and name else "give an fm.Policy or one of fm.policies"
        raise PolicyError(f"policies[{pattern!r}] is {name or repr(policy)}, of type {type(policy).__name__}; {fix}")
    fixed = [path for path in untrained if _matches(pattern, path)]
    if fixed and not any(_matches(pattern, path) for path in paths):
        raise PolicyError(
            f"policies[{pattern!r}] matches only parameters that are not trained ({named(fixed)}): integers, booleans "
            "and keys have no gradients, so replicas send nothing for them and no rule or filter applies; leave this "
            f"pattern out; those that are trained: {named(paths) or 'none'}"
        )
    if not any(_matches(pattern, path) for path in paths):
        below = any(path.startswith(f"{pattern}/") for path in paths)
        anew = "give a pattern of one of them" if paths else "leave it out"
        fix = f"give {pattern + '/*'!r} for those of layer {pattern!r}" if below else anew
        raise PolicyError(f"policies[{pattern!r}] matches no parameter; there are: {named(paths) or 'none'}; {fix}")


def _matches(pattern: str, path: str) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in (path, path.removeprefix(_ROOT)))


def _first_match(policies: Mapping[str, Policy], path: str) -> tuple[str, Policy]:
    for pattern, policy in policies.items():
        if _matches(pattern, path):
            return pattern, policy
    return DEFAULT_PATTERN, Policy()


def _idle_quorums(policies: Mapping[str, Policy], replicas: int) -> list[str]:
    """What to say of quorums that leave no replica out."""
    idle: dict[Completion, list[str]] = {}
    for name, policy in policies.items():
        if _is_idle(policy.quorum, replicas):
            idle.setdefault(policy.quorum, []).append(name)
    return [f"{named(names)}: {_why_idle(quorum, replicas)}" for quorum, names in idle.items()]


def _is_idle(quorum: Completion, replicas: int) -> bool:
    """Whether a quorum says something that is not so for this number of replicas. A limit of its wait holds for any."""
    if isinstance(quorum, Speculate):
        return replicas == 1
    if quorum.waits_for_all or (isinstance(quorum, Quorum) and quorum.limit_s < math.inf):
        return False
    return quorum.never_drops(replicas)


def _why_idle(quorum: Completion, replicas: int) -> str:
    if isinstance(quorum, Speculate):
        return "one replica has no other to take its portions"
    return f"{quorum} of {replicas} can never drop"
