"""Fits that go on after the loss of workers: every item has one fate, and synchronous fits end with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
from flowml.errors import UnsupportedError
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

STEPS, EVERY = 40, 5
REPLICAS = 4
POLICIES: dict[str, Any] = {
    "synchronous": None,
    "quorum": fm.policies.quorum(0.75),
    "bounded": fm.policies.asynchronous(staleness=4),
    "asynchronous": fm.policies.asynchronous(),
    "DiLoCo": fm.policies.diloco(4),
    "sums": fm.policies.all_reduce(),
}
EXACT = {"synchronous", "DiLoCo", "sums"}
"""Those whose result does not depend on who is faster."""
UNALIGNED = {"bounded", "asynchronous"}
"""Those whose replicas share no clocks, so that snapshots are not at fixed steps."""


@pytest.fixture(scope="module")
def processes() -> Iterator[fm.Cluster]:
    """Four worker processes, which tests of this module kill."""
    with closing(fm.Cluster.local(workers=REPLICAS)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def threads() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.threads(workers=REPLICAS)) as cluster:
        yield cluster


def fit(cluster: fm.Cluster, policy: str, path: Path | None = None, **options: Any) -> fm.TrainingResult:
    layout = {key: options.pop(key) for key in ("placement", "replicas", "microbatches") if key in options}
    trainer = fm.Trainer(
        mlp_loss,
        optax.adam(1e-2),
        cluster=cluster,
        policies=POLICIES[policy],
        **{"replicas": REPLICAS, **layout},
    )
    if path is not None:
        options["checkpoint"] = fm.Checkpoint(path, every_steps=EVERY)
    return trainer.fit(mlp(), data(), **{"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **options})


def killing(cluster: fm.Cluster, at: dict[int, str], seen: list[int]) -> Callable[[dict[str, Any]], None]:
    """A callback that kills workers at steps, once each, and notes the steps that it sees."""

    def callback(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        worker = at.pop(record["step"], None)
        if worker is not None and worker in cluster.pids:
            os.kill(cluster.pids[worker], signal.SIGKILL)
        elif worker is not None:
            cluster.end_worker(worker)

    return callback


def assert_survives(cluster: fm.Cluster, policy: str, path: Path, at: dict[int, str], **options: Any) -> None:
    seen: list[int] = []
    steps = sorted(at)
    victims = tuple(at[step] for step in steps)
    callbacks = [killing(cluster, at, seen)]
    with pytest.warns(fm.FlowmlWarning, match=r"was lost at step \d+ .* goes on from step"):
        found = fit(cluster, policy, path, callbacks=callbacks, on_loss="replace", **options)
    assert seen == list(range(STEPS)), "callbacks see each step once"
    assert [record["step"] for record in found.history] == list(range(STEPS))
    assert [loss.workers for loss in found.losses] == [(victim,) for victim in victims]
    for step, loss in zip(steps, found.losses, strict=True):
        assert loss.step >= step
        least = 1 if policy in UNALIGNED else step - step % EVERY
        assert least <= loss.resumed_at <= loss.step, "it does not go back further than the snapshot"
    ledger = found.ledger
    given = ledger.used + ledger.dropped + ledger.folded
    assert given + ledger.unseen == STEPS * REPLICAS
    assert ledger.outstanding == 0
    assert fm.restore(path).step == STEPS
    if policy in EXACT:
        whole = fit(cluster, policy, **options)
        assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
        assert [r["loss"] for r in found.history] == [r["loss"] for r in whole.history]
        assert found.ledger == whole.ledger
    if policy != "quorum":
        assert ledger.used == STEPS * REPLICAS


@pytest.mark.parametrize("policy", POLICIES)
def test_a_killed_process_is_replaced(processes: fm.Cluster, policy: str, tmp_path: Path) -> None:
    assert_survives(processes, policy, tmp_path, {12: "worker:0", 27: "worker:2"})


@pytest.mark.parametrize("policy", ["synchronous", "quorum"])
def test_a_worker_in_this_process_is_replaced(threads: fm.Cluster, policy: str, tmp_path: Path) -> None:
    assert_survives(threads, policy, tmp_path, {12: "worker:0", 27: "worker:2"})


def test_a_stage_of_a_pipeline_is_replaced(processes: fm.Cluster, tmp_path: Path) -> None:
    layout = {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2}
    seen: list[int] = []
    callbacks = [killing(processes, {12: "worker:3"}, seen)]
    with pytest.warns(fm.FlowmlWarning, match=r"worker:3 was lost"):
        found = fit(processes, "synchronous", tmp_path, callbacks=callbacks, on_loss="replace", **layout)
    whole = fit(processes, "synchronous", **layout)
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
    assert found.ledger == whole.ledger


def test_without_a_checkpoint_the_driver_keeps_what_is_needed(processes: fm.Cluster) -> None:
    callbacks = [killing(processes, {20: "worker:1"}, [])]
    with pytest.warns(fm.FlowmlWarning, match=r"worker:1 was lost"):
        found = fit(processes, "synchronous", callbacks=callbacks, on_loss="replace")
    assert_same(found.params, fit(processes, "synchronous").params)


def test_what_cannot_be(threads: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="on_loss"):
        fit(threads, "synchronous", on_loss="ignore")
    simulated = fm.SimulatedCluster(workers=4, compute=fm.sim.Constant(0.1), network=fm.sim.Network(1e-4, 1e9))
    with pytest.raises(UnsupportedError, match="churn"):
        fit(simulated, "synchronous", on_loss="replace")  # type: ignore[arg-type]
