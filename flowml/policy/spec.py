"""Defines `Policy` and the values that it is made of, and rejects unsound compositions.

Each knob is a frozen value that checks itself; `Policy` checks that its knobs are sound together. Some choices
of the design do not work yet (docs/policies.md lists them). Such a choice is never ignored: it raises an error that
names the available ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.topology import TOPOLOGIES, ParameterServer, Topology
from flowml.policy.topology import describe as describe_topology

UNBOUNDED = math.inf
"""A staleness without bound: a read never waits."""

_ROUNDING = 1e-9  # 1 - 1/3 of three members has to be two of them, although binary fractions are not exact

_SERVER = ParameterServer()


@dataclass(frozen=True)
class Gradient:
    """Replicas send gradients, summed over the microbatches and steps since their last push."""


@dataclass(frozen=True)
class Factors:
    """Replicas send the operands a and δ of the product aᵀδ, and the home forms the gradient.

    This sends less for a large dense layer and a small batch (Chilimbi et al., Project Adam, OSDI 2014).
    """


@dataclass(frozen=True)
class Quorum:
    """How many contributions complete a clock, and what happens to later ones.

    Args:
        count_or_fraction: a float in (0, 1] is a share of the replicas, rounded up; an int ≥ 1 is a number of replicas.
        of: `"replicas"`.
        late: `"drop"` discards late contributions; `"fold"` applies each contribution on arrival and is available as
            `Quorum(1, late="fold")`, with a staleness above 0.

    Raises:
        PolicyError: for a value that is out of range or not available yet.
    """

    count_or_fraction: float = 1.0
    of: Literal["replicas"] = "replicas"
    late: Literal["drop", "fold"] = "drop"
    counted: bool = field(init=False, repr=False)  # makes Quorum(1), one replica, differ from Quorum(1.0), all

    def __post_init__(self) -> None:
        value = _number(self.count_or_fraction, "Quorum({!r}): give a fraction like 0.75 or a count like 3")
        object.__setattr__(self, "count_or_fraction", value)
        object.__setattr__(self, "counted", isinstance(value, int))
        if isinstance(value, int) and value < 1:
            raise PolicyError(f"Quorum({value}): a count of replicas is at least 1")
        if isinstance(value, float) and not 0 < value <= 1:
            raise PolicyError(f"Quorum({value}): a fraction lies in (0, 1]; for a number of replicas give an int")
        _available("of", self.of, ("replicas",), "Quorum({})")
        _available("late", self.late, ("drop", "fold"), "Quorum({})")

    def need(self, members: int) -> int:
        """How many contributions complete a clock of `members` replicas: the count, or the share rounded up."""
        if self.counted:
            return min(int(self.count_or_fraction), members)
        return max(1, math.ceil(self.count_or_fraction * members - _ROUNDING))

    def never_drops(self, members: int) -> bool:
        """Whether every one of `members` replicas is needed, so that none can come too late."""
        return self.need(members) >= members

    def __str__(self) -> str:
        return f"Quorum({self.count_or_fraction})"


@dataclass(frozen=True)
class Every:
    """Push and pull every `push` steps. Between pushes each replica adds up its gradients.

    Raises:
        PolicyError: for a `push` below 1, or a `pull` that differs from it.
    """

    push: int = 1
    pull: int | None = None

    def __post_init__(self) -> None:
        push = whole(self.push)
        if push is None or push < 1:
            raise PolicyError(f"Every(push={self.push!r}): the number of steps between pushes is an int of at least 1")
        object.__setattr__(self, "push", push)
        if self.pull is None:
            object.__setattr__(self, "pull", self.push)
        if self.pull != self.push:
            raise PolicyError(
                f"Every(push={self.push}, pull={self.pull}): pulling at another rhythm than pushing is not available "
                f"yet; leave pull out"
            )


@dataclass(frozen=True, init=False)
class Policy:
    """How the replicas of one layer are kept in step. `Policy()` is synchronous data parallelism.

    Attributes:
        topology: how contributions travel. With `ParameterServer()` replicas send them to the layer's home. With
            `AllReduce()`, `Ring()`, `Tree()` or `Hierarchy()` all replicas add up each gradient together.
        staleness: how many clocks a read may be behind (0: synchronous, n: bounded, `UNBOUNDED`: no bound).
        quorum: what completes a clock. By default all replicas do if the staleness is 0; else each contribution is
            applied on arrival (Dean et al., Downpour; Ho et al., stale synchronous).
        every: steps between pushes.
        payload: what is sent.
        filters: transformations of the payload; none is available yet.
        apply: `"mean"` divides by the number of microbatch gradients that took part, `"sum"` only by the
            microbatches of one step.

    Raises:
        PolicyError: for a composition that is not sound, or a part that is not available yet.
    """

    topology: Topology
    staleness: float
    quorum: Quorum
    every: Every
    payload: Gradient | Factors
    filters: tuple[object, ...]
    apply: Literal["mean", "sum"]

    def __init__(
        self,
        topology: Topology = _SERVER,
        staleness: float = 0,
        quorum: Quorum | None = None,
        every: Every | int = 1,
        payload: Gradient | Factors = Gradient(),
        filters: Sequence[object] = (),
        apply: Literal["mean", "sum"] = "mean",
    ) -> None:
        bound = _staleness(staleness)
        if quorum is None:
            quorum = Quorum(1.0) if bound == 0 else Quorum(1, late="fold")
        values = {
            "topology": topology,
            "staleness": bound,
            "quorum": quorum,
            "every": every if isinstance(every, Every) else Every(every),
            "payload": payload,
            "filters": _filters(filters),
            "apply": apply,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _check_parts(self)
        _check_sound(self)

    @property
    def clocked(self) -> bool:
        """Whether the layer commits clock by clock. If False, each contribution is applied on arrival."""
        return self.quorum.late != "fold"

    @property
    def collective(self) -> bool:
        """Whether replicas add up their gradients among themselves."""
        return not isinstance(self.topology, ParameterServer)

    def describe(self) -> str:
        """A short text for tables: `"sync"`, `"every 4"`, `"async ≤3, factors"`, `"sync, ring"`."""
        bound = "" if self.staleness == UNBOUNDED else f" ≤{self.staleness}"
        words: list[str] = []
        if not self.clocked:
            words.append(f"async{bound}")
        elif self.staleness:
            words.append(f"stale{bound}")
        if self.every.push > 1:
            words.append(f"every {self.every.push}")
        if self.clocked and self.quorum != Quorum(1.0):
            words.append(f"quorum {self.quorum.count_or_fraction} {self.quorum.late}")
        words = words or ["sync"]
        if self.collective:
            words.append(describe_topology(self.topology))
        if isinstance(self.payload, Factors):
            words.append("factors")
        if self.apply == "sum":
            words.append("sum")
        return ", ".join(words)


def _number(value: object, otherwise: str) -> int | float:
    """A Python or NumPy number as an int or a float. Raises PolicyError for NaN, a bool or anything else."""
    count = whole(value)
    if count is not None:
        return count
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise PolicyError(otherwise.format(value))
    return float(value)


def _staleness(staleness: object) -> float:
    """The bound as an int, or UNBOUNDED."""
    value = _number(staleness, "staleness={!r}: give a number of clocks, or flowml.UNBOUNDED")
    if value < 0:
        raise PolicyError(f"staleness={value}: a read cannot be newer than now; 0 is synchronous")
    if value == UNBOUNDED:
        return UNBOUNDED
    if value != int(value):
        raise PolicyError(f"staleness={value}: clocks are whole, so the bound is an int or flowml.UNBOUNDED")
    return int(value)


def _filters(filters: Sequence[object]) -> tuple[object, ...]:
    try:
        return tuple(filters)
    except TypeError:
        raise PolicyError(f"filters={filters!r} is not available yet; leave filters out") from None


def _available(knob: str, value: object, choices: tuple[str, ...], where: str = "{}") -> None:
    """Raise PolicyError unless `value` is one of `choices`; `where` formats the knob, as in `"Quorum({})"`."""
    if value not in choices:
        known = " or ".join(f"{knob}={c!r}" for c in choices)
        raise PolicyError(f"{where.format(f'{knob}={value!r}')} is not available yet; give {known}")


def _check_parts(policy: Policy) -> None:
    """Check that each knob has an available value."""
    kinds: tuple[tuple[str, object, tuple[type, ...]], ...] = (
        ("topology", policy.topology, TOPOLOGIES),
        ("quorum", policy.quorum, (Quorum,)),
        ("payload", policy.payload, (Gradient, Factors)),
    )
    for name, value, types in kinds:
        if type(value) not in types:
            known = " or ".join(f"flowml.{t.__name__}()" for t in types)
            raise PolicyError(f"{name}={value!r} is not available yet; give {name}={known}")
    if policy.filters:
        raise PolicyError(f"filters={policy.filters!r} is not available yet; leave filters out")
    _available("apply", policy.apply, ("mean", "sum"))


def _check_sound(policy: Policy) -> None:
    """Check that the knobs are sound together."""
    quorum, stale = policy.quorum, policy.staleness
    if policy.collective:
        _check_collective(policy)
    folding = f"Quorum({quorum.count_or_fraction}, late='fold')"
    if isinstance(policy.payload, Factors) and policy.every.push > 1:
        raise PolicyError(
            f"payload=Factors() with every={policy.every.push} is not sound: the factors of several steps cannot be "
            f"added up without forming the product they stand for; use every=1, or payload=Gradient()"
        )
    if quorum.late == "fold" and stale == 0:
        raise PolicyError(
            f"quorum={folding} with staleness=0 is not sound: folding a late contribution in applies a gradient of "
            "older parameters, which staleness 0 rules out; give staleness=1 or more, or late='drop'"
        )
    if quorum.late == "fold" and quorum != Quorum(1, late="fold"):
        raise PolicyError(
            f"quorum={folding} is not available yet; give quorum=Quorum(1, late='fold'), "
            f"which applies every contribution on arrival, or late='drop'"
        )
    if policy.clocked and stale == UNBOUNDED:
        raise PolicyError(
            f"quorum={quorum} with staleness=UNBOUNDED is not sound: replicas would run ahead of the clocks that "
            f"the quorum completes, and their contributions pile up without bound; give a finite staleness, or "
            f"leave quorum out"
        )


def _check_collective(policy: Policy) -> None:
    """Check that the other knobs are sound and available with a sum over all replicas."""
    topology = f"topology={policy.topology!r}"
    if policy.staleness:
        raise PolicyError(
            f"{topology} with staleness={policy.staleness} is not available yet: replicas add up each clock together "
            "before the next is read; use staleness=0, or topology=flowml.ParameterServer()"
        )
    if policy.quorum != Quorum(1.0):
        raise PolicyError(
            f"{topology} with quorum={policy.quorum} is not sound: a sum over all replicas takes the gradient of each, "
            "so none can be left out; leave quorum out, or use topology=flowml.ParameterServer()"
        )
    if isinstance(policy.payload, Factors):
        raise PolicyError(
            f"{topology} with payload=Factors() is not sound: the factors of different replicas cannot be added up "
            "without forming the products they stand for; use payload=Gradient(), or topology=flowml.ParameterServer()"
        )
