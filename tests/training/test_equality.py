"""Everything synchronous equals the plain optax loop: to the bit on one device, else to float reassociation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import flowml as fm
from tests.training.reference import (
    BATCH,
    EXAMPLES,
    assert_close,
    assert_same,
    data,
    mlp,
    mlp_loss,
    optax_loop,
    predict,
)

SOURCE = data()
STEPS = 10  # two epochs of four batches, and half of a third


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2), name="conv1")(x))
        x = nn.relu(nn.Conv(6, (3, 3), name="conv2")(x))
        x = nn.relu(nn.Dense(8, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="fc2")(x)


def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "image": rng.normal(size=(EXAMPLES, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 3, EXAMPLES).astype(np.int32),
    }


def cnn_loss(params: Any, batch: Any) -> Any:
    logits = CNN().apply(params, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def cnn_params() -> Any:
    return CNN().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-2),
    "clipped adam": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2)),
    "schedule": lambda: optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, STEPS)),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.1, 0.0, STEPS)),
    "multi": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.05, momentum=0.9)},
        lambda params: {k: "a" if k == "fc1" else "b" for k in params},
    ),
    "masked": lambda: optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.sgd(0.05),
    ),
    "noisy": lambda: optax.chain(optax.add_noise(0.01, 0.5, jax.random.key(3)), optax.sgd(0.05)),
    "factored": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_device_equals_the_loop_to_the_bit(threads_cluster: fm.Cluster, name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, STEPS)
    trainer = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, placement=fm.Pipeline(1))
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    assert_same(result.params, expected.params)
    assert_same(result.opt_state, expected.opt_state)
    assert [record["loss"] for record in result.history] == expected.losses
    assert [record["step"] for record in result.history] == list(range(STEPS))
    assert [record["epoch"] for record in result.history] == [s // (EXAMPLES // BATCH) for s in range(STEPS)]
    assert result.ledger.used == STEPS


@pytest.mark.parametrize("name", ["clipped adam", "multi", "noisy", "factored", "injected"])
def test_replicas_stages_and_microbatches_equal_the_loop(threads_cluster: fm.Cluster, name: str) -> None:
    optimizer = OPTIMIZERS[name]()
    expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, STEPS)
    trainer = fm.Trainer(
        mlp_loss, optimizer, cluster=threads_cluster, replicas=2, placement=fm.Pipeline(2), microbatches=2
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    assert len({d.split("/")[0] for d in result.plan.devices}) == 4
    assert_close(result.params, expected.params)
    assert_close(result.opt_state, expected.opt_state)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)
    assert {r["replicas"] for r in result.history} == {2}


@pytest.mark.parametrize(
    "layout",
    [
        {"placement": fm.Pipeline(3)},
        {"placement": fm.Pipeline(2), "microbatches": 4, "schedule": "gpipe"},
        {"placement": fm.Pipeline(2), "microbatches": 3, "schedule": "1f1b"},
        {"replicas": 4},
        {"replicas": 3, "microbatches": 2},
        {"replicas": 2, "placement": {"fc0*": "worker:0", "*": "worker:1"}},
    ],
    ids=str,
)
def test_any_layout_equals_the_loop(threads_cluster: fm.Cluster, layout: dict[str, Any]) -> None:
    optimizer = optax.adam(1e-2)
    expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, STEPS)
    result = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, **layout).fit(
        mlp(), SOURCE, batch_size=BATCH, steps=STEPS
    )
    assert_close(result.params, expected.params)
    assert_close(result.opt_state, expected.opt_state)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)


def test_a_linen_cnn_to_the_bit_and_across_processes(threads_cluster: fm.Cluster, process_cluster: fm.Cluster) -> None:
    source, optimizer = images(), optax.adam(1e-2)
    expected = optax_loop(cnn_loss, cnn_params(), optimizer, source, 8)
    alone = fm.Trainer(cnn_loss, optimizer, cluster=threads_cluster).fit(
        cnn_params(), source, batch_size=BATCH, epochs=2
    )
    assert len(alone.plan.devices) == 1, "a small model is best on one device"
    assert_same(alone.params, expected.params)
    assert_same(alone.opt_state, expected.opt_state)
    two = fm.Trainer(cnn_loss, optimizer, cluster=process_cluster, placement=fm.Pipeline(2), microbatches=2).fit(
        cnn_params(), source, batch_size=BATCH, epochs=2
    )
    assert_close(two.params, expected.params)
    assert_close(two.opt_state, expected.opt_state)


def test_an_equinox_model(threads_cluster: fm.Cluster) -> None:
    model = eqx.nn.MLP(12, 2, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(batch["x"]) - batch["y"]) ** 2)

    optimizer = optax.adamw(1e-2)
    expected = optax_loop(loss, params, optimizer, SOURCE, STEPS)
    result = fm.Trainer(loss, optimizer, cluster=threads_cluster).fit(params, SOURCE, batch_size=BATCH, steps=STEPS)
    assert_same(result.params, expected.params)
    assert_same(result.opt_state, expected.opt_state)
    eqx.combine(result.params, static)(jnp.zeros(12))
    whole = fm.Trainer(loss, optimizer, cluster=threads_cluster).fit(model, SOURCE, batch_size=BATCH, steps=STEPS)
    assert whole.params.activation is model.activation
    assert_same(eqx.filter(whole.params, eqx.is_inexact_array), expected.params)


def test_aux_comes_with_each_step(threads_cluster: fm.Cluster) -> None:
    def loss(params: Any, batch: Any) -> Any:
        error = predict(params, batch["x"]) - batch["y"]
        value = jnp.mean(error**2)
        small = jnp.sum(jnp.abs(error) < 0.5)
        return value, {"worst": jnp.max(jnp.abs(error)), "small": small, "constant": 3.0, "loss": value, "twice": small}

    optimizer = optax.sgd(0.05)
    expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, 4)
    params, state = mlp(), None
    for layout in ({"placement": fm.Pipeline(1)}, {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 3}):
        result = fm.Trainer(loss, optimizer, cluster=threads_cluster, **layout).fit(
            params, SOURCE, batch_size=BATCH, steps=4, opt_state=state
        )
        assert_close(result.params, expected.params)
        first = result.history[0]["aux"]
        counted = first["small"]
        whole = loss(params, {k: v[_first_batch()] for k, v in SOURCE.items()})[1]
        assert int(counted) == int(whole["small"]), "counts are summed over shares of the batch"
        assert float(first["constant"]) == 3.0
        assert 0 < float(first["worst"]) <= float(whole["worst"]) + 1e-6
        assert float(first["loss"]) == pytest.approx(result.history[0]["loss"])
        assert int(first["twice"]) == int(counted)


def _first_batch() -> np.ndarray:
    from flowml.data import epoch_order

    return epoch_order(EXAMPLES, 0, 0)[:BATCH]


def dropout_loss(params: Any, batch: Any, rng: Any) -> Any:
    keep = jax.random.bernoulli(rng, 0.8, batch["x"].shape)
    return mlp_loss(params, {**batch, "x": jnp.where(keep, batch["x"] / 0.8, 0.0)})


def test_a_loss_with_a_key(threads_cluster: fm.Cluster) -> None:
    optimizer = optax.adam(1e-2)
    expected = optax_loop(dropout_loss, mlp(), optimizer, SOURCE, STEPS, seed=5, takes_key=True)
    result = fm.Trainer(dropout_loss, optimizer, cluster=threads_cluster).fit(
        mlp(), SOURCE, batch_size=BATCH, steps=STEPS, seed=5
    )
    assert_same(result.params, expected.params)
    assert [r["loss"] for r in result.history] == expected.losses
    for layout in ({"placement": fm.Pipeline(2)}, {"microbatches": 3}):
        shared = optax_loop(
            dropout_loss,
            mlp(),
            optimizer,
            SOURCE,
            STEPS,
            seed=5,
            takes_key=True,
            items=2,
            microbatches=layout.get("microbatches", 1),
        )
        trainer = fm.Trainer(dropout_loss, optimizer, cluster=threads_cluster, replicas=2, **layout)
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS, seed=5)
        assert_close(result.params, shared.params)


def test_weights_tied_across_stages(threads_cluster: fm.Cluster) -> None:
    params = {"embed": mlp()["fc0"]["kernel"], "body": mlp()["fc1"], "unused": jnp.ones(3), "scale": jnp.float32(1.0)}

    def loss(params: Any, batch: Any) -> Any:
        with fm.layer("embed"):
            h = jnp.tanh(batch["x"] @ params["embed"])
        with fm.layer("body"):
            h = jnp.tanh(h @ params["body"]["kernel"] + params["body"]["bias"])
        with fm.layer("unembed"):
            return jnp.mean((params["scale"] * h @ params["embed"].T - batch["x"]) ** 2)

    placement = {"embed": "worker:0", "body": "worker:0", "unembed": "worker:1", "*": "worker:1"}
    for optimizer in (optax.adam(1e-2), optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))):
        expected = optax_loop(loss, params, optimizer, SOURCE, STEPS)
        result = fm.Trainer(
            loss, optimizer, cluster=threads_cluster, replicas=2, placement=placement, microbatches=2
        ).fit(params, SOURCE, batch_size=BATCH, steps=STEPS)
        assert_close(result.params, expected.params)
        assert_close(result.opt_state, expected.opt_state)
        assert_same(result.params["unused"], params["unused"])


def test_parameters_whose_gradients_are_one_value(threads_cluster: fm.Cluster) -> None:
    params = {"a": {"w": jnp.zeros(2)}, "b": {"w": jnp.ones(2)}, "c": {"w": jnp.ones((12, 2))}}

    def loss(params: Any, batch: Any) -> Any:
        y = batch["x"] @ params["c"]["w"] + params["a"]["w"] + params["b"]["w"]
        return jnp.mean((y - batch["y"]) ** 2)

    expected = optax_loop(loss, params, optax.sgd(0.1), SOURCE, STEPS)
    for layout in ({}, {"placement": fm.Pipeline(2)}, {"replicas": 2, "microbatches": 2}):
        result = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster, **layout).fit(
            params, SOURCE, batch_size=BATCH, steps=STEPS
        )
        assert_close(result.params, expected.params)


def test_dtypes_stay(threads_cluster: fm.Cluster) -> None:
    params = {**mlp(dtype=jnp.bfloat16), "fc1": mlp()["fc1"]}

    def loss(params: Any, batch: Any) -> Any:
        return mlp_loss(params, batch).astype(jnp.float32)

    optimizer = optax.adam(1e-2, mu_dtype=jnp.float32)
    expected = optax_loop(loss, params, optimizer, SOURCE, STEPS)
    alone = fm.Trainer(loss, optimizer, cluster=threads_cluster).fit(params, SOURCE, batch_size=BATCH, steps=STEPS)
    assert_same(alone.params, expected.params)
    assert_same(alone.opt_state, expected.opt_state)
    parted = fm.Trainer(loss, optimizer, cluster=threads_cluster, replicas=2, placement=fm.Pipeline(2)).fit(
        params, SOURCE, batch_size=BATCH, steps=STEPS
    )
    assert_close(parted.params, expected.params, tolerance=2e-2)  # bfloat16 has 8 bits
    assert_close(parted.opt_state, expected.opt_state, tolerance=5e-2)


def test_numpy_and_python_numbers_for_parameters(threads_cluster: fm.Cluster) -> None:
    params = {"w": np.full((12, 2), 0.1), "scale": 1.0}
    source = {"x": SOURCE["x"].astype(np.float64), "y": SOURCE["y"]}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params["w"] * params["scale"] - batch["y"]) ** 2)

    expected = optax_loop(loss, jax.tree.map(jnp.asarray, params), optax.adam(1e-2), source, STEPS)
    trainer = fm.Trainer(loss, optax.adam(1e-2), cluster=threads_cluster)
    result = trainer.fit(params, source, batch_size=BATCH, steps=STEPS)
    assert_close(result.params, expected.params)
    assert trainer.plan(params, {k: v[:BATCH] for k, v in source.items()}) is result.plan


def test_fits_continue(threads_cluster: fm.Cluster) -> None:
    optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, 8))
    expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, 8, shuffle=False)
    trainer = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, replicas=2, placement=fm.Pipeline(2))
    first = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=1, shuffle=False)
    second = trainer.fit(first.params, SOURCE, batch_size=BATCH, steps=4, shuffle=False, opt_state=first.opt_state)
    assert_close(second.params, expected.params)
    assert_close(second.opt_state, expected.opt_state)
    np.testing.assert_allclose([r["loss"] for r in first.history + second.history], expected.losses, rtol=1e-5)
    again = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=2, shuffle=False)
    assert_same(again.params, second.params)


def test_the_seed_decides(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2, placement=fm.Pipeline(2))
    runs = [trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=3, seed=seed) for seed in (1, 1, 2)]
    assert_same(runs[0].params, runs[1].params)
    assert [r["loss"] for r in runs[0].history] == [r["loss"] for r in runs[1].history]
    assert runs[0].history[0]["loss"] != runs[2].history[0]["loss"]
