"""Says which workers hold parameters and compute no gradients: the parameter servers of a fit.

Every layer whose contributions go to a home lives there. Layers that replicas add up, mix or share among themselves
have no home of that kind, so they stay where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from flowml.devices import Device, worker_of
from flowml.errors import PlacementError, named
from flowml.numbers import whole_number
from flowml.plan import Training
from flowml.policy import Gossip, Policy

Homes = int | str | Sequence[str]
"""The last workers, so many of them, or the patterns of the names of workers."""


def homes_of(given: Any) -> int | tuple[str, ...]:
    """The argument `homes` of `Trainer`, checked: 0 stands for None. Raises TypeError or ValueError."""
    if given is None:
        return 0
    if isinstance(given, str):
        given = (given,)
    if not isinstance(given, Sequence):
        return whole_number("homes", given, least=1)
    patterns = tuple(cast("Sequence[Any]", given))
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(
                f"homes has {pattern!r} of type {type(pattern).__name__}; give names of workers or patterns of them, "
                "such as 'worker:3', or how many"
            )
        if "/" in pattern:
            raise ValueError(
                f"homes has {pattern!r}, which is a device, and a home takes a whole worker; give "
                f"{pattern.partition('/')[0]!r}"
            )
    if not patterns:
        raise ValueError("homes is empty; give names of workers such as 'worker:3', or how many, or leave it out")
    return patterns


def is_home(homes: int | tuple[str, ...], worker: str) -> bool:
    """Whether a worker has one of these names."""
    return not isinstance(homes, int) and any(fnmatchcase(worker, pattern) for pattern in homes)


def divide(
    homes: int | tuple[str, ...], devices: Sequence[Device], replicas: int
) -> tuple[tuple[Device, ...], tuple[Device, ...]]:
    """The devices that compute, and those of the workers that only hold parameters.

    Raises PlacementError if a pattern matches no worker, or none is left that computes.
    """
    if homes == 0:
        return tuple(devices), ()
    workers = tuple(dict.fromkeys(d.worker for d in devices))
    chosen = _chosen(homes, workers, replicas)
    return tuple(d for d in devices if d.worker not in chosen), tuple(d for d in devices if d.worker in chosen)


def _chosen(homes: int | tuple[str, ...], workers: Sequence[str], replicas: int) -> frozenset[str]:
    if isinstance(homes, int):
        if homes and homes >= len(workers):
            raise PlacementError(
                f"homes={homes}: there are {len(workers)} workers, and at least one has to compute; start more "
                "workers or give fewer homes"
            )
        return frozenset(workers[len(workers) - homes :])
    found: set[str] = set()
    for pattern in homes:
        hit = [worker for worker in workers if is_home((pattern,), worker)]
        if not hit:
            raise PlacementError(
                f"homes names {pattern!r}, which matches no worker; there are: {named(workers)}; name one of them, or "
                "start the one that was lost"
            )
        found.update(hit)
    if len(found) == len(workers):
        raise PlacementError(
            f"homes={named(homes)} takes all {len(workers)} workers, and {replicas} replicas have to compute on "
            "others; start more workers or name fewer homes"
        )
    return frozenset(found)


def lives_at_home(policy: Policy) -> bool:
    """Whether replicas send what they have of a layer to one home, which may be anywhere."""
    return not (policy.collective or policy.shared or isinstance(policy.remote, Gossip))


def check_housed(homes: Sequence[Device], policies: Iterable[Policy]) -> None:
    """Raise PlacementError if there are homes, and no layer would live there."""
    used = tuple(dict.fromkeys(policies))
    if homes and not any(map(lives_at_home, used)):
        raise PlacementError(
            f"homes= is for layers that a home holds, and all of these are held by replicas themselves (policies: "
            f"{named([p.describe() for p in used])}); give a policy with fm.ParameterServer(), or leave homes out"
        )


def idle(homes: Sequence[Device], used: Collection[str]) -> tuple[str, ...]:
    """A warning if workers that are to hold parameters hold none."""
    there = {worker_of(device) for device in used}
    unused = tuple(dict.fromkeys(home.worker for home in homes if home.worker not in there))
    why = "there are fewer layers than homes, and a layer is not divided"
    return (f"{named(unused)} hold{'s' * (len(unused) == 1)} nothing: {why}; name fewer homes",) if unused else ()


def homes_only(training: Training) -> tuple[str, ...]:
    """The devices that hold layers, and are of no replica."""
    mine = {device for devices in training.replicas for device in devices}
    return tuple(dict.fromkeys(h for store in training.stores for h in store.copies if h not in mine))
