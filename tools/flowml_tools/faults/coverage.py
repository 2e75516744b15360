"""Counts which values of knobs have met which kinds of faults, over many cases, and prints them as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flowml import sim
from flowml.policy import UNBOUNDED, Coded, Deadline, Every, Fold, Gossip, Hierarchy, Outer, Policy, Prox, Quorum
from flowml.policy.apply import base_of
from flowml.policy.rhythm import ONCE
from flowml_tools.faults.cases import Case

FAULTS = (
    "none",
    "reordered",
    "lost",
    "repeated",
    "parted",
    "straggler",
    "replica lost",
    "home crashed",
    "worker crashed",
    "driver ended",
    "withdrawn",
)
"""The kinds of faults. A crash of a worker that is no home, and of one that is, ends the fit; so does the driver.
With "withdrawn" snapshots are that a replica holds up."""


def faults_of(case: Case) -> list[str]:
    """The kinds of faults in a case."""
    disorders = [f for f in case.faults if isinstance(f, sim.Disorder)]
    found = {
        "reordered": any(f.delay_s for f in disorders),
        "lost": any(f.lost for f in disorders),
        "repeated": bool(case.twice) or any(f.repeated for f in disorders),
        "parted": any(isinstance(f, sim.Partition) for f in case.faults),
        "straggler": isinstance(case.compute, sim.Straggler),
        "replica lost": case.lost is not None,
        "home crashed": case.crashed is not None and case.crashes_home,
        "worker crashed": case.crashed is not None and not case.crashes_home,
        "driver ended": case.interrupted_s is not None,
        "withdrawn": case.patience_s is not None,
    }
    return [name for name, there in found.items() if there] or ["none"]


def values_of(policy: Policy) -> list[str]:
    """The values of the knobs of a policy, by name."""
    topology, quorum, every = policy.topology, policy.quorum, policy.every
    found = [f"topology {_topology(topology)}"]
    bound = "0" if not policy.staleness else "unbounded" if policy.staleness == UNBOUNDED else "n"
    found.append(f"staleness {bound}")
    found.append(f"quorum {_quorum(quorum)}")
    if policy.clocked and not quorum.never_drops(2):
        late = quorum.late
        found.append(f"late {late.describe()}" + (" with decay" if isinstance(late, Fold) and late.decay < 1 else ""))
    found += [f"every {name}" for name in _rhythm(every)]
    alpha = " mixed" if getattr(policy.payload, "alpha", 0.0) else ""
    found.append(f"payload {type(policy.payload).__name__.lower()}{alpha}")
    found += [f"filter {f.call}{' with feedback' if f.feedback else ''}" for f in policy.filters]
    found += [f"filter {f.call} of what is published" for f in policy.pull_filters]
    found.append(f"apply {type(base_of(policy.apply)).__name__.lower()}")
    found += ["apply prox"] if isinstance(policy.apply, Prox) else []
    found += ["apply outer in a gossip"] if isinstance(policy.apply, Outer) and isinstance(topology, Gossip) else []
    return found


def _topology(topology: object) -> str:
    if isinstance(topology, Gossip):
        return f"gossip {topology.graph.describe()}"
    if isinstance(topology, Hierarchy):
        local, remote = (type(t).__name__.lower() for t in (topology.local, topology.remote))
        return f"sites: {local} inside, {remote} between"
    return type(topology).__name__.lower()


def _quorum(quorum: object) -> str:
    if isinstance(quorum, Coded):
        return f"coded {quorum.code}"
    if isinstance(quorum, Deadline):
        limit = " limit" if quorum.limit_s < float("inf") else ""
        return f"deadline of {quorum.of} {quorum.grace if quorum.grace == 'adaptive' else 'fixed'}{limit}"
    if isinstance(quorum, Quorum):
        kind = "count" if quorum.counted else "all" if quorum.count_or_fraction == 1 else "share"
        return f"{kind} of {quorum.of}" + (" over the epoch" if quorum.ends_epoch else "")
    return type(quorum).__name__.lower()


def _rhythm(every: Every) -> list[str]:
    found = ["once"] if every.push == ONCE else ["1"] if every.push == 1 else ["k"]
    found += ["offset"] if every.offset else []
    found += ["delay"] if every.delay else []
    return found + (["pull apart"] if every.pull != every.push else [])


@dataclass
class Coverage:
    """How often each value has met each kind of fault."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])

    @staticmethod
    def of(cases: Iterable[Case]) -> Coverage:
        found = Coverage()
        for case in cases:
            kinds = faults_of(case)
            names = {name for policy in case.policies for name in values_of(policy)}
            found.counts.update((name, kind) for name in names for kind in kinds)
        return found

    @property
    def values(self) -> list[str]:
        return sorted({name for name, _ in self.counts})

    def zeroes(self) -> list[tuple[str, str]]:
        """The pairs that have not met."""
        return [(name, kind) for name in self.values for kind in FAULTS if not self.counts[name, kind]]

    def table(self) -> str:
        """A row for each value, a column for each kind of fault, and the pairs that have not met."""
        wide = max(map(len, self.values), default=0)
        lines = [" " * wide + "".join(f"  {kind:>14}" for kind in FAULTS)]
        for name in self.values:
            lines.append(f"{name:<{wide}}" + "".join(f"  {self.counts[name, kind]:>14}" for kind in FAULTS))
        return "\n".join([*lines, *_apart(self.zeroes())])


def _apart(zeroes: Sequence[tuple[str, str]]) -> list[str]:
    if not zeroes:
        return ["every value has met every kind of fault"]
    by_name: dict[str, list[str]] = {}
    for name, kind in zeroes:
        by_name.setdefault(name, []).append(kind)
    return [f"{len(zeroes)} pairs have not met:", *(f"  {name}: {', '.join(k)}" for name, k in by_name.items())]
