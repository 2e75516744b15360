"""The state of flax linen, flax nnx, equinox and haiku models, as the page on training shows it."""

from __future__ import annotations

import importlib
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import BATCH, EXAMPLES, FEATURES, data

SOURCE = data()
MICROBATCHES = 2
STEPS = 5


def mean_error(y: Any, batch: Any) -> Any:
    return jnp.mean((y - batch["y"]) ** 2)


def same_as_the_loop(loss: Any, params: Any, state: Any, cluster: Any) -> None:
    """Train on one device with jit, and on two stages, and compare everything."""
    optimizer = optax.sgd(0.02)
    trainer = fm.Trainer(
        loss, optimizer, cluster=cluster, placement=fm.Pipeline(stages=2), microbatches=MICROBATCHES, has_state=True
    )
    result = trainer.fit(params, SOURCE, batch_size=BATCH, steps=STEPS, state=state, progress=False)
    gradient, opt_state, rows = jax.jit(jax.value_and_grad(loss, has_aux=True)), optimizer.init(params), BATCH // 2
    for step in range(STEPS):
        order = epoch_order(EXAMPLES, 0, step * BATCH // EXAMPLES)[step * BATCH % EXAMPLES :][:BATCH]
        found: list[Any] = []
        for part in range(MICROBATCHES):
            mine = order[part * rows :][:rows]
            (_, state), gradients = gradient(params, state, {k: v[mine] for k, v in SOURCE.items()})
            found.append(gradients)
        updates, opt_state = optimizer.update(jax.tree.map(lambda *g: sum(g) / len(g), *found), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.structure((result.params, result.state)) == jax.tree.structure((params, state))
    for a, b in zip(jax.tree.leaves((result.params, result.state)), jax.tree.leaves((params, state)), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_linen_batch_stats(threads_cluster: fm.Cluster) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.BatchNorm(use_running_average=False, name="norm1")(nn.Dense(16, name="fc1")(x))
            x = nn.BatchNorm(use_running_average=False, name="norm2")(nn.Dense(16, name="fc2")(nn.relu(x)))
            return nn.Dense(2, name="fc3")(nn.relu(x))

    model = Model()
    variables: Any = model.init(jax.random.key(0), jnp.zeros((2, FEATURES)))

    def loss(params: Any, state: Any, batch: Any) -> Any:
        y, new = model.apply({"params": params, **state}, batch["x"], mutable=["batch_stats"])
        return mean_error(y, batch), new

    same_as_the_loop(loss, variables["params"], {"batch_stats": variables["batch_stats"]}, threads_cluster)


def test_nnx_batch_stats_and_dropout_counts(threads_cluster: fm.Cluster) -> None:
    class Model(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.fc1 = nnx.Linear(FEATURES, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.fc2 = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.fc2(self.drop(nnx.relu(self.norm(self.fc1(x)))))

    graphdef, params, state = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, state: Any, batch: Any) -> Any:
        model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, state))  # for the loop: jax.grad needs it
        y = model(batch["x"])
        return mean_error(y, batch), nnx.split(model, nnx.Param, ...)[2]

    same_as_the_loop(loss, params, state, threads_cluster)


def test_equinox_state(threads_cluster: fm.Cluster) -> None:
    class Model(eqx.Module):
        fc1: Any
        norm: Any
        fc2: Any

        def __init__(self, key: Any) -> None:
            one, two = jax.random.split(key)
            self.fc1, self.fc2 = eqx.nn.Linear(FEATURES, 16, key=one), eqx.nn.Linear(16, 2, key=two)
            self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch")

        def __call__(self, x: Any, state: Any) -> Any:
            x, state = self.norm(self.fc1(x), state)
            return self.fc2(jax.nn.relu(x)), state

    model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, state: Any, batch: Any) -> Any:
        model = eqx.combine(params, static)
        y, new = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(batch["x"], state)
        return mean_error(y, batch), new

    same_as_the_loop(loss, params, state, threads_cluster)


def test_haiku_state(threads_cluster: fm.Cluster) -> None:
    hk: Any = importlib.import_module("haiku")  # it has no types

    def forward(x: Any) -> Any:
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), is_training=True)
        return hk.Linear(2)(jax.nn.relu(x))

    model = hk.transform_with_state(forward)
    params, state = model.init(jax.random.key(0), SOURCE["x"][:2])

    def loss(params: Any, state: Any, batch: Any) -> Any:
        y, new = model.apply(params, state, None, batch["x"])
        return mean_error(y, batch), new

    same_as_the_loop(loss, params, state, threads_cluster)
