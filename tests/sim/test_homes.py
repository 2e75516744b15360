"""Applies take virtual time: a version is published when its apply is done, and a worker does one at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEPS = 5
SOURCE = {"x": np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)}
PARAMS = {"a": np.ones((4, 8), np.float32), "b": np.ones((8, 2), np.float32)}
IDLE = fm.sim.Network(0.0, float("inf"))


def loss(params: Any, batch: Any) -> Any:
    x = batch["x"] @ params["a"]
    return jnp.mean(((x @ params["b"] if "b" in params else x) - 1) ** 2)


def fit(
    homes: fm.sim.Homes, workers: int, policy: fm.Policy, params: Any = PARAMS, *, arithmetic: bool = False
) -> fm.TrainingResult:
    cluster = fm.SimulatedCluster(workers, fm.sim.Constant(0.1), IDLE, homes=homes, arithmetic=arithmetic)
    trainer = fm.Trainer(loss, optax.adam(0.1), cluster=cluster, replicas=workers, policies=policy)
    return trainer.fit(params, SOURCE, batch_size=8, steps=STEPS)


def test_applies_of_one_home_follow_one_another() -> None:
    """Four replicas push at the same time, and each waits for the version that has its own push. After that they stay
    apart by the time of an apply, so none waits for another one again."""
    result = fit(fm.sim.Homes(apply_s=0.02), 4, fm.policies.asynchronous(), {"a": np.ones((4, 2), np.float32)})
    assert result.virtual_seconds == pytest.approx(STEPS * (0.1 + 0.02) + 3 * 0.02)


def test_a_synchronous_step_takes_an_apply() -> None:
    result = fit(fm.sim.Homes(apply_s=0.2), 2, fm.Policy())
    assert result.virtual_seconds == pytest.approx(STEPS * (0.1 + 0.2))


def test_an_apply_takes_the_bytes_of_all_its_contributions() -> None:
    homes = fm.sim.Homes(bytes_per_s=10_000)
    nbytes = PARAMS["a"].nbytes
    result = fit(homes, 4, fm.policies.synchronous())
    assert result.virtual_seconds == pytest.approx(STEPS * (0.1 + 4 * nbytes / 10_000))


def test_each_replica_applies_a_sum_itself() -> None:
    result = fit(fm.sim.Homes(apply_s=0.02), 4, fm.policies.all_reduce())
    assert result.virtual_seconds == pytest.approx(STEPS * (0.1 + 0.02))


def test_the_arithmetic_is_the_same() -> None:
    given, taken = (fit(homes, 2, fm.Policy(), arithmetic=True) for homes in (fm.sim.Homes(), fm.sim.Homes(0.3, 1e3)))
    jax.tree.map(np.testing.assert_array_equal, given.params, taken.params)
    jax.tree.map(np.testing.assert_array_equal, given.opt_state, taken.opt_state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.sim.Homes(apply_s=-1), r"Homes: apply_s=-1 makes no sense; give a finite number of at least 0"),
        (lambda: fm.sim.Homes(apply_s=float("nan")), r"Homes: apply_s=nan makes no sense"),
        (lambda: fm.sim.Homes(bytes_per_s=0), r"Homes: bytes_per_s=0 makes no sense; give a finite number above 0"),
        (
            lambda: fm.SimulatedCluster(1, fm.sim.Constant(0.1), IDLE, homes=0.1),  # pyright: ignore
            r"SimulatedCluster\(homes=0\.1\) is of type float; give a model of fm.sim",
        ),
    ],
)
def test_costs_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(fm.FlowmlError, match=message):
        make()
