"""A fit goes on after a worker and the coordinator died together, and says at once what it waits for."""

from __future__ import annotations

import os
import re
import signal
import warnings
from contextlib import closing
from typing import Any

import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
from tests.training.reference import assert_same
from tests.training.test_lost_and_replaced import REPLICAS, fit


def test_a_worker_and_the_coordinator_die_together() -> None:
    """The last worker: the others have been sent the plan before a driver that takes it for present notices."""
    with closing(LaunchedCluster(workers=REPLICAS, state="")) as launched:
        with fm.Cluster.connect(launched.address, launched.token) as cluster:
            whole = fit(cluster, "synchronous")

            def kill(record: dict[str, Any]) -> None:
                if record["step"] == 15:
                    launched.end_coordinator()
                    os.kill(launched.pids["worker:3"], signal.SIGKILL)

            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = fit(cluster, "synchronous", callbacks=[kill], on_loss="replace")
        assert [loss.workers for loss in found.losses] == [("worker:3",)]
        assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
        texts = [str(w.message) for w in told]
        assert re.match(r"worker:3 was lost at step \d+ .* was replaced within", texts[-1])
        waits = "worker:3 was lost; waiting up to 60 s for another in its place; the launcher starts it"
        assert texts[:-1] in ([], [waits])  # it may be there within a second
