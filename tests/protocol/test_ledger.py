"""Who gets which item, and that every item is accounted for."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowml.errors import FlowmlError
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.ledger import Asked, Grant, Ledger, Settled, Work
from flowml_runtime.protocol.training.summary import Tally
from flowml_runtime.protocol.training.terms import ReplicaLost

ALIGNED = Work(replicas=2, items_per_epoch=5, item_size=8, total_clocks=4, aligned=True)
QUEUE = Work(replicas=2, items_per_epoch=3, item_size=8, total_clocks=2, aligned=False)


def items(grants: list[Grant]) -> list[int]:
    return [item.sequence for grant in grants for _, item in grant.items]


def test_rows_give_each_replica_its_item_of_the_epochs_order() -> None:
    ledger = Ledger(ALIGNED)
    assert items(ledger.step(Asked(1, (0, 1)))) == [1, 3]
    assert items(ledger.step(Asked(0, (0,)))) == [0]
    (grant,) = ledger.step(Asked(0, (1, 2)))
    assert grant == Grant(0, ((1, wire.Item(2, 0, 16, 8)), (2, wire.Item(5, 1, 0, 8))), exhausted=False)
    assert items(ledger.step(Asked(1, (2, 3)))) == [6, 8]
    ledger.validate()


def test_an_item_that_its_replica_skipped_is_unseen() -> None:
    ledger = Ledger(ALIGNED)
    (first,) = ledger.step(Asked(0, (0, 1)))
    ledger.step(Settled(0, tuple((item, "used") for _, item in first.items)))
    ledger.step(Asked(1, (1,)))
    assert ledger.summary().epochs[0] == Tally(used=2, unseen=3)


def test_what_was_never_begun_comes_back() -> None:
    ledger = Ledger(ALIGNED)
    (grant,) = ledger.step(Asked(0, (0, 1)))
    assert ledger.step(Asked(0, (), (grant.items[0][1],))) == []
    assert ledger.outstanding == 1
    assert ledger.summary().replicas[0].returned == 1
    ledger.validate()


def test_a_queue_is_drained_by_whoever_asks_and_says_when_it_is_empty() -> None:
    ledger = Ledger(QUEUE)
    assert ledger.step(Asked(0, (0, 1)))[0].exhausted is False
    assert items(ledger.step(Asked(1, (0, 1)))) == [2, 3]
    assert ledger.step(Asked(0, (2,))) == [Grant(0, ((2, wire.Item(4, 1, 8, 8)),), exhausted=False)]
    assert ledger.step(Asked(0, (3, 4))) == [Grant(0, ((3, wire.Item(5, 1, 16, 8)),), exhausted=True)]
    assert ledger.step(Asked(1, (2,))) == [Grant(1, (), exhausted=True)]


def test_the_last_item_is_known_to_be_the_last() -> None:
    ledger = Ledger(Work(1, 2, 8, 2, aligned=False))
    assert ledger.step(Asked(0, (0, 1)))[0].exhausted


def test_a_run_of_steps_ends_within_an_epoch() -> None:
    work = Work(replicas=2, items_per_epoch=5, item_size=1, total_clocks=3, aligned=False)
    assert (work.clocks_per_epoch, work.epochs, work.total_items) == (2, 2, 7)
    ledger = Ledger(work)
    assert items(ledger.step(Asked(0, tuple(range(9))))) == list(range(6)), "one is left for the other replica"
    assert items(ledger.step(Asked(1, (0, 1)))) == [6]


def test_requeued_work_is_done_first_by_another_replica() -> None:
    ledger = Ledger(QUEUE)
    (grant,) = ledger.step(Asked(0, (0, 1)))
    ledger.step(Settled(0, ((grant.items[0][1], "requeued"),)))
    assert items(ledger.step(Asked(1, (0, 1)))) == [0, 2]
    ledger.validate()


def test_nothing_is_settled_twice_or_by_another() -> None:
    ledger = Ledger(QUEUE)
    (grant,) = ledger.step(Asked(0, (0,)))
    mine = grant.items[0][1]
    with pytest.raises(ProtocolError, match="replica 1 says that item 0 was used"):
        ledger.step(Settled(1, ((mine, "used"),)))
    ledger.step(Settled(0, ((mine, "used"),)))
    with pytest.raises(ProtocolError, match="does not have it"):
        ledger.step(Settled(0, ((mine, "dropped"),)))
    with pytest.raises(ProtocolError, match="after clock 0"):
        ledger.step(Asked(0, (0,)))


def test_the_items_of_a_lost_replica_stay_out_until_the_end_and_its_rows_are_left_to_others() -> None:
    ledger = Ledger(ALIGNED)
    ledger.step(Asked(0, (0,)))
    (mine,) = ledger.step(Asked(1, (0, 1, 2)))
    ledger.step(ReplicaLost(1))
    assert ledger.step(Asked(1, (3,), (mine.items[2][1],))) == [], "but what it has told on its way counts"
    ledger.step(Settled(1, ((mine.items[0][1], "used"),)))
    assert items(ledger.step(Asked(0, (1, 2, 3)))) == [2, 5, 7]
    assert [clock for _, clock, _ in ledger.held(1)] == [1]
    ledger.validate()
    ledger.close()
    told = ledger.summary().replicas[1]
    assert (told.used, told.dropped, told.returned) == (1, 1, 1)
    ledger.validate()


def test_too_few_items_for_the_replicas_is_an_error_with_the_fix() -> None:
    with pytest.raises(FlowmlError, match="2 work items of 64 examples, too few for 3 replicas; use a smaller batch"):
        Work(3, 2, 64, 1, aligned=True)


def test_the_account_says_how_evenly_examples_were_seen() -> None:
    ledger = Ledger(Work(1, 2, 2, 4, aligned=True))
    (grant,) = ledger.step(Asked(0, (0, 1, 2, 3)))
    fates = ("used", "dropped", "used", "used")
    settled: Any = tuple((item, fate) for (_, item), fate in zip(grant.items, fates, strict=True))
    ledger.step(Settled(0, settled))
    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]
    assert ledger.summary(lambda epoch: orders[epoch]).seen == ((1, 4), (2, 1))
    assert ledger.summary().seen == ()


def test_the_summary_reads_as_a_table() -> None:
    ledger = Ledger(QUEUE)
    (grant,) = ledger.step(Asked(1, (0, 1)))
    ledger.step(Settled(1, ((grant.items[0][1], "used"), (grant.items[1][1], "dropped"))))
    lines = str(ledger.summary()).splitlines()
    assert lines[0].split() == ["items", "of", "8", "used", "dropped", "folded", "requeued", "unseen"]
    assert [line.split() for line in lines[1:]] == [
        ["epoch", "0", "1", "1", "0", "0", "1"],
        ["epoch", "1", "0", "0", "0", "0", "3"],
        ["replica", "0", "0", "0", "0", "0", "0"],
        ["replica", "1", "1", "1", "0", "0", "0"],
        ["total", "1", "1", "0", "0", "4"],
    ]


@settings(deadline=None)
@given(st.integers(1, 4), st.booleans(), st.integers(1, 10), st.integers(0, 2**32))
def test_every_item_ends_in_one_place(replicas: int, aligned: bool, clocks: int, seed: int) -> None:
    rng = random.Random(seed)
    work = Work(replicas, replicas * 2 + seed % 3, 4, clocks, aligned)
    ledger, held = Ledger(work), [list[wire.Item]() for _ in range(replicas)]
    clock = [0] * replicas
    for _ in range(60):
        who = rng.randrange(replicas)
        returned = tuple(i for i in held[who] if rng.random() < 0.2)
        kept = [i for i in held[who] if i not in returned]
        fates: Any = tuple((i, rng.choice(["used", "dropped", "folded", "requeued"])) for i in kept)
        asked = () if clock[who] >= clocks and aligned else (clock[who], clock[who] + 1)
        grants = ledger.step(Asked(who, asked, returned))
        ledger.step(Settled(who, fates))
        held[who] = [item for grant in grants for _, item in grant.items]
        clock[who] += rng.randint(2, 4)
        ledger.validate()
    summary = ledger.summary()
    assert summary.outstanding == sum(map(len, held))
    total = work.epochs * work.items_per_epoch
    assert summary.used + summary.dropped + summary.folded + summary.unseen == total
