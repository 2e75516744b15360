"""Says which parameters share a home because of the optimizer, and which homes exchange values instead.

An optimizer couples parameters if the update of one depends on the gradient of another. Homes exchange what couples
them if their layers share clocks: then each value is defined at each clock, by what these layers apply there. Where
layers have no clock, because contributions are applied on arrival or replicas update parameters themselves, coupled
parameters of one policy share a home. A value that couples layers of several clocks is computed for those of each
clock alone, as if all others were 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from flowml.disjoint import DisjointSets
from flowml.errors import PolicyError, named
from flowml.home import Combine, Coupled, Coupling, Share
from flowml.lowering.lower import ExecutableTable
from flowml.plan import ArraySpec
from flowml.policy import Consensus, Gossip, Gradient, Outer, Policy
from flowml.policy.apply import Mean, base_of
from flowml.training import coupled
from flowml.training.drafts import strong
from flowml.training.optimizer import OptimizerSlices


@dataclass(frozen=True)
class Use:
    """Where an optimizer runs: for each leaf, what it has in common with those that it may be coupled to there; None
    for a leaf that the optimizer does not update. `divides`: homes can exchange values."""

    slices: OptimizerSlices
    keys: tuple[Hashable | None, ...]
    divides: bool

    def groups(self) -> list[list[list[int]]]:
        """The leaves that are coupled, those with one key together."""
        found: list[list[list[int]]] = []
        for group in self.slices.groups:
            by_key: dict[Hashable, list[int]] = {}
            for leaf in group:
                if self.keys[leaf] is not None:
                    by_key.setdefault(self.keys[leaf], []).append(leaf)
            found.append(list(by_key.values()))
        return found


def clock_of(policy: Policy) -> Hashable | None:
    """What the homes of layers have in common that decide about the same clocks in the same way; None if a home does
    not apply clock by clock."""
    if not policy.clocked or policy.shared or policy.sites_decide or isinstance(policy.remote, Gossip):
        return None
    if policy.local and policy.collective:
        return None
    return policy.collective, policy.quorum, policy.every, policy.topology if policy.sited else None


def on_several_devices(paths: Sequence[str], policy: Policy, *, coupled: bool) -> PolicyError:
    """Why replicas cannot update these parameters of their own: one device would have to have all of them."""
    why = (
        "the optimizer reads the gradients of all of them for each update, as clip_by_global_norm does"
        if coupled
        else "several devices of a replica use one of them"
    )
    each = ", give an optimizer that updates each layer by itself" if coupled else ""
    other = "a policy whose homes update, such as synchronous()" if policy.local else "topology=fm.ParameterServer()"
    return PolicyError(
        f"{', '.join(map(repr, paths[:3]))} ({policy.describe()}): each replica updates these parameters itself, on "
        f"one device, and they are on several: {why}; place them on one device{each}, or give them {other}"
    )


def policy_of_value(policies: Iterable[Policy]) -> Policy:
    """The policy of the value, if the parameters have these. Raises PolicyError if they share no clock."""
    first, *others = dict.fromkeys(policies)
    clock = None if first.local else clock_of(first)
    if clock is not None and all(not p.local and clock_of(p) == clock for p in others):
        plain = {"payload": Gradient(), "filters": (), "pull_filters": (), "apply": Mean()}
        return msgspec.structs.replace(first, **plain)
    if others:
        raise PolicyError(
            "the optimizer wants the value of the loss (value=), which is computed once a clock from the replicas "
            f"whose gradients are applied, and layers of the policies {first.describe()!r} and "
            f"{others[0].describe()!r} share no clock; give all layers one policy, or one quorum, topology and every"
        )
    if first.filters and not first.local:
        raise PolicyError(
            f"the optimizer wants the value of the loss (value=), and with {first.describe()!r} it goes the way of the "
            "gradients that are applied on arrival, whose filters would change it; leave filters out, or give a policy "
            "whose layers commit clock by clock, such as fm.policies.ssp(2)"
        )
    return first


def uses(
    own: OptimizerSlices, outer: Mapping[Outer | Consensus, OptimizerSlices], policies: Sequence[Policy]
) -> Iterable[Use]:
    """Where the Trainer's optimizer runs, and those of homes."""
    kinds = [base_of(p.apply) for p in policies]
    at_home = [not p.local and kind not in outer for p, kind in zip(policies, kinds, strict=True)]
    for slices, mine in (
        (own, at_home),
        *((slices, [kind == o for kind in kinds]) for o, slices in outer.items()),
    ):
        clocks = [clock_of(p) if here else None for p, here in zip(policies, mine, strict=True)]
        rest = zip(policies, mine, clocks, strict=True)
        yield Use(slices, tuple(clocks), divides=True)
        yield Use(slices, tuple(p if here and clock is None else None for p, here, clock in rest), divides=False)
    yield Use(own, tuple(p if p.local else None for p in policies), divides=False)


