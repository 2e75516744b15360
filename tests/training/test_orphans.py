"""A driver is killed in the middle of a fit on workers that outlive it. Another one goes on with what they keep.

The fits that are killed write no checkpoint before their end, so all that is left of them is on the workers. `make
kills` ends a driver at each point, and `make test` at one under each policy. If no driver comes, the workers write the
last checkpoint.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import CheckpointError
from flowml_runtime.driver.training import saving
from flowml_runtime.driver.training.kept import claimed
from flowml_runtime.environment import checkpoints
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.transport.ending import Ending, Ends
from tests.training.reference import assert_same
from tests.training.test_kills import ALL, CLOCKED, EVERY_POLICY, EXACT, EXAMPLES, count, points
from tests.training.test_lost_and_replaced import BATCH, REPLICAS, STEPS, data, fit

ROOT = Path(__file__).resolve().parents[2]
STOP_AT, EARLY = 10, 1
DRIVER = points("""
    before after send StartTraining 2
    before after send Grant 6
    before after soon take Report 100
    before after send Hold 2
    before after take Paused 9
    before after send Export 9
    before after soon take Exported 11
    before after soon take Buffers 30
    before after send Completed 6
    before after send Completed 8
    before after soon send Hold 14
    before after take Settled 3
    before after take Retired 2
    before after send StopTraining 1
    before after send Released 2
