"""Replicas without common clocks that each have a shard: who gets which item, also after losses and snapshots."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from flowml_runtime import wire
from flowml_runtime.protocol.training.ledger import Asked, Grant, Ledger, Settled, Work
from flowml_runtime.protocol.training.shards import ShardQueue
from flowml_runtime.protocol.training.terms import ReplicaLost

WORK = Work(replicas=2, items_per_epoch=6, item_size=8, total_clocks=5, aligned=False, sharded=True)


def numbers(grants: list[Grant]) -> list[int]:
    return [item.sequence for grant in grants for _, item in grant.items]


def test_each_replica_gets_its_own_items_however_far_the_other_is() -> None:
    ledger = Ledger(WORK)
    assert numbers(ledger.step(Asked(1, (0, 1)))) == [1, 3]
    assert numbers(ledger.step(Asked(1, (2, 3)))) == [5, 7], "its second epoch begins"
    (last,) = ledger.step(Asked(1, (4, 5)))
    assert (numbers([last]), last.exhausted) == ([9], True)
    (first,) = ledger.step(Asked(0, (0, 1)))
    assert (numbers([first]), first.exhausted) == ([0, 2], False)
    ledger.validate()


def test_the_others_take_the_shard_of_a_lost_replica_epoch_by_epoch() -> None:
    ledger = Ledger(WORK)
    (mine,) = ledger.step(Asked(1, (0, 1)))
    ledger.step(Settled(1, ((mine.items[0][1], "used"),)))
    ledger.step(Asked(1, (), (mine.items[1][1],)))
    ledger.step(ReplicaLost(1))
    taken = [numbers(ledger.step(Asked(0, (clock,))))[0] for clock in range(9)]
    assert taken == [0, 2, 4, 3, 5, 6, 8, 7, 9], "its own items of an epoch, then those of the lost one"
    assert ledger.step(Asked(0, (9,))) == [Grant(0, (), exhausted=True)]
    ledger.validate()


def test_a_replica_that_joins_again_goes_on_with_what_is_left_of_its_shard() -> None:
    ledger = Ledger(WORK)
    ledger.step(ReplicaLost(1))
    grants = [ledger.step(Asked(0, (clock,))) for clock in range(4)]
    assert numbers([g for one in grants for g in one]) == [0, 2, 4, 1]
    again = Ledger(WORK)
    again.restore(ledger.kept((4, 0)), (4, 0))
    assert numbers(again.step(Asked(1, (4, 5)))) == [3, 5]
    assert numbers(again.step(Asked(0, (4, 5)))) == [6, 8]
    again.validate()


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 10), st.booleans(), st.integers(0, 2**32))
def test_every_item_is_granted_to_its_owner_until_it_is_lost(
    replicas: int, each: int, clocks: int, short: bool, seed: int
) -> None:
    """Steps, items that come back, losses, and snapshots at any time."""
    rng = random.Random(seed)
    sizes = tuple(1 + i % 2 for i in range(replicas)) if short else ()
    work = Work(replicas, (each + short) * replicas, 4, clocks, aligned=False, sharded=True, short=sizes)
    ledger, held = Ledger(work), [list[wire.Item]() for _ in range(replicas)]
    clock, lost, sated = [0] * replicas, set[int](), set[int]()
    while len(sated | lost) < replicas:
        who = rng.choice([r for r in range(replicas) if r not in lost | sated])
        if rng.random() < 0.05 and len(lost) < replicas - 1 and not sated:
            for item in held[who]:
                ledger.step(Asked(who, (), (item,)))
            ledger.step(ReplicaLost(who))
            held[who], lost = [], lost | {who}
            continue
        returned = tuple(i for i in held[who] if rng.random() < 0.2)
        fates: Any = tuple((i, "used") for i in held[who] if i not in returned)
        (grant,) = ledger.step(Asked(who, (clock[who], clock[who] + 1), returned))
        ledger.step(Settled(who, fates))
        held[who] = [item for _, item in grant.items]
        for item in held[who]:
            owner = item.sequence % work.items_per_epoch % replicas
            assert owner == who or owner in lost
        sated |= {who} if grant.exhausted else set()
        clock[who] += 2
        ledger.validate()
        if rng.random() < 0.2:
            kept = ledger.kept(clock)
            again = Ledger(work)
            again.restore(kept, clock)
            for replica in lost:
                again.step(ReplicaLost(replica))
            for replica, items in enumerate(held):  # what was not settled was begun
                assert sorted(i.sequence for _, _, i in again.held(replica)) == sorted(i.sequence for i in items)
            again.validate()
            ledger = again
    for replica, items in enumerate(held):
        ledger.step(Settled(replica, tuple((i, "used") for i in items)))
    ledger.validate()
    returned_late = ledger.summary().unseen - (work.epochs * work.clocks_per_epoch - clocks) * replicas
    assert returned_late == sum(map(len, (q for q in ledger._queue._back))), "no item is anywhere else"  # pyright: ignore


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_what_is_not_begun_is_drawn_again_in_its_order(replicas: int, each: int, seed: int) -> None:
    rng = random.Random(seed)
    work = Work(replicas, each * replicas, 4, 12, aligned=False, sharded=True)
    queue, taken = ShardQueue(work), list[tuple[int, int, wire.Item]]()
    steps = [rng.randint(0, 12) for _ in range(replicas)]
    for replica, count in enumerate(steps):
        for clock in range(count):
            item = queue.take(replica, clock)
            assert item is not None
            taken.append((replica, clock, item))
    begun = [rng.randint(0, count) for count in steps]
    again = ShardQueue(work)
    again.restore(queue.state([(r, c, item) for r, c, item in taken if c >= begun[r]]), {})
    for replica, first in enumerate(begun):
        found = [again.take(replica, clock) for clock in range(first, 13)]
        order = [e * work.items_per_epoch + n * replicas + replica for e in range(-(-12 // each)) for n in range(each)]
        assert [item.sequence for item in found if item] == order[first:12] and found[-1] is None
