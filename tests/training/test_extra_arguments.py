"""Optimizers that want more than gradients: the value of the loss is given to them, evaluations of it are refused."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flowml as fm
from flowml.data import epoch_order
from flowml.errors import PolicyError
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_checkpoints import assert_goes_on, case
from tests.training.test_coupled_fits import simulated

STEPS = 6
PLATEAU = optax.chain(optax.adam(1e-2), contrib.reduce_on_plateau(patience=1, rtol=0.5))


def _scaled(updates: Any, state: Any, params: Any = None, value: Any = None, **_: Any) -> Any:
    return jax.tree.map(lambda u: u if value is None else u * value, updates), state


ACCEPTING = optax.GradientTransformationExtraArgs(optax.identity().init, _scaled)
VALUED: dict[str, Any] = {
    "value=None": optax.chain(optax.sgd(0.1), ACCEPTING),
    "polyak_sgd": optax.polyak_sgd(),
    "momo": contrib.momo(),
    "momo_adam": contrib.momo_adam(),
    "reduce_on_plateau": PLATEAU,
}
WAYS: dict[str, dict[str, Any]] = {
    "two homes": {"replicas": 2},
    "two stages": {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2},
    "sums": {"replicas": 2, "policies": fm.Policy(fm.AllReduce())},
}


def loop(optimizer: Any, steps: int = STEPS) -> tuple[Any, Any]:
    """The plain loop with `value=`."""
    params, source = mlp(), data()
    state, per_epoch = optimizer.init(params), len(source["x"]) // BATCH
    gradient, update = jax.jit(jax.value_and_grad(mlp_loss)), jax.jit(optimizer.update)
    for number in range(steps):
        order = epoch_order(len(source["x"]), 3, number // per_epoch)
        rows = order[number % per_epoch * BATCH :][:BATCH]
        value, found = gradient(params, {name: rest[rows] for name, rest in source.items()})
        updates, state = update(found, state, params, value=value)
        params = optax.apply_updates(params, updates)
    return params, state


def fit(cluster: Any, optimizer: Any, loss: Any = mlp_loss, **options: Any) -> fm.TrainingResult:
    options = {"replicas": 2, **options}
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, **options)
    return trainer.fit(mlp(), data(), batch_size=BATCH, steps=STEPS, seed=3, progress=False)


def assert_close(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", VALUED)
def test_an_optimizer_gets_the_loss_of_the_batch(threads_cluster: fm.Cluster, name: str, way: str) -> None:
    found, wanted = fit(threads_cluster, VALUED[name], **WAYS[way]), loop(VALUED[name])
    assert_close(found.params, wanted[0])
    assert_close(found.opt_state, wanted[1])


def test_a_simulated_fit_with_the_loss_is_the_real_one(threads_cluster: fm.Cluster) -> None:
    real, virtual = (fit(cluster, VALUED["polyak_sgd"]) for cluster in (threads_cluster, simulated()))
    losses = [[record["loss"] for record in found.history] for found in (virtual, real)]
    assert losses[0] == losses[1]
    for a, b in zip(jax.tree.leaves(virtual.params), jax.tree.leaves(real.params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"losses {losses[0]}")


def test_programs_that_were_compiled_without_optimizations_are_others() -> None:
    """Equal programs of a fit before, whose plan is still loaded, are not taken for those of this one."""
    bits: list[bytes] = []
    for first in (True, False):
        with closing(fm.Cluster.threads(workers=2)) as cluster:
            if first:
                jax.config.update("jax_disable_most_optimizations", True)
                try:
                    fit(cluster, VALUED["polyak_sgd"])
                finally:
                    jax.config.update("jax_disable_most_optimizations", False)
            found = fit(cluster, VALUED["polyak_sgd"])
        bits.append(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found.params)))
    assert bits[0] == bits[1]


def test_a_fit_with_the_loss_goes_on_bit_by_bit(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    assert_goes_on(case(threads_cluster, tmp_path, optimizer=VALUED["momo_adam"]))


def test_a_checkpoint_has_the_callers_parameters(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    trainer = fm.Trainer(mlp_loss, PLATEAU, cluster=threads_cluster, replicas=2)
    saved = fm.Checkpoint(tmp_path, every_steps=2)
    result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, checkpoint=saved, progress=False)
    assert_close(fm.restore(tmp_path).params, result.params)
    again = trainer.fit(result.params, data(), batch_size=BATCH, steps=2, opt_state=result.opt_state, progress=False)
    assert jax.tree.structure(again.opt_state) == jax.tree.structure(PLATEAU.init(mlp()))


def test_the_value_is_the_mean_by_weights(threads_cluster: fm.Cluster) -> None:
    """Replicas of different weights give the loss of the whole batch, and aux beside it."""

    def weighted(params: Any, batch: Any) -> Any:
        weight = jnp.abs(batch["x"][:, 0])
        errors = jnp.mean((_predict(params, batch["x"]) - batch["y"]) ** 2, axis=1)
        return jnp.sum(weight * errors) / jnp.sum(weight), {"weight": jnp.sum(weight)}

    two = fit(threads_cluster, VALUED["polyak_sgd"], weighted, weight="weight")
    one = fit(threads_cluster, VALUED["polyak_sgd"], weighted, weight="weight", replicas=1)
    assert_close(two.params, one.params)
    assert two.history[-1]["aux"].keys() == {"weight"}


def _predict(params: Any, x: Any) -> Any:
    for name in ("fc0", "fc1"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["fc2"]["kernel"] + params["fc2"]["bias"]


def test_a_validation_measures_the_callers_parameters(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, VALUED["polyak_sgd"], cluster=threads_cluster, replicas=2)
    result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, validation=data(24, seed=1), progress=False)
    wanted = mlp_loss(result.params, data(24, seed=1))
    np.testing.assert_allclose(result.validation[-1]["loss"], wanted, rtol=1e-4)
    np.testing.assert_allclose(
        trainer.evaluate(result.params, data(), lambda p, b: {"loss": mlp_loss(p, b)})["loss"],
        mlp_loss(result.params, data()),
        rtol=1e-4,
    )


def test_a_validation_measures_the_fast_parameters(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, optax.lookahead(optax.sgd(0.1), 2, 0.5), cluster=threads_cluster, replicas=2)
    pair = optax.LookaheadParams.init_synced(mlp())
    result = trainer.fit(pair, data(), batch_size=BATCH, steps=3, validation=data(24, seed=1), progress=False)
    wanted = mlp_loss(result.params.fast, data(24, seed=1))
    np.testing.assert_allclose(result.validation[-1]["loss"], wanted, rtol=1e-4)


@pytest.mark.parametrize("policies", [fm.policies.downpour(1, 1), fm.policies.diloco(2), fm.Policy(fm.Gossip())])
def test_replicas_without_a_clock_give_their_own_loss(threads_cluster: fm.Cluster, policies: fm.Policy) -> None:
    result = fit(threads_cluster, VALUED["polyak_sgd"], policies=policies)
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize(
    ("policies", "says"),
    [
        ({"fc1/*": fm.policies.quorum(0.5)}, "share no clock; give all layers one policy"),
        (
            fm.Policy(staleness=fm.UNBOUNDED, filters=(fm.filters.top_k(0.5),)),
            "applied on arrival, whose filters would change it",
        ),
    ],
)
def test_a_value_without_meaning_is_refused(threads_cluster: fm.Cluster, policies: Any, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        fit(threads_cluster, VALUED["polyak_sgd"], policies=policies)
