"""Warns of layers whose replicas would first exchange something after the end of a fit.

A replica pushes once more after its last step, so such a fit has one exchange: replicas with parameters of their own
have trained apart until then, and gradients have been added up for a single update.
"""

from __future__ import annotations

from collections.abc import Iterable

from flowml.callers import warn
from flowml.plan import StoreSpec, Training
from flowml.policy import Gossip, Policy
from flowml.policy.rhythm import ONCE
from flowml.render.units import listed

MOST = 3
"""The most layers that a warning names."""


def warn_of_rhythms(training: Training, total: int) -> None:
    """Warn, in one line for each rhythm, if a fit of `total` steps ends before its first exchange."""
    found: dict[str, list[str]] = {}
    for store in training.stores:
        for text in _too_late(store, total, len(training.replicas)):
            found.setdefault(text, []).append(store.name)
    for text, layers in found.items():
        of = "" if len(layers) == len(training.stores) else f" of {listed(tuple(layers), MOST)}"
        warn(text.format(of=of))


def first_exchange(policy: Policy) -> int:
    """How many steps a replica does before its first exchange; 0 if there is none before the end anyway."""
    if isinstance(policy.remote, Gossip):
        return policy.remote.every
    every = policy.every
    return 0 if every.push == ONCE else every.next_due(0, ONCE) + 1


def _too_late(store: StoreSpec, total: int, replicas: int) -> Iterable[str]:
    policy, first = store.policy, first_exchange(store.policy)
    gossip, pull = isinstance(policy.remote, Gossip), policy.every.pull or policy.every.push
    once = "more steps, or fm.Once() if that is meant"
    remedy = f"give a shorter period, {'or more steps' if gossip else once}"
    if first > total and (gossip or policy.local):
        if replicas > 1:
            yield (
                f"replicas first exchange parameters{{of}} after {first} steps, and the fit has {total}: they train "
                f"apart, and exchange once, after the last step; {remedy}"
            )
    elif first > total:
        yield (
            f"gradients{{of}} are first sent after {first} steps, and the fit has {total}: they are added up for a "
            f"single update, after the last step; {remedy}"
        )
    elif not gossip and pull > max(total, policy.every.push):
        so = "they train apart" if policy.local else "all its steps compute with the first values"
        yield (
            f"replicas first take new values{{of}} after {pull} steps, and the fit has {total}: {so}; give a smaller "
            "pull, or more steps"
        )
