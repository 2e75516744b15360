"""The buffers of filters on a stage and at a home: nothing is lost over pushes that count, and a receiver checks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.plan import StoreSpec
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec
from flowml_runtime import wire
from flowml_runtime.worker.training.filtered import Decoder, Encoder

SHAPE = (12, 9)


def stores(filters: tuple[Any, ...], **knobs: Any) -> tuple[StoreSpec, ...]:
    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch @ params["w"]) ** 2)

    spec = TrainingSpec(loss, optax.sgd(0.1), replicas=2, policies=fm.Policy(filters=filters, **knobs))
    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    batch = jax.ShapeDtypeStruct((4, SHAPE[0]), jnp.float32)
    training = compile_training(spec, params, batch, ["worker:0", "worker:1"]).plan.training
    assert training is not None
    return training.stores


CHAINS = [
    (fm.filters.top_k(0.1).with_error_feedback(), fm.filters.key_cache(), fm.filters.compress()),
    (fm.filters.random_k(0.2).with_error_feedback(), fm.filters.quantise(8)),
    (fm.filters.low_rank(1).with_error_feedback(), fm.filters.quantise(4)),
    (fm.filters.significance(0.5), fm.filters.key_cache()),
    (fm.filters.sign().with_error_feedback(),),
]
STORES = {chain: stores(chain) for chain in CHAINS}


def message(clock: int, replica: int = 1, **changes: Any) -> wire.Contribution:
    ids: dict[str, Any] = {"plan_id": "p", "run": 0, "incarnation": 0, "base_version": 0, "weight": 1}
    return wire.Contribution(**ids | {"store": 0, "part": 0, "replica": replica, "clock": clock} | changes)


def gradient(clock: int) -> np.ndarray:
    return np.random.default_rng(clock).normal(size=SHAPE).astype(np.float32)


PARAMETER = np.ones(SHAPE, np.float32)


@given(st.sampled_from(CHAINS), st.lists(st.booleans(), min_size=1, max_size=12))
def test_pushes_that_count_and_what_is_kept_add_up(chain: Any, fates: list[bool]) -> None:
    """A dropped push takes nothing from the residual, and its own gradient stays dropped."""
    encoder, decoder = Encoder(STORES[chain], replica=1, seed=0), Decoder(STORES[chain])
    given, arrived = np.zeros(SHAPE), np.zeros(SHAPE)
    for clock, counts in enumerate(fates):
        sent, arrays = encoder.encode(message(clock), [gradient(clock)], [PARAMETER])
        assert [(s.shape, s.dtype) for s in sent.specs] == [(a.shape, a.dtype.name) for a in arrays]
        (decoded,) = decoder.decode(sent, arrays)  # a home decodes what it drops, if keys are cached
        encoder.settle(clock, (0,), counts=counts)
        if counts:
            given += gradient(clock)
            arrived += decoded
        residual = encoder.buffers[0, 0, 0].get("residual", np.zeros(SHAPE))
        np.testing.assert_allclose(arrived + residual, given, atol=1e-4)


def test_replicas_have_buffers_and_seeds_of_their_own() -> None:
    chain = CHAINS[1]
    encoders = [Encoder(STORES[chain], replica=r, seed=0) for r in range(2)]
    first, second = (e.encode(message(0, r), [gradient(0)], None)[1] for r, e in enumerate(encoders))
    assert first[0] != second[0], "the seeds of random_k"
    again = Encoder(STORES[chain], replica=0, seed=0).encode(message(0, 0), [gradient(0)], None)[1]
    assert [a.tobytes() for a in again] == [a.tobytes() for a in first]


def test_a_home_keeps_the_keys_of_each_replica() -> None:
    chain = CHAINS[0]
    encoders, decoder = [Encoder(STORES[chain], replica=r, seed=0) for r in range(2)], Decoder(STORES[chain])
    for clock in (0, 0, 1):
        for replica, encoder in enumerate(encoders):
            sent, arrays = encoder.encode(message(clock, replica), [gradient(replica)], None)
            decoder.decode(sent, arrays)


def test_what_filters_cannot_have_made_is_an_error_that_names_the_sender() -> None:
    chain = CHAINS[1]
    encoder, decoder = Encoder(STORES[chain], replica=1, seed=0), Decoder(STORES[chain])
    sent, arrays = encoder.encode(message(3), [gradient(0)], None)
    for wrong in (arrays[:-1], arrays[::-1], [a[:-1] for a in arrays], []):
        with pytest.raises(fm.FlowmlError, match="replica 1 sent for layer 'w' at clock 3 what its filters cannot"):
            decoder.decode(sent, wrong)
    with pytest.raises(fm.FlowmlError, match="replica 1 sent 2 arrays for layer 'w' at clock 3, where 1"):
        decoder.decode(sent, [*arrays, arrays[0]])
