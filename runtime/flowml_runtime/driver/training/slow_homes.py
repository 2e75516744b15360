"""Which workers were slow as homes of layers, and what it cost.

Workers tell how long their homes worked for each layer: on applies and on making versions to publish. A home is slow if
that is clearly more than the middle home would have taken, by its seconds for each piece of work and by its seconds for
each byte, whichever is more. So a home of more or of larger layers is not slow for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from flowml.plan import Training
from flowml.policy.waits import shared
from flowml_runtime import wire
from flowml_runtime.driver.training.stragglers import SLOW, SlowHome
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms


@dataclass
class _Home:
    """The work of one worker's homes."""

    layers: list[str] = field(default_factory=list[str])
    jobs: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """The part of `seconds` for which replicas waited."""


def slow_homes(training: Training, terms: Terms, told: Iterable[wire.Traffic], computed: float) -> tuple[SlowHome, ...]:
    """The workers that were slow as homes, those that cost most first. `computed` is how many seconds the middle
    replica has worked."""
    homes = {traffic.worker: _home(training, terms, traffic) for traffic in told if traffic.homes}
    usual = _usual(homes)
    late = sorted((home.seconds, worker) for worker, home in homes.items() if SLOW * home.seconds > usual[worker])
    good = [home.seconds for worker, home in homes.items() if (home.seconds, worker) not in late]
    before = max([*good, *(usual[worker] for _, worker in late)], default=0.0)
    found: list[SlowHome] = []
    last = [(number, seconds) for number, (seconds, _) in enumerate(late) if seconds > before]
    for number, _, longer in shared(last, before):
        worker = late[number][1]
        home = homes[worker]
        cost = max(longer * home.waited / home.seconds, min(longer, home.seconds - computed))
        found.append(SlowHome(worker, tuple(home.layers), home.seconds, usual[worker], max(cost, 0.0)))
    return tuple(sorted(found, key=lambda home: -home.cost_s))


def _home(training: Training, terms: Terms, traffic: wire.Traffic) -> _Home:
    home = _Home()
    for number, jobs, seconds in traffic.homes:
        store = training.stores[number]
        home.layers.append(store.name)
        home.jobs += jobs
        home.nbytes += jobs * store.nbytes
        home.seconds += seconds
        home.waited += seconds * _waits(terms.stores[number], terms.replicas)
    return home


def _waits(store: StoreTerms, replicas: int) -> float:
    """For what share of the work of its home the replicas wait. Without clocks each waits for its own contribution;
    within a bound of staleness, or of a delay, they compute meanwhile."""
    policy = store.policy
    if not (store.clocked or store.collective):
        return 1 / replicas
    return float(policy.staleness == 0 and not policy.every.delay)


def _usual(homes: dict[str, _Home]) -> dict[str, float]:
    """By worker, the seconds that the middle home would have taken for its work."""
    each = _middle([home.seconds / home.jobs for home in homes.values()])
    byte = _middle([home.seconds / max(home.nbytes, 1) for home in homes.values()])
    return {worker: max(each * home.jobs, byte * home.nbytes) for worker, home in homes.items()}


def _middle(paces: list[float]) -> float:
    return sorted(paces)[(len(paces) - 1) // 2] if paces else 0.0
