"""The ledger of a run is counted in items of another size: it adds up, and what is over stays over."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from flowml_runtime.protocol.training.ledger import Asked, Ledger, LedgerState, Settled
from flowml_runtime.protocol.training.owed import Owed
from flowml_runtime.protocol.training.recounting import recounted
from flowml_runtime.protocol.training.work import Work

BATCH, EXAMPLES = 24, 24 * 7 + 5


def work(replicas: int, *, aligned: bool, short: tuple[int, ...] = (), clocks: int = 20) -> Work:
    return Work(
        replicas=replicas,
        items_per_epoch=EXAMPLES // BATCH * replicas + len(short),
        item_size=BATCH // replicas,
        total_clocks=clocks,
        aligned=aligned,
        short=short,
        requeues=False,
    )


def run(ledger: Ledger, work: Work, clocks: range, rng: random.Random, *, used: float = 1.0) -> None:
    """Replicas compute these clocks in some order. Of their items a share is used, and others are lost or late."""
    for clock in clocks:
        for replica in rng.sample(range(work.replicas), work.replicas):
            for grant in ledger.step(Asked(replica, (clock,))):
                for _, item in grant.items:
                    fate = "used" if rng.random() < used else rng.choice(["dropped", "folded", "requeued"])
                    ledger.step(Settled(replica, ((item, fate),)))  # type: ignore[arg-type]


def goes_on(state: LedgerState, now: Work, clock: int) -> Ledger:
    ledger = Ledger(now)
    ledger.restore(state, (clock,) * now.replicas)
    ledger.validate()
    return ledger


def by_example(state: LedgerState, work: Work) -> list[str]:
    """What became of each example that batches have, in the order of all epochs; "" if its item is not over."""
    found = [""] * (work.epochs * work.items_per_epoch * work.item_size)
    for first, count, fate in state.over:
        span = range(first * work.item_size, (first + count) * work.item_size)
        found[span.start : span.stop] = [fate] * len(span)
    return found


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("short", [False, True])
def test_a_synchronous_run_is_counted_exactly(replicas: int, short: bool) -> None:
    rests = {1: (5,), 2: (3, 2), 3: (2, 2, 1), 4: (2, 1, 1, 1)} if short else {}
    before = work(4, aligned=True, short=rests.get(4, ()))
    now = work(replicas, aligned=True, short=rests.get(replicas, ()))
    ledger, rng = Ledger(before), random.Random(1)
    run(ledger, before, range(11), rng)
    other = goes_on(recounted(ledger.kept((11,) * 4), before, now, 11, lambda _r, _c: False), now, 11)
    run(other, now, range(11, 20), rng)
    whole = Ledger(now)
    run(whole, now, range(20), rng)
    if short and replicas > 4:
        return  # so few examples do not divide among so many
    order = list(range(EXAMPLES))
    assert other.summary(lambda _: order).seen == whole.summary(lambda _: order).seen
    assert other.summary().used == whole.summary().used


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("aligned", [True, False])
def test_no_item_is_lost_or_there_twice(seed: int, aligned: bool) -> None:
    rng = random.Random(seed)
    before, now = work(rng.choice([2, 3, 4]), aligned=aligned), work(rng.choice([1, 2, 6, 8]), aligned=aligned)
    ledger, stop = Ledger(before), rng.randrange(1, 19)
    run(ledger, before, range(stop), rng, used=0.7)
    kept = ledger.kept((stop,) * before.replicas)
    state = recounted(kept, before, now, stop if aligned else 0, lambda _r, _c: True)
    old, new = by_example(kept, before), by_example(state, now)
    for first in range(0, len(old), now.item_size):
        item = slice(first, first + now.item_size)
        assert new[first] in old[item], "a new item has a fate that some of its examples had"
        assert len({*new[item]}) == 1
        if len({*old[item]}) == 1:
            assert new[item] == old[item]
    clock = stop if aligned else -(-state.granted // now.replicas)
    other = goes_on(state, now, clock)
    run(other, now, range(clock, clock + (20 - stop if aligned else 200)), rng)
    other.validate()
    assert other.outstanding == 0
    if not aligned:
        summary = other.summary()
        assert summary.used + summary.dropped + summary.folded == now.total_items


def test_what_waits_is_drawn_again_and_what_is_lost_is_not() -> None:
    before, now = work(2, aligned=True), work(4, aligned=True)
    ledger = Ledger(before)
    for replica in (0, 1):
        (grant,) = ledger.step(Asked(replica, (0, 1)))
        if replica == 0:
            ledger.step(Settled(0, ((grant.items[0][1], "used"),)))
    kept = ledger.kept((1, 1))  # replica 1 has begun clock 0, nobody clock 1
    for lost, fate in ((True, "dropped"), (False, "used")):
        state = recounted(kept, before, now, 1, lambda _r, _c, lost=lost: lost)
        assert state.over == ((0, 2, "used"), (2, 2, "dropped")) if lost else ((0, 4, "used"),)
        assert state.epochs[0].fates[fate] >= 2
        (grant,) = goes_on(state, now, 1).step(Asked(0, (1,)))
        assert grant.items[0][1] == now.item(4)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("replicas", [2, 4])
def test_what_was_used_and_not_sent_is_dropped_if_its_sum_is_left_out(replicas: int, earlier: bool) -> None:
    """A replica that pushes every few steps holds the sum of those since."""
    before, now = work(2, aligned=False), work(replicas, aligned=False)
    ledger = Ledger(before)
    run(ledger, before, range(3), random.Random(0))
    kept = ledger.kept((3, 3))
    (first, _, _), *_ = kept.over
    item = before.item(first)
    waits: dict[str, Any] = {"owed": (Owed(0, 0, item, (0,)),)} if earlier else {"unsent": ((0, 2, item),)}
    kept = msgspec.structs.replace(kept, partly=2, **waits)
    for lost in (True, False):
        state = recounted(kept, before, now, 0, lambda _r, _c, lost=lost: lost)
        dropped = replicas // 2 if lost else 0
        assert sum(n for _, n, fate in state.over if fate == "dropped") == dropped
        summary = goes_on(state, now, -(-state.granted // replicas)).summary()
        assert (summary.dropped, summary.used) == (dropped, 3 * replicas - dropped)
        assert summary.partly == replicas
