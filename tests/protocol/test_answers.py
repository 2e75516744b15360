"""A home whose readers take only after some of their pushes publishes to each of them when it is about to take."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from flowml.policy import (
    UNBOUNDED,
    Consensus,
    Delta,
    Every,
    Mix,
    Outer,
    Policy,
    Quorum,
    Weights,
    filters,
)
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions
from flowml_runtime.protocol.training.home import Apply, Flush, Home, Publish, SendApplied, StageRetired, StoreLoaded
from flowml_runtime.protocol.training.snapshot import Rhythm
from flowml_runtime.protocol.training.store import ContributionReceived, answers
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.history import Turn
from flowml_tools.faults.layout import make
from flowml_tools.faults.world import World

DOWNPOUR = Policy(staleness=UNBOUNDED, every=Every(1, 3), payload=Delta(), apply="sum")


def home(policy: Policy, replicas: int = 3, stages: tuple[int, ...] = (0,)) -> Home:
    machine = Home(Terms(replicas, len(stages), 1, (StoreTerms(stages, policy),), 12), [0])
    machine.step(StoreLoaded(0))
    return machine


def push(machine: Home, replica: int, clock: int, handle: int, part: int = 0, weight: int = 1) -> list[Any]:
    found = machine.step(ContributionReceived(0, part, replica, 0, clock, 0, weight, handle, weight == 0))
    machine.validate()
    return [a for a in found if not isinstance(a, Apply)]


def test_only_the_push_before_a_take_is_answered_with_a_version() -> None:
    machine = home(DOWNPOUR)
    assert push(machine, 1, 0, 1) == [SendApplied(0, 1, 0, 1)]
    assert push(machine, 1, 1, 2) == [SendApplied(0, 1, 1, 2)]
    assert push(machine, 0, 0, 3) == [SendApplied(0, 0, 0, 3)]
    assert push(machine, 1, 2, 4) == [Publish(0, 4, 0, replica=1), SendApplied(0, 1, 2, 4)]
    assert not [a for a in push(machine, 1, 2, 5) if isinstance(a, Publish | SendApplied)], "it came again"
    assert push(machine, 2, 0, 6) == [SendApplied(0, 2, 0, 5)]
    assert push(machine, 0, 1, 7) == [SendApplied(0, 0, 1, 6)]


def test_an_empty_push_is_answered_too() -> None:
    machine = home(DOWNPOUR)
    assert push(machine, 1, 2, 0, weight=0) == [Publish(0, 0, 0, replica=1), SendApplied(0, 1, 2, 0)]


def test_a_push_of_two_stages_is_answered_when_both_parts_are_here() -> None:
    machine = home(Policy(staleness=UNBOUNDED, every=2), stages=(0, 1))
    assert push(machine, 1, 1, 1) == []
    assert push(machine, 1, 1, 2, part=1) == [Publish(0, 1, 0, replica=1), SendApplied(0, 1, 1, 1)]


def test_what_waits_for_others_is_answered_with_the_newest_version() -> None:
    machine = home(Policy(staleness=UNBOUNDED, every=2, quorum=Quorum(2, late="fold")))
    assert push(machine, 1, 1, 1) == [Publish(0, 0, 0, replica=1), SendApplied(0, 1, 1, 0)]
    assert push(machine, 0, 1, 2) == [Publish(0, 1, 0, replica=0), SendApplied(0, 0, 1, 1)]
    assert push(machine, 1, 3, 3) == [Publish(0, 1, 0, replica=1), SendApplied(0, 1, 3, 1)]
    assert [type(a) for a in machine.step(Flush())] == [Apply], "no one takes what is made at the end"


def test_no_one_is_told_of_a_version_without_its_values() -> None:
    """A reader would believe that it has a version of which others have the values."""
    machine = home(DOWNPOUR)
    push(machine, 1, 0, 1)
    assert not [a for a in machine.step(StageRetired(2, 0)) if isinstance(a, Publish)]
    assert not [a for a in machine.step(ReplicaLost(0)) if isinstance(a, Publish)]
    assert not [a for a in push(machine, 0, 2, 2) if isinstance(a, Publish)], "it is lost"


@pytest.mark.parametrize("every", [Every(1, 8), Every(4, 8), Every(3), Every(3, offset=1), Every(2, 6)])
@pytest.mark.parametrize("clock", range(30))
def test_the_step_after_an_answered_push_takes(every: Every, clock: int) -> None:
    assert every.takes_after_push
    assert every.asks(clock) == (every.taken(clock + 1) == clock + 1)
    if every.asks(clock):
        assert every.due(clock, -1), "each take comes right after a push"


OTHERS = [
    Policy(),
    Policy(staleness=UNBOUNDED),
    Policy(staleness=UNBOUNDED, every=Every(4, 1)),
    Policy(staleness=UNBOUNDED, every=Every(4, 2), payload=Delta()),
    Policy(staleness=UNBOUNDED, every=Every(2, 3), payload=Delta()),
    Policy(staleness=UNBOUNDED, every=Every(4, delay=1), payload=Delta()),
    Policy(staleness=4, every=Every(1, 4)),
    Policy(staleness=UNBOUNDED, every=4, payload=Weights(), apply=Mix(0.2)),
    Policy(staleness=UNBOUNDED, every=4, payload=Delta(), apply=Consensus(0.1), quorum=Quorum(2, late="fold")),
    Policy(staleness=UNBOUNDED, every=4, pull_filters=(filters.quantise(8),)),
    Policy(every=4, payload=Delta()),
]


@pytest.mark.parametrize("policy", OTHERS, ids=Policy.describe)
def test_other_policies_publish_each_version_to_all(policy: Policy) -> None:
    store = StoreTerms((0,), policy)
    assert not answers(Terms(3, 1, 1, (store,), 12), store)


def test_a_replica_may_leave_pushes_out_beside_a_quorum_and_gets_each_version() -> None:
    store, dropping = StoreTerms((0,), DOWNPOUR), StoreTerms((0,), Policy(quorum=Quorum(2)))
    assert answers(Terms(3, 1, 1, (store, StoreTerms((0,), Policy())), 12), store)
    assert not answers(Terms(3, 1, 1, (store, dropping), 12), store)


RULES = {
    "downpour": DOWNPOUR,
    "gradients": Policy(staleness=UNBOUNDED, every=Every(1, 4)),
    "both": Policy(staleness=UNBOUNDED, every=3, payload=Delta(), apply=Outer()),
    "offset": Policy(staleness=UNBOUNDED, every=Every(3, offset=1)),
    "quorum": Policy(staleness=UNBOUNDED, every=2, quorum=Quorum(2, late="fold")),
    "compressed": Policy(staleness=UNBOUNDED, every=2, pull_filters=(filters.compress(),)),
}
TROUBLE: dict[str, dict[str, Any]] = {
    "none": {},
    "on two workers": {"workers": 2},
    "messages again": {"twice": 0.5},
    "snapshots": {"rhythm": Rhythm(2), "pauses": (1.5, 4.0), "twice": 0.3},
}


def run(policy: Policy, seed: int = 0, **options: Any) -> World:
    world = make([policy, Policy(staleness=UNBOUNDED)], replicas=3, clocks=9, seed=seed, speeds=(1, 2, 4), **options)
    world.go()
    check_rest(world)
    return world


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("rule", RULES)
def test_each_take_has_its_answer_and_no_other_version_is_sent(rule: str, trouble: str) -> None:
    for seed in range(4):
        history = run(RULES[rule], seed, **TROUBLE[trouble]).history
        assert check(history) == []
        turns = [f for f in history.facts if isinstance(f, Turn)]
        sent = Counter(a.store for t in turns for a in t.wanted if isinstance(a, actions.Publish) for _ in a.to)
        assert 0 < sent[0] < sent[1] / 2


@pytest.mark.parametrize("rule", ["downpour", "both"])
def test_the_rest_goes_on_without_a_lost_replica(rule: str) -> None:
    for after in range(6):
        world = make([RULES[rule]], replicas=3, stages=1, clocks=9, seed=after, homes_on=0)
        world.lose(2, after + 0.5)
        world.go()
        check_rest(world)
        assert check(world.history) == []


def test_the_checker_finds_versions_that_no_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("flowml_runtime.protocol.training.home.answers", lambda *_: False)
        assert any("does not take then" in text for text in check(run(DOWNPOUR).history))
    with monkeypatch.context() as patched:
        patched.setattr(Every, "asks", lambda *_: True)
        assert any("does not take then" in text for text in check(run(DOWNPOUR).history))


def test_the_checker_finds_a_push_without_an_answer() -> None:
    """The replica would wait for it, so the history has to lose it."""
    history = run(DOWNPOUR).history
    place, turn = next(
        (n, f)
        for n, f in enumerate(history.facts)
        if isinstance(f, Turn)
        and isinstance(f.event, actions.Received)
        and isinstance(f.event.message, wire.Contribution)
        and any(isinstance(a, actions.Publish) and a.store == 0 for a in f.wanted)
    )
    kept = [a for a in turn.wanted if not isinstance(a, actions.Publish)]
    history.facts[place] = Turn(turn.at, turn.who, turn.number, turn.event, kept)
    assert any("does not answer the push of replica" in text for text in check(history))
