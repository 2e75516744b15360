"""Values and waiters meet whoever comes first, and a step that was given up leaves nothing behind."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.rendezvous import Cancelled, Rendezvous


def test_whoever_comes_second_takes_the_other_away() -> None:
    table: Rendezvous[str, str] = Rendezvous()
    assert table.put(("a", 0, "x"), "value") is None
    assert table.claim(("a", 0, "x"), "waiter") == "value"
    assert table.claim(("a", 0, "x"), "waiter") is None
    assert table.put(("a", 0, "x"), "value") == "waiter"
    assert len(table) == 0


def test_two_values_or_two_waiters_for_a_key_are_an_error() -> None:
    table: Rendezvous[str, str] = Rendezvous()
    table.put(("a", 0), "value")
    with pytest.raises(ProtocolError, match="came twice"):
        table.put(("a", 0), "value")
    table.claim(("a", 1), "waiter")
    with pytest.raises(ProtocolError, match="two wait"):
        table.claim(("a", 1), "waiter")


def test_a_sender_too_far_ahead_is_an_error_not_a_full_memory() -> None:
    table: Rendezvous[str, str] = Rendezvous(capacity=2)
    table.put(("a", 0), "value")
    table.put(("a", 1), "value")
    with pytest.raises(ProtocolError, match="2 values wait"):
        table.put(("a", 2), "value")


def test_closing_wakes_all_and_takes_nothing_more() -> None:
    table: Rendezvous[str, str] = Rendezvous()
    table.claim(("a", 0), "waiter")
    table.put(("b", 0), "value")
    assert table.close() == ("waiter",)
    assert table.put(("a", 0), "value") is None
    with pytest.raises(Cancelled):
        table.claim(("b", 0), "waiter")
    table.validate()


class Meetings(RuleBasedStateMachine):
    """Against a model that remembers everything: each key's value and waiter, and which steps are over."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Rendezvous[int, int] = Rendezvous(capacity=1000)
        self.values: dict[tuple[str, int, int], int] = {}
        self.waiters: dict[tuple[str, int, int], int] = {}
        self.over: set[tuple[str, int]] = set()
        self.count = 0

    keys = st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.integers(0, 1))

    @rule(key=keys)
    def put(self, key: tuple[str, int, int]) -> None:
        self.count += 1
        if key[:2] in self.over:
            assert self.table.put(key, self.count) is None
        elif key in self.waiters:
            assert self.table.put(key, self.count) == self.waiters.pop(key)
        elif key not in self.values:
            assert self.table.put(key, self.count) is None
            self.values[key] = self.count

    @rule(key=keys)
    def claim(self, key: tuple[str, int, int]) -> None:
        self.count += 1
        if key[:2] in self.over:
            with pytest.raises(Cancelled):
                self.table.claim(key, self.count)
        elif key in self.values:
            assert self.table.claim(key, self.count) == self.values.pop(key)
        elif key not in self.waiters:
            assert self.table.claim(key, self.count) is None
            self.waiters[key] = self.count

    @rule(stream=st.sampled_from("ab"), step=st.integers(0, 4))
    def cancel(self, stream: str, step: int) -> None:
        assert set(self.table.cancel_step(stream, step)) == self._end({(stream, step)})

    @rule(stream=st.sampled_from("ab"), step=st.integers(0, 4))
    def advance(self, stream: str, step: int) -> None:
        assert set(self.table.advance(stream, step)) == self._end({(stream, s) for s in range(step)})

    def _end(self, steps: set[tuple[str, int]]) -> set[int]:
        self.over |= steps
        self.values = {k: v for k, v in self.values.items() if k[:2] not in self.over}
        woken = {w for k, w in self.waiters.items() if k[:2] in self.over}
        self.waiters = {k: w for k, w in self.waiters.items() if k[:2] not in self.over}
        return woken

    @invariant()
    def agree(self) -> None:
        self.table.validate()
        assert len(self.table) == len(self.values)


TestMeetings = Meetings.TestCase
TestMeetings.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
