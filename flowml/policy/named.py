"""Defines named policies. Each function sets one or two fields of `flowml.Policy`.

The other fields can be given too: `asynchronous(staleness=3, every=4)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack

from flowml import policy as algebra
from flowml.policy.quorum import LateName, late_of


class _Common(TypedDict, total=False):
    topology: algebra.Topology
    filters: Sequence[object]
    apply: Literal["mean", "sum"]


class _Pushing(_Common, total=False):
    every: algebra.Every | int
    payload: algebra.Gradient | algebra.Factors


class _Rhythm(_Common, total=False):
    staleness: float
    quorum: algebra.Completion | None
    payload: algebra.Gradient | algebra.Factors


class _Sending(_Common, total=False):
    staleness: float
    quorum: algebra.Completion | None
    every: algebra.Every | int


class _Waiting(_Pushing, total=False):
    staleness: float


class _Summing(TypedDict, total=False):
    every: algebra.Every | int
    apply: Literal["mean", "sum"]


class _Reading(_Pushing, total=False):
    quorum: algebra.Completion | None


def synchronous(**overrides: Unpack[_Pushing]) -> algebra.Policy:
    """All replicas contribute to every clock, and reads are never stale: equal to one large batch."""
    return algebra.Policy(**overrides)


def all_reduce(**overrides: Unpack[_Summing]) -> algebra.Policy:
    """Like `synchronous`, but each replica keeps a copy, and replicas add up their gradients among themselves."""
    return algebra.Policy(topology=algebra.AllReduce(), **overrides)


def every(k: int, **overrides: Unpack[_Rhythm]) -> algebra.Policy:
    """Each replica adds up its gradients and sends them every `k` steps (Project Adam, local accumulation)."""
    return algebra.Policy(every=k, **overrides)


def asynchronous(staleness: float = algebra.UNBOUNDED, **overrides: Unpack[_Reading]) -> algebra.Policy:
    """Each contribution is applied on arrival; reads are at most `staleness` clocks old (0: synchronous)."""
    return algebra.Policy(staleness=staleness, **overrides)


def factors(**overrides: Unpack[_Sending]) -> algebra.Policy:
    """Replicas send the operands of a dense layer's gradient, and the home multiplies them (Project Adam)."""
    return algebra.Policy(payload=algebra.Factors(), **overrides)


def quorum(
    count_or_fraction: float, *, late: algebra.Late | LateName = "drop", **overrides: Unpack[_Waiting]
) -> algebra.Policy:
    """A share (0.75) or a number (3) of the replicas completes a clock; by default later contributions are dropped."""
    return algebra.Policy(quorum=algebra.Quorum(count_or_fraction, late=late_of(late, "quorum")), **overrides)
