"""A policy is a value that cannot be unsound."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from flowml import policies
from flowml.errors import PolicyError
from flowml.policy import (
    UNBOUNDED,
    AllReduce,
    Deadline,
    Every,
    Factors,
    Gradient,
    Hierarchy,
    ParameterServer,
    Policy,
    Quorum,
    Ring,
    Tree,
)
from flowml.policy.topology import choose, sent_bytes


def test_the_default_is_synchronous_data_parallelism() -> None:
    policy = Policy()
    assert policy == Policy(ParameterServer(), 0, Quorum(1.0), 1, Gradient(), (), "mean")
    assert policy.clocked
    assert policy.every == Every(push=1)


@pytest.mark.parametrize("staleness", [1, 3, 3.0, UNBOUNDED])
def test_staleness_alone_means_that_each_contribution_is_applied_on_arrival(staleness: float) -> None:
    policy = Policy(staleness=staleness)
    assert policy.quorum == Quorum(1, late="fold")
    assert not policy.clocked
    assert policy == Policy(staleness=staleness, quorum=Quorum(1, late="fold"))


def test_a_quorum_keeps_stale_reads_on_the_clock() -> None:
    assert Policy(staleness=2, quorum=Quorum(0.75)).clocked
    assert Policy(staleness=2, quorum=Quorum(1)).clocked


@pytest.mark.parametrize("kind", [Quorum, Deadline])
def test_one_replica_is_not_all_replicas(kind: type[Quorum | Deadline]) -> None:
    assert kind(1) != kind(1.0)
    assert len({kind(1), kind(1.0), kind(1.0)}) == 2


def test_a_policy_is_a_value() -> None:
    policy = Policy(staleness=3, every=4)
    assert msgspec.structs.replace(policy, every=2) == Policy(staleness=3, every=2)
    assert copy.deepcopy(policy) == policy == pickle.loads(pickle.dumps(policy))
    assert hash(policy) == hash(Policy(staleness=3, every=Every(4)))
    with pytest.raises(AttributeError):
        policy.staleness = 1  # pyright: ignore[reportAttributeAccessIssue]


make_policy: Any = Policy  # what a user may type, whatever the checker says
make_quorum: Any = Quorum


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_policy(topology="ring"), "fm.ParameterServer"),
        (lambda: make_policy(payload="weights"), "fm.Gradient.. or fm.Factors"),
        (lambda: make_policy(quorum=0.75), "fm.Quorum"),
    ],
)
def test_what_a_knob_does_not_have_says_what_it_has(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason) as caught:
        make()
    assert "is not known; give " in str(caught.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: make_policy(apply="prox"),
            "apply='prox' is not available; give apply='mean', apply='sum', or one of fm.StalenessScaled, "
            "fm.Outer, fm.Mix, fm.Consensus, fm.Vote, fm.Distill, fm.Prox",
        ),
        (lambda: make_policy(filters=5), "filters=5: give a tuple of filters, such as (fm.filters.top_k(0.01),)"),
        (
            lambda: make_policy(topology="ring"),
            "topology='ring' is not known; give topology=fm.Ring() or fm.ParameterServer() or "
            "fm.AllReduce() or fm.Tree() or fm.Hierarchy(local, remote) or fm.Gossip() or "
            "fm.SharedMemory()",
        ),
    ],
)
def test_a_refusal_names_the_knob_the_value_and_the_fix(make: Callable[[], object], text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_policy(payload=Factors(), every=2), "cannot be added up"),
        (lambda: make_policy(staleness=-1), "newer than now"),
        (lambda: make_policy(staleness=1.5), "whole"),
        (lambda: make_policy(staleness=float("nan")), "staleness=nan"),
        (lambda: make_policy(staleness=True), "staleness=True"),
        (lambda: make_policy(staleness="none"), "staleness='none'"),
        (lambda: make_policy(staleness=UNBOUNDED, quorum=Quorum(0.5)), "pile up"),
        (lambda: make_policy(every=0), "at least 1"),
        (lambda: make_policy(every=2.0), "push=2.0"),
        (lambda: Quorum(0), "at least 1"),
        (lambda: Quorum(0.0), "lies in"),
        (lambda: Quorum(1.5), "give an int"),
        (lambda: Quorum(True), "fraction like"),
        (lambda: make_quorum("all"), "'all'"),
        (lambda: make_policy(topology=Ring(), quorum=Quorum(0.75)), "none can be left out; leave quorum out"),
        (lambda: make_policy(topology=Tree(2), quorum=Quorum(1)), r"topology=fm.Tree\(2\) with quorum=Quorum\(1\)"),
        (lambda: make_policy(topology=AllReduce(), payload=Factors()), "use payload=Gradient"),
        (lambda: Tree(0), r"Tree\(fanout=0\)"),
        (lambda: Tree(2.0), r"Tree\(fanout=2.0\)"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_an_unsound_policy_cannot_be_made(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        make()


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (policies.synchronous(), "sync"),
        (policies.every(4), "every 4"),
        (policies.asynchronous(), "async"),
        (policies.asynchronous(staleness=3, payload=Factors()), "async ≤3, factors"),
        (policies.asynchronous(staleness=0), "sync"),
        (policies.factors(), "sync, factors"),
        (policies.quorum(0.75), "quorum 0.75 drop"),
        (policies.quorum(3, every=2, staleness=1), "stale ≤1, every 2, quorum 3 drop"),
        (policies.quorum(1, late="fold", staleness=2), "async ≤2"),
        (policies.synchronous(apply="sum"), "sync, sum"),
        (policies.all_reduce(), "sync, all-reduce"),
        (policies.all_reduce(every=4, apply="sum"), "every 4, all-reduce, sum"),
        (policies.synchronous(topology=Ring()), "sync, ring"),
        (policies.every(2, topology=Tree(fanout=3)), "every 2, tree 3"),
        (policies.synchronous(topology=Hierarchy()), "sync, hierarchy"),
    ],
)
def test_short_names_are_compositions(policy: Policy, text: str) -> None:
    assert policy.describe() == text


def test_what_a_schedule_makes_each_rank_send() -> None:
    assert sent_bytes("ring", 300, 3) == sent_bytes("direct", 300, 3) == sent_bytes("tree", 300, 3) == 400
    assert [sent_bytes("doubling", 300, ranks) for ranks in (1, 2, 3, 4, 8)] == [0, 300, 400, 600, 900]
    assert {choose(1, "ab"), choose(10**9, "ab"), choose(10**9, "aa")} == {"doubling", "ring", "direct"}


def test_policies_need_no_jax() -> None:
    code = "import sys, flowml.policy.named, flowml.policy; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
