"""A loss that is NaN or infinite while all gradients are finite: the end of the fit, or counted and left out."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import assert_close

ROWS, STEPS = 8, 6
BAD_STEP, BAD_REPLICA = 2, 1

KINDS = ["threads_cluster", "process_cluster"]
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"microbatches": 2},
    {"policies": fm.policies.all_reduce()},
    {"policies": fm.policies.every(2)},
]


def loss(params: Any, batch: Any) -> Any:
    """The gradient does not see what is added to the value."""
    return jnp.mean(batch["x"] @ params["w"]) ** 2 + jax.lax.stop_gradient(jnp.sum(batch["added"]))


def params() -> dict[str, Any]:
    return {"w": jnp.full((4, 2), 0.5)}


def source(added: float) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(STEPS * ROWS, 4)).astype(np.float32)
    values = np.zeros(len(x), np.float32)
    values[BAD_STEP * ROWS + BAD_REPLICA * ROWS // 2] = added
    return {"x": x, "added": values}


def fit(cluster: fm.Cluster, added: float = np.nan, **options: Any) -> fm.TrainingResult:
    options = {"replicas": 2, "placement": fm.Pipeline(1), **options}
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "loss is no mean over examples")
        return trainer.fit(params(), source(added), batch_size=ROWS, steps=STEPS, shuffle=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_the_fit_ends_with_it(kind: str, added: float, options: Any, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    with pytest.raises(
        fm.WorkerError, match=rf"failed at step 2: the loss of replica 1 is {added};.*'refuse'"
    ) as error:
        fit(cluster, added, on_nonfinite="raise", **options)
    assert error.value.step == BAD_STEP


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_it_is_left_out_counted_and_named(kind: str, options: Any, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    with pytest.warns(fm.FlowmlWarning, match=r"loss of replica 1 at step 2 is NaN or infinite although") as caught:
        result = fit(cluster, **options)
    assert len(caught) == 1
    assert result.ledger.nonfinite == {}
    assert result.ledger.nonfinite_losses == {1: 1}
    assert "losses not finite and left out of the history: replica 1 × 1" in str(result.ledger)
    assert [r["replicas"] for r in result.history] == [2, 2, 1, 2, 2, 2]
    assert all(math.isfinite(r["loss"]) for r in result.history)
    assert_close(result.params, fit(cluster, 0.0, **options).params)


def test_it_may_be_in_the_mean(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster, on_nonfinite="apply")
    assert math.isnan(result.history[BAD_STEP]["loss"])
    assert result.ledger.nonfinite_losses == {}


def test_a_finite_loss_ends_nothing(process_cluster: fm.Cluster) -> None:
    assert len(fit(process_cluster, 1.0, on_nonfinite="raise").history) == STEPS
