"""A driver is killed in the middle of a fit on workers that outlive it. Another one goes on with what they keep.

The fits that are killed write no checkpoint before their end, so all that is left of them is on the workers. `make
kills` ends a driver at each point, and `make test` at one under each policy.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
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
from tests.training.test_lost_and_replaced import REPLICAS, STEPS, fit

ROOT = Path(__file__).resolve().parents[2]
STOP_AT = 10
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
    return (fit if policy in EXACT else count)(cluster, policy, **options)


def drive(address: str, token: str, policy: str, path: str, *at: str) -> None:
    """What the process of a driver does that ends at a point, or says that it has come to a step."""

    def callback(record: dict[str, Any]) -> None:
        if record["step"] == STOP_AT:
            print("is here", flush=True)
            sys.stdin.read()

    with fm.Cluster.connect(address, token) as cluster:
        saving.LEAST_PAUSE_S, saving.MOST_SHARE = 0.0, 1.0  # as many snapshots as may be
        if at:
            ends = Ends(Ending(*at[:3], int(at[3])))  # type: ignore[arg-type]
            ends.watch_sent(cluster.endpoint)  # type: ignore[arg-type]
            cluster.session.on_message = ends.watch_taken(cluster.session.on_message)  # type: ignore[method-assign]
        train(cluster, policy, Path(path), callbacks=[] if at else [callback])


def command(launched: LaunchedCluster, policy: str, path: Path, at: str = "") -> dict[str, Any]:
    """How to start such a process."""
    script = "import sys; from tests.training.test_orphans import drive; drive(*sys.argv[1:])"
    arguments = [launched.address, launched.token, policy, str(path), *at.split()]
    modules = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return {"args": [sys.executable, "-c", script, *arguments], "env": {**os.environ, "PYTHONPATH": modules}}


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
        assert told.splitlines()[-1].startswith(b"flowml.errors."), told
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        assert_fates(found, "asynchronous", None)


def test_after_a_while_nothing_is_kept_and_the_workers_are_free(tmp_path: Path) -> None:
    with closing(LaunchedCluster(workers=REPLICAS, orphan_s=1e-3)) as launched:
        started = command(launched, "asynchronous", tmp_path, "after send Completed 8")
        assert subprocess.run(**started, timeout=100, check=False).returncode == -signal.SIGKILL
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            found = train(cluster, "asynchronous", tmp_path, resume="auto")
    assert found.resumed_at == 0
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
