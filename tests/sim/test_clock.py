"""The queue of a clock against a plain heap: what comes out is the same, however many entries there are, and wherever
in time they are."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from flowml_runtime.sim.heap import Clock

_DELAYS: dict[str, Callable[[random.Random], float]] = {
    "compute times and latencies": lambda r: r.lognormvariate(-2.3, 0.3) if r.random() < 0.3 else 1e-3,
    "ties": lambda r: r.choice([0.0, 1e-3, 0.1]),
    "all at once": lambda r: 0.0,
    "of all sizes": lambda r: 10 ** r.uniform(-12, 12),
    "bursts": lambda r: r.randrange(3) + r.random() * 1e-9,
    "some never": lambda r: r.choice([r.random(), math.inf]),
    "a few very late": lambda r: 1e300 if r.random() < 1e-3 else r.random(),
}


class _Both:
    """A clock, and a plain heap of the same events."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.heap: list[tuple[float, int]] = []
        self.number = 0
        self.happened: list[int] = []

    def put(self, when: float) -> None:
        """Schedule an event, as one that another clock has numbered."""
        self.number += 1
        self.clock.put_all(when, self.number, [(self.number, self.happened.append, (self.number,))])
        heapq.heappush(self.heap, (when, self.number))

    def next(self) -> None:
        when, number = heapq.heappop(self.heap)
        assert self.clock.head == when
        before = len(self.happened)
        assert self.clock.go_on(lambda: len(self.happened) == before)
        assert (self.clock.now, self.happened[-1]) == (when, number)


@pytest.mark.parametrize("name", _DELAYS)
def test_events_happen_in_the_order_of_a_plain_heap(name: str) -> None:
    both, rng = _Both(), random.Random(name)
    for most in (20, 6000, 40_000, 0, 9000):  # waxes and wanes
        while len(both.heap) < most:
            both.put(both.clock.now + _DELAYS[name](rng))
            if rng.random() < 0.2 and both.heap[0][0] < math.inf:
                both.next()
        for _ in range(2000):  # as many as before
            if both.heap and both.heap[0][0] < math.inf:
                both.next()
                both.put(both.clock.now + _DELAYS[name](rng))
        while len(both.heap) > most // 2 and both.heap[0][0] < math.inf:
            both.next()
    assert both.clock.head == (both.heap[0][0] if both.heap else math.inf)


def test_a_window_ends_before_what_is_later_however_much_waits() -> None:
    clock, happened = Clock(), list[float]()
    ends = iter([0.25, 0.5, math.inf])

    def meet() -> bool:
        assert all(when < clock.until for when in happened)
        seen = set(happened)
        assert clock.head == min((when for when in times if when not in seen), default=math.inf)
        clock.until = next(ends, -1.0)
        return clock.until > 0

    times = [n / 20_000 for n in range(20_000)]
    random.Random(0).shuffle(times)
    for when in times:
        clock.at(when, 0, happened.append, when)
    clock.until, clock.meet = 0.1, meet
    assert not clock.go_on(lambda: True)
    assert happened == sorted(times)


def test_at_the_end_of_a_window_the_owner_may_do_something_else() -> None:
    clock, happened = Clock(), list[Any]()
    clock.at(0.5, 0, happened.append, "event")

    def meet() -> bool:
        happened.append("meet")
        clock.until = math.inf
        return True

    clock.until, clock.meet = 0.1, meet
    clock.ready = lambda: len(happened) > 1
    for found in ("first", "second"):
        assert clock.go_on(lambda: True)
        happened.append(found)
    clock.go_on(lambda: len(happened) < 4)
    assert happened == ["first", "second", "meet", "event"]


def test_a_clock_is_tidied_after_many_events() -> None:
    clock, tidied = Clock(), list[int]()
    clock.tidy = lambda: tidied.append(clock.events)
    for n in range(20_000):
        clock.at(float(n), 0, lambda: None)
    clock.run(20_001)
    assert tidied == [8192, 16384]


def test_nothing_of_many_happens_after_a_clear() -> None:
    clock, happened = Clock(), list[Any]()
    for n in range(20_000):
        clock.at(n / 1000, n, happened.append, n)
    clock.go_on(lambda: len(happened) < 100)
    clock.clear()
    assert clock.head == math.inf
    clock.at(30.0, 0, happened.append, "later")
    clock.at(25.0, 0, happened.append, "sooner")
    clock.run(10)
    assert happened == [*range(100), "sooner", "later"]


def test_many_events_that_go_on_do_not_end() -> None:
    clock = Clock()
    for n in range(20_000):
        clock.at(n / 1000, n, lambda: None)
    with pytest.raises(RuntimeError, match="does not end"):
        clock.run(19_999)
    clock.run(1)
    assert clock.events == 20_000
