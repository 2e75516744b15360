"""Policies of replicas with parameters of their own: their rhythms, and which compositions are refused."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import optax
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flowml.errors import PolicyError
from flowml.policy import (
    UNBOUNDED,
    AllReduce,
    Coded,
    Consensus,
    Delta,
    Every,
    Gradient,
    Hierarchy,
    Mix,
    Once,
    Outer,
    ParameterServer,
    Policy,
    Quorum,
    Weights,
    check_composition,
    named,
    window,
)
from flowml.policy.kinds import read

SITES = Hierarchy(ParameterServer(), AllReduce(), 2, Quorum(0.5))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 8))
def test_a_window_begins_after_the_last_push(clock: int, every: int, offset: int) -> None:
    assume(offset < every)
    rhythm = Every(every, offset=offset)
    pushes = [c for c in range(clock) if rhythm.due(c, last_clock=1000)]
    assert rhythm.next_due(clock, 1000) == next(c for c in range(clock, 1001) if rhythm.due(c, last_clock=1000))
    assert window(clock, every, offset) == rhythm.taken(clock) == (pushes[-1] + 1 if pushes else 0)
    assert not pushes or pushes[0] + 1 == (offset or every)


@given(st.integers(0, 60), st.integers(2, 9), st.integers(0, 8))
def test_a_value_is_taken_a_delay_after_its_push(clock: int, every: int, delay: int) -> None:
    assume(delay < every)
    pushes = [c for c in range(clock) if Every(every).due(c, last_clock=1000) and c + 1 + delay <= clock]
    assert Every(every, delay=delay).taken(clock) == (pushes[-1] + 1 if pushes else 0)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 11))
def test_fragments_push_in_turn_and_each_once_in_a_period(push: int, fragments: int, offset: int) -> None:
    assume(fragments <= push and offset < push)
    whole = Every(push, fragments=fragments, offset=offset)
    parts = [whole.fragment(i) for i in range(fragments)]
    due = [[i for i, part in enumerate(parts) if part.due(clock, -1)] for clock in range(push, 2 * push)]
    assert sorted(i for step in due for i in step) == list(range(fragments))
    assert max(map(len, due)) == 1
    assert parts[-1].offset == offset
    assert all(part.fragments == 1 for part in parts)


def test_a_single_push_comes_at_the_end() -> None:
    assert [c for c in range(100) if Once().due(c, last_clock=99)] == [99]
    assert Policy(every=Once(), payload=Weights()).describe() == "once, weights"


def test_diloco_takes_a_fragment_at_equal_steps_whatever_the_delay() -> None:
    for delay in range(3):
        rhythm = named.diloco(6, fragments=2, delay=delay).every
        pushes = [[c + 1 for c in range(13) if rhythm.fragment(f).due(c, -1)] for f in (0, 1)]
        assert [p + delay for p in pushes[0]][:2] == [3, 9]
        assert [p + delay for p in pushes[1]][:2] == [6, 12]


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (named.local_sgd(8), "every 8, delta"),
        (named.diloco(8), "every 8, delta, outer"),
        (
            named.diloco(8, fragments=2, delay=1, alpha=0.5),
            "every 8 of 2 fragments, from 7, delay 1, delta, keep 0.5, outer",
        ),
        (named.elastic_averaging(4, 0.2), "async, every 4, weights, mix 0.2"),
        (named.average_once(), "once, weights"),
        (named.downpour(2, 4), "async, every 2, pull 4, delta, sum"),
    ],
)
def test_named_policies_describe_themselves_and_travel(policy: Policy, text: str) -> None:
    assert policy.describe() == text
    assert policy.local
    sent = msgspec.msgpack.encode(policy.travelling)
    assert msgspec.msgpack.decode(sent, type=Policy, dec_hook=read) == policy.travelling


def test_an_outer_optimizer_does_not_travel() -> None:
    policy = named.diloco(8, outer=optax.sgd(0.5))
    assert policy.travelling == named.diloco(8)
    assert policy != named.diloco(8, outer=optax.sgd(0.5))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Every(0), "at least 1"),
        (lambda: Every(4, pull=0), "at least 1"),
        (lambda: Every(4, offset=4), "give offset=0 to 3"),
        (lambda: Every(4, delay=4), "give delay=0 to 3"),
        (lambda: Every(4, fragments=5), "at most 4 fragments"),
        (lambda: Every(4, pull=2, delay=1), "leave pull out"),
        (lambda: Delta(alpha=1.5), "from 0 to 1"),
        (lambda: Weights(alpha=True), "from 0 to 1"),
        (lambda: Mix(0), "in .0, 1."),
        (lambda: named.diloco(4, delay=4), "give delay=0 to 3"),
        (lambda: Policy(every=Every(4, pull=8)), "give staleness=7 or more"),
        (lambda: Policy(every=Every(4, delay=1)), "use payload=Delta"),
        (
            lambda: Policy(topology=Hierarchy(AllReduce(), AllReduce(), 2), payload=Delta()),
            "use a Hierarchy with remote",
        ),
        (
            lambda: Policy(topology=AllReduce(), payload=Delta(), apply=Consensus(0.1)),
            "use topology=fm.ParameterServer",
        ),
        (lambda: Policy(topology=SITES, payload=Delta()), "a Hierarchy with remote=fm.ParameterServer"),
        (lambda: Policy(quorum=Coded(1), payload=Delta(), every=4), "use payload=Gradient"),
        (lambda: Policy(quorum=Quorum(0.75), payload=Weights(), apply=Mix(0.1), every=4), "leave quorum out"),
        (lambda: Policy(quorum=Quorum(0.75, late="fold"), payload=Weights(), every=4), "or late='drop'"),
        (lambda: Policy(apply=Mix(0.1)), "use payload=Weights"),
        (lambda: Policy(payload=Delta(), apply=Mix(0.1)), "use payload=Weights"),
        (lambda: Policy(payload=Weights(), apply="sum"), "use payload=Delta"),
        (lambda: Policy(payload=Weights(), apply=Outer()), "use payload=Delta"),
        (lambda: Policy(payload=Weights(), staleness=UNBOUNDED), "use apply=Mix"),
        (lambda: Policy(payload=Weights(), every=Every(4, pull=2)), "or use payload=Delta"),
        (lambda: Policy(payload=Weights(alpha=0.5), apply=Mix(0.1)), "leave alpha"),
    ],
)
def test_an_unsound_composition_says_why_and_what_to_use(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        make()


def test_an_outer_optimizer_takes_gradients_too() -> None:
    assert Policy(payload=Gradient(), apply=Outer()).describe() == "sync, outer"


def test_replicas_that_pull_a_centre_together_do_not_pull_it_beyond_their_mean() -> None:
    check_composition({"fc": named.elastic_averaging(4, 0.5, staleness=0)}, 2)
    check_composition({"fc": named.elastic_averaging(4, 0.5)}, 8)
    with pytest.raises(PolicyError, match=r"'fc': .*give pull=0.33 or less"):
        check_composition({"fc": named.elastic_averaging(4, 0.5, staleness=0)}, 3)
