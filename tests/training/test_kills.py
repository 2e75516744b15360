"""Processes are killed at named points of a run: no acknowledged update is lost, none is applied twice.

`make kills` runs every cell of policy x role x point, and `make test` one of each policy and role and one of each
policy at the end of a fit. Fits with a common clock and no quorum must end with the same bits and the same ledger as
one without a kill. For the others the model itself counts: its parameters are one number for each example, whose
gradient is 1 for this example and 0 for all others. So each parameter shows how often, and with which weight, the work
item of its example was applied.

A coordinator that is killed is started again where it was. Workers and driver go on without it, and none is lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.transport.ending import Ending
from tests.conftest import wait_until
from tests.training.reference import assert_same
from tests.training.test_lost_and_replaced import EVERY, POLICIES, REPLICAS, STEPS, fit

ROLES = {"leader": "worker:0", "home": "worker:1", "worker": "worker:3"}
"""Three layers have their homes on three workers. The home of the first leads; the last worker computes only."""
CLOCKED = ("synchronous", "quorum", "DiLoCo")
EXACT = ("synchronous", "DiLoCo")
EVERY_POLICY = (*CLOCKED, "asynchronous")
ALL = "FLOWML_KILLS" in os.environ


def points(text: str) -> list[Ending]:
    """The points of lines such as "before after send Report 12"."""
    found: list[Ending] = []
    for line in text.strip().splitlines():
        *whens, verb, message, number = line.split()
        found += [Ending(when, verb, message, int(number)) for when in whens]  # type: ignore[arg-type]
    return found


WORKER = points("""
    before after take StartTraining 1
    before after send Ask 2
    before after take Grant 2
    before after send Contribution 10
    before after send Report 9
    before after take Published 12
    before after soon send Settled 2
    before after send Paused 1
    before after send Exported 1
    before after take Hold 1
    before after send Retired 1
""")
HOME = points("""
    before after soon take StoreValue 1
    before after soon take Contribution 25
    before after soon send Published 14
    before after take Export 1
    before after send Buffers 2
    before after send Exported 1
    before after send StoreValue 1
""")
HOME_OF_CLOCKED = points("""
    before after send Arrived 22
    before after soon take Commit 6
""")
HOME_ON_ARRIVAL = points("""
    before after soon send Applied 30
""")
LEADER = points("""
    before after soon take Arrived 30
    before after soon send Commit 18
    before after soon take Contribution 25
    before after soon send Published 14
    before after send Exported 1
    before after send StoreValue 1
""")


COORDINATOR = points("""
    before after soon take Heartbeat 8
    before after soon take Heartbeat 20
