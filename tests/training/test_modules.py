"""Equinox modules are parameters as they are: functions and Python's numbers in them ride along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import BATCH, data
from tests.training.test_coupled_fits import simulated
from tests.training.test_untrained import WAYS, assert_close

STEPS = 4
ADAM = optax.adam(1e-2)


class Model(eqx.Module):
    """With a function, a number and a flag among its leaves, an array that is not trained, and a shared object."""

    mlp: eqx.nn.MLP
    drop: eqx.nn.Dropout
    order: jax.Array
    scale: float = 0.5

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.mlp(self.drop(x)[self.order] * self.scale)


def model(activation: Any = jax.nn.tanh) -> Model:
    width, out = data()["x"].shape[1], data()["y"].shape[1]
    mlp = eqx.nn.MLP(width, out, 16, 1, activation=activation, key=jax.random.key(0))
    order = np.random.default_rng(0).permutation(width).astype(np.int32)
    return Model(mlp, eqx.nn.Dropout(0.5, inference=True), jnp.asarray(order))


def loss(model: Model, batch: Any) -> Any:
    return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)


def loop(optimizer: Any) -> Model:
    here = model()
    state = optimizer.init(eqx.filter(here, eqx.is_inexact_array))
    source = data()
    for number in range(STEPS):
        order = epoch_order(len(source["x"]), 0, number // 4)[number % 4 * BATCH :][:BATCH]
        batch = {name: rest[order] for name, rest in source.items()}
        gradients = eqx.filter_jit(eqx.filter_grad(loss))(here, batch)
        updates, state = optimizer.update(gradients, state, eqx.filter(here, eqx.is_inexact_array))
        here = eqx.apply_updates(here, updates)
    return here


def fit(cluster: Any, start: Any = None, optimizer: Any = ADAM, **options: Any) -> fm.TrainingResult:
    about = {
        name: options.pop(name) for name in ("replicas", "placement", "microbatches", "policies") if name in options
    }
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, **about)
    given: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "progress": False, **options}
    return trainer.fit(model() if start is None else start, data(), **given)


def arrays(tree: Any) -> Any:
    return eqx.filter(tree, eqx.is_array)


@pytest.mark.parametrize("way", WAYS)
def test_a_fit_of_a_module_equals_the_loop(threads_cluster: fm.Cluster, way: str) -> None:
    found = fit(threads_cluster, **WAYS[way]).params
    wanted = loop(ADAM)
    assert_close(arrays(found), arrays(wanted))
    assert found.mlp.activation is wanted.mlp.activation
    assert (found.scale, found.drop.p, found.drop.inference) == (0.5, 0.5, True)
    np.testing.assert_allclose(jax.vmap(found)(data()["x"]), jax.vmap(wanted)(data()["x"]), rtol=1e-4, atol=1e-5)


def weights(tree: Any) -> Any:
    """The mask of an optimizer, of the module as it is."""
    return jax.tree_util.tree_map_with_path(lambda path, x: eqx.is_inexact_array(x) and "weight" in str(path[-1]), tree)


@pytest.mark.parametrize("of", ["whole", "arrays"])
def test_masks_of_whole_modules_and_of_their_arrays(threads_cluster: fm.Cluster, of: str) -> None:
    mask: Any = weights(model() if of == "whole" else arrays(model()))
    trained = weights(eqx.filter(model(), eqx.is_inexact_array))
    found = fit(threads_cluster, optimizer=optax.masked(optax.sgd(0.1), mask), on_loss="raise", **WAYS["two homes"])
    assert_close(arrays(found.params), arrays(loop(optax.masked(optax.sgd(0.1), trained))))


def test_functions_of_a_model_get_the_module(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(loss, ADAM, cluster=threads_cluster, placement=fm.Pipeline(2))
    result = trainer.fit(model(), data(), batch_size=BATCH, steps=2, validation=data(24, seed=1), progress=False)
    np.testing.assert_allclose(result.validation[-1]["loss"], loss(result.params, data(24, seed=1)), rtol=1e-4)
    found = trainer.evaluate(result.params, data(), lambda m, b: {"loss": loss(m, b)})
    np.testing.assert_allclose(found["loss"], loss(result.params, data()), rtol=1e-4)
    predicted = trainer.predict(result.params, data(), lambda m, b: jax.vmap(m)(b["x"]))
    np.testing.assert_allclose(predicted, jax.vmap(result.params)(data()["x"]), rtol=1e-4, atol=1e-5)
    assert "mlp/layers/0" in trainer.plan(model(), {k: v[:BATCH] for k, v in data().items()}).explain()


def test_a_fit_of_a_module_goes_on_from_a_snapshot(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    saved = fm.Checkpoint(tmp_path, every_steps=2)
    fit(threads_cluster, steps=2, checkpoint=saved)
    resumed = fit(threads_cluster, checkpoint=saved, resume="auto").params
    assert_close(arrays(resumed), arrays(fit(threads_cluster).params))
    assert resumed.mlp.activation is model().mlp.activation


def test_another_function_is_another_program(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(loss, ADAM, cluster=threads_cluster)
    losses = [
        trainer.fit(model(activation), data(), batch_size=BATCH, steps=1, progress=False).history[0]["loss"]
        for activation in (jax.nn.tanh, jax.nn.relu, jax.nn.tanh)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_a_simulated_fit_of_a_module_is_the_real_one(threads_cluster: fm.Cluster) -> None:
    real, virtual = (fit(cluster, replicas=2).params for cluster in (threads_cluster, simulated()))
    assert_close(arrays(virtual), arrays(real))


def test_what_no_program_can_hold_is_refused(threads_cluster: fm.Cluster) -> None:
    class Odd(eqx.Module):
        w: jax.Array
        names: Any

    start = Odd(jnp.ones(3), {1, 2})
    trainer = fm.Trainer(lambda m, b: jnp.mean(b["x"]) * m.w.sum(), ADAM, cluster=threads_cluster)
    with pytest.raises(TypeError, match=r"'names' is of type set, which is no array and cannot be hashed.* give"):
        trainer.fit(start, data(), batch_size=BATCH, steps=1, progress=False)
    plain = {"w": jnp.ones(3), "f": jax.nn.relu}
    with pytest.raises(TypeError, match=r"'f' is of type .*eqx.partition"):
        trainer.fit(plain, data(), batch_size=BATCH, steps=1, progress=False)
