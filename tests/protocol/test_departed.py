"""Runs that go on without a lost replica, at random points: no other one stops, and each item has its fate."""

from __future__ import annotations

import math
from typing import Any

import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowml as fm
from flowml.policy import Fold, Policy, Quorum, named
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.departed import alone_on, waits_for_none
from flowml_runtime.protocol.training.snapshot import Rhythm
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make
from flowml_tools.faults.world import World

REPLICAS = 4
RULES: dict[str, Any] = {
    "Downpour": (named.downpour(2, 4), named.downpour(2, 4)),
    "Downpour, rare pushes": (named.downpour(5, 2), named.downpour(5, 2)),
    "asynchronous": (named.asynchronous(), named.asynchronous()),
    "two rhythms": (named.asynchronous(every=3), named.asynchronous()),
    "staleness scaled": (Policy(staleness=math.inf, apply=fm.StalenessScaled()), named.asynchronous()),
}


def world(rules: str, seed: int, lost_s: float, victim: int = 3, **options: Any) -> World:
    """Four replicas with a worker each. The first two are the homes of a layer each."""
    options = {"clocks": 24, "items": 16, "rhythm": Rhythm(), "outlives": True, **options}
    made = make(RULES[rules], replicas=REPLICAS, stages=1, seed=seed, **options)
    made.lose(victim, lost_s)
    return made


def told(made: World) -> list[Any]:
    """What the driver's machine wanted, in order."""
    turns = (f for f in made.history.facts if getattr(f, "who", "") == "driver")
    return [action for turn in turns for action in turn.wanted]  # pyright: ignore[reportAttributeAccessIssue]


@settings(deadline=None, max_examples=60)
@given(
    rules=st.sampled_from(sorted(RULES)),
    seed=st.integers(0, 10_000),
    lost_s=st.floats(0, 30),
    victim=st.sampled_from([2, 3]),
    source=st.sampled_from(["fed", "shipped"]),
    pauses=st.lists(st.floats(0, 40), max_size=4),
    twice=st.sampled_from([0.0, 0.3]),
    slow=st.sampled_from([1, 6]),
)
def test_a_replica_is_lost_at_any_time(
    rules: str, seed: int, lost_s: float, victim: int, source: Any, pauses: list[float], twice: float, slow: int
) -> None:
    options = {"source": source, "pauses": sorted(pauses), "twice": twice, "speeds": (1, slow, 1, 1)}
    made = world(rules, seed, lost_s, victim, **options)
    made.go()
    check_rest(made)
    assert not check(made.history)
    summary = made.history.summary
    assert summary is not None
    assert summary.outstanding == 0
    left = [a for a in told(made) if isinstance(a, driver.NoteLeftOut)]
    if left:
        assert summary.used == made.work.total_items, "others do what no store has"
        assert summary.dropped == 0
        every = max(s.policy.every.push for s in made.terms.stores)
        assert summary.partly <= every, "at most one push was under way"
