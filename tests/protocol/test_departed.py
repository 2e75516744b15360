"""Runs that go on without a lost replica, at random points: no other one stops, and each item has its fate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowml as fm
from flowml.policy import Policy, named
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.departed import Departed, alone_on, waits_for_none
from flowml_runtime.protocol.training.ledger import Asked, Ledger, LedgerState, Settled
from flowml_runtime.protocol.training.owed import Owed
from flowml_runtime.protocol.training.snapshot import Rhythm
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.work import Work
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
    sharded=st.booleans(),
)
def test_a_replica_is_lost_at_any_time(
    rules: str,
    seed: int,
    lost_s: float,
    victim: int,
    source: Any,
    pauses: list[float],
    twice: float,
    slow: int,
    sharded: bool,
) -> None:
    options = {"source": source, "pauses": sorted(pauses), "twice": twice, "speeds": (1, slow, 1, 1)}
    made = world(rules, seed, lost_s, victim, sharded=sharded, **options)
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


def test_the_others_take_steps_while_the_homes_are_asked() -> None:
    """Nothing holds them back: between the news of the loss and the last answer they begin steps."""
    made = world("Downpour", 5, 6.5, speeds=(1, 1, 1, 1))
    made.go()
    facts = made.history.facts
    (heard,) = (n for n, f in enumerate(facts) if any(isinstance(a, driver.LeaveOut) for a in wanted(f)))
    (known,) = (n for n, f in enumerate(facts) if any(isinstance(a, driver.NoteLeftOut) for a in wanted(f)))
    assert not any(isinstance(getattr(a, "message", None), wire.Hold) for a in wanted(facts[heard]))
    begun = [a.replica for f in facts[heard:known] for a in wanted(f) if isinstance(a, actions.Start)]
    assert begun
    assert 3 not in begun
    later = {a.replica for f in facts[known:] for a in wanted(f) if isinstance(a, actions.Start)}
    assert later == {0, 1, 2}


def wanted(fact: Any) -> Any:
    return getattr(fact, "wanted", ())


WAITS: dict[str, tuple[bool, Any]] = {
    "asynchronous": (True, named.asynchronous()),
    "asynchronous, every 4": (True, named.asynchronous(every=4)),
    "Downpour": (True, named.downpour(2, 4)),
    "Project Adam": (True, named.adam_convolution(10)),
    "elastic averaging": (True, named.elastic_averaging(4, 0.5)),
    "bounded": (False, named.asynchronous(staleness=8)),
    "n-softsync": (False, named.softsync(2)),
    "synchronous": (False, named.synchronous()),
    "quorum": (False, named.quorum(0.75)),
    "DiLoCo": (False, named.diloco(4)),
    "gossip": (False, named.gossip()),
    "sums": (False, named.all_reduce()),
    "shared memory": (False, named.hogwild()),
}


@pytest.mark.parametrize("name", WAITS)
def test_under_which_policies_no_replica_waits(name: str) -> None:
    expected, policy = WAITS[name]
    terms = Terms(4, 1, 1, (StoreTerms((0,), policy),), 8)
    assert waits_for_none(terms) == expected
    mixed = replace(terms, stores=(*terms.stores, StoreTerms((0,), named.synchronous())))
    assert not waits_for_none(mixed), "a layer beside it has a clock"
    assert not waits_for_none(replace(terms, stages=2))
    assert not waits_for_none(replace(terms, stateful=frozenset({0})))


def test_a_home_and_the_last_replicas_are_not_left_out() -> None:
    made = world("asynchronous", 0, 1.0)
    terms, places = made.terms, made.places
    assert [alone_on(f"worker:{n}", terms, places) for n in range(4)] == [(), (), (2,), (3,)]
    last = places.without([2, 0, 1])
    assert alone_on("worker:3", terms, last) == ()


def test_without_leave_the_fit_ends() -> None:
    made = world("Downpour", 0, 1e9)
    machine = made.driver.machine
    machine.step(driver.Begin())
    assert machine.goes_on_without("worker:3") == (3,)
    (failed,) = machine.step(driver.WorkerLost("worker:3", "it stopped"))
    assert isinstance(failed, driver.Fail)
    told, left = machine.step(driver.WorkerLost("worker:3", "it stopped", may_leave=True))
    assert isinstance(told, actions.Send)
    assert isinstance(left, driver.LeaveOut)
    assert machine.step(driver.WorkerLost("worker:3", "others hear of it too", may_leave=True)) == []
    assert machine.goes_on_without("worker:3") == ()


@pytest.mark.parametrize("outlives", [False, True])
def test_a_run_that_begins_without_a_replica_does_again_what_no_store_has(outlives: bool) -> None:
    """Replica 1 has done four steps. One store has all of them, another one of three, and the last waits for others."""
    policies = named.asynchronous(), named.asynchronous(every=3), named.softsync(2)
    terms = Terms(2, 1, 1, tuple(StoreTerms((0,), policy) for policy in policies), 8)
    names = tuple((n, f"layer {n}") for n in range(3))
    work = Work(2, 16, 4, 8, aligned=False, ungrouped=names)

    def kept(every_store: bool) -> LedgerState:
        ledger = Ledger(work)
        before = Departed(terms, ledger, saves=True, outlives=outlives)
        for replica, clock in ((r, c) for c in range(4) for r in range(2)):
            ((_, item),) = ledger.step(Asked(replica, (clock,)))[0].items
            told = Settled(replica, ((item, "used"),))
            before.ignores(wire.Settled(plan_id="p", run=0, cause=0, replica=replica, fates=told.fates))
            ledger.step(told)
        before.saved(wire.Stopped((4, 4), (), stores(every_store)))
        return msgspec.structs.replace(ledger.kept((4, 4)), unsent=before.unsent())

    def stores(first_too: bool) -> tuple[wire.StoreState, ...]:
        reached = 4 if first_too else 3, 3, 3
        return tuple(wire.StoreState(n, 4, clock, clocks=(4, clock)) for n, clock in enumerate(reached))

    for first_too, used in ((True, 8), (False, 7)):
        ledger, state = Ledger(work), kept(first_too)
        ledger.restore(state, (4, 4))
        after = Departed(terms, ledger, saves=True, outlives=outlives)
        after.restore(state, [1], wire.Stopped((4, 4), (), stores(first_too)))
        found = ledger.summary()
        ledger.validate()
        assert (found.used, found.partly, found.outstanding) == (used, int(first_too), 0)
        rows = {name: (tally.used, tally.dropped) for name, tally in found.groups.items()}
        assert rows == ({"layer 1": (7, 1), "layer 2": (7, 1)} if first_too else {}), "it is done again, or lost there"


def test_a_replica_owes_items_of_a_run_before_until_its_first_push() -> None:
    """Both stores lack an item of replica 1, and one lacks another item, which the other store has lost. The second run
    stands at clocks that say nothing about the first."""
    policies = named.asynchronous(every=7), named.asynchronous(every=3, staleness=9)
    terms = Terms(2, 1, 1, tuple(StoreTerms((0,), policy) for policy in policies), 100)
    work = Work(2, 64, 4, 100, aligned=False, ungrouped=tuple((n, f"layer {n}") for n in range(2)))
    before = Ledger(work)
    for replica, clock in ((0, 0), (1, 0), (1, 1), (1, 2)):
        ((_, item),) = before.step(Asked(replica, (clock,)))[0].items
        before.step(Settled(replica, ((item, "used"),)))
    none, other = work.item(1), work.item(2)
    before.note_partly((0,))
    state = before.kept((5, 5))
    owed = Owed(1, 1, none, (0, 1)), Owed(1, 1, other, (1,), lost=(0,))
    state = msgspec.structs.replace(state, owed=owed)

    def after(*reached: int, without: bool = True) -> tuple[int, int, dict[str, tuple[int, int]], tuple[Owed, ...]]:
        """Used items, those in part, the rows of layers, and what is owed if a snapshot finds the stores there."""
        ledger = Ledger(work)
        ledger.restore(state, (5, 5))
        machine = Departed(terms, ledger, saves=True, outlives=True)
        machine.restore(state, [], wire.Stopped((5, 5), (), stores(0, 3)))
        taken = wire.Stopped((9, 9), (), stores(*reached))
        kept = machine.without(work, taken, [1]) if without else None
        machine.saved(taken, without=[1] if without else ())
        found = Ledger(work)
        found.restore(kept or ledger.kept((9, 9)), (9, 9))
        summary = found.summary()
        rows = {name: (tally.used, tally.dropped) for name, tally in summary.groups.items()}
        return summary.used, summary.partly, rows, machine.owed(taken)

    def stores(*reached: int) -> tuple[wire.StoreState, ...]:
        return tuple(wire.StoreState(n, 1, clock, clocks=(clock, clock)) for n, clock in enumerate(reached))

    assert after(0, 3) == (2, 0, {}, owed), "both items are done again"
    assert after(7, 3)[:3] == (3, 1, {"layer 1": (2, 1)}), "one has what the other one lacks; the other item is lost"
    assert after(0, 6)[:3] == (4, 2, {"layer 0": (2, 2)})
    assert after(7, 6)[:3] == (4, 1, {"layer 0": (3, 1)}), "all has arrived that was not lost before"
    assert after(0, 6, without=False)[3] == (Owed(1, 1, none, (0,)),)
    assert after(7, 6, without=False)[3] == ()
