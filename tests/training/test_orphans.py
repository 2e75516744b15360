"""A driver is killed in the middle of a fit on workers that outlive it. Another one goes on with what they keep.

The fits that are killed write no checkpoint before their end, so all that is left of them is on the workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowml as fm
from flowml_runtime.driver.training import saving
from flowml_runtime.launch.launched import LaunchedCluster
from flowml_runtime.worker.ending import Ending, Ends
from tests.training.reference import assert_same
from tests.training.test_kills import EXACT, EXAMPLES, count
from tests.training.test_lost_and_replaced import REPLICAS, STEPS, fit

ROOT = Path(__file__).resolve().parents[2]


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
    """What the process of a driver does that ends at a point."""
    with fm.Cluster.connect(address, token) as cluster:
        ends = Ends(Ending(*at[:3], int(at[3])))  # type: ignore[arg-type]
        ends.watch_sent(cluster.endpoint)  # type: ignore[arg-type]
        cluster.session.on_message = ends.watch_taken(cluster.session.on_message)  # type: ignore[method-assign]
        saving.LEAST_PAUSE_S, saving.MOST_SHARE = 0.0, 1.0  # as many snapshots as may be
        train(cluster, policy, Path(path))


def kill(launched: LaunchedCluster, policy: str, path: Path, at: str) -> None:
    """Train in a process of its own, which ends at a point."""
    script = "import sys; from tests.training.test_orphans import drive; drive(*sys.argv[1:])"
    modules = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    arguments = [launched.address, launched.token, policy, str(path), *at.split()]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env={**os.environ, "PYTHONPATH": modules}, timeout=120, check=False
    )
    assert done.returncode == -9, "it has not come to the point"


@pytest.mark.parametrize("policy", ["synchronous", "quorum", "asynchronous", "DiLoCo"])
def test_another_driver_goes_on_with_what_workers_keep(
    launched: LaunchedCluster, whole: dict[str, fm.TrainingResult], policy: str, tmp_path: Path
) -> None:
    kill(launched, policy, tmp_path, "after send Completed 6")
    with fm.Cluster.connect(launched.address, launched.token) as cluster:
        found = train(cluster, policy, tmp_path, resume="auto")
    assert found.resumed_at > 0
    assert [record["step"] for record in found.history] == list(range(found.resumed_at, STEPS))
    assert_fates(found, whole.get(policy))


def assert_fates(found: fm.TrainingResult, same: fm.TrainingResult | None) -> None:
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
        np.testing.assert_array_equal(weights, layers[0])
    assert np.count_nonzero(layers[0]) == ledger.used + ledger.folded
