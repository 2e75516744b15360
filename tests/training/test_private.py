"""Optimizers that clip the gradient of each example train as in a plain loop with `vmap(grad)`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flowml as fm
from flowml.data import epoch_order
from flowml.errors import UnsupportedError, WorkerError
from flowml.training.step import item_key
from tests.training.optimizers import PRIVATE
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss
from tests.training.test_coupled_fits import simulated

STEPS = 5
WAYS: dict[str, dict[str, Any]] = {
    "one home": {"replicas": 1},
    "two homes": {"replicas": 2},
    "two stages": {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2},
    "sums": {"replicas": 2, "policies": fm.policies.all_reduce()},
}


def dpsgd(noise: float = 0.5) -> Any:
    return optax.chain(
        contrib.differentially_private_aggregate(0.3, noise, jax.random.key(0)), optax.sgd(0.1, momentum=0.9)
    )


DPSGD = dpsgd()


def batches() -> Any:
    source = data()
    for number in range(STEPS):
        order = epoch_order(len(source["x"]), 0, number // 4)[number % 4 * BATCH :][:BATCH]
        yield {name: rest[order] for name, rest in source.items()}


def alone(batch: Any) -> Any:
    return jax.tree.map(lambda x: x[:, None], batch)


def loop(optimizer: Any) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        gradients = jax.vmap(jax.grad(mlp_loss), (None, 0))(params, alone(batch))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = mlp(), optimizer.init(mlp())
    for batch in batches():
        params, state = step(params, state, batch)
    return params, state


def fit(
    cluster: Any, optimizer: Any = DPSGD, loss: Any = mlp_loss, steps: int = STEPS, **options: Any
) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, **options)
    return trainer.fit(mlp(), data(), batch_size=BATCH, steps=steps, progress=False)


def close(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("way", WAYS)
def test_a_fit_equals_the_plain_loop(threads_cluster: fm.Cluster, name: str, way: str) -> None:
    optimizer = PRIVATE[name]()
    found, wanted = fit(threads_cluster, optimizer, **WAYS[way]), loop(optimizer)
    close(found.params, wanted[0])
    close(found.opt_state, wanted[1])
    batch = next(batches())
    np.testing.assert_allclose(found.history[0]["loss"], mlp_loss(mlp(), batch), rtol=1e-5)


def test_each_example_has_a_key_of_its_own_and_aux_is_joined(threads_cluster: fm.Cluster) -> None:
    def noisy(params: Any, batch: Any, rng: Any) -> Any:
        value = mlp_loss(params, batch) * jax.random.uniform(rng)
        return value, {"twice": 2 * value, "examples": jnp.int32(batch["x"].shape[0])}

    optimizer = dpsgd(0.0)
    found = fit(threads_cluster, optimizer, noisy, steps=1)
    batch, keys = next(batches()), jax.random.split(item_key(0, 0, 0, 1), BATCH)
    (values, aux), gradients = jax.vmap(jax.value_and_grad(noisy, has_aux=True), (None, 0, 0))(
        mlp(), alone(batch), keys
    )
    updates, _ = optimizer.update(gradients, optimizer.init(mlp()), mlp())
    close(found.params, optax.apply_updates(mlp(), updates))
    record = found.history[0]
    np.testing.assert_allclose(
        [record["loss"], record["aux"]["twice"]], [values.mean(), aux["twice"].mean()], rtol=1e-5
    )
    assert record["aux"]["examples"] == BATCH


def test_a_later_fit_has_the_noise_of_its_batch(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, DPSGD, cluster=threads_cluster)
    results = [trainer.fit(mlp(), data(), batch_size=n, steps=1, progress=False).params for n in (8, BATCH)]
    again = fit(threads_cluster, steps=1).params
    assert_same(results[1], again)


def test_a_gradient_that_is_not_finite_ends_the_fit(threads_cluster: fm.Cluster) -> None:
    """Without its replica the mean is of fewer examples, and the noise would be too little for them."""
    source = data()
    source["x"][0] = np.nan
    trainer = fm.Trainer(mlp_loss, DPSGD, cluster=threads_cluster, replicas=2)
    with pytest.raises(WorkerError, match=r"the gradient of layer .* holds NaN or infinity"):
        trainer.fit(mlp(), source, batch_size=BATCH, steps=2, shuffle=False, progress=False)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "late": ({"policies": fm.policies.asynchronous()}, r"has the policy .* give fm.policies.synchronous\(\)"),
    "quorum": ({"policies": fm.policies.quorum(0.5)}, "adds noise for the whole batch of each step"),
    "local": ({"policies": fm.policies.local_sgd(2)}, "adds noise for the whole batch"),
    "weight": ({"weight": lambda batch: batch["x"].shape[0]}, "no meaning in a Trainer with weights or a shorter last"),
    "not first": ({"optimizer": optax.chain(optax.clip(1.0), DPSGD)}, "is not the first of an optax.chain; put it"),
    "masked": ({"optimizer": optax.masked(DPSGD, {"fc0": True, "fc1": True, "fc2": False})}, "is not the first"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_meaning_is_refused(why: str) -> None:
    options, text = REFUSED[why]
    with pytest.raises(UnsupportedError, match=text) as error:
        fit(simulated(), replicas=2, **options)
    assert "write the loop with fm.dataflow" in str(error.value)
