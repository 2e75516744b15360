"""Validation during a fit measures the parameters between two steps, and its results are in the records."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss, optax_loop, predict

HELD_OUT = data(50, seed=3)
STEPS = 7


def metrics(params: Any, batch: Any) -> Any:
    error = predict(params, batch["x"]) - batch["y"]
    return {"loss": jnp.mean(error**2), "close": jnp.mean(jnp.abs(error) < 0.5)}


def fit(cluster: Any, loss: Any = mlp_loss, options: Any = None, **given: Any) -> Any:
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, **(options or {}))
    return trainer.fit(mlp(), data(), batch_size=BATCH, steps=STEPS, progress=False, **given)


@pytest.mark.parametrize(
    "options",
    [{}, {"replicas": 2, "placement": fm.Pipeline(stages=2), "microbatches": 2}],
    ids=["one device", "replicas and stages"],
)
def test_the_results_are_those_of_the_plain_loop(threads_cluster: fm.Cluster, options: Any) -> None:
    seen: list[tuple[int, Any]] = []
    result = fit(
        threads_cluster,
        options=options,
        validation=(HELD_OUT, metrics),
        validate_every=3,
        callbacks=[lambda record: seen.append((record["step"], record.get("validation")))],
    )
    assert [step for step, _ in seen] == list(range(STEPS)), "no record is lost or out of order"
    assert [step for step, found in seen if found] == [2, 5, 6]
    assert result.validation == [{"step": step, **found} for step, found in seen if found]
    for found in result.validation:
        wanted = metrics(optax_loop(mlp_loss, mlp(), optax.sgd(0.1), data(), found["step"] + 1).params, HELD_OUT)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_a_source_alone_measures_the_loss_each_epoch(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster, validation=HELD_OUT)
    assert [found["step"] for found in result.validation] == [3, 6], "an epoch has 4 steps, and one is at the end"
    np.testing.assert_allclose(result.validation[-1]["loss"], mlp_loss(result.params, HELD_OUT), rtol=1e-5)


def test_a_weighted_loss_is_measured_by_its_weights(threads_cluster: fm.Cluster) -> None:
    def masked(params: Any, batch: Any) -> Any:
        rows = jnp.sum((predict(params, batch["x"]) - batch["y"]) ** 2, axis=1)
        mask = (batch["x"][:, 0] > 0).astype(jnp.float32)
        return jnp.sum(rows * mask) / jnp.maximum(mask.sum(), 1), {"rows": mask.sum()}

    result = fit(threads_cluster, masked, {"weight": "rows", "replicas": 2}, validation=HELD_OUT)
    np.testing.assert_allclose(result.validation[-1]["loss"], masked(result.params, HELD_OUT)[0], rtol=1e-5)


def test_replicas_without_common_clocks_are_measured(threads_cluster: fm.Cluster) -> None:
    options = {"replicas": 2, "policies": fm.policies.asynchronous()}
    result = fit(threads_cluster, options=options, validation=(HELD_OUT, metrics), validate_every=3)
    assert [record["step"] for record in result.history] == list(range(STEPS))
    assert result.validation[-1]["step"] == STEPS - 1 and len(result.validation) >= 2
    np.testing.assert_allclose(result.validation[-1]["loss"], mlp_loss(result.params, HELD_OUT), rtol=1e-5)


def test_a_loss_with_state_is_measured_with_it(threads_cluster: fm.Cluster) -> None:
    def loss(params: Any, state: Any, batch: Any) -> Any:
        return mlp_loss(params, {**batch, "x": batch["x"] - state["mean"]}), {"mean": jnp.mean(batch["x"], axis=0)}

    given = {"state": {"mean": jnp.zeros(12)}, "validation": HELD_OUT, "validate_every": 4}
    result = fit(threads_cluster, loss, {"has_state": True, "placement": fm.Pipeline(stages=2)}, **given)
    wanted = loss(result.params, result.state, HELD_OUT)[0]
    np.testing.assert_allclose(result.validation[-1]["loss"], wanted, rtol=1e-5)


def test_checkpoints_keep_their_rhythm_beside_validation(threads_cluster: fm.Cluster, tmp_path: Any) -> None:
    checkpoint = fm.Checkpoint(tmp_path / "run", every_steps=2, keep=9)
    result = fit(threads_cluster, validation=HELD_OUT, validate_every=3, checkpoint=checkpoint)
    assert [found["step"] for found in result.validation] == [2, 5, 6]
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run").iterdir())
    assert {2, 7} <= {*steps} <= {2, 4, 6, 7}, "not after steps that were only measured"


def test_what_cannot_be_measured_is_refused(threads_cluster: fm.Cluster) -> None:
    def draws(params: Any, batch: Any, rng: Any) -> Any:
        return mlp_loss(params, batch)

    with pytest.raises(ValueError, match=r"draws takes a key.*give validation=\(source, metrics\)"):
        fit(threads_cluster, draws, validation=HELD_OUT)
    with pytest.raises(ValueError, match="validate_every"):
        fit(threads_cluster, validation=HELD_OUT, validate_every=0)
    with pytest.raises(ValueError, match="validate_every is for validation="):
        fit(threads_cluster, validate_every=3)
