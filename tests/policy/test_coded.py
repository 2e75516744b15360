"""Coded quorums as policies: when they decide, with which coefficients, and which compositions are sound."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.policy import Decide, Policy, Wait, check_composition, coded_by
from flowml.policy.codes import CyclicRepetition, matrix
from flowml.policy.kinds import read
from flowml.policy.quorum import Arrivals, Coded, Quorum


def arrivals(members: int, arrived: list[int], full: int = 4) -> Arrivals:
    return Arrivals(
        members=members, full=full, rows=3, began=0.0, hopeful=members - len(arrived), times=dict.fromkeys(arrived, 1.0)
    )


@given(st.integers(2, 9), st.data())
def test_a_clock_is_decided_at_the_first_arrival_that_can_be_decoded(members: int, data: st.DataObject) -> None:
    stragglers = data.draw(st.integers(0, members - 1))
    order = data.draw(st.permutations(range(members)))
    quorum = Coded(stragglers, "cyclic")
    answers = [quorum.decide(arrivals(members, order[:k]), now=2.0) for k in range(members + 1)]
    decided = [isinstance(a, Decide) for a in answers]
    assert decided == [k >= members - stragglers for k in range(members + 1)]
    assert all(isinstance(a, Wait | Decide) for a in answers)


@given(st.integers(2, 9), st.integers(1, 5), st.data())
def test_the_coefficients_give_the_mean_over_all_microbatches(members: int, each: int, data: st.DataObject) -> None:
    stragglers = data.draw(st.integers(0, members - 1))
    arrived = data.draw(st.permutations(range(members)))[: members - stragglers]
    full = each * (stragglers + 1)
    answer = Coded(stragglers, "cyclic").decide(arrivals(members, arrived, full), now=2.0)
    assert isinstance(answer, Decide)
    coefficients = np.zeros(members)
    for replica, coefficient in answer.coefficients:
        coefficients[replica] = coefficient
    shares = coefficients @ matrix(CyclicRepetition(members, stragglers))
    np.testing.assert_allclose(shares, 1 / (members * each))
    assert [r for r, _ in answer.coefficients] == sorted(arrived)


def test_the_fractional_code_does_not_wait_for_n_minus_s() -> None:
    answer = Coded(1).decide(arrivals(4, [1, 3]), now=2.0)
    assert answer == Decide(((1, 0.125), (3, 0.125)))
    assert Coded(1).decide(arrivals(4, [0, 1]), now=2.0) == Wait()


def test_a_coded_policy_travels_and_describes_itself() -> None:
    for policy, text in (
        (fm.policies.coded(1), "coded 1 fractional"),
        (fm.policies.coded(2, "cyclic"), "coded 2 cyclic"),
        (fm.policies.coded_reduce(4, 3, 1), "coded 1 tree 4x3"),
    ):
        assert policy.describe() == text
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(policy), type=Policy, dec_hook=read) == policy


UNSOUND: list[tuple[dict[str, Any], str]] = [
    ({"staleness": 2}, "with staleness=2 is not sound: .* of the same parameters"),
    ({"every": 4}, "with every=4 is not sound: .* use every=1"),
    ({"payload": fm.Factors()}, r"payload=fm.Factors\(\) is not sound: .* cannot be decoded"),
    ({"apply": "sum"}, r"apply=fm.Sum\(\) is not sound: .* use apply='mean'"),
    ({"apply": fm.Vote(1)}, r"apply=fm.Vote\(.* is not sound: .* use apply='mean'"),
    ({"filters": [fm.filters.top_k(0.1)]}, "is not sound: a filter that changes .* use lossless filters"),
    ({"topology": fm.Ring()}, "with quorum=Coded.* is not sound"),
]


@pytest.mark.parametrize(("knobs", "text"), UNSOUND)
def test_an_unsound_composition_raises(knobs: dict[str, Any], text: str) -> None:
    with pytest.raises(fm.PolicyError, match=text):
        Policy(quorum=Coded(1, "cyclic"), **knobs)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Coded(-1), "give a whole number of at least 0"),
        (lambda: Coded(1.5), "give a whole number of at least 0"),
        (lambda: Coded(1, "reed"), "is not known; give 'fractional', 'cyclic' or 'tree'"),
        (lambda: Coded(1, "cyclic", 3, 2), "has no tree; leave children and levels out"),
        (lambda: Coded(3, "tree", 3, 2), "needs at least 4 children of each parent, there are 3"),
        (lambda: coded_by([fm.policies.coded(1)], 3), "does not divide 3 replicas"),
        (lambda: coded_by([fm.policies.coded(4, "cyclic")], 4), "needs at least 5 replicas, there are 4"),
        (lambda: coded_by([fm.policies.coded_reduce(2, 2, 1)], 4), "has 6 replicas, there are 4; give replicas=6"),
    ],
)
def test_a_code_without_its_replicas_is_refused(make: Any, text: str) -> None:
    with pytest.raises(fm.PolicyError, match=text):
        make()


@pytest.mark.parametrize(
    "other", [Policy(), fm.policies.coded(2), fm.policies.asynchronous(), fm.policies.all_reduce()]
)
def test_all_layers_have_one_code(other: Policy) -> None:
    with pytest.raises(fm.PolicyError, match="give all layers the same code"):
        check_composition({"a": fm.policies.coded(1), "b": other}, 6)
    assert check_composition({"a": fm.policies.coded(1), "b": fm.policies.coded(1)}, 6) == ()
    assert coded_by([Policy(), Policy(quorum=Quorum(0.5))], 4) is None
