"""Stochastic rounding with error feedback loses no more than it is given, so that what is kept does not grow."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.policy.filters import Context, Form, decode, encode

CHAINS = {
    "1 bit": (fm.filters.quantise(1, stochastic=True).with_error_feedback(),),
    "1 bit, the whole array": (fm.filters.quantise(1, stochastic=True, block=0).with_error_feedback(),),
    "2 bits": (fm.filters.quantise(2, stochastic=True).with_error_feedback(),),
    "2 bits of the largest": (fm.filters.top_k(0.5).with_error_feedback(), fm.filters.quantise(2, stochastic=True)),
    "4 bits": (fm.filters.quantise(4, stochastic=True, block=0).with_error_feedback(),),
    "8 bits": (fm.filters.quantise(8, stochastic=True, block=7).with_error_feedback(),),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_kept_stays_bounded(name: str) -> None:
    """The residual of a constant value settles, and what has arrived is on average the value."""
    chain, rng = CHAINS[name], np.random.default_rng(0)
    value = rng.normal(size=1000).astype(np.float32) ** 3
    state, arrived, pushes = {}, np.zeros_like(value), 400
    for push in range(pushes):
        before = value + state.get("residual", np.float32(0))
        wire, state = encode(chain, value, state, Context(seed=(push,), clock=push))
        decoded, _ = decode(chain, iter(wire), Form(value.shape, value.dtype), {})
        arrived += decoded
        assert np.linalg.norm(state["residual"]) <= np.linalg.norm(before) * (1 + 1e-6)
    assert np.linalg.norm(arrived / pushes - value) < 0.5 * np.linalg.norm(value)


def test_one_random_bit_with_error_feedback_learns() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16)).astype(np.float32)
    source = {"x": x, "y": x @ rng.normal(size=(16, 4)).astype(np.float32)}

    def loss(params, batch):
        return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    policy = fm.Policy(filters=CHAINS["1 bit, the whole array"])
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=2, policies=policy)
    params = {"w": jnp.zeros((16, 4))}
    result = trainer.fit(params, source, batch_size=32, steps=60, progress=False)
    assert loss(result.params, source) < loss(params, source) / 2
