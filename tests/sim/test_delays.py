"""`Trainer(delays=)` takes a model of machines, and both clocks add the same seconds to the same steps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.training.delays import DRAWN, rows_of

SLOW = fm.sim.Straggler(fm.sim.ShiftedExponential(0.01, 0.01), factor=4, workers=(1,))
SOURCE = {"x": np.ones((64, 4), np.float32)}
STEPS = 8


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def fit(cluster: Any, delays: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=4, delays=delays)
    return trainer.fit({"w": jnp.ones((4, 2))}, SOURCE, batch_size=16, steps=STEPS, seed=5)


def slowest() -> float:
    """The time of a synchronous fit that takes nothing but the delays."""
    return float(SLOW.draw(5, np.arange(4)[:, None], np.arange(STEPS)).max(axis=0).sum())


def test_a_simulated_step_takes_the_drawn_delay_of_the_slowest_replica() -> None:
    cluster = fm.SimulatedCluster(4, fm.sim.Constant(0.0), fm.sim.Network(0.0, float("inf")))
    assert fit(cluster, SLOW).virtual_seconds == pytest.approx(slowest())


@pytest.mark.parametrize("arithmetic", [True, False], ids=["arithmetic", "clocks only"])
def test_all_tasks_share_a_delay_so_that_a_cut_leaves_out_the_same_microbatches(
    threads_cluster: fm.Cluster, arithmetic: bool
) -> None:
    """Tasks that take no time of their own, such as additions, pause on real workers too."""
    delays, rule = {"worker:3": 3.0}, fm.policies.drop_compute(0.75)  # after 0.6 s of five tasks, or 0.857 s of seven
    left_out: list[int] = []
    sim = fm.SimulatedCluster(4, fm.sim.Constant(1e-3), fm.sim.Network(1e-4, 1e9), arithmetic=arithmetic)
    for cluster in (threads_cluster, sim):
        settings: dict[str, Any] = {"replicas": 4, "microbatches": 4, "placement": fm.Pipeline(1)}
        trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, policies=rule, delays=delays, **settings)
        result = trainer.fit({"w": jnp.ones((4, 2))}, SOURCE, batch_size=16, steps=1, seed=5)
        left_out.append(result.ledger.left_out)
    assert left_out[0] == left_out[1]


def test_real_steps_pause_for_the_drawn_delays(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster, SLOW)
    assert result.seconds >= slowest()
    assert result.ledger.used == 4 * STEPS


def test_draws_are_those_of_the_model_by_worker_and_step_and_bounded_in_number() -> None:
    rows = rows_of(SLOW, ("a", "b"), seed=3, clocks=10**7)
    assert [(name, len(row)) for name, row in rows] == [("a", DRAWN), ("b", DRAWN)]
    assert rows[1][1][7] == SLOW.seconds(3, 1, 7)


def test_anything_else_is_refused() -> None:
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(0.0, 1e9))
    with pytest.raises(TypeError, match=r"give a mapping from worker names to seconds, or a model of fm\.sim"):
        fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, delays=0.1)  # pyright: ignore[reportArgumentType]
