"""A replica is silent for long, and is lost then: the fit goes on from a snapshot of the others, with a true ledger."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.policy import Fold, ParameterServer
from flowml_runtime.driver.training import saving
from flowml_runtime.environment import checkpoints
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.transport.ending import Ending
from tests.conftest import wait_until
from tests.training.test_kills import doom

REPLICAS, STEPS = 4, 320
SILENT, SILENT_AT, LOST_AT = "worker:3", 10, 240
"""The model has three layers, so this worker is the home of none."""
BEFORE = 40
"""A snapshot of all replicas is of an earlier step: a replica has work for few steps ahead."""
EXAMPLES = STEPS * REPLICAS
SERVER = ParameterServer()


@pytest.fixture(scope="module")
def patient() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=REPLICAS, lost_after_s=120)) as cluster:
        yield cluster


WAITING = 8
"""The most records that wait for decisions about their steps while a snapshot has these."""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_SHARE", 1.0)


def falls_silent(
    cluster: Any, at_end: Callable[[], None] = lambda: None, *, suspends: bool = True
) -> Callable[[dict[str, Any]], None]:
    """A callback that suspends a worker if it `suspends`, and kills it much later. Before that it calls `at_end`."""
    pid = cluster.pids[SILENT]

    def callback(record: dict[str, Any]) -> None:
        step = record["step"]
        if step == LOST_AT:
            at_end()
        if step == SILENT_AT and suspends:
            os.kill(pid, signal.SIGSTOP)
        if step == LOST_AT:
            os.kill(pid, signal.SIGKILL)
        if SILENT_AT < step <= LOST_AT:
            time.sleep(0.02)  # snapshots are taken by time

    return callback


def loss(params: Any, batch: Any) -> Any:
    return -sum(jnp.mean(batch @ params[layer]["w"]) for layer in "abc")


def count(cluster: fm.Cluster, policy: Any, on_loss: Any, *callbacks: Any, **options: Any) -> fm.TrainingResult:
    """A fit whose parameters show the weight with which each example was applied. A replica falls silent in it, unless
    there are other `callbacks`."""
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=REPLICAS, policies=policy)
    params = {layer: {"w": jnp.zeros(EXAMPLES)} for layer in "abc"}
    source = np.eye(EXAMPLES, dtype=np.float32)
    fixed: dict[str, Any] = {"batch_size": REPLICAS, "steps": STEPS, "progress": False, **options}
    try:
        return trainer.fit(params, source, callbacks=callbacks or [falls_silent(cluster)], on_loss=on_loss, **fixed)
    finally:
        cluster.bring_back(cluster.lost)


def check(found: fm.TrainingResult) -> None:
    """Each example that the ledger says was used was applied, and nothing else."""
    ledger, layers = found.ledger, [np.asarray(layer["w"]) for layer in found.params.values()]
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == layers[0].size
    for weights in layers if not ledger.partly else ():
        np.testing.assert_array_equal(weights, layers[0], "all layers have the same items")
    applied = np.count_nonzero(np.max(layers, axis=0))
    assert applied == ledger.used + ledger.folded, "what was acknowledged was applied, and nothing else"
    missing = len(layers) * applied - np.count_nonzero(layers)
    assert missing <= (len(layers) - 1) * ledger.partly


ROUNDS: dict[str, Any] = {"every": 4, "quorum": 0.75, "outer": optax.sgd(1.0), "grace": 0.0}
ONE_KEY: Any = (fm.filters.top_k(1).with_error_feedback(), fm.filters.key_cache())
"""Filters that lose nothing of these gradients, each of which has one element, and that both ends remember."""
SITES = fm.Policy(topology=fm.Hierarchy(SERVER, SERVER, [[0], [1, 2, 3]], fm.Quorum(0.6)))
"""The silent replica is in a site that another one leads."""
FEW: Any = (fm.filters.top_k(8), fm.filters.compress())


@pytest.mark.filterwarnings("ignore:worker.3 was lost")
@pytest.mark.parametrize(
    ("policy", "on_loss"),
    [
        (fm.policies.quorum(0.75), "replace"),
        (fm.policies.quorum(0.75), "shrink"),
        (fm.policies.quorum(0.75, late="fold"), "replace"),
        (fm.policies.quorum(0.75, late="requeue"), "replace"),
        (fm.policies.decoupled_diloco(**ROUNDS), "replace"),
        (fm.policies.decoupled_diloco(**ROUNDS, late="drop"), "replace"),
        (fm.policies.decoupled_diloco(**ROUNDS), "shrink"),
        (fm.policies.quorum(0.75, filters=ONE_KEY, pull_filters=FEW), "replace"),
        (fm.policies.quorum(0.75, late="fold", filters=ONE_KEY), "shrink"),
        (SITES, "replace"),
        (fm.policies.asynchronous(filters=ONE_KEY), "replace"),
        (fm.policies.downpour(push=2, pull=4), "replace"),
        (fm.policies.coded(1), "replace"),
        (fm.policies.coded(1), "shrink"),
        (fm.policies.speculate(1), "replace"),
    ],
    ids=[
        *("quorum", "quorum-shrinks", "folds", "requeues", "rounds-fold", "rounds-drop", "rounds-shrink"),
        *("filters", "filters-shrink", "sites", "asynchronous", "downpour", "coded", "coded-shrinks", "portions"),
    ],
)
def test_others_lose_few_steps(patient: fm.Cluster, policy: fm.Policy, on_loss: str) -> None:
    found = count(patient, policy, on_loss)
    [loss] = found.losses
    assert loss.workers == (SILENT,)
    assert BEFORE < loss.resumed_at <= loss.step + WAITING
    assert [record["step"] for record in found.history] == list(range(STEPS))
    check(found)
    weights = np.asarray(found.params["a"]["w"])
    plain = type(policy.quorum) is fm.Quorum and policy.clocked and policy.every.push == 1 and not policy.sited
    if plain and not isinstance(policy.late, Fold):
        counted = 1 / weights[weights != 0]
        np.testing.assert_allclose(counted, np.where(counted < 3.5, 3, 4), rtol=1e-6, err_msg="each once")
        np.testing.assert_allclose(weights.sum(), STEPS, rtol=1e-4, err_msg="each step once")


SUSPENDED = (
    *("before send Report 9", "before send Contribution 20", "after send Contribution 19", "after send Settled 2"),
    *("before send Ask 2", "soon take Published 12"),
)


@pytest.mark.filterwarnings("ignore:worker.3 was lost")
@pytest.mark.parametrize(
    ("policy", "at"),
    [
        *((fm.policies.asynchronous(), at) for at in SUSPENDED),
        (fm.policies.quorum(0.75), SUSPENDED[0]),
        *((fm.policies.speculate(1), at) for at in (*SUSPENDED[:5], "before send Contribution 19")),
    ],
    ids=[*SUSPENDED, "quorum", *(f"portions {at}" for at in (*SUSPENDED[:5], "before send Contribution 19"))],
)
def test_a_worker_is_suspended_at_a_point(patient: fm.Cluster, policy: fm.Policy, at: str) -> None:
    """Before its report, a step counts of which no record can tell."""
    when, verb, message, number = at.split()
    doom(patient, SILENT, Ending(when, verb, message, int(number), suspended=True))  # type: ignore[arg-type]
    found = count(patient, policy, "replace", falls_silent(patient, suspends=False))
    [loss] = found.losses
    assert BEFORE < loss.resumed_at <= loss.step + 1
    assert [record["step"] for record in found.history] == list(range(STEPS))
    check(found)


@pytest.mark.filterwarnings("ignore:worker.3 was lost")
def test_records_come_while_a_worker_with_copies_is_silent(patient: fm.Cluster) -> None:
    """The step at which the worker is killed is acknowledged while it is silent, by what the driver has in memory."""
    found = count(patient, fm.policies.quorum(0.75), "replace", replicate=1)
    [loss] = found.losses
    assert LOST_AT < loss.resumed_at <= loss.step + 1, "a step that was acknowledged is not done again"
    check(found)


class DriverEnds(Exception):
    """Stands for the end of the driver's process."""


