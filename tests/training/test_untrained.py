"""Integers, booleans, keys and None in the parameters ride along with a fit, which equals the loop beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flowml as fm
from flowml.data import epoch_order
from flowml.errors import CheckpointError
from tests.training.reference import BATCH, assert_same, data, mlp
from tests.training.test_coupled_fits import simulated

STEPS = 6


def params() -> dict[str, Any]:
    found: dict[str, Any] = {**mlp(), "key": jax.random.key(7), "count": 3, "flags": [np.array([True, False])]}
    found["fc0"]["order"] = np.random.default_rng(0).permutation(16).astype(np.int32)
    found["fc1"]["none"] = None
    return found


def outputs(params: Any, batch: Any) -> Any:
    x = jnp.tanh(batch["x"] @ params["fc0"]["kernel"] + params["fc0"]["bias"])[:, params["fc0"]["order"]]
    x = x + 0.01 * jax.random.normal(params["key"], (16,)) * params["count"]
    x = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return jnp.where(params["flags"][0][0], x, 0) @ params["fc2"]["kernel"] + params["fc2"]["bias"]


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((outputs(params, batch) - batch["y"]) ** 2)


def is_trained(tree: Any) -> Any:
    return jax.tree.map(eqx.is_inexact_array, tree)


def labels(tree: Any) -> Any:
    return jax.tree.map(lambda x: "on" if eqx.is_inexact_array(x) else "off", tree)


def _frozen(tree: Any) -> Any:
    return jax.tree.map(lambda trained: not trained, is_trained(tree))


ADAM = optax.adam(1e-2)
FROZEN: Any = _frozen
WHOLE: dict[str, Any] = {
    "masked": optax.masked(ADAM, is_trained(params())),
    "partition": optax.partition({"on": ADAM, "off": optax.set_to_zero()}, labels(params())),
    "multi_transform": optax.multi_transform({"on": ADAM, "off": optax.set_to_zero()}, labels),
    "selective_transform": optax.selective_transform(ADAM, freeze_mask=FROZEN),
    "masked clip": optax.masked(optax.chain(optax.clip_by_global_norm(0.05), ADAM), is_trained),
}
"""Those that take gradients of float0, with the whole tree."""
ABSENT: dict[str, Any] = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": ADAM,
    "clip": optax.chain(optax.clip_by_global_norm(0.05), ADAM),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 0.0, 9)),
    "schedule_free": contrib.schedule_free_sgd(1e-2),
    "MultiSteps": optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.05), ADAM), 2),
    "polyak_sgd": optax.polyak_sgd(),
    "clip beside a mask": optax.chain(optax.clip_by_global_norm(1.0), optax.masked(ADAM, is_trained(params()))),
}
"""Those that take the tree of what is trained."""
BOTH = {**WHOLE, **ABSENT}
WAYS: dict[str, dict[str, Any]] = {
    "one home": {"replicas": 1},
    "two homes": {"replicas": 2},
    "two stages": {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2},
    "sums": {"replicas": 2, "policies": fm.Policy(fm.AllReduce())},
}


def batches() -> Any:
    source = data()
    for number in range(STEPS):
        order = epoch_order(len(source["x"]), 3, number // 4)
        yield {name: rest[order[number % 4 * BATCH :][:BATCH]] for name, rest in source.items()}


def whole_loop(optimizer: Any) -> tuple[Any, Any]:
    """The loop with `allow_int`."""
    here, state = params(), optimizer.init(params())
    gradient = jax.jit(jax.grad(loss, allow_int=True))
    for batch in batches():
        updates, state = optimizer.update(gradient(here, batch), state, here)
        here = jax.tree.map(lambda p, u: p if u.dtype == jax.dtypes.float0 else p + u, here, updates)
    return here, state


def absent_loop(optimizer: Any) -> tuple[Any, Any]:
    """The loop with equinox."""
    here, rest = eqx.partition(params(), eqx.is_inexact_array)
    state = optimizer.init(here)
    gradient = jax.jit(jax.value_and_grad(lambda p, batch: loss(eqx.combine(p, rest), batch)))
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    for batch in batches():
        value, found = gradient(here, batch)
        updates, state = update(found, state, here, value=value)
        here = eqx.apply_updates(here, updates)
    return eqx.combine(here, rest), state


def fit(cluster: Any, optimizer: Any = ADAM, start: Any = None, **options: Any) -> fm.TrainingResult:
    names = ("replicas", "placement", "microbatches", "policies")
    about: dict[str, Any] = {"replicas": 2, **{name: options.pop(name) for name in names if name in options}}
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, **about)
    given: dict[str, Any] = {"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **options}
    return trainer.fit(params() if start is None else start, data(), **given)


def assert_close(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(jnp.result_type(b), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert jnp.result_type(a) == jnp.result_type(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


CASES = [
    *(("two stages", name) for name in BOTH),
    *(("two homes", name) for name in ("masked clip", "partition", "clip", "MultiSteps", "polyak_sgd")),
    *((way, name) for way in ("one home", "sums") for name in ("partition", "adam")),
]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_a_fit_equals_the_loop(threads_cluster: fm.Cluster, name: str, way: str) -> None:
    found = fit(threads_cluster, BOTH[name], **WAYS[way])
    wanted = (whole_loop if name in WHOLE else absent_loop)(BOTH[name])
    assert_close(found.params, wanted[0])
    assert_close(found.opt_state, wanted[1])


def test_a_simulated_fit_is_the_real_one(threads_cluster: fm.Cluster) -> None:
    real, virtual = (fit(cluster).params for cluster in (threads_cluster, simulated()))
    assert_close(virtual, real)


def test_own_parameters(threads_cluster: fm.Cluster) -> None:
    """Replicas that update parameters of their own, with an outer optimizer, and that have no clock."""
    for policy in (fm.policies.diloco(2), fm.policies.downpour(1, 1), fm.Policy(fm.Gossip())):
        result = fit(threads_cluster, policies=policy)
        assert result.history[-1]["loss"] < result.history[0]["loss"]
        assert_close(
            jax.tree.map(lambda _, x: x, is_trained(params()), result.params)["fc0"]["order"], params()["fc0"]["order"]
        )


@pytest.mark.parametrize("name", ["adam", "partition", "polyak_sgd"])
def test_a_fit_goes_on_from_a_snapshot(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    whole = fit(threads_cluster, BOTH[name])
    saved = fm.Checkpoint(tmp_path, every_steps=2)
    fit(threads_cluster, BOTH[name], steps=4, checkpoint=saved)
    restored = fm.restore(tmp_path).params
    assert_close(restored, fit(threads_cluster, BOTH[name], steps=4).params)
    resumed = fit(threads_cluster, BOTH[name], checkpoint=saved, resume="auto")
    assert_same(resumed.opt_state, whole.opt_state)
    assert_close(resumed.params, whole.params)
    other = {**params(), "count": 4}
    with pytest.raises(CheckpointError, match="params leaf 'count' is not trained and has other values there"):
        fit(threads_cluster, BOTH[name], start=other, steps=8, checkpoint=saved, resume="auto")


def test_another_form_goes_on_from_a_snapshot(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    saved = fm.Checkpoint(tmp_path, every_steps=2)
    fit(threads_cluster, steps=4, checkpoint=saved)
    resumed = fit(threads_cluster, checkpoint=saved, resume="auto", **WAYS["two stages"])
    assert_close(resumed.params, fit(threads_cluster).params)


def test_other_values_are_another_program(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(loss, ADAM, cluster=threads_cluster, replicas=2)
    options: dict[str, Any] = {"batch_size": BATCH, "steps": 2, "progress": False}
    first = trainer.fit(params(), data(), **options)
    same = trainer.fit(params(), data(), **options)
    assert [r["loss"] for r in same.history] == [r["loss"] for r in first.history]
    other = trainer.fit({**params(), "count": 40}, data(), **options)
    assert other.history[0]["loss"] != first.history[0]["loss"]
    order = params()["fc0"]["order"]
    given = params()
    given["fc0"]["order"][:] = order[::-1]
    after = trainer.fit(given, data(), **options)
    assert after.history[0]["loss"] != first.history[0]["loss"]


def test_evaluations_have_all_leaves(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(loss, ADAM, cluster=threads_cluster, replicas=2, placement=fm.Pipeline(2))
    options: dict[str, Any] = {"batch_size": BATCH, "steps": 2, "progress": False, "validation": data(24, seed=1)}
    result = trainer.fit(params(), data(), **options)
    np.testing.assert_allclose(result.validation[-1]["loss"], loss(result.params, data(24, seed=1)), rtol=1e-4)
    found = trainer.evaluate(result.params, data(), lambda p, b: {"loss": loss(p, b)})
    np.testing.assert_allclose(found["loss"], loss(result.params, data()), rtol=1e-4)
    predicted = trainer.predict(result.params, data(), outputs)
    np.testing.assert_allclose(predicted, outputs(result.params, data()), rtol=1e-4, atol=1e-5)


def test_tables_show_them(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster)
    rows = {line.split()[0]: line for line in result.table().splitlines()}
    assert all("not trained" in rows[name] for name in ("key", "count", "flags/0", "fc0/order"))
    assert not {*result.traffic} & {"key", "count", "flags"}


def test_what_cannot_ride_along_is_refused(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        fit(threads_cluster, start={"count": 3})
    with pytest.raises(TypeError, match=r"'count' is int32, so it is not trained.* give an array"):
        trainer = fm.Trainer(loss, ADAM, cluster=threads_cluster)
        trainer.plan({**params(), "count": jax.ShapeDtypeStruct((), "int32")}, data())
