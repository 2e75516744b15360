"""Workers of a simulated cluster leave, are lost and come back, and a fit goes on as one on real workers does."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.sim import Churn, Crash
from flowml_runtime.sim.members import Absence, SimulatedMembers, absences
from tests.training.reference import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:worker.+ (was|were) lost")

CHANGES = [(3.0, 2, False), (7.0, 2, True), (5.0, 0, False), (9.0, 0, True)]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 8)).astype(np.float32)
SOURCE = {"x": X, "y": X @ RNG.normal(size=(8, 3)).astype(np.float32)}
PARAMS = {"fc": {"w": jnp.zeros((8, 3))}}
ITEMS = 4 * 120

POLICIES = {
    "synchronous": fm.policies.synchronous(),
    "sums": fm.policies.all_reduce(),
    "ring": fm.policies.ring(),
    "quorum": fm.policies.quorum(0.75),
    "folding": fm.policies.quorum(0.75, late="fold"),
    "asynchronous": fm.policies.asynchronous(),
    "diloco": fm.policies.diloco(4),
    "decoupled": fm.policies.decoupled_diloco(4, 0.75),
    "gossip": fm.policies.gossip("ring"),
    "coded": fm.policies.coded(1),
    "portions": fm.policies.speculate(2),
}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["fc"]["w"] - batch["y"]) ** 2)


def fit(policy: str, *faults: Any, arithmetic: bool = False, steps: int = 120, **options: Any) -> fm.TrainingResult:
    share_s = 0.05 if policy == "coded" else 0.1  # a replica of the code computes two shares of the batch
    models = fm.sim.LogNormal(share_s, 0.2), fm.sim.Network(1e-3, 1e8)
    cluster = fm.SimulatedCluster(4, *models, arithmetic=arithmetic, faults=faults)
    trainer = fm.Trainer(loss, optax.adam(0.01), cluster=cluster, replicas=4, policies=POLICIES[policy])
    return trainer.fit(PARAMS, SOURCE, batch_size=32, steps=steps, progress=False, **options)


def churn(notice_s: float = 0.0) -> Churn:
    return Churn(CHANGES, notice_s=notice_s, start_s=0.5, pause_s=0.1)


def test_a_fit_waits_for_lost_workers_and_ends_with_the_bits_of_one_that_lost_none() -> None:
    whole, found = fit("synchronous", arithmetic=True), fit("synchronous", churn(), arithmetic=True, on_loss="replace")
    assert [lost.workers for lost in found.losses] == [("worker:2",), ("worker:0",)]
    assert "it stopped at 3 s" in found.losses[0].reason
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
    assert found.ledger == whole.ledger
    assert whole.virtual_seconds is not None and found.virtual_seconds is not None
    assert found.virtual_seconds > whole.virtual_seconds + 4  # worker:2 was away for so long


def test_nothing_is_done_twice_when_workers_give_notice_and_come_back() -> None:
    found = fit("synchronous", churn(notice_s=1.0), arithmetic=True, replicas="elastic")
    assert found.losses == ()
    assert [(c.left, c.joined, c.replicas) for c in found.changes] == [
        (("worker:2",), (), 3),
        (("worker:0",), (), 2),
        ((), ("worker:2",), 3),
        ((), ("worker:0",), 4),
    ]
    steps = [record["step"] for record in found.history]
    assert steps == list(range(120))
    assert found.ledger.used == sum(record["replicas"] for record in found.history)
    assert {record["replicas"] for record in found.history} == {2, 3, 4}


@pytest.mark.parametrize("notice_s", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_workers_leave_and_join_under_every_policy_and_every_item_has_one_fate(policy: str, notice_s: float) -> None:
    found, again = (fit(policy, churn(notice_s), replicas="elastic") for _ in range(2))
    assert len(found.history) == 120
    left = [w for c in found.changes for w in c.left] + [w for lost in found.losses for w in lost.workers]
    assert left == ["worker:2", "worker:0"]
    assert [w for c in found.changes for w in c.joined] == ["worker:2", "worker:0"]
    ledger = found.ledger
    assert ledger.outstanding == 0
    assert (ledger.used + ledger.dropped + ledger.folded + ledger.unseen) * ledger.item_size >= 120 * 32
    assert (again.trace_hash, again.ledger, again.events) == (found.trace_hash, found.ledger, found.events)


@pytest.mark.parametrize("policy", ["synchronous", "quorum", "diloco"])
def test_fewer_replicas_go_on(policy: str) -> None:
    found = fit(policy, Crash(1, 2.0), Crash(3, 6.0), on_loss="shrink")
    assert [lost.workers for lost in found.losses] == [("worker:1",), ("worker:3",)]
    assert found.history[-1]["replicas"] <= 2
    assert found.ledger.outstanding == 0


def test_little_work_is_lost_with_a_worker() -> None:
    """How long replicas stand decides how often there are snapshots for memory, and not how long these were due."""
    found = fit("synchronous", Crash(1, 20.0), on_loss="shrink", steps=200)
    (lost,) = found.losses
    assert lost.step - lost.resumed_at < 30  # of 0.1 s, 1 s of which the loss was not known


def test_a_fit_that_is_not_told_to_go_on_ends_with_the_first_departure() -> None:
    with pytest.raises(fm.WorkerLostError, match=r"worker:2.*it stopped at 3 s"):
        fit("synchronous", churn())


def test_fewer_replicas_than_are_needed_end_a_fit() -> None:
    with pytest.raises(fm.WorkerLostError, match=r"2 of 4 replicas are left, and the fit needs 3"):
        fit("synchronous", churn(), replicas="elastic", min_replicas=3)


def test_a_worker_that_never_returns_ends_a_fit_that_waits_for_it() -> None:
    with pytest.raises(fm.WorkerLostError, match=r"worker:1 does not return in this simulation; give on_loss='shrink'"):
        fit("synchronous", Crash(1, 2.0), on_loss="replace")


def test_copies_on_simulated_workers_are_refused() -> None:
    with pytest.raises(fm.SimulationError, match="replicate="):
        fit("synchronous", on_loss="replace", replicate=1)


def test_a_fit_begins_with_the_workers_that_are_up() -> None:
    late = Churn([(0.0, 3, False), (4.0, 3, True)])
    found = fit("synchronous", late, replicas="elastic")
    assert (found.history[0]["replicas"], found.history[-1]["replicas"]) == (3, 4)
    assert [c.joined for c in found.changes] == [("worker:3",)]
    waits = fit("synchronous", late, on_loss="replace")
    assert {record["replicas"] for record in waits.history} == {4}


def test_the_times_of_faults_count_from_the_start_of_each_fit() -> None:
    cluster = fm.SimulatedCluster(4, fm.sim.Constant(0.1), fm.sim.Network(0.0, float("inf")), faults=[churn()])
    trainer = fm.Trainer(loss, optax.adam(0.01), cluster=cluster, replicas=4)
    first, second = (
        trainer.fit(PARAMS, SOURCE, batch_size=32, steps=100, progress=False, on_loss="shrink") for _ in range(2)
    )
    assert first.losses == second.losses
    assert first.ledger == second.ledger
    assert first.trace_hash == second.trace_hash
    assert first.virtual_seconds == pytest.approx(second.virtual_seconds)


def test_the_coordinator_knows_who_is_there() -> None:
    away = absences([churn(notice_s=1.0), Crash(1, 4.0)], workers=3)
    assert away == (
        Absence(3.0, 2, 2.0, 3.0, 7.5),
        Absence(4.0, 1, noticed_s=5.0),
        Absence(5.0, 0, 4.0, 5.0, 9.5),
    )
    devices = fm.SimulatedCluster(3, fm.sim.Constant(1), fm.sim.Network(0.0, 1e9)).devices
    members = SimulatedMembers(devices, away)

    def at(now_s: float) -> tuple[str, str]:
        members.go_on(now_s)
        return "".join(d.worker[-1] for d in members.devices), "".join(w[-1] for w in sorted(members.leaving))

    assert [at(t) for t in (0, 2, 3, 4, 4.9, 5, 7.5, 9.5)] == [
        ("012", ""),
        ("012", "2"),
        ("01", ""),
        ("01", "0"),
        ("01", "0"),
        ("", ""),
        ("2", ""),
        ("02", ""),
    ]


def test_a_worker_that_goes_before_it_has_started_was_away_all_the_time() -> None:
    quick = Churn([(1.0, 0, False), (2.0, 0, True), (2.4, 0, False), (6.0, 0, True)], start_s=0.5)
    assert absences([quick], workers=1) == (Absence(1.0, 0, noticed_s=2.0, up_s=6.5),)


@pytest.mark.parametrize("name", ["notice_s", "start_s", "pause_s"])
def test_times_of_a_churn_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(fm.SimulationError, match=name):
        Churn(CHANGES, **{name: -1.0})


@pytest.mark.parametrize(("policy", "latency_s"), [("synchronous", 0.0), *((policy, 1e-3) for policy in POLICIES)])
def test_a_worker_that_joins_stops_the_others_for_no_longer_than_a_step(policy: str, latency_s: float) -> None:
    """In virtual time, where all steps take the same and loading a plan takes none: the longest time between the ends
    of two steps around the join is at most a step longer than before it. Replicas that wait for each other stand only
    for the messages of the snapshot, so not at all if these take no time."""
    late = Churn([(0.0, 3, False), (4.03, 3, True)])
    models = fm.sim.Constant(0.05 if policy == "coded" else 0.1), fm.sim.Network(latency_s, float("inf"))
    cluster = fm.SimulatedCluster(4, *models, arithmetic=False, faults=[late])
    trainer = fm.Trainer(loss, optax.adam(0.01), cluster=cluster, replicas=4, policies=POLICIES[policy])
    found = trainer.fit(PARAMS, SOURCE, batch_size=32, steps=80, progress=False, replicas="elastic")
    assert [change.joined for change in found.changes] == [("worker:3",)]
    took = np.diff([record["seconds"] for record in found.history])
    at = found.changes[0].step  # of the first step with all replicas
    assert 20 < at < 70
    stood_s = took[at - 10 : at + 10].max() - took[: at - 10].max()
    assert stood_s <= 0.1 + 1e-9
    if policy not in ("asynchronous", "portions"):
        assert stood_s <= 8 * latency_s + 1e-9
