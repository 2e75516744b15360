"""A stopped worker delays no step that does not need it, however large the layers that its stages read."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.devices import worker_of

REPLICAS = 4
STOPPED_S = 3.0
MEASURED_S = 1.0
"""For how long steps are counted before and afterwards."""
RELEASED_S = 0.2
"""Afterwards: a record waits for the report of a replica that was stopped between its contribution and its report."""


def loss(params: Any, batch: Any) -> Any:
    with fm.layer("wide"):
        y = batch["x"] @ params["wide"]["kernel"]
    return jnp.mean(y**2)


@pytest.mark.parametrize("side", [512, 2048], ids=["1 MiB", "16 MiB"])
def test_a_stopped_reader_leaves_no_gap_under_a_quorum(side: int) -> None:
    params = {"wide": {"kernel": jnp.full((side, side), 1e-3, jnp.float32)}}
    source = {"x": np.ones((64, side), np.float32)}
    with fm.Cluster.local(workers=REPLICAS) as cluster:
        trainer = fm.Trainer(
            loss,
            optax.sgd(1e-3),
            cluster=cluster,
            replicas=REPLICAS,
            placement=fm.Pipeline(1),
            policies={"*": fm.policies.quorum(0.75)},
        )
        batch = jax.tree_util.tree_map(lambda x: x[:REPLICAS], source)
        training = trainer.plan(params, batch).training
        assert training is not None
        homes = {worker_of(h) for s in training.stores for h in s.copies}
        [spare, *_] = [w for r in reversed(training.replicas) for w in map(worker_of, r) if w not in homes]
        times: list[float] = []
        stopped: list[float] = []
        running = threading.Event()

        def stop_and_go() -> None:
            running.wait(60)
            stopped.append(time.monotonic())
            os.kill(cluster.pids[spare], signal.SIGSTOP)
            threading.Event().wait(STOPPED_S)
            os.kill(cluster.pids[spare], signal.SIGCONT)
            stopped.append(time.monotonic())

        class Enough(Exception):
            """The fit has run long enough."""

        def on_step(record: dict[str, Any]) -> None:
            times.append(time.monotonic())
            if times[-1] > times[0] + 1.5 * MEASURED_S:
                running.set()
            if len(stopped) == 2 and times[-1] > stopped[1] + RELEASED_S + MEASURED_S:
                raise Enough

        stopper = threading.Thread(target=stop_and_go)
        stopper.start()
        with pytest.raises(Enough):
            trainer.fit(params, source, batch_size=REPLICAS, steps=1_000_000, callbacks=[on_step])
        stopper.join()
    began, ended = stopped[0], stopped[1] + RELEASED_S
    before, meanwhile, after = (
        sum(a < t <= b for t in times) / (b - a)
        for a, b in ((began - MEASURED_S, began), (began, ended), (ended, ended + MEASURED_S))
    )
    said = f"{before:.1f}, {meanwhile:.1f} and {after:.1f} steps a second before, meanwhile and afterwards"
    assert meanwhile > min(before, after) / 4, said