def together(use: Use) -> list[tuple[list[int], str]]:
    """The leaves that must share a home, and why."""
    found: list[tuple[list[int], str]] = []
    for group in use.groups():
        for leaves in group:
            if len(leaves) < 2:
                continue
            if not use.divides:
                found.append((leaves, "their contributions share no clock"))
                continue
            first, because = use.slices.together
            sets: dict[int, list[int]] = {}
            for leaf in leaves:
                sets.setdefault(first[leaf], []).append(leaf)
            found += (
                (mine, f"its {because[i]} of them cannot be divided") for i, mine in sets.items() if len(mine) > 1
            )
    return found


def across_clocks(uses: Iterable[Use], names: Sequence[str]) -> list[str]:
    """Notes for layers that an optimizer couples and that share no clock. `names` are the layers of the leaves."""
    coupled_leaves: dict[int, list[list[list[int]]]] = {}
    """The optimizer -> for each of its groups, the leaves that are coupled wherever it runs."""
    for use in uses:
        groups = coupled_leaves.setdefault(id(use.slices), [[] for _ in use.slices.groups])
        for sets, more in zip(groups, use.groups(), strict=True):
            sets += more
    notes: dict[str, None] = {}
    for group in (sets for groups in coupled_leaves.values() for sets in groups if len(sets) > 1):
        layers = " and ".join(named(tuple(dict.fromkeys(names[leaf] for leaf in leaves))) for leaves in group)
        notes[
            f"the optimizer couples {layers}, which share no clock; what couples them, such as a norm, is computed for "
            "each of these groups alone, as if the others were 0"
        ] = None
    return list(notes)


@dataclass(frozen=True)
class Exchange:
    """Stores whose homes exchange values. `first` is where the state of their optimizer begins among all states."""

    stores: tuple[int, ...]
    division: coupled.Coupling
    slices: OptimizerSlices
    first: int


def exchanges(found: Iterable[tuple[Use, int]], stores: Sequence[Sequence[int]]) -> list[Exchange]:
    """The stores that exchange values. `stores` are the leaves of each, and `found` has the uses, each with where the
    state of its optimizer begins."""
    made: list[Exchange] = []
    store_of = {leaf: number for number, leaves in enumerate(stores) for leaf in leaves}
    for use, first in found:
        if not use.divides:
            continue
        coupled_stores = DisjointSets(len(stores))
        for group in use.groups():
            for leaves in group:
                coupled_stores.join(store_of[leaf] for leaf in leaves)
        for members in coupled_stores.sets():
            if len(members) > 1:
                division = use.slices.divide([stores[m] for m in members])
                made.append(Exchange(tuple(members), division, use.slices, first))
    return made


def lower(exchange: Exchange, number: int, table: ExecutableTable) -> Coupling:
    """Export the tasks that combine what the homes share."""
    division, specs, first = exchange.division, exchange.slices.state_specs, exchange.first
    state = tuple(strong(specs[s]) for s in division.state)
    commons: list[ArraySpec] = []
    rounds: list[Combine] = []
    for at, combination in enumerate(division.combinations):
        shared = tuple(spec for member in division.members for spec in member.shares[at].returns)
        taken = tuple(commons[i] for i in combination.takes)
        task = table.add_function(
            f"combine:{number}.{at}", combination.run, (*state, *taken, *shared), combination.returns
        )
        rounds.append(Combine(task, combination.takes))
        commons += combination.returns
    return Coupling(exchange.stores, tuple(rounds), tuple(first + s for s in division.state))


def lower_member(
    exchange: Exchange,
    number: int,
    store: int,
    update: coupled.Function,
    given: Sequence[ArraySpec],
    name: str,
    table: ExecutableTable,
) -> Coupled:
    """Export the tasks of one store. `given` are the specs of its gradients, parameters and state."""
    division = exchange.division
    member = division.members[exchange.stores.index(store)]
    commons = [spec for combination in division.combinations for spec in combination.returns]

    def share(what: str, step: coupled.Step, run: coupled.Function) -> Share:
        taken = tuple(commons[i] for i in step.takes)
        task = table.add_function(f"{what}:{name}", run, (*given, *taken), step.returns) if step.returns else None
        return Share(task, step.takes, sum(s.nbytes for s in step.returns))

    shares = tuple(share("share", step, step.run) for step in member.shares)
    return Coupled(number, shares, share("step", member.update, update))
