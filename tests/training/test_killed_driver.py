"""A driver process is killed in the middle of a fit. Another process goes on, and ends with the bits of a whole fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optax
import psutil

import flowml as fm
from flowml_runtime.environment import checkpoints
from tests.conftest import wait_until
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

ROOT = Path(__file__).resolve().parents[2]
STEPS, KILLED = 16, 8
SCRIPT = f"""
import sys

import flowml as fm
from tests.training.test_killed_driver import fit


def wait(record):
    if record["step"] == {KILLED}:
        print("is here", flush=True)
        sys.stdin.read()  # until it is killed


if __name__ == "__main__":
    with fm.Cluster.local(workers=2) as cluster:
        fit(cluster, checkpoint=fm.Checkpoint(sys.argv[1], every_steps=3), callbacks=[wait])
"""


def fit(cluster: fm.Cluster, **options: Any) -> fm.TrainingResult:
    policies = fm.policies.diloco(4)
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=2, policies=policies)
    return trainer.fit(mlp(), data(), batch_size=BATCH, steps=STEPS, seed=3, progress=False, **options)


def test_another_process_goes_on_where_a_driver_was_killed(process_cluster: fm.Cluster, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    modules = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": modules, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"is here\n", "the fit has ended before it was killed"
        wait_until(lambda: bool(checkpoints.snapshots(path)), "a snapshot is written", 60)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(workers, 60)[1], "workers have not ended with their driver"
    before = fm.restore(path).step
    assert 0 < before < STEPS

    resumed = fit(process_cluster, checkpoint=fm.Checkpoint(path, every_steps=3), resume="auto")
    whole = fit(process_cluster)
    assert [record["step"] for record in resumed.history] == list(range(before, STEPS))
    assert_same((resumed.params, resumed.opt_state), (whole.params, whole.opt_state))
    assert resumed.ledger == whole.ledger
