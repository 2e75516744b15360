"""The short batch at the end of an epoch may be used: it equals a step of the plain loop on that batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import assert_close, data, mlp, mlp_loss

BATCH, EPOCHS = 24, 2
OPTIMIZER = optax.adam(1e-2)
STAGES = {"placement": fm.Pipeline(stages=2)}


class Rows:
    """The same examples from an object."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source["x"])

    def __getitem__(self, indices: Any) -> Any:
        return {name: leaf[indices] for name, leaf in self.source.items()}


def plain(examples: int) -> tuple[Any, list[float], list[int]]:
    """The plain loop over all batches, of which the last of an epoch is short: parameters, losses, sizes."""
    source, params = data(examples), mlp()
    state, losses, sizes = OPTIMIZER.init(params), list[float](), list[int]()
    step = jax.jit(jax.value_and_grad(mlp_loss))
    for epoch in range(EPOCHS):
        order = epoch_order(examples, 0, epoch)
        for start in range(0, examples, BATCH):
            rows = order[start : start + BATCH]
            value, gradients = step(params, {name: leaf[rows] for name, leaf in source.items()})
            updates, state = OPTIMIZER.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(value))
            sizes.append(len(rows))
    return params, losses, sizes


def fit(
    cluster: Any, examples: int, source: Any = None, loss: Any = mlp_loss, last: Any = "use", **options: Any
) -> Any:
    trainer = fm.Trainer(loss, OPTIMIZER, cluster=cluster, **options)
    source = data(examples) if source is None else source
    return trainer.fit(mlp(), source, batch_size=BATCH, epochs=EPOCHS, last=last, progress=False)


def coded(code: Any) -> dict[str, Any]:
    return {"replicas": 4, "policies": fm.Policy(quorum=fm.Coded(1, code)), "microbatches": 2}


def portions(each: int) -> dict[str, Any]:
    return {"replicas": 2, "policies": fm.policies.speculate(each)}


FITS = pytest.mark.parametrize(
    ("kind", "examples", "options"),
    [
        ("arrays", 77, {}),
        ("object", 77, {}),
        ("arrays", 78, {**STAGES, "microbatches": 3}),
        ("arrays", 78, {**STAGES, "replicas": 2, "microbatches": 2}),
        ("object", 77, {"replicas": 2}),
        ("arrays", 77, {"replicas": 2, "policies": fm.policies.all_reduce()}),
        ("arrays", 20, {"replicas": 2}),
        ("object", 20, {"replicas": 2}),
        ("arrays", 80, coded("cyclic")),
        ("object", 80, coded("fractional")),
        ("arrays", 77, portions(2)),
        ("object", 80, portions(3)),
    ],
)


@FITS
def test_a_fit_equals_the_plain_loop(threads_cluster: fm.Cluster, kind: str, examples: int, options: Any) -> None:
    assert_equals_the_plain_loop(threads_cluster, kind, examples, options)


@FITS
def test_a_simulated_fit_equals_the_plain_loop(kind: str, examples: int, options: Any) -> None:
    simulated = fm.SimulatedCluster(4, fm.sim.LogNormal(0.1, 0.5), fm.sim.Network(1e-4, 1e9))
    assert_equals_the_plain_loop(simulated, kind, examples, options)


@pytest.mark.parametrize("arithmetic", [True, False])
def test_a_simulated_short_step_takes_its_share_of_the_time(arithmetic: bool) -> None:
    simulated = fm.SimulatedCluster(1, fm.sim.Constant(0.24), fm.sim.Network(1e-9, 1e15), arithmetic=arithmetic)
    result = fit(simulated, 36)
    assert result.virtual_seconds == pytest.approx(EPOCHS * (0.24 + 0.12), rel=1e-3)


def assert_equals_the_plain_loop(cluster: Any, kind: str, examples: int, options: Any) -> None:
    source = Rows(data(examples)) if kind == "object" else None
    result = fit(cluster, examples, source, **options)
    params, losses, _ = plain(examples)
    assert_close(result.params, params, 5e-5 if "policies" in options else 2e-5)
    np.testing.assert_allclose([record["loss"] for record in result.history], losses, rtol=1e-5)
    assert result.ledger.seen == ((EPOCHS, examples),)
    assert result.ledger.examples == EPOCHS * examples
    assert [record["epoch"] for record in result.history] == sorted([0, 1] * -(-examples // BATCH))


def test_aux_is_averaged_by_examples_and_counts_are_exact(threads_cluster: fm.Cluster) -> None:
    def loss(params: Any, batch: Any) -> Any:
        value = mlp_loss(params, batch)
        return value, {"value": value, "examples": jnp.int32(len(batch["x"]))}

    result = fit(threads_cluster, 77, loss=loss, replicas=2)
    _, losses, sizes = plain(77)
    np.testing.assert_allclose([record["aux"]["value"] for record in result.history], losses, rtol=1e-5)
    assert [int(record["aux"]["examples"]) for record in result.history] == sizes


def test_independent_replicas_use_every_example(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster, 77, replicas=2, policies=fm.policies.asynchronous())
    assert result.ledger.seen == ((EPOCHS, 77),)


def test_what_does_not_divide_is_refused(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="has 5 examples, which do not divide into 2 work items of 2 microbatches"):
        fit(threads_cluster, 77, replicas=2, microbatches=2)
    with pytest.raises(ValueError, match="has 1 examples, which do not divide into 2 work items"):
        fit(threads_cluster, 73, replicas=2)
    wanted = "has 5 examples, which do not divide into 4 equal microbatches .* leaves a multiple of 4"
    with pytest.raises(ValueError, match=wanted):
        fit(threads_cluster, 77, replicas=4, policies=fm.Policy(quorum=fm.Coded(1, "cyclic")))
    with pytest.raises(ValueError, match="last='keep'"):
        fit(threads_cluster, 77, last="keep")


def test_evaluate_may_drop_it(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, OPTIMIZER, cluster=threads_cluster)
    source = data(77)
    first = {name: leaf[:72] for name, leaf in source.items()}

    def metrics(params: Any, batch: Any) -> Any:
        return {"loss": mlp_loss(params, batch)}

    for last, wanted in (("drop", first), ("use", source)):
        found = trainer.evaluate(mlp(), source, metrics, batch_size=BATCH, last=last)
        np.testing.assert_allclose(found["loss"], mlp_loss(mlp(), wanted), rtol=1e-5)
    with pytest.raises(ValueError, match="no examples that fill a batch of 128"):
        trainer.evaluate(mlp(), source, metrics, last="drop")
