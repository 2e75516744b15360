"""A killed replica stalls nobody where none waits for another: the run goes on, and no other one begins."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.sim import Crash
from tests.training.reference import assert_same
from tests.training.test_lost_and_replaced import POLICIES, REPLICAS, killing

STEPS = 80
ITEMS = REPLICAS * STEPS
RNG = np.random.default_rng(0)
X = RNG.normal(size=(512, 8)).astype(np.float32)
SOURCE = {"x": X, "y": np.tanh(X @ RNG.normal(size=(8, 3))).astype(np.float32)}
PARAMS = {"a": {"w": jnp.asarray(RNG.normal(size=(8, 16)) / 4, jnp.float32)}, "b": {"w": jnp.zeros((16, 3))}}
"""Of two layers, whose homes are the first two workers."""


def mean_square(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]["w"]) @ params["b"]["w"] - batch["y"]) ** 2)


def fit(cluster: fm.Cluster, policy: str, path: Path | None = None, **options: Any) -> fm.TrainingResult:
    rules, delays = POLICIES[policy], options.pop("delays", None)
    trainer = fm.Trainer(
        mean_square, optax.adam(1e-2), cluster=cluster, replicas=REPLICAS, policies=rules, delays=delays
    )
    checkpoint = None if path is None else fm.Checkpoint(path, every_steps=5)
    options = {"batch_size": 32, "steps": STEPS, "seed": 3, "progress": False, "checkpoint": checkpoint, **options}
    return trainer.fit(PARAMS, SOURCE, **options)


@contextmanager
def loading_nothing(cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """No plan is loaded in the block, as it would be for another run."""

    def load(*_: Any) -> None:
        raise AssertionError("another run is prepared")

    with monkeypatch.context() as patched:
        patched.setattr(cluster.session, "load", load)
        yield


def kill_and_refuse(cluster: fm.Cluster, at: dict[int, str], patch: pytest.MonkeyPatch, seen: list[int]) -> Any:
    """A callback that kills workers at steps, and from the first of them on lets no plan be loaded."""
    kill, block = killing(cluster, at, seen), loading_nothing(cluster, patch)
    first = min(at)

    def callback(record: dict[str, Any]) -> None:
        if record["step"] == first:
            block.__enter__()
        kill(record)

    return callback, block


@pytest.mark.parametrize("policy", ["asynchronous", "Downpour"])
@pytest.mark.parametrize("lost", [{12: "worker:2"}, {8: "worker:3", 30: "worker:2"}], ids=["one", "two"])
@pytest.mark.parametrize("shuffle", [True, fm.Shards(reassign_every=2)], ids=str)
def test_the_survivors_go_on(
    processes: fm.Cluster,
    policy: str,
    lost: dict[int, str],
    shuffle: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    victims = [(lost[step],) for step in sorted(lost)]
    callback, block = kill_and_refuse(processes, dict(lost), monkeypatch, seen)
    try:
        with pytest.warns(fm.FlowmlWarning, match=r"left out with its replica; the fit goes on from step"):
            found = fit(processes, policy, tmp_path, callbacks=[callback], on_loss="shrink", shuffle=shuffle)
        restored = fm.restore(tmp_path)
    finally:
        block.__exit__(None, None, None)
        processes.bring_back(processes.lost)
    assert seen == [record["step"] for record in found.history] == list(range(STEPS))
    assert [loss.workers for loss in found.losses] == victims
    for loss in found.losses:
        assert loss.resumed_at == loss.step < STEPS, "the others had steps to do, and did none of them again"
        assert loss.seconds == 0
    assert (found.ledger.used, found.ledger.outstanding) == (ITEMS, 0), "others do what the lost replica had not sent"
    assert found.ledger.partly <= 2 * len(lost), "at most one push of each was under way"
    assert found.ledger.seen == ((STEPS * 32 // len(X), len(X)),), "whoever did it, in whichever epoch it was"
    assert restored.step == STEPS
    assert_same(restored.params, found.params)
    assert found.history[-1]["loss"] < found.history[0]["loss"] / 2


@pytest.mark.parametrize("shuffle", [True, fm.Shards()], ids=str)
def test_the_home_is_lost_after_another_replica(processes: fm.Cluster, tmp_path: Path, shuffle: Any) -> None:
    """The next run begins at a snapshot without both, and the items of the first are in it."""
    seen: list[int] = []
    try:
        callbacks = [killing(processes, {8: "worker:2", 24: "worker:0"}, seen)]
        with pytest.warns(fm.FlowmlWarning, match="was lost"):
            found = fit(processes, "Downpour", tmp_path, callbacks=callbacks, on_loss="shrink", shuffle=shuffle)
    finally:
        processes.bring_back(processes.lost)
    assert seen == [record["step"] for record in found.history] == list(range(STEPS))
    assert [loss.workers for loss in found.losses] == [("worker:2",), ("worker:0",)]
    assert found.losses[0].seconds == 0 < found.losses[1].seconds
    assert (found.ledger.used, found.ledger.outstanding) == (ITEMS, 0)


@pytest.mark.parametrize("shuffle", [True, fm.Shards()], ids=str)
def test_a_worker_joins_after_a_run_has_gone_on_without_it(threads: fm.Cluster, shuffle: Any) -> None:
    at = {10: lambda: threads.end_worker("worker:2"), 60: lambda: threads.start_worker("worker:2")}

    def change(record: dict[str, Any]) -> None:
        at.pop(record["step"], bool)()

    options: dict[str, Any] = {"replicas": "elastic", "delays": {"worker:1": 0.005}, "steps": 300, "shuffle": shuffle}
    with pytest.warns(fm.FlowmlWarning, match="worker:2 was lost"):
        found = fit(threads, "Downpour", callbacks=[change], **options)
    assert [loss.seconds for loss in found.losses] == [0]
    assert [change.joined for change in found.changes] == [("worker:2",)]
    assert found.ledger.outstanding == 0
    assert len(found.history) == 300


@pytest.mark.parametrize("policy", ["synchronous", "bounded"])
def test_where_replicas_wait_for_others_another_run_begins(threads: fm.Cluster, policy: str) -> None:
    try:
        with pytest.warns(fm.FlowmlWarning, match="worker:2 was lost"):
            found = fit(threads, policy, callbacks=[killing(threads, {12: "worker:2"}, [])], on_loss="shrink")
    finally:
        threads.bring_back(threads.lost)
    assert found.losses[0].seconds > 0


def test_a_fit_that_may_not_lose_a_worker_ends(threads: fm.Cluster) -> None:
    try:
        with pytest.raises(fm.WorkerLostError, match="worker:2 was lost during training"):
            fit(threads, "Downpour", callbacks=[killing(threads, {12: "worker:2"}, [])])
        with pytest.raises(fm.WorkerLostError, match=r"3 of 4 replicas are left, and the fit needs 4"):
            threads.bring_back(threads.lost)
            kill = [killing(threads, {12: "worker:2"}, [])]
            fit(threads, "Downpour", callbacks=kill, on_loss="shrink", min_replicas=4)
    finally:
        threads.bring_back(threads.lost)


# The same machines under virtual time, where any time of a loss can be tried.

SIMULATED = 60
STEP_S = 0.1


def simulated(policy: Any, *crashes: Crash, shuffle: Any = True) -> fm.TrainingResult:
    models = fm.sim.LogNormal(STEP_S, 0.2), fm.sim.Network(1e-3, 1e8)
    cluster = fm.SimulatedCluster(4, *models, arithmetic=False, faults=crashes)
    trainer = fm.Trainer(mean_square, optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy)
    options: dict[str, Any] = {"batch_size": 32, "steps": SIMULATED, "progress": False, "on_loss": "shrink"}
    return trainer.fit(PARAMS, SOURCE, shuffle=shuffle, **options)


@pytest.mark.filterwarnings("ignore:worker.+ was lost")
@pytest.mark.parametrize("policy", [fm.policies.asynchronous(), fm.policies.downpour(3, 2), fm.policies.downpour(5, 5)])
@pytest.mark.parametrize("shuffle", [True, fm.Shards()], ids=str)
def test_at_whatever_time_a_replica_is_lost(policy: Any, shuffle: Any, rng: np.random.Generator) -> None:
    for _ in range(12):
        crashes = (Crash(w, float(rng.uniform(0.0, 5.0)), noticed_s=0.3) for w in (2, 3))
        found = simulated(policy, *crashes, shuffle=shuffle)
        assert [record["step"] for record in found.history] == list(range(SIMULATED))
        assert [loss.seconds for loss in found.losses] == [0.0, 0.0]
        assert found.ledger.used == 4 * SIMULATED
        assert found.ledger.outstanding == 0
        times = np.diff([record["seconds"] for record in found.history])
        assert times.max() < 10 * STEP_S, "two replicas go on"


@pytest.mark.filterwarnings("ignore:worker.+ was lost")
@pytest.mark.parametrize("policy", [fm.policies.asynchronous(), fm.policies.downpour(5, 5)])
def test_what_a_lost_home_had_not_pushed_goes_to_others(policy: Any, rng: np.random.Generator) -> None:
    """The next run begins at a snapshot between two pushes. The steps before it that were not pushed are lost."""
    for _ in range(6):
        found = simulated(policy, *(Crash(w, float(rng.uniform(0.0, 5.5)), noticed_s=0.3) for w in (0, 3)))
        assert [record["step"] for record in found.history] == list(range(SIMULATED))
        assert {loss.workers[0] for loss in found.losses} == {"worker:0", "worker:3"}
        assert (found.ledger.used, found.ledger.outstanding) == (4 * SIMULATED, 0)


@pytest.mark.filterwarnings("ignore:worker.+ was lost")
def test_a_late_loss_goes_back_to_the_snapshot() -> None:
    """Others know already that there are no more items, so that no one would take those of the lost replica."""
    whole = simulated(fm.policies.asynchronous())
    assert whole.virtual_seconds is not None
    found = simulated(fm.policies.asynchronous(), Crash(2, whole.virtual_seconds - 0.05, noticed_s=0.01))
    assert [record["step"] for record in found.history] == list(range(SIMULATED))
    assert found.ledger.used == 4 * SIMULATED
