"""Names for the policies that people ask for: each only fills in `flowml.Policy`.

Every other knob can be given too: `asynchronous(staleness=3, every=4)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack

from flowml import policy as algebra


class _Common(TypedDict, total=False):
    topology: algebra.Topology
    filters: Sequence[object]
    apply: Literal["mean", "sum"]


class _Pushing(_Common, total=False):
    every: algebra.Every | int
    payload: algebra.Gradient | algebra.Factors


class _Rhythm(_Common, total=False):
    staleness: float
    quorum: algebra.Quorum | None
    payload: algebra.Gradient | algebra.Factors


class _Sending(_Common, total=False):
    staleness: float
    quorum: algebra.Quorum | None
    every: algebra.Every | int


class _Waiting(_Pushing, total=False):
    staleness: float


class _Summing(TypedDict, total=False):
    every: algebra.Every | int
    apply: Literal["mean", "sum"]


class _Reading(_Pushing, total=False):
    quorum: algebra.Quorum | None


def synchronous(**overrides: Unpack[_Pushing]) -> algebra.Policy:
    """All replicas contribute to every clock, and nothing read is old: equal to one large batch."""
    return algebra.Policy(**overrides)


def all_reduce(**overrides: Unpack[_Summing]) -> algebra.Policy:
    """As `synchronous`, but each replica keeps a copy, and replicas add up their gradients among themselves."""
    return algebra.Policy(topology=algebra.AllReduce(), **overrides)


def every(k: int, **overrides: Unpack[_Rhythm]) -> algebra.Policy:
    """Gradients add up on each replica and are sent every `k` steps (Project Adam, local accumulation)."""
    return algebra.Policy(every=k, **overrides)


def asynchronous(staleness: float = algebra.UNBOUNDED, **overrides: Unpack[_Reading]) -> algebra.Policy:
    """Each contribution is applied when it arrives; reads are at most `staleness` clocks old (0: synchronous)."""
    return algebra.Policy(staleness=staleness, **overrides)


def factors(**overrides: Unpack[_Sending]) -> algebra.Policy:
    """Send the operands of a dense layer's gradient, and let the home form it (Project Adam)."""
    return algebra.Policy(payload=algebra.Factors(), **overrides)


def quorum(
    count_or_fraction: float, *, late: Literal["drop", "fold"] = "drop", **overrides: Unpack[_Waiting]
) -> algebra.Policy:
    """A clock is complete with a share (0.75) or a number (3) of the replicas; who comes later is left out."""
    return algebra.Policy(quorum=algebra.Quorum(count_or_fraction, late=late), **overrides)