@pytest.mark.parametrize("on_loss", ["replace", "raise"])
def test_what_was_taken_without_the_silent_one_is_on_the_disk(
    patient: fm.Cluster, on_loss: str, tmp_path: Path
) -> None:
    """The driver ends while a worker is silent, and another fit goes on from the others' checkpoint."""
    steps = list[int]()

    def driver_ends() -> None:
        steps.extend(checkpoints.step_of(path) for path in checkpoints.snapshots(tmp_path))
        raise DriverEnds

    policy, where = fm.policies.quorum(0.75), fm.Checkpoint(tmp_path, every_steps=20, keep=2)
    with pytest.raises(DriverEnds):
        count(patient, policy, on_loss, falls_silent(patient, driver_ends), checkpoint=where)
    patient.bring_back(SILENT)
    assert BEFORE < steps[0] <= LOST_AT, "written before the driver ended"
    found = count(patient, policy, "raise", lambda record: None, checkpoint=where, resume="auto")
    assert found.resumed_at >= steps[0]
    check(found)


def test_a_fit_that_ends_with_the_loss_leaves_what_was_taken(patient: fm.Cluster, tmp_path: Path) -> None:
    where = fm.Checkpoint(tmp_path, every_steps=20)
    with pytest.raises(fm.WorkerLostError):
        count(patient, fm.policies.quorum(0.75), "raise", checkpoint=where)
    assert checkpoints.step_of(checkpoints.snapshots(tmp_path)[0]) > BEFORE