""")
"""Each member sends two in a second."""


def cells() -> Iterator[tuple[str, str, Ending]]:
    for policy in EVERY_POLICY:
        clocked = policy in CLOCKED
        yield from ((policy, "worker", at) for at in WORKER)
        yield from ((policy, "home", at) for at in [*HOME, *(HOME_OF_CLOCKED if clocked else HOME_ON_ARRIVAL)])
        yield from ((policy, "leader", at) for at in LEADER if clocked)
        yield from ((policy, "coordinator", at) for at in COORDINATOR)


def few(grid: Sequence[tuple[str, str, Ending]]) -> list[tuple[str, str, Ending]]:
    """A cell of each policy and role, with other points each time, and one of each policy at the end of the fit."""
    chosen: dict[tuple[str, str], list[tuple[str, str, Ending]]] = {}
    for cell in grid:
        chosen.setdefault(cell[:2], []).append(cell)
    last = [cell for cell in grid if cell[2].message == "Retired" and cell[2].when == "after"]
    found = [row[(7 * position + 3) % len(row)] for position, row in enumerate(chosen.values())]
    return [*found, *(cell for cell in last if cell not in found)]


GRID = list(cells())
EXAMPLES = STEPS * REPLICAS
TAKEOVER_S = 10.0


@pytest.fixture(scope="module")
def launched() -> Iterator[LaunchedCluster]:
    """With a coordinator in a process of its own."""
    with closing(LaunchedCluster(workers=REPLICAS, state="")) as launched:
        yield launched


@pytest.fixture(scope="module")
def connected(launched: LaunchedCluster) -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.connect(launched.address, launched.token)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(processes: fm.Cluster) -> dict[str, fm.TrainingResult]:
    """Fits without a kill."""
    return {policy: fit(processes, policy) for policy in EXACT}


def doom(cluster: fm.Cluster, worker: str, at: Ending) -> None:
    """Have another process for a worker, which ends at a point. The next one lives."""
    assert cluster.launched is not None
    cluster.end_worker(worker)
    wait_until(lambda: worker in cluster.lost, "the loss is known")
    cluster.launched.start_worker(worker, at)
    wait_until(lambda: worker not in cluster.lost, "another has joined", 60)


def count(cluster: fm.Cluster, policy: str, path: Path | None = None, **options: Any) -> fm.TrainingResult:
    """A fit whose parameters show the weight with which each example was applied."""

    def loss(params: Any, batch: Any) -> Any:
        return -sum(jnp.mean(batch @ params[layer]["w"]) for layer in "abc")

    about: dict[str, Any] = {"cluster": cluster, "replicas": REPLICAS, "delays": options.pop("delays", {})}
    trainer = fm.Trainer(loss, optax.sgd(1.0), policies=POLICIES[policy], **about)
    if path is not None:
        options["checkpoint"] = fm.Checkpoint(path, every_steps=EVERY)
    params = {layer: {"w": jnp.zeros(EXAMPLES)} for layer in "abc"}
    source = np.eye(EXAMPLES, dtype=np.float32)
    return trainer.fit(params, source, batch_size=REPLICAS, steps=STEPS, progress=False, **options)


def check(found: fm.TrainingResult, policy: str, path: Path, whole: dict[str, fm.TrainingResult]) -> None:
    """Nothing that was acknowledged is lost, and nothing was applied twice."""
    assert fm.restore(path).step == STEPS
    assert_same(fm.restore(path).params, found.params)
    check_steps(found, STEPS)
    if policy in EXACT:
        check_same(found, whole[policy])
    else:
        check_weights(found, policy)


def check_steps(found: fm.TrainingResult, steps: int) -> None:
    """Each step has one record, and each work item one fate."""
    assert [record["step"] for record in found.history] == list(range(steps))
    ledger = found.ledger
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == steps * REPLICAS
    assert ledger.outstanding == 0


def check_same(found: fm.TrainingResult, whole: fm.TrainingResult) -> None:
    """It is, to the bit, what a fit without a kill is."""
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
    assert found.ledger == whole.ledger


def check_weights(found: fm.TrainingResult, policy: str) -> None:
    """What the ledger calls used was applied once in each layer, and nothing else was."""
    layers = [np.asarray(found.params[layer]["w"]) for layer in "abc"]
    for weights in layers:
        np.testing.assert_array_equal(weights, layers[0], "all layers have the same items")
    applied, ledger = layers[0][layers[0] != 0], found.ledger
    assert len(applied) == ledger.used + ledger.folded, "what was acknowledged was applied, and nothing else"
    if policy == "asynchronous":
        assert ledger.used == len(layers[0])
        np.testing.assert_array_equal(applied, applied[0], "each once")
    else:
        counts = [record["replicas"] for record in found.history]
        expected = np.sort(np.concatenate([np.full(n, np.float32(1) / n) for n in counts]))
        np.testing.assert_allclose(
            np.sort(applied), expected, rtol=1e-6, err_msg="each once, with its weight in the mean"
        )


def chosen(*, coordinator: bool) -> Any:
    grid = [cell for cell in (GRID if ALL else few(GRID)) if (cell[1] == "coordinator") == coordinator]
    return pytest.mark.parametrize(("policy", "role", "at"), grid, ids=lambda value: str(value).replace(" ", "-"))


@chosen(coordinator=False)
@pytest.mark.filterwarnings("ignore:worker.. was lost")
def test_a_kill(
    processes: fm.Cluster,
    whole: dict[str, fm.TrainingResult],
    policy: str,
    role: str,
    at: Ending,
    tmp_path: Path,
) -> None:
    victim = ROLES[role]
    doom(processes, victim, at)
    pid = processes.pids[victim]
    found = (fit if policy in EXACT else count)(processes, policy, tmp_path, on_loss="replace")
    wait_until(lambda: processes.pids.get(victim) != pid, f"it has come to the point {at}")
    if at.message not in ("Retired", "StoreValue"):
        assert [loss.workers for loss in found.losses] == [(victim,)]
    check(found, policy, tmp_path, whole)


@chosen(coordinator=True)
def test_a_kill_of_the_coordinator(
    launched: LaunchedCluster,
    connected: fm.Cluster,
    whole: dict[str, fm.TrainingResult],
    policy: str,
    role: str,
    at: Ending,
    tmp_path: Path,
) -> None:
    launched.end_coordinator(at)
    wait_until(lambda: launched.processes.coordinator, "it is there again", TAKEOVER_S)
    pid = launched.processes.coordinator

    def wait(record: dict[str, Any]) -> None:
        if record["step"] == STEPS // 2:  # in the middle of the fit
            wait_until(lambda: launched.processes.coordinator not in (0, pid), "another has taken over", TAKEOVER_S)

    found = (fit if policy in EXACT else count)(connected, policy, tmp_path, on_loss="replace", callbacks=[wait])
    assert found.losses == ()
    assert len(connected.devices) == REPLICAS
    check(found, policy, tmp_path, whole)
