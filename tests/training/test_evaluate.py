"""Metrics and predictions run over all examples, on the trainer's cluster, and equal those of one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, data, mlp, mlp_loss, predict

SOURCE = data(50)


def metrics(params: Any, batch: Any) -> Any:
    error = predict(params, batch["x"]) - batch["y"]
    return {"loss": jnp.mean(error**2), "close": jnp.mean(jnp.abs(error) < 0.5), "bias": jnp.mean(error, axis=0)}


def outputs(params: Any, batch: Any) -> Any:
    return {"y": predict(params, batch["x"])}


def clusters(threads: fm.Cluster, processes: fm.Cluster) -> dict[str, Any]:
    simulated = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=True)
    return {"threads": threads, "processes": processes, "simulated": simulated}


@pytest.mark.parametrize("kind", ["threads", "processes", "simulated"])
def test_a_short_last_batch_counts_by_its_examples(
    threads_cluster: fm.Cluster, process_cluster: fm.Cluster, kind: str
) -> None:
    cluster = clusters(threads_cluster, process_cluster)[kind]
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, placement=fm.Pipeline(stages=2))
    result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, progress=False)
    for params in (mlp(), result.params):
        found, wanted = trainer.evaluate(params, SOURCE, metrics, batch_size=16), metrics(params, SOURCE)
        assert isinstance(found["loss"], float)
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
        rows = trainer.predict(params, SOURCE, outputs, batch_size=16)
        np.testing.assert_allclose(rows["y"], predict(params, SOURCE["x"]), rtol=1e-5, atol=1e-6)


def features(params: Any, batch: Any) -> Any:
    return jnp.tanh(batch["x"] @ params["fc0"]["kernel"])


@pytest.mark.parametrize("placement", [fm.Pipeline(stages=2), {"fc0": "worker:0", "fc*": "worker:1"}])
def test_a_function_of_a_part_of_the_model_runs_where_its_parameters_are(
    process_cluster: fm.Cluster, placement: Any
) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=process_cluster, placement=placement)
    for _ in range(2):
        found = trainer.predict(mlp(), SOURCE, features, batch_size=16)
        np.testing.assert_allclose(found, features(mlp(), SOURCE), rtol=1e-5, atol=1e-6)
        validation = SOURCE, lambda _, batch: {"mean": jnp.mean(batch["x"])}
        result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=1, validation=validation, progress=False)
        np.testing.assert_allclose(result.validation[-1]["mean"], np.mean(SOURCE["x"]), rtol=1e-5, atol=1e-6)


def test_functions_with_state_get_it(threads_cluster: fm.Cluster) -> None:
    def loss(params: Any, state: Any, batch: Any) -> Any:
        return mlp_loss(params, {**batch, "x": batch["x"] - state["mean"]}), {"mean": jnp.mean(batch["x"], axis=0)}

    def shifted(params: Any, state: Any, batch: Any) -> Any:
        return {"loss": loss(params, state, batch)[0]}

    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster, has_state=True)
    begun = {"mean": jnp.zeros(12)}
    result = trainer.fit(mlp(), data(), batch_size=BATCH, steps=2, state=begun, progress=False)
    found = trainer.evaluate(result.params, SOURCE, shifted, state=result.state)
    wanted = jax.jit(shifted)(result.params, result.state, SOURCE)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
    with pytest.raises(ValueError, match="none is given; give state="):
        trainer.evaluate(result.params, SOURCE, shifted)


def test_what_is_no_metric_and_no_prediction_is_refused(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    with pytest.raises(TypeError, match=r"mlp_loss returns a .*; metrics return a dict of means"):
        trainer.evaluate(mlp(), SOURCE, mlp_loss)
    with pytest.raises(ValueError, match=r"mlp_loss returns an array of shape \[\] for 50 examples"):
        trainer.predict(mlp(), SOURCE, mlp_loss)
    with pytest.raises(ValueError, match="has no examples"):
        trainer.evaluate(mlp(), {"x": np.zeros((0, 12)), "y": np.zeros((0, 2))}, metrics)
    silent: Any = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=False)
    with pytest.raises(fm.UnsupportedError, match="computes nothing; give it arithmetic=True"):
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=silent).evaluate(mlp(), SOURCE, metrics)


def test_parameters_unlike_those_of_the_fit_are_named(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    with pytest.raises(KeyError) as caught:
        trainer.evaluate({"other": jnp.ones(3)}, SOURCE, metrics)
    (note,) = (n for n in caught.value.__notes__ if "by metrics" in n)
    assert "whose parameters are other: float32[3]" in note
    trainer.fit(mlp(), data(), batch_size=BATCH, steps=1, progress=False)
    first, *_ = sorted(mlp())
    for wrong, what in (
        ({"other": jnp.ones(3)}, rf"\(KeyError: .*\), .*'{first}/.*' is missing and was float32"),
        (jax.tree.map(lambda x: jnp.ones((7, *x.shape)), mlp()), rf"'{first}/.*' is float32\[7, .*\] and was float32"),
        ({**mlp(), first: np.array("text")}, "has dtype <U4, which is not numeric|is missing and was"),
        (None, "is missing and was"),
    ):
        with pytest.raises((ValueError, TypeError), match=what):
            trainer.evaluate(wrong, SOURCE, metrics)
        with pytest.raises((ValueError, TypeError), match=what):
            trainer.predict(wrong, SOURCE, outputs)
    with pytest.raises(TypeError, match=r"is a jax.ShapeDtypeStruct without values; give an array"):
        trainer.evaluate(jax.eval_shape(mlp), SOURCE, metrics)


@pytest.mark.parametrize("size", [50, 16, 1])
@pytest.mark.parametrize("form", [lambda e: e.mean(1), jnp.transpose, jnp.ravel], ids=["rows", "columns", "flat"])
def test_a_value_of_each_example_is_no_metric(threads_cluster: fm.Cluster, form: Any, size: int) -> None:
    """Batches of one size would be added up otherwise, each example to those of other batches."""

    def each(params: Any, batch: Any) -> Any:
        return {"all": {"each": form((predict(params, batch["x"]) - batch["y"]) ** 2)}}

    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    wrong = (
        rf"each returns 'all/each' of shape \[.*\] for {size} examples, which depends .*; give jnp.mean.*predict\(\)"
    )
    with pytest.raises(ValueError, match=wrong):
        trainer.evaluate(mlp(), SOURCE, each, batch_size=size)
    with pytest.raises(ValueError, match=wrong):
        simulated = clusters(threads_cluster, threads_cluster)["simulated"]
        fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=simulated).evaluate(mlp(), SOURCE, each, batch_size=size)


def test_metrics_of_a_function_that_takes_one_size_are_compared_batch_by_batch(threads_cluster: fm.Cluster) -> None:
    def each(params: Any, batch: Any) -> Any:
        if len(batch["x"]) > 16:
            raise ValueError("too many")
        return {"each": batch["x"].mean(1)}

    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    with pytest.raises(ValueError, match=r"'each' of shape \[2\] for 2 examples, which depends on their number"):
        trainer.evaluate(mlp(), SOURCE, each, batch_size=16)


def test_a_metric_as_long_as_a_batch_is_a_mean_if_it_stays_so(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    found = trainer.evaluate(mlp(), SOURCE, metrics, batch_size=2)  # the bias has two elements
    np.testing.assert_allclose(found["bias"], metrics(mlp(), SOURCE)["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [jnp.sum, jnp.any], ids=["int32", "bool"])
def test_a_count_is_no_mean(threads_cluster: fm.Cluster, value: Any) -> None:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster)
    with pytest.raises(TypeError, match=r"count returns 'hits' of dtype (int32|bool), .* are floats; give jnp.mean"):

        def count(params: Any, batch: Any) -> Any:
            return {"hits": value(predict(params, batch["x"]) > 0)}

        trainer.evaluate(mlp(), SOURCE, count)