def counting(params: Any, state: Any, batch: Any) -> Any:
    number = jnp.argmax(batch.sum(0)).astype(jnp.int32)
    new = {"steps": state["steps"] + 1, "most": jnp.maximum(state["most"], number), "mean": state["mean"] + 1.0}
    return loss(params, batch), new


def with_state(cluster: fm.Cluster, rule: Any, *callbacks: Any, **options: Any) -> fm.TrainingResult:
    """A fit whose model has state."""
    about: dict[str, Any] = {"cluster": cluster, "replicas": REPLICAS, "has_state": True}
    about |= {"state_rules": {"steps": rule}, "policies": fm.policies.quorum(0.75)}
    trainer = fm.Trainer(counting, optax.sgd(1.0), **about)
    params = {layer: {"w": jnp.zeros(EXAMPLES)} for layer in "abc"}
    state = {"steps": jnp.int32(0), "most": jnp.int32(0), "mean": jnp.float32(0)}
    fixed: dict[str, Any] = {"batch_size": REPLICAS, "steps": STEPS, "progress": False, "state": state, **options}
    return trainer.fit(params, np.eye(EXAMPLES, dtype=np.float32), callbacks=callbacks, **fixed)


def check_state(found: fm.TrainingResult) -> None:
    """A new replica went on with what the others had counted."""
    check(found)
    used, state = np.flatnonzero(np.asarray(found.params["a"]["w"])), found.state
    assert int(state["most"]) >= used.max()
    assert STEPS - BEFORE < float(state["steps"]) <= STEPS
    assert STEPS - BEFORE < float(state["mean"]) <= STEPS


@pytest.mark.filterwarnings("ignore:worker.3 was lost")
@pytest.mark.parametrize("rule", ["max", "local", "first", "sum"])
def test_the_state_of_the_model_goes_on(patient: fm.Cluster, rule: str) -> None:
    """What a silent replica has added to a sum is not known, so the fit goes back to the snapshot of all."""
    try:
        found = with_state(patient, rule, falls_silent(patient), on_loss="replace")
    finally:
        patient.bring_back(patient.lost)
    [lost] = found.losses
    assert (lost.resumed_at > BEFORE) == (rule != "sum")
    if rule == "sum":
        check(found)
        assert int(found.state["steps"]) >= found.ledger.used
    else:
        check_state(found)


def test_workers_keep_what_was_taken_for_the_next_driver(tmp_path: Path) -> None:
    """Nothing is on the disk when the driver ends while a worker is silent, which is lost then."""

    def driver_ends() -> None:
        raise DriverEnds

    where = fm.Checkpoint(tmp_path)
    with closing(LaunchedCluster(workers=REPLICAS, lost_after_s=120)) as launched:
        with fm.Cluster.connect(launched.address, launched.token) as cluster, pytest.raises(DriverEnds):
            with_state(cluster, "max", falls_silent(launched, driver_ends), checkpoint=where)
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            os.kill(launched.pids[SILENT], signal.SIGKILL)
            wait_until(lambda: SILENT not in {device.worker for device in cluster.devices}, "the worker is lost")
            cluster.bring_back(SILENT)
            found = with_state(cluster, "max", checkpoint=where, resume="auto")
    assert BEFORE < found.resumed_at <= LOST_AT + 1
    check_state(found)
