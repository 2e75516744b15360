"""Workers that give notice leave a fit without a loss: what they do goes on elsewhere, and no step is done twice."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
import psutil
import pytest

import flowml as fm
from flowml_runtime.driver.training import saving
from tests.conftest import wait_until
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_elastic import STEP_S, doing, plain
from tests.training.test_lost_and_replaced import POLICIES, REPLICAS


def fit(cluster: fm.Cluster, at: dict[int, Callable[[], object]], **options: Any) -> fm.TrainingResult:
    layout = {n: options.pop(n) for n in ("policies", "placement", "microbatches") if n in options}
    count = options.pop("count", REPLICAS)
    trainer = fm.Trainer(
        mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=count, delays={"worker:0": STEP_S}, **layout
    )
    options = {"batch_size": BATCH, "steps": 200, "seed": 3, "progress": False, **options}
    return trainer.fit(mlp(), data(), callbacks=[doing(at)], **options)


def leaves(cluster: fm.Cluster, worker: str) -> Callable[[], None]:
    return lambda: cluster.end_worker(worker, notice=True)


def gone(cluster: fm.Cluster, worker: str) -> None:
    wait_until(lambda: worker not in {d.worker for d in cluster.devices}, f"{worker} has left")


def test_a_spot_machine_leaves_by_sigterm_and_all_that_it_did_counts() -> None:
    with fm.Cluster.local(workers=3) as cluster:
        process = psutil.Process(cluster.pids["worker:2"])
        found = fit(
            cluster, {40: lambda: process.send_signal(signal.SIGTERM)}, count=3, on_loss="shrink", batch_size=48
        )
        gone(cluster, "worker:2")
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it has ended")
    assert found.losses == ()
    ((change),) = found.changes
    assert (change.joined, change.left, change.replicas) == ((), ("worker:2",), 2)
    replicas = [record["replicas"] for record in found.history]
    assert replicas == [3] * change.step + [2] * (len(replicas) - change.step)
    assert found.ledger.used == sum(replicas), "no step is done twice, and no item is lost"


def test_the_first_replica_leaves_too_and_the_steps_before_are_those_of_a_loop(threads: fm.Cluster) -> None:
    found = fit(threads, {40: leaves(threads, "worker:0"), 90: leaves(threads, "worker:2")}, on_loss="shrink")
    gone(threads, "worker:2")
    threads.bring_back(threads.lost)
    assert found.losses == ()
    assert [change.left for change in found.changes] == [("worker:0",), ("worker:2",)]
    replicas = [record["replicas"] for record in found.history]
    assert found.ledger.used == sum(replicas)
    first = found.changes[0].step
    assert replicas[first - 1 : first + 1] == [REPLICAS, REPLICAS - 1]
    _, losses = plain(replicas[:first], BATCH // REPLICAS)
    np.testing.assert_allclose([r["loss"] for r in found.history[:first]], losses, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_replaced_workers_leave_and_the_result_is_that_of_a_fit_without(threads: fm.Cluster, policy: str) -> None:
    found = fit(threads, {30: leaves(threads, "worker:1")}, on_loss="replace", policies=POLICIES[policy])
    assert found.losses == ()
    assert [(change.joined, change.left) for change in found.changes] == [(("worker:1",), ("worker:1",))]
    assert found.ledger.outstanding == 0
    if policy in ("synchronous", "DiLoCo", "sums"):
        whole = fit(threads, {}, policies=POLICIES[policy])
        assert found.ledger == whole.ledger
        jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)


EVERY = 16
"""The steps between two pushes of the layers that push least often."""


@pytest.mark.parametrize(
    "policies",
    [
        fm.policies.diloco(EVERY),
        {"fc0*": fm.Policy(), "*": fm.policies.local_sgd(EVERY)},
        {"fc0*": fm.policies.all_reduce(), "fc1*": fm.policies.diloco(EVERY), "*": fm.policies.local_sgd(4)},
    ],
    ids=["one", "beside synchronous", "two"],
)
def test_local_steps_of_a_replica_that_leaves_are_pushed_first(threads: fm.Cluster, policies: Any) -> None:
    """It leaves and joins again after a push, so nothing is dropped, also with snapshots in between."""
    found = leave_and_join(threads, 3, steps=600, policies=policies)
    assert {change.step % EVERY for change in found.changes} == {0}
    ledger = found.ledger
    assert (ledger.dropped, ledger.used) == (0, sum(record["replicas"] for record in found.history))


def test_a_replica_that_leaves_does_not_wait_for_a_push_that_is_far_away(
    threads: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PUSH_WITHIN_S", STEP_S)
    found = fit(threads, {30: leaves(threads, "worker:1")}, on_loss="shrink", policies=fm.policies.diloco(150))
    threads.bring_back(threads.lost)
    ((change),) = found.changes
    assert change.step < 150
    assert found.ledger.dropped == change.step, "its local steps"


def taking_turns(cluster: fm.Cluster, workers: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """A callback that has workers leave, each when the one before is back, and starts each again when it has left."""
    turns, out = list(workers), list[str]()

    def callback(record: dict[str, Any]) -> None:
        there = {d.worker for d in cluster.devices}
        if out and out[0] not in there:
            cluster.start_worker(out.pop())
        elif turns and not out and len(there) == REPLICAS and record["step"] > 5:
            out.append(turns.pop(0))
            cluster.end_worker(out[0], notice=True)

    return callback


def leave_and_join(cluster: fm.Cluster, turns: int, **options: Any) -> fm.TrainingResult:
    workers = [f"worker:{1 + turn % 3}" for turn in range(turns)]
    trainer = fm.Trainer(
        mlp_loss,
        optax.adam(1e-2),
        cluster=cluster,
        replicas=REPLICAS,
        delays={"worker:0": STEP_S},
        policies=options.pop("policies", None),
    )
    turn = taking_turns(cluster, workers)
    about: dict[str, Any] = {"batch_size": BATCH, "seed": 3, "progress": False, "replicas": "elastic", **options}
    found = trainer.fit(mlp(), data(), callbacks=[turn], **about)
    cluster.bring_back(cluster.lost)
    assert found.losses == ()
    assert [c.left for c in found.changes if c.left] == [(worker,) for worker in workers]
    assert [c.joined for c in found.changes if c.joined] == [(worker,) for worker in workers]
    assert [record["step"] for record in found.history] == list(range(len(found.history)))
    assert found.ledger.outstanding == 0
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_leave_and_join_again_under_each_policy(threads: fm.Cluster, policy: str) -> None:
    found = leave_and_join(threads, 3, steps=500, policies=POLICIES[policy])
    if policy != "DiLoCo":  # whose loss goes up and down on so few examples, also without a change
        assert found.history[-1]["loss"] < found.history[0]["loss"] / 2


def test_twenty_leaves_and_joins_in_one_fit_do_no_step_twice(threads: fm.Cluster) -> None:
    found = leave_and_join(threads, 10, steps=1500)
    replicas = [record["replicas"] for record in found.history]
    assert found.ledger.used == sum(replicas)


def test_a_replica_of_two_stages_leaves_with_one_of_them(threads: fm.Cluster) -> None:
    layout: dict[str, Any] = {"placement": fm.Pipeline(2), "microbatches": 2, "count": 2}
    found = fit(threads, {30: leaves(threads, "worker:3")}, on_loss="shrink", **layout)
    threads.bring_back(threads.lost)
    assert found.losses == ()
    assert [(c.left, c.replicas) for c in found.changes] == [(("worker:3",), 1)]
    assert found.ledger.used == sum(record["replicas"] for record in found.history)


def test_a_worker_without_which_the_fit_cannot_go_on_stays_until_its_end(threads: fm.Cluster) -> None:
    found = fit(threads, {30: leaves(threads, "worker:1")}, on_loss="shrink", min_replicas=REPLICAS)
    gone(threads, "worker:1")
    threads.bring_back(threads.lost)
    assert (found.losses, found.changes) == ((), ())
    assert found.ledger.used == 200 * REPLICAS