""")
LATE = ("Completed", "Retired", "StopTraining", "Released")
"""At these points a snapshot is complete. At the others there may be none yet, and the next driver begins."""
GRID = [(policy, at) for policy in EVERY_POLICY for at in DRIVER]
FEW = [(policy, DRIVER[(11 * place + 20) % len(DRIVER)]) for place, policy in enumerate(EVERY_POLICY)]


@pytest.fixture(scope="module")
def launched() -> Iterator[LaunchedCluster]:
    with closing(LaunchedCluster(workers=REPLICAS)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(launched: LaunchedCluster) -> dict[str, fm.TrainingResult]:
    """Fits whose driver lives."""
    with fm.Cluster.connect(launched.address, launched.token) as cluster:
        return {policy: fit(cluster, policy) for policy in EXACT}


def train(cluster: fm.Cluster, policy: str, path: Path, **options: Any) -> fm.TrainingResult:
    """A fit that writes no checkpoint before its end."""
    options["checkpoint"] = fm.Checkpoint(path)
    policy, _, on_loss = policy.partition(" ")
    options |= {"on_loss": on_loss} if on_loss else {}
    if policy == "untrained":
        return with_rows(cluster, **options)
    return (fit if policy in EXACT else count)(cluster, policy, **options)


def with_rows(cluster: fm.Cluster, **options: Any) -> fm.TrainingResult:
    """A fit of parameters of which some are not trained."""

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"][:, params["rows"]] @ params["w"] - batch["y"][:, :1]) ** 2)

    trainer = fm.Trainer(loss, optax.adam(1e-2), cluster=cluster, replicas=REPLICAS)
    params = {"w": jnp.ones((2, 1)), "rows": jnp.asarray([3, 1])}
    return trainer.fit(params, data(), batch_size=BATCH, steps=STEPS, progress=False, **options)


def drive(address: str, token: str, policy: str, path: str, *at: str) -> None:
    """What the process of a driver does that ends at a point, or says that it has come to a step: an `early` one,
    before the first snapshot, or a later one."""
    early = at == ("early",)

    def callback(record: dict[str, Any]) -> None:
        if record["step"] == (EARLY if early else STOP_AT):
            print("is here", flush=True)
            sys.stdin.read()

    with fm.Cluster.connect(address, token) as cluster:
        # as many snapshots as may be, or none
        saving.LEAST_PAUSE_S, saving.MOST_SHARE = (1e9, 1.0) if early else (0.0, 1.0)
        if at and not early:
            ends = Ends(Ending(*at[:3], int(at[3])))  # type: ignore[arg-type]
            ends.watch_sent(cluster.endpoint)  # type: ignore[arg-type]
            cluster.session.on_message = ends.watch_taken(cluster.session.on_message)  # type: ignore[method-assign]
        train(cluster, policy, Path(path), callbacks=[] if at and not early else [callback], resume="auto")


def command(launched: LaunchedCluster, policy: str, path: Path, at: str = "") -> dict[str, Any]:
    """How to start such a process."""
    script = "import sys; from tests.training.test_orphans import drive; drive(*sys.argv[1:])"
    arguments = [launched.address, launched.token, policy, str(path), *at.split()]
    modules = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return {"args": [sys.executable, "-c", script, *arguments], "env": {**os.environ, "PYTHONPATH": modules}}


@pytest.mark.filterwarnings("ignore:the workers keep only a part of the first snapshot")
@pytest.mark.parametrize(("policy", "at"), GRID if ALL else FEW, ids=lambda value: str(value).replace(" ", "-"))
def test_another_driver_goes_on_with_what_workers_keep(
    launched: LaunchedCluster, whole: dict[str, fm.TrainingResult], policy: str, at: Ending, tmp_path: Path
) -> None:
    point = f"{at.when} {at.verb} {at.message} {at.number}"
    done = subprocess.run(**command(launched, policy, tmp_path, point), timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL, f"it has not come to the point {at}"
    with fm.Cluster.connect(launched.address, launched.token) as cluster:
        found = train(cluster, policy, tmp_path, resume="auto")
    assert found.resumed_at > 0 or at.message not in LATE
    assert [record["step"] for record in found.history] == list(range(found.resumed_at, STEPS))
    assert fm.restore(tmp_path).step == STEPS
    assert_fates(found, policy, whole.get(policy))


def test_a_suspended_driver_is_refused_when_it_wakes_up(tmp_path: Path) -> None:
    with closing(LaunchedCluster(workers=REPLICAS, lost_after_s=1.0)) as launched:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(**command(launched, "asynchronous", tmp_path), **pipes) as old:
            assert old.stdout is not None
            assert old.stdout.readline() == b"is here\n"
            with fm.Cluster.connect(launched.address, launched.token) as cluster:
                with pytest.raises(CheckpointError, match=rf"in use by a fit of process {old.pid} on .*; wait for its"):
                    train(cluster, "asynchronous", tmp_path, resume="auto")
                name = checkpoints.identity(tmp_path, anew=False)
                with (
                    pytest.raises(CheckpointError, match=r"driver-\w+ is training this fit on the same workers"),
                    claimed(cluster, name, wait_s=0.0),
                ):
                    pass
                old.send_signal(signal.SIGSTOP)
                found = eventually(lambda: train(cluster, "asynchronous", tmp_path, resume="auto"))
                assert found.resumed_at > 0
            before = sorted(p.name for p in tmp_path.iterdir())
            old.send_signal(signal.SIGCONT)
            _, told = old.communicate(timeout=60)
        assert old.returncode == 1
        assert re.fullmatch(
            r"flowml.errors.WorkerLostError: this process was suspended or cut off, and worker:\d counts this driver "
            r"as lost \(no heartbeat for 1 s\); another driver may have taken the fit over; connect to the cluster "
            r'again, and call fit\(resume="auto"\)',
            told.decode().splitlines()[-1],
        ), told
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        assert_fates(found, "asynchronous", None)


def test_a_driver_that_is_suspended_before_the_first_snapshot_loses_the_directory_too(tmp_path: Path) -> None:
    with closing(LaunchedCluster(workers=REPLICAS, lost_after_s=1.0)) as launched:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(**command(launched, "synchronous", tmp_path, "early"), **pipes) as old:
            assert old.stdout is not None
            assert old.stdout.readline() == b"is here\n"
            old.send_signal(signal.SIGSTOP)
            with fm.Cluster.connect(launched.address, launched.token) as cluster:
                found = eventually(lambda: train(cluster, "synchronous", tmp_path, resume="auto"))
            assert found.resumed_at == 0, "nothing was kept"
            old.send_signal(signal.SIGCONT)
            _, told = old.communicate(timeout=60)
        assert b"this process was suspended or cut off" in told.splitlines()[-1], told
        assert fm.restore(tmp_path).step == STEPS


LAST = "after send Completed 8"
"""A driver that ends here has told all workers twice that a snapshot is complete."""


def lose_driver(launched: LaunchedCluster, policy: str, path: Path, at: str = LAST) -> None:
    done = subprocess.run(**command(launched, policy, path, at), timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL


def written(path: Path, after: int = 0) -> int:
    """The step of the first snapshot in a directory after this one, once it is there."""
    deadline = time.monotonic() + 30.0
    while True:
        steps = [checkpoints.step_of(p) for p in checkpoints.snapshots(path)]
        if steps and steps[0] > after:
            return steps[0]
        assert time.monotonic() < deadline, sorted(path.iterdir())


def manifests(path: Path) -> dict[str, bytes]:
    """What the snapshots in a directory hold, with checksums."""
    return {p.name: (p / checkpoints.MANIFEST).read_bytes() for p in checkpoints.snapshots(path)}


def terminate(launched: LaunchedCluster, *workers: str) -> None:
    """Have workers hand over and leave, and wait until their processes have ended."""
    handles = [os.pidfd_open(launched.pids[worker]) for worker in workers]
    for handle in handles:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
    for handle in handles:
        assert select.select([handle], [], [], 60.0)[0]
        os.close(handle)


@pytest.fixture(scope="module")
def brief() -> Iterator[LaunchedCluster]:
    """Workers that wait for the next driver for a moment only."""
    with closing(LaunchedCluster(workers=REPLICAS, orphan_s=1e-3)) as cluster:
        yield cluster


@pytest.mark.parametrize("policy", [*EXACT, "asynchronous", "untrained", "synchronous replace", "DiLoCo shrink"])
def test_if_no_driver_comes_the_workers_write_the_last_checkpoint(
    launched: LaunchedCluster, brief: LaunchedCluster, whole: dict[str, fm.TrainingResult], policy: str, tmp_path: Path
) -> None:
    lose_driver(brief, policy, tmp_path)
    step = written(tmp_path)
    assert 0 < step < STEPS
    restored = fm.restore(tmp_path)
    with fm.Cluster.connect(launched.address, launched.token) as cluster:  # its workers know nothing of this fit
        found = train(cluster, policy, tmp_path, resume="auto")
        if policy == "untrained":
            np.testing.assert_array_equal(restored.params["rows"], [3, 1])
            same = train(cluster, policy, tmp_path / "whole")
            assert_same((found.params, found.opt_state), (same.params, same.opt_state))
            return
    assert found.resumed_at == step
    assert [record["step"] for record in found.history] == list(range(step, STEPS))
    assert_fates(found, policy.split(maxsplit=1)[0], whole.get(policy.split(maxsplit=1)[0]))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".last")]


def test_a_fit_that_is_refused_leaves_the_name_of_the_one_before(launched: LaunchedCluster, tmp_path: Path) -> None:
    def refused() -> None:
        with pytest.raises(ValueError, match="batch"):
            train(cluster, "synchronous", tmp_path, batch_size=REPLICAS + 1)

    with fm.Cluster.connect(launched.address, launched.token) as cluster:
        refused()
        assert list(tmp_path.iterdir()) == []
        before = checkpoints.identity(tmp_path, anew=True)
        refused()
        assert checkpoints.identity(tmp_path, anew=False) == before, "workers know that fit by it"
        train(cluster, "synchronous", tmp_path)
        assert checkpoints.identity(tmp_path, anew=False) != before


def test_workers_that_must_end_write_the_last_checkpoint(
    launched: LaunchedCluster, whole: dict[str, fm.TrainingResult], tmp_path: Path
) -> None:
    with closing(LaunchedCluster(workers=REPLICAS)) as ending:
        lose_driver(ending, "synchronous", tmp_path)
        assert not checkpoints.snapshots(tmp_path)
        terminate(ending, *ending.pids)
    step = written(tmp_path)
    with fm.Cluster.connect(launched.address, launched.token) as cluster:
        found = train(cluster, "synchronous", tmp_path, resume="auto")
    assert found.resumed_at == step
    assert_fates(found, "synchronous", whole["synchronous"])


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.filterwarnings("ignore:.*are damaged|.*cannot be read|.*is damaged")
def test_what_workers_keep_counts_where_the_disk_is_damaged(
    launched: LaunchedCluster, whole: dict[str, fm.TrainingResult], tmp_path: Path, older: bool
) -> None:
    """The newest checkpoint cannot be read, and its step is no older than that of the workers."""
    if older:
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            train(cluster, "synchronous", tmp_path, steps=2)
    lose_driver(launched, "synchronous", tmp_path)
    damaged = tmp_path / f"step-{STEPS - 1:012d}"
    damaged.mkdir()
    (damaged / "manifest.json").write_bytes(b"{")
    with (
        fm.Cluster.connect(launched.address, launched.token) as cluster,
        pytest.warns(fm.FlowmlWarning, match="goes on from the snapshot of step [0-9]+ that the workers keep"),
    ):
        found = train(cluster, "synchronous", tmp_path, resume="auto")
    assert found.resumed_at > 2
    assert_fates(found, "synchronous", whole["synchronous"])
    assert fm.restore(tmp_path).step == STEPS


def test_a_driver_takes_what_one_worker_has_written_and_others_keep(
    whole: dict[str, fm.TrainingResult], tmp_path: Path
) -> None:
    with closing(LaunchedCluster(workers=REPLICAS + 1)) as launched:
        lose_driver(launched, "synchronous", tmp_path)
        terminate(launched, "worker:1")
        assert not checkpoints.snapshots(tmp_path), "its part is not taken for the whole"
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            found = train(cluster, "synchronous", tmp_path, resume="auto")
    assert found.resumed_at > 0
    assert_fates(found, "synchronous", whole["synchronous"])


def test_if_a_worker_is_killed_before_its_part_is_written_the_older_checkpoint_stays(
    launched: LaunchedCluster, whole: dict[str, fm.TrainingResult], tmp_path: Path
) -> None:
    with closing(LaunchedCluster(workers=REPLICAS)) as ending:
        with fm.Cluster.connect(ending.address, ending.token) as cluster:
            train(cluster, "synchronous", tmp_path, steps=2)
        lose_driver(ending, "synchronous", tmp_path)
        os.kill(ending.pids["worker:1"], signal.SIGSTOP)
        terminate(ending, *(ending.pids.keys() - {"worker:1"}))
        os.kill(ending.pids["worker:1"], signal.SIGKILL)
    assert len(list(tmp_path.glob(".last-*/part*.json"))) == REPLICAS - 1
    assert fm.restore(tmp_path).step == 2
    with fm.Cluster.connect(launched.address, launched.token) as cluster:
        found = train(cluster, "synchronous", tmp_path, resume="auto")
    assert found.resumed_at == 2
    assert_fates(found, "synchronous", whole["synchronous"])
    assert not list(tmp_path.glob(".last-*")), "what was left is removed"


def test_a_driver_that_wakes_up_after_the_workers_have_written_changes_nothing(
    launched: LaunchedCluster, tmp_path: Path
) -> None:
    with closing(LaunchedCluster(workers=REPLICAS, lost_after_s=1.0, orphan_s=1e-3)) as brief:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(**command(brief, "asynchronous", tmp_path), **pipes) as old:
            assert old.stdout is not None
            assert old.stdout.readline() == b"is here\n"
            old.send_signal(signal.SIGSTOP)
            step = written(tmp_path)
            before = manifests(tmp_path)
            old.send_signal(signal.SIGCONT)
            _, told = old.communicate(timeout=60)
        assert b"this process was suspended or cut off" in told.splitlines()[-1], told
    assert manifests(tmp_path) == before
    assert not [*tmp_path.glob(".writing-*"), *tmp_path.glob(".offered-*")]
    with fm.Cluster.connect(launched.address, launched.token) as cluster:
        found = train(cluster, "asynchronous", tmp_path, resume="auto")
    assert found.resumed_at == step
    assert_fates(found, "asynchronous", None)


def eventually(attempt: Any, timeout_s: float = 30.0) -> fm.TrainingResult:
    """What it returns once the driver before is known to be lost."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return attempt()
        except CheckpointError:
            assert time.monotonic() < deadline


def assert_fates(found: fm.TrainingResult, policy: str, same: fm.TrainingResult | None) -> None:
    """Each item was applied as the ledger says. A fit whose result depends on nothing else is the `same`."""
    ledger = found.ledger
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == EXAMPLES
    assert ledger.outstanding == 0
    if same is not None:
        assert_same((found.params, found.opt_state), (same.params, same.opt_state))
        assert ledger == same.ledger
        return
    layers = [np.asarray(found.params[layer]["w"]) for layer in "abc"]
    for weights in layers:
        np.testing.assert_array_equal(weights, layers[0], "all layers have the same items")
    applied = layers[0][layers[0] != 0]
    assert len(applied) == ledger.used + ledger.folded, "what was acknowledged was applied, and nothing else"
    if policy in CLOCKED:
        np.testing.assert_allclose(applied.sum(), STEPS, rtol=1e-5, err_msg="each step has one mean")
        assert set(np.round(1 / applied)) <= {3, 4}, "each once, with its weight in the mean"
    else:
        np.testing.assert_array_equal(applied, applied[0], "each once")
