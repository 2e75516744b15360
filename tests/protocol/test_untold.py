"""Items of a lost replica that decisions contain have the fates that the replica would have told."""

from __future__ import annotations

import pytest

import flowml as fm
from flowml.policy import Fold, Policy, Quorum
from flowml_runtime import wire
from flowml_runtime.protocol.training.accounts import Settle
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.untold import Untold
from flowml_tools.faults import campaign
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.cases import Case
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make

CLOCKS = 40


def terms(*policies: Policy, clocks: int = CLOCKS) -> Terms:
    return Terms(3, 1, 1, tuple(StoreTerms((0,), policy) for policy in policies), clocks)


def item(number: int) -> wire.Item:
    return wire.Item(sequence=number, epoch=0, start=8 * number, size=8)


def commit(clock: int, *excluded: int, group: int = 0, folded: tuple[tuple[int, int], ...] = ()) -> wire.Commit:
    return wire.Commit(plan_id="p", run=1, clock=clock, excluded=excluded, group=group, folded=folded)


def fates(untold: Untold, *clocks: int) -> dict[int, tuple[str, tuple[int, ...]]]:
    """The fates of the items of replica 2 for these clocks, with the groups that do without them."""
    told: list[Settle] = untold.fates(2, [(2, clock, item(clock)) for clock in clocks])
    return {settle.item.sequence: (settle.fate, settle.missing) for settle in told}


def noted(rules: Terms, *commits: wire.Commit) -> Untold:
    untold = Untold(rules, {})
    for told in commits:
        untold.note(told, list)
    return untold


def test_what_a_decision_contains_is_used_and_the_rest_dropped() -> None:
    untold = noted(terms(Policy(quorum=Quorum(2))), commit(0), commit(1, 2), commit(2))
    dropped = ("dropped", ())
    assert fates(untold, 0, 1, 2, 3) == {0: ("used", ()), 1: dropped, 2: ("used", ()), 3: dropped}


def test_each_group_says_what_it_contains() -> None:
    rules = terms(Policy(quorum=Quorum(2)), Policy(quorum=Quorum(1, late=Fold())))
    told = commit(0, 2), commit(0, 2, group=1), commit(1, group=1, folded=((2, 0),)), commit(1)
    assert fates(noted(rules, *told), 0, 1) == {0: ("folded", (0,)), 1: ("used", ())}


def test_a_push_contains_the_steps_before_it_that_were_certainly_not_skipped() -> None:
    """Decisions about clock 5 or later that leave the replica out are reasons to skip clocks 3 and 4."""
    rules = terms(Policy(quorum=Quorum(2), every=3))
    assert set(fates(noted(rules, commit(2), commit(5)), 3, 4, 5).values()) == {("used", ())}
    untold = noted(rules, commit(2), commit(5, 2), commit(8))
    assert fates(untold, 4, 8) == {4: ("dropped", ()), 8: ("used", ())}
    untold.report(2, 4)
    assert fates(untold, 4, 8) == {4: ("used", ()), 8: ("used", ())}


def test_a_decision_that_can_leave_out_only_lost_replicas_is_no_reason_to_skip() -> None:
    """The push of clock 3 contains clock 2, although the other group has decided clock 5 without the replica."""
    told = commit(0), commit(1, group=1), commit(3), commit(5, 2, group=1), commit(6, 2)
    push, other = Policy(every=fm.Every(3, offset=1)), fm.Every(4, offset=2)
    for quorum in (Quorum(), Quorum(0.75)):
        found = fates(noted(terms(push, Policy(quorum=quorum, every=other)), *told), 2, 3, 4)
        assert found == {2: ("used", (1,)), 3: ("used", (1,)), 4: ("dropped", ())}
    found = fates(noted(terms(push, Policy(quorum=Quorum(2), every=other)), *told), 2, 3)
    assert found == {2: ("dropped", ()), 3: ("used", (1,))}, "it may have skipped clock 2"


def test_a_push_of_several_steps_counts_whole_where_other_layers_go_on_without_the_lost_replica() -> None:
    """The reports of some of its steps were not heard, and those counted as dropped."""
    case = Case.of(42206)
    assert case.lost is not None
    assert campaign.run(case) is None


def test_a_store_without_decisions_counts_what_was_certainly_finished() -> None:
    """The replica has not skipped clock 1, because readers of the other store would have waited."""
    rules = terms(Policy(quorum=Quorum(2)), Policy(staleness=1))
    untold = noted(rules, commit(0), commit(1, 2), commit(2), commit(3, 2))
    assert fates(untold, 1, 2, 3) == {1: ("used", (0,)), 2: ("used", ()), 3: ("dropped", ())}


def test_a_long_run_keeps_only_decisions_that_may_concern_an_item() -> None:
    rules = terms(Policy(quorum=Quorum(2), every=3), Policy(quorum=Quorum(1, late=Fold())), clocks=10_000)
    untold, held = Untold(rules, {}), [(2, clock, item(clock)) for clock in (30, 31, 32)]
    for clock in range(9000):
        late = ((2, 31),) if clock == 8000 else ()
        untold.note(commit(clock, 2, group=1, folded=late), lambda: held)
        if clock % 3 == 2:
            untold.note(commit(clock) if clock < 33 else commit(clock, 2), lambda: held)
    assert untold.kept < 200
    found = {s.item.sequence: s.fate for s in untold.fates(2, held)}
    assert found == {30: "dropped", 31: "used", 32: "used"}, "clocks 30 and 31 may have been skipped, but 31 is there"


@pytest.mark.parametrize("policy", [Policy(), Policy(quorum=Quorum(2)), Policy(quorum=Quorum(2, late=Fold()), every=3)])
@pytest.mark.parametrize("clocks", [9, 30, 64])
def test_a_replica_that_asks_ahead_and_is_lost_has_its_contributions_in_the_ledger(policy: Policy, clocks: int) -> None:
    for seed in range(4):
        run = make(
            [policy], replicas=3, stages=1, clocks=clocks, items=clocks * 3, seed=seed, source="shipped", homes_on=0
        )
        run.lose(2, clocks * (0.2 + seed / 5))
        run.go()
        check_rest(run)
        assert check(run.history) == []
        applied = [key for version in run.applied[0] for key in version if key[0] == 2]
        mine = run.driver.machine.ledger.summary().replicas[2]
        assert mine.used + mine.folded == sum(f"{content:x}".count("1") for _, _, content, _ in applied)


def test_the_search_through_decisions_is_paid_for_by_decisions_however_many_replicas_there_are() -> None:
    """A run with many sites has many decisions a clock, and a search at each hundredth would look at all replicas."""
    rules, looked, decisions = terms(Policy(quorum=Quorum(2)), clocks=10_000), 0, 4000
    items = [(replica, clock, item(clock)) for clock in (0, 1) for replica in range(20_000)]

    def held() -> list[tuple[int, int, wire.Item]]:
        nonlocal looked
        looked += len(items)
        return items

    untold = Untold(rules, {})
    for clock in range(decisions):
        untold.note(commit(clock), held)
    assert 0 < looked <= 16 * decisions + len(items)
