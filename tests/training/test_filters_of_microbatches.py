"""Microbatches do not change what filters choose: a replica's gradient is one value, in however many pieces it came."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

FILTERS = {
    "significance": fm.filters.significance(0.3),
    "significance without decay": fm.filters.significance(0.3, decay=None),
    "kkt": fm.filters.kkt(0.3),
    "top_k": fm.filters.top_k(0.3).with_error_feedback(),
    "quantise": fm.filters.quantise(8),
    "low_rank": fm.filters.low_rank(1).with_error_feedback(),
}


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def fitted(policy: fm.Policy, microbatches: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    source = {"x": x, "y": x @ rng.normal(size=(8, 4)).astype(np.float32)}
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=2, policies=policy, microbatches=microbatches)
    result = trainer.fit({"w": jnp.eye(8, 4)}, source, batch_size=16, steps=6, progress=False)
    return np.asarray(result.params["w"]), result.traffic["w"]["pushed_bytes"]


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_chooses_alike_for_any_number_of_microbatches(name: str) -> None:
    policy = fm.Policy(filters=(FILTERS[name],))
    (one, sent), (four, also) = fitted(policy, 1), fitted(policy, 4)
    np.testing.assert_allclose(one, four, atol=0.01 if name == "quantise" else 1e-5)
    assert sent == also


def test_significance_of_a_change_is_that_of_the_change_itself() -> None:
    """The change of two steps of a replica, whose parameters begin at 1, against a threshold between two of them."""
    policy = fm.policies.local_sgd(2, filters=(fm.filters.significance(0.25, decay=None),))
    rates = np.array([0.1, 0.2], np.float32)  # of the gradients: changes of 0.2 and 0.4 in two steps

    def linear(params, batch):
        return jnp.mean(batch["x"] @ params["w"])

    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    trainer = fm.Trainer(linear, optax.sgd(1.0), cluster=cluster, replicas=2, policies=policy, microbatches=2)
    source = {"x": np.tile(rates, (32, 1))}
    result = trainer.fit({"w": jnp.ones(2)}, source, batch_size=8, steps=2, progress=False)
    np.testing.assert_allclose(result.params["w"], [1.0, 0.6], atol=1e-6)
