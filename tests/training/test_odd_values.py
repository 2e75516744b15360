"""Values that look like arrays and are none, and functions that look like losses and optimizers: one sentence each."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss


class OneResult:
    def init(self, params: Any) -> Any:
        return ()

    def update(self, gradients: Any, state: Any, params: Any = None) -> Any:
        return gradients


def fit(cluster: fm.Cluster, params: Any, loss: Any = mlp_loss, optimizer: Any = None, **options: Any) -> Any:
    trainer = fm.Trainer(loss, optimizer or optax.sgd(0.1), cluster=cluster)
    return trainer.fit(params, data(), batch_size=BATCH, steps=1, **options)


def with_leaf(leaf: Any) -> Any:
    return {**mlp(), "odd": leaf}


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (np.ones(3, ">f4"), "parameter 'odd' has dtype >f4, which has the byte order of other machines; give .astype"),
        (np.array(["a"]), "parameter 'odd' has dtype <U1, which is not numeric"),
        (np.datetime64("2020"), "parameter 'odd' has dtype datetime64[Y], which is not numeric"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), "parameter 'odd' is a jax.ShapeDtypeStruct without values; give an"),
    ],
    ids=str,
)
def test_parameters_that_are_no_arrays(threads_cluster: fm.Cluster, leaf: Any, says: str) -> None:
    with pytest.raises(TypeError, match=re.escape(says)):
        fit(threads_cluster, with_leaf(leaf))


def test_a_ref_and_a_traced_value_are_no_parameters(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(TypeError, match=r"parameter 'odd' is a jax Ref, which no worker can write to"):
        fit(threads_cluster, with_leaf(jax.new_ref(jnp.ones(3))))
    with pytest.raises(TypeError, match=r"parameter '.*' is traced by another JAX transformation.*outside of jit"):
        jax.jit(lambda w: fit(threads_cluster, with_leaf(w)))(jnp.ones(3))


def test_an_optimizer_state_without_values(threads_cluster: fm.Cluster) -> None:
    adam = optax.adam(0.1)
    with pytest.raises(TypeError, match=r"opt_state leaf '0/count' is a jax.ShapeDtypeStruct without values"):
        fit(threads_cluster, mlp(), optimizer=adam, opt_state=jax.eval_shape(adam.init, mlp()))


def test_an_update_of_one_result(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(
        TypeError, match=r"update returns a dict instead of the tuple \(updates, state\); give an optax"
    ):
        fit(threads_cluster, mlp(), optimizer=OneResult())


@pytest.mark.parametrize("loss", [int, print], ids=["class", "builtin"])
def test_a_builtin_loss_is_called_with_two_arguments(threads_cluster: fm.Cluster, loss: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        fit(threads_cluster, mlp(), loss)
    assert "signature" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "error", "says"),
    [
        (10**40, OverflowError, "twice: args[0]: Python int 1000"),
        (np.datetime64("2020"), TypeError, "twice: args[0] has dtype datetime64[Y], which is not numeric"),
    ],
    ids=str,
)
def test_arguments_of_a_call(threads_cluster: fm.Cluster, argument: Any, error: type[Exception], says: str) -> None:
    def twice(x: Any) -> Any:
        return x * 2

    with pytest.raises(error, match=re.escape(says)):
        fm.dataflow(twice, cluster=threads_cluster)(argument)


def test_a_done_callback_and_the_file_of_a_trace(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    future = fm.dataflow(lambda x: x + 1, cluster=threads_cluster).submit(1)
    odd: Any = None
    with pytest.raises(TypeError, match="callback=None is of type NoneType; give a function of the future"):
        future.add_done_callback(odd)
    ran: list[int] = []
    with pytest.raises(FileNotFoundError), threads_cluster.trace(tmp_path / "no" / "t.json"):
        ran.append(1)
    assert ran == [], "it is said before the work"


@pytest.mark.parametrize(
    "policy",
    [None, fm.policies.asynchronous(), fm.policies.local_sgd(2), fm.policies.ring(), fm.policies.power_sgd(2)],
    ids=["none", "asynchronous", "local", "ring", "low rank"],
)
def test_a_fit_moves_arrays_on_purpose_under_a_transfer_guard_of_all_threads(policy: fm.Policy | None) -> None:
    before, params, batches = jax.config.jax_transfer_guard, mlp(), data()
    with closing(fm.Cluster.threads(workers=2)) as cluster:
        trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=2, policies=policy)
        jax.config.update("jax_transfer_guard", "disallow")
        try:
            result = trainer.fit(params, batches, batch_size=BATCH, steps=2, progress=False)
        finally:
            jax.config.update("jax_transfer_guard", before)
    assert len(result.history) == 2


def test_text_in_a_module_rides_along(threads_cluster: fm.Cluster) -> None:
    class Model(eqx.Module):
        w: jax.Array
        kind: str

    def loss_of(model: Model, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ model.w - 1) ** 2)

    trainer = fm.Trainer(loss_of, optax.sgd(0.1), cluster=threads_cluster)
    source = {"x": np.ones((8, 3), np.float32)}
    found = trainer.fit(Model(jnp.ones((3, 2)), "linear"), source, batch_size=4, steps=2, progress=False)
    assert found.params.kind == "linear" and not np.array_equal(found.params.w, np.ones((3, 2)))
