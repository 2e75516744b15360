"""A quorum that the living can never meet is an error: when it is made, when it is compiled, or when the run knows."""

from __future__ import annotations

import math
from typing import Any

import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.policy import Arrivals, Completion, Decide, Never, Wait, check_batch, check_composition
from flowml_runtime.protocol.errors import QuorumError
from flowml_runtime.protocol.training.decision import Arrived, Decision, Wake
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, ReplicaLost, Terms, Tick
from tests.training.reference import BATCH, data, mlp, mlp_loss


@pytest.mark.parametrize("quorum", [fm.Quorum(5), fm.Deadline(5)])
def test_more_replicas_than_there_are_is_refused(quorum: Completion) -> None:
    with pytest.raises(fm.PolicyError, match=r"asks for more replicas than there are \(4\)"):
        check_composition({"a": fm.Policy(quorum=quorum)}, 4)


def test_a_number_of_examples_is_compared_with_the_batch_and_not_with_the_replicas() -> None:
    policy = fm.Policy(quorum=fm.Quorum(24, of="samples"))
    check_composition({"a": policy}, 4)
    check_batch([policy], 24)
    with pytest.raises(fm.PolicyError, match=r"more examples than a batch has \(20\)"):
        check_batch([policy], 20)


def test_a_fit_whose_batch_is_too_small_for_the_quorum_says_so(threads_cluster: fm.Cluster) -> None:
    rule = fm.Policy(quorum=fm.Quorum(BATCH + 1, of="samples"))
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=4, policies=rule)
    with pytest.raises(fm.PolicyError, match=rf"give a count of at most {BATCH}"):
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=1)


@pytest.mark.parametrize("limit", [0, -1, math.nan, "soon"])
def test_a_limit_is_a_number_of_seconds(limit: Any) -> None:
    with pytest.raises(fm.PolicyError, match=r"Quorum\(limit_s="):
        fm.Quorum(2, limit_s=limit)


def test_a_limit_needs_clocks() -> None:
    with pytest.raises(fm.PolicyError, match="without clocks that a deadline or a limit could end"):
        fm.Policy(staleness=2, quorum=fm.Quorum(2, late="fold", limit_s=1.0))


@given(
    members=st.integers(1, 6),
    arrived=st.integers(0, 6),
    gone=st.integers(0, 6),
    count=st.integers(1, 6),
    now=st.sampled_from([0.0, 4.0, 5.0, 9.0]),
    limit=st.sampled_from([math.inf, 5.0]),
)
def test_a_count_is_awaited_as_long_as_it_can_be_met(
    members: int, arrived: int, gone: int, count: int, now: float, limit: float
) -> None:
    arrived, count = min(arrived, members), min(count, members)
    gone = min(gone, members - arrived)
    arrivals = Arrivals(members, 1, 1, 0.0, hopeful=members - arrived - gone, times=dict.fromkeys(range(arrived), 0.0))
    answer = fm.Quorum(count, limit_s=limit).decide(arrivals, now)
    if arrived >= count:
        assert answer == Decide()
    elif members - gone < count or now >= limit:
        assert isinstance(answer, Never)
    else:
        assert answer == Wait(limit)


def decision(quorum: Completion) -> Decision:
    terms = Terms(4, 1, 1, (StoreTerms((0,), fm.Policy(quorum=quorum)),), 9)
    return Decision(terms, terms.groups[0])


def test_a_number_of_replicas_ends_the_run_when_too_few_are_left() -> None:
    machine = decision(fm.Quorum(3))
    assert machine.step(ReplicaLost(0)) == []
    with pytest.raises(QuorumError, match=r"clock 0 cannot .*: Quorum\(3\) needs 3 replicas, and 2 of 4 are left; see"):
        machine.step(ReplicaLost(1))


def test_a_share_goes_on_with_those_that_are_left() -> None:
    machine = decision(fm.Quorum(0.75))
    machine.step(ReplicaLost(0))
    machine.step(ReplicaLost(1))
    machine.step(Arrived(0, 2, 0))
    assert machine.step(Arrived(0, 3, 0)) == [Committed(0, excluded=(0, 1))]


def test_a_limit_ends_the_wait_for_a_quorum_and_names_who_is_missing() -> None:
    machine = decision(fm.Quorum(1.0, limit_s=5.0))
    assert machine.step(Arrived(0, 2, 0), 1.0) == [Wake(5.0)]
    assert machine.step(Arrived(0, 0, 0), 2.0) == []
    with pytest.raises(QuorumError, match="not there 5 s after the clock before: replicas 1, 3 are missing"):
        machine.step(Tick(), 5.0)


@pytest.mark.parametrize("quorum", [fm.Quorum(4, limit_s=20.0), fm.Quorum(1.0, limit_s=20.0)])
def test_a_fit_ends_at_the_limit_when_a_worker_stops_unnoticed(quorum: Completion) -> None:
    crash = fm.sim.Crash(worker=2, at_s=7.5, noticed_s=1e6)
    cluster = fm.SimulatedCluster(
        workers=4,
        compute=fm.sim.Constant(1.0),
        network=fm.sim.Network(1e-3, 1e9),
        faults=[crash],
        arithmetic=False,
    )
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=fm.Policy(quorum=quorum))
    with pytest.raises(fm.DeadlineError, match=r"clock 7 cannot be completed: Quorum.* 20 s .*replicas 2 are missing"):
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=20)


def test_a_fit_ends_at_the_limit_of_its_first_clock_when_nothing_ever_arrives() -> None:
    crashes = [fm.sim.Crash(worker=w, at_s=0.5, noticed_s=1e6) for w in (1, 2, 3)]
    slow = fm.sim.Straggler(fm.sim.Constant(1.0), factor=1e6, workers=(0,))
    cluster = fm.SimulatedCluster(
        workers=4, compute=slow, network=fm.sim.Network(1e-3, 1e9), faults=crashes, arithmetic=False
    )
    rule = fm.Policy(quorum=fm.Quorum(0.5, limit_s=20.0))
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=rule)
    with pytest.raises(fm.DeadlineError, match=r"clock 0 cannot be completed: Quorum\(0.5\) is not there 20 s"):
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=20)
    assert cluster.session.now() == pytest.approx(20, abs=1)
