"""A home sends a replica only the versions that it takes, so bytes fall with the rhythm of takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

REPLICAS, STEPS, WIDTH = 4, 32, 16
NBYTES = WIDTH * 3 * 4
X = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
SOURCE = {"x": X, "y": (X @ np.random.default_rng(1).normal(size=(WIDTH, 3)) / 4).astype(np.float32)}
PARAMS = {"w": np.zeros((WIDTH, 3), np.float32)}
POLICIES = {
    "downpour": fm.policies.downpour(1, 8),
    "downpour, push 4": fm.policies.downpour(4, 8),
    "downpour, Adagrad": fm.policies.downpour(2, 4, optax.adagrad(0.1)),
    "gradients": fm.policies.asynchronous(every=4),
    "gradients, pull 8": fm.policies.asynchronous(every=fm.Every(1, 8)),
    "softsync": fm.Policy(staleness=fm.UNBOUNDED, quorum=fm.Quorum(2, late="fold"), every=4),
}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def machines(slow: float = 4.0) -> fm.SimulatedCluster:
    compute = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.3), factor=slow, workers=(1,))
    return fm.SimulatedCluster(REPLICAS, compute, fm.sim.Network(1e-4, 1e7))


def fit(cluster: Any, policy: fm.Policy) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.sgd(0.02), cluster=cluster, replicas=REPLICAS, policies=policy)
    return trainer.fit(PARAMS, SOURCE, batch_size=16, steps=STEPS, progress=False)


def most_versions(result: fm.TrainingResult, pull: int) -> int:
    """The most versions that cross to a replica that is not at the home: the first, and one for each take."""
    return sum(1 + tally.used // pull for tally in result.ledger.replicas[1:])


def check(result: fm.TrainingResult, policy: fm.Policy) -> None:
    sent = result.traffic["w"]["published_wire_bytes"]
    assert policy.every.pull is not None
    assert 0 < sent <= most_versions(result, policy.every.pull) * NBYTES
    assert loss(result.params, SOURCE) < 0.9 * loss(PARAMS, SOURCE)


@pytest.mark.parametrize("name", POLICIES)
def test_in_virtual_time(name: str) -> None:
    result = fit(machines(), POLICIES[name])
    check(result, POLICIES[name])
    every = POLICIES[name].every
    assert result.traffic["w"]["published_wire_bytes"] == most_versions(result, every.pull or 1) * NBYTES


@pytest.mark.parametrize("name", POLICIES)
def test_on_real_workers(threads_cluster: fm.Cluster, name: str) -> None:
    check(fit(threads_cluster, POLICIES[name]), POLICIES[name])


def test_takes_every_8_steps_need_an_eighth_of_the_bytes_and_learn_as_much() -> None:
    seldom, often = fit(machines(), fm.policies.downpour(1, 8)), fit(machines(), fm.policies.downpour(1, 1))
    bytes_of = [result.traffic["w"]["published_wire_bytes"] for result in (seldom, often)]
    assert bytes_of[0] * 8 < bytes_of[1]
    assert seldom.traffic["w"]["pushed_wire_bytes"] <= often.traffic["w"]["pushed_wire_bytes"] + 4 * NBYTES
    assert often.traffic["w"]["published_wire_bytes"] > STEPS * REPLICAS * (REPLICAS - 2) * NBYTES
    assert loss(seldom.params, SOURCE) < 2 * loss(often.params, SOURCE)


def test_lossless_filters_of_what_is_published_change_no_value() -> None:
    plain = fit(machines(), fm.policies.downpour(1, 8))
    packed = fit(machines(), fm.Policy(**_fields(fm.policies.downpour(1, 8)), pull_filters=(fm.filters.compress(),)))
    assert packed.traffic["w"]["published_wire_bytes"] < 2 * plain.traffic["w"]["published_wire_bytes"]
    np.testing.assert_allclose(packed.params["w"], plain.params["w"], atol=1e-5)


def _fields(policy: fm.Policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in ("staleness", "every", "payload", "apply")}


def test_a_fit_that_goes_on_takes_as_often(tmp_path: Path) -> None:
    """Each replica begins with the version of the snapshot, also between two takes."""
    policy = fm.policies.downpour(1, 8)
    trainer = fm.Trainer(loss, optax.sgd(0.02), cluster=machines(), replicas=REPLICAS, policies=policy)
    common: dict[str, Any] = {"checkpoint": fm.Checkpoint(tmp_path, every_steps=5), "resume": "auto"}
    trainer.fit(PARAMS, SOURCE, batch_size=16, steps=STEPS // 2, progress=False, **common)
    rest = trainer.fit(PARAMS, SOURCE, batch_size=16, steps=STEPS, progress=False, **common)
    assert 0 < rest.traffic["w"]["published_wire_bytes"] <= most_versions(rest, 8) * NBYTES
    assert loss(rest.params, SOURCE) < 0.9 * loss(PARAMS, SOURCE)


def test_advice_counts_the_bytes_that_are_sent() -> None:
    trainer = fm.Trainer(loss, optax.sgd(0.02), cluster=machines(), replicas=REPLICAS)
    tried = {str(pull): fm.policies.downpour(8, pull) for pull in (4, 8)}
    found = fm.advise(trainer, PARAMS, {"x": X[:16], "y": SOURCE["y"][:16]}, policies=tried, steps=STEPS)
    assert found["8"].nbytes < found["4"].nbytes / 2
