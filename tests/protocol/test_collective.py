"""Collectives: exact sums, equal bits whatever the order of delivery, the bytes promised, and no deadlock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowml.policy.topology import DOUBLING_BYTES, DOUBLING_BYTES_APART
from flowml_runtime.protocol.collective import (
    WINDOW,
    Action,
    AllReduce,
    Combine,
    Done,
    Layout,
    Received,
    Replace,
    SendChunk,
    Started,
)
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.schedules import (
    Schedule,
    Send,
    around,
    choose,
    direct,
    doubling,
    gather,
    hierarchical,
    ring,
    spread,
    tree,
)

Values = np.ndarray[Any, Any]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    hosts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
    ranks = len(hosts)
    kind = draw(st.sampled_from(["hierarchical", "ring", "direct", "doubling", "tree", "gather", "spread", "around"]))
    if kind == "hierarchical":
        return hierarchical(tuple(hosts))
    if kind == "tree":
        return tree(ranks, draw(st.integers(1, 4)))
    simple = {
        "ring": ring,
        "direct": direct,
        "doubling": doubling,
        "gather": gather,
        "spread": spread,
        "around": around,
    }
    return simple[kind](ranks)


def given_to(schedule: Schedule, rank: int, values: Values) -> Values:
    """What a rank adds: zeros where others own the elements."""
    if not schedule.owned:
        return values
    first, end = Layout(len(values), 1, schedule.chunks, owned=True).owned_by(rank)
    mine = np.zeros_like(values)
    mine[first:end] = values[first:end]
    return mine


@dataclass
class Rank:
    """A machine, and what a host would hold for it."""

    machine: AllReduce
    own: Values
    held: dict[tuple[int, int], Values] = field(default_factory=dict[tuple[int, int], Values])
    started: bool = False
    done: int = 0


class World:
    """Ranks joined by links that keep their order; which link delivers next is up to `random`."""

    def __init__(self, schedule: Schedule, values: list[Values], *, pieces: int, window: int, random: Random) -> None:
        self.schedule = schedule
        self.layout = Layout(len(values[0]), pieces, schedule.chunks, schedule.owned)
        self.ranks = [Rank(AllReduce(schedule, r, pieces, "bucket 0", window), own) for r, own in enumerate(values)]
        self.links: dict[tuple[int, int], deque[Received]] = {}
        self.random = random
        self.sent = [0] * len(values)

    def run(self) -> list[Values]:
        """Start and deliver in any order until nothing is left to be done; the result of each rank that has one."""
        while choices := [r for r in self.ranks if not r.started] + [k for k, link in self.links.items() if link]:
            chosen = self.random.choice(choices)
            if isinstance(chosen, Rank):
                chosen.started = True
                self._step(self.ranks.index(chosen), Started())
            else:
                self._step(chosen[1], self.links[chosen].popleft())
        assert [r.done for r in self.ranks] == [1] * len(self.ranks), "deadlock"
        return [self._result(r) for r in (self.ranks[:1] if self.schedule.one_way else self.ranks)]

    def _step(self, number: int, event: Started | Received) -> None:
        rank = self.ranks[number]
        for action in rank.machine.step(event):
            self._act(number, rank, action)
        rank.machine.validate()

    def _act(self, number: int, rank: Rank, action: Action) -> None:
        match action:
            case SendChunk(peer, piece, chunk, take):
                values = self._held(rank, piece, chunk)
                self.sent[number] += values.nbytes
                self.links.setdefault((number, peer), deque()).append(Received(number, piece, take, values))
            case Combine(piece, chunk, before, after, _):
                operands = [*before, self._held(rank, piece, chunk), *after]
                total = operands[0]
                for operand in operands[1:]:
                    total = total + operand
                rank.held[piece, chunk] = total
            case Replace(piece, chunk, handle):
                rank.held[piece, chunk] = handle
            case Done():
                rank.done += 1

    def _held(self, rank: Rank, piece: int, chunk: int) -> Values:
        first, end = self.layout.span(piece, chunk)
        return rank.held.get((piece, chunk), rank.own[first:end])

    def _result(self, rank: Rank) -> Values:
        spans = [(p, c) for p in range(self.layout.pieces) for c in range(self.layout.chunks)]
        result = np.empty_like(rank.own)
        for piece, chunk in spans:
            first, end = self.layout.span(piece, chunk)
            result[first:end] = self._held(rank, piece, chunk)
        return result


@given(schedules(), st.integers(0, 60), st.integers(1, 7), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_every_rank_has_the_exact_sum_in_any_order_of_delivery(
    schedule: Schedule, size: int, pieces: int, window: int, random: Random
) -> None:
    values = [np.array([random.randrange(1000) for _ in range(size)], np.int64) for _ in range(schedule.ranks)]
    values = [given_to(schedule, rank, each) for rank, each in enumerate(values)]
    results = World(schedule, values, pieces=pieces, window=window, random=random).run()
    for result in results:
        np.testing.assert_array_equal(result, sum(values))


@given(schedules(), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_sums_of_floats_have_the_same_bits_on_all_ranks_and_in_every_order(
    schedule: Schedule, size: int, pieces: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = [
        (rng.normal(size=size) * 10.0 ** rng.integers(-6, 6, size)).astype(np.float32) for _ in range(schedule.ranks)
    ]
    values = [given_to(schedule, rank, each) for rank, each in enumerate(values)]
    runs = [World(schedule, values, pieces=pieces, window=2, random=Random(seed)).run() for seed in range(2)]
    bits = {result.tobytes() for results in runs for result in results}
    assert len(bits) == 1


@pytest.mark.parametrize("ranks", range(1, 10))
@pytest.mark.parametrize("make", [ring, direct])
def test_a_ring_sends_the_least_bytes_there_can_be(make: Any, ranks: int) -> None:
    size = ranks * 12
    values = [np.full(size, r, np.int64) for r in range(ranks)]
    world = World(make(ranks), values, pieces=3, window=2, random=Random(0))
    world.run()
    assert world.sent == [2 * (ranks - 1) * size * 8 // ranks] * ranks


@pytest.mark.parametrize("ranks", range(1, 10))
@pytest.mark.parametrize("make", [spread, around])
def test_an_exchange_sends_each_chunk_to_each_other_rank_once(make: Any, ranks: int) -> None:
    size = ranks * 12
    values = [given_to(make(ranks), r, np.full(size, r + 1, np.int64)) for r in range(ranks)]
    world = World(make(ranks), values, pieces=3, window=2, random=Random(0))
    for result in world.run():
        np.testing.assert_array_equal(result, np.repeat(np.arange(ranks) + 1, 12))
    assert world.sent == [(ranks - 1) * 12 * 8] * ranks


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_chunks_that_ranks_own_lie_together(size: int, pieces: int, chunks: int) -> None:
    layout = Layout(size, pieces, chunks, owned=True)
    spans = [layout.span(p, c) for c in range(chunks) for p in range(pieces)]
    assert [spans[0][0], *(end for _, end in spans)] == [*(first for first, _ in spans), size]
    for rank in range(chunks):
        assert layout.owned_by(rank) == (spans[rank * pieces][0], spans[(rank + 1) * pieces - 1][1])


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_a_layout_covers_every_element_once(size: int, pieces: int, chunks: int) -> None:
    layout = Layout(size, pieces, chunks)
    spans = [layout.span(p, c) for p in range(pieces) for c in range(chunks)]
    assert [spans[0][0], *(end for _, end in spans)] == [*(first for first, _ in spans), size]


def test_a_large_bucket_is_cut_so_that_no_message_is_larger_than_a_piece() -> None:
    layout = Layout.of(16 * 2**20, 4, ring(2), piece_bytes=2**20)
    spans = [layout.span(p, c) for p in range(layout.pieces) for c in range(2)]
    assert layout.pieces == 32
    assert max(end - first for first, end in spans) * 4 == 2**20
    assert Layout.of(0, 4, ring(2)).pieces == 1


@pytest.mark.parametrize(
    ("nbytes", "hosts", "name"),
    [
        (DOUBLING_BYTES, "aaaa", "doubling"),
        (DOUBLING_BYTES + 1, "aaaa", "direct"),
        (DOUBLING_BYTES_APART, "aabb", "doubling"),
        (DOUBLING_BYTES_APART + 1, "abcd", "ring"),
        (DOUBLING_BYTES_APART + 1, "aabb", "hierarchical"),
    ],
)
def test_the_schedule_follows_size_and_topology(nbytes: int, hosts: str, name: str) -> None:
    assert choose(nbytes, tuple(hosts)).name == name


def test_hosts_exchange_a_share_each_and_not_everything() -> None:
    """Two hosts of two: each rank sends half inside, a quarter each way around the hosts, and spreads its half."""
    hosts = (0, 0, 1, 1)
    values = [np.full(8, r, np.int64) for r in range(4)]
    world = World(hierarchical(hosts), values, pieces=1, window=1, random=Random(0))
    between = sum(
        world.layout.span(0, step.chunk)[1] - world.layout.span(0, step.chunk)[0]
        for rank, steps in enumerate(map(hierarchical(hosts).steps, range(len(hosts))))
        for step in steps
        if isinstance(step, Send) and hosts[step.peer] != hosts[rank]
    )
    world.run()
    assert between == 2 * 8, "each of two hosts sends the whole bucket once: half to be added, half that is done"
    assert world.sent == [(4 + 2 + 2 + 4) * 8] * 4


def machine(window: int = WINDOW, pieces: int = 8) -> AllReduce:
    return AllReduce(direct(3), 1, pieces, "bucket 4", window)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Received(0, 8, 0, "x"), "rank 0 sent for bucket 4, piece 8, take 0 of rank 1: 'direct' has 8 pieces"),
        (Received(0, 0, 9, "x"), "rank 0 sent for bucket 4, piece 0, take 9 of rank 1: 'direct' has 8 pieces and 3"),
        (Received(1, 0, 1, "x"), "rank 1 sent for bucket 4, piece 0, take 1 of rank 1, which takes nothing from it"),
        (Received(0, 2, 1, "x"), "rank 0 sent for bucket 4, piece 2, take 1 of rank 1, which is too far ahead"),
    ],
)
def test_what_cannot_be_is_refused_with_peer_bucket_and_step(event: Received, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        machine(window=2).step(event)


def test_a_rank_that_only_sends_may_be_far_ahead_of_another() -> None:
    """It is told nothing, so that it has sent its last piece before a slow rank sends its first."""
    m = AllReduce(gather(3), 0, 64, "bucket 0")
    for piece in range(64):
        assert m.step(Received(1, piece, 0, "fast")) == []
        m.validate()
    m.step(Started())
    done = [action for piece in range(64) for action in m.step(Received(2, piece, 0, "slow"))]
    assert [action.piece for action in done if isinstance(action, Combine)] == list(range(64))
    assert isinstance(done[-1], Done)
    with pytest.raises(ProtocolError, match="'gather' has 64 pieces"):
        AllReduce(gather(3), 0, 64, "bucket 0").step(Received(1, 64, 0, "x"))


def test_nothing_comes_twice() -> None:
    m = machine(pieces=1)
    m.step(Received(0, 0, 1, "x"))
    with pytest.raises(ProtocolError, match="rank 0 sent twice for bucket 4"):
        m.step(Received(0, 0, 1, "x"))
    m.step(Started())
    m.step(Received(2, 0, 1, "y"))
    m.validate()
    with pytest.raises(ProtocolError, match="rank 2 sent twice for bucket 4"):
        m.step(Received(2, 0, 1, "y"))
    with pytest.raises(ProtocolError, match="started twice"):
        m.step(Started())


def test_a_machine_says_whom_it_waits_for() -> None:
    m = AllReduce(doubling(3), 0, 1, "bucket 0")
    m.step(Started())
    assert m.waits_for() == (2,)
    m.step(Received(2, 0, 0, "x"))
    assert m.waits_for() == (1,)
    assert isinstance(m.step(Received(1, 0, 1, "y"))[-1], Done)
    assert m.done and m.waits_for() == ()


def test_only_a_rank_that_passes_on_what_it_took_relays() -> None:
    assert [doubling(2).relays(r) for r in range(2)] == [False, False]
    assert [doubling(3).relays(r) for r in range(3)] == [True, False, False]
    assert [direct(2).relays(r) for r in range(2)] == [True, True]
    with pytest.raises(ValueError, match="fanout 0"):
        tree(3, 0)


@pytest.mark.parametrize("make", [ring, direct])
def test_a_rank_makes_its_own_part_of_a_schedule_and_no_other(make: Callable[[int], Schedule]) -> None:
    ranks = 2000
    schedule = make(ranks)
    steps = schedule.steps(7)
    assert sum(isinstance(s, Send) for s in steps) == 2 * (ranks - 1)
    assert len(steps) <= 4 * (ranks - 1)
    assert list(schedule._steps) == [7]  # pyright: ignore[reportPrivateUsage]
