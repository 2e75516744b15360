"""Coded training equals synchronous training on the whole batch, whoever is late, and drops no work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import (
    BATCH,
    EXAMPLES,
    GATE,
    assert_close,
    assert_same,
    data,
    hold_marked,
    mlp,
    mlp_loss,
    optax_loop,
)

SOURCE = data()
STEPS = 8
CODES = {
    "fractional": (4, fm.policies.coded(1)),
    "cyclic": (4, fm.policies.coded(1, "cyclic")),
    "cyclic, two late": (4, fm.policies.coded(2, "cyclic")),
    "cyclic of three": (3, fm.policies.coded(1, "cyclic")),
    "tree": (3, fm.policies.coded_reduce(3, 1, 1)),
}


@pytest.fixture(scope="module")
def six() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=6) as cluster:
        yield cluster


def fit(cluster: fm.Cluster, policy: fm.Policy, replicas: int, loss: Any = mlp_loss, **settings: Any) -> Any:
    fitting = {k: settings.pop(k) for k in ("source", "batch_size", "callbacks", "shuffle") if k in settings}
    trainer = fm.Trainer(loss, optax.adam(0.01), cluster=cluster, replicas=replicas, policies=policy, **settings)
    source = fitting.pop("source", SOURCE)
    return trainer.fit(mlp(), source, **{"batch_size": BATCH, "steps": STEPS, **fitting})


def whole_batch(loss: Any = mlp_loss, items: int = 1, **settings: Any) -> Any:
    return optax_loop(loss, mlp(), optax.adam(0.01), SOURCE, STEPS, items=items, **settings)


@pytest.mark.parametrize("case", CODES)
@pytest.mark.parametrize("late", [(), ("worker:0",), ("worker:1", "worker:2")])
def test_the_update_is_that_of_the_whole_batch(threads_cluster: fm.Cluster, case: str, late: tuple[str, ...]) -> None:
    replicas, policy = CODES[case]
    result = fit(threads_cluster, policy, replicas, delays=dict.fromkeys(late, 0.02))
    expected = whole_batch()
    assert_close(result.params, expected.params, 1e-4)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-4)
    check_account(result.ledger, replicas)


def check_account(ledger: Any, replicas: int) -> None:
    """Each example of each clock is used once, and none is dropped."""
    assert (ledger.used, ledger.outstanding) == (STEPS * replicas, 0)
    assert ledger.dropped == ledger.folded == ledger.requeued == ledger.returned == ledger.unseen == 0
    assert ledger.seen == ((STEPS * BATCH // EXAMPLES, EXAMPLES),)


def hold_replica_3(x: Any) -> Any:
    """Holds up the steps of replica 3, which is on worker 3, until GATE is set."""
    return hold_marked(x, threading.current_thread().name.startswith("worker:3/"))


def held_loss(params: Any, batch: Any) -> Any:
    shape = jax.ShapeDtypeStruct(batch["x"].shape, batch["x"].dtype)
    with fm.layer("gate"):
        x = jax.pure_callback(hold_replica_3, shape, batch["x"])
    return mlp_loss(params, {"x": x, "y": batch["y"]})


@pytest.mark.parametrize("policy", [fm.policies.coded(1), fm.policies.coded(1, "cyclic")], ids=["fractional", "cyclic"])
def test_every_clock_is_complete_without_the_slow_replica(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    """Replica 3 cannot finish a step before step 6 is done, and the parameters are still those of whole batches."""
    GATE.clear()
    seen: list[int] = []

    def on_step(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        if record["step"] == STEPS - 2:
            GATE.set()

    result = fit(threads_cluster, policy, 4, held_loss, callbacks=[on_step], placement=fm.Pipeline(1))
    assert seen == list(range(STEPS))
    assert_close(result.params, whole_batch().params, 1e-4)
    check_account(result.ledger, 4)


def test_the_fractional_code_has_the_same_bits_whoever_is_late(threads_cluster: fm.Cluster) -> None:
    results = [
        fit(threads_cluster, fm.policies.coded(1), 4, delays={late: 0.02} if late else {})
        for late in ("", "worker:0", "worker:3")
    ]
    for other in results[1:]:
        assert_same(other.params, results[0].params)


@pytest.mark.parametrize("policy", [fm.policies.coded(1), fm.policies.coded(1, "cyclic")], ids=["fractional", "cyclic"])
@pytest.mark.parametrize("late", ["", "worker:1"])
def test_on_processes(process_cluster: fm.Cluster, policy: fm.Policy, late: str) -> None:
    result = fit(process_cluster, policy, 2, delays={late: 0.02} if late else {})
    assert_close(result.params, whole_batch().params, 1e-4)
    check_account(result.ledger, 2)


def test_a_tree_of_two_levels(six: fm.Cluster) -> None:
    """Two children of each parent, of which one is enough: replicas 0 and 1, and 2 … 5 below them."""
    policy = fm.policies.coded_reduce(2, 2, 1)
    result = fit(six, policy, 6, delays={"worker:1": 0.02, "worker:2": 0.02}, batch_size=BATCH)
    assert_close(result.params, whole_batch().params, 1e-4)
    assert result.plan.training.microbatches * BATCH // 4 < BATCH  # each computes less than the batch
    check_account(result.ledger, 6)


def test_stages_and_microbatches(threads_cluster: fm.Cluster) -> None:
    result = fit(
        threads_cluster, fm.policies.coded(1), 2, placement=fm.Pipeline(2), microbatches=3, delays={"worker:3": 0.02}
    )
    assert_close(result.params, whole_batch(items=2, microbatches=3).params, 1e-4)


def noisy_loss(params: Any, batch: Any, rng: Any) -> Any:
    keep = jax.random.bernoulli(rng, 0.8, batch["x"].shape)
    return mlp_loss(params, {"x": batch["x"] * keep, "y": batch["y"]})


@pytest.mark.parametrize("microbatches", [1, 2])
def test_keys_are_those_of_synchronous_training(threads_cluster: fm.Cluster, microbatches: int) -> None:
    for policy in (fm.policies.coded(1), fm.policies.coded(2, "cyclic")):
        result = fit(threads_cluster, policy, 4, noisy_loss, microbatches=microbatches, delays={"worker:2": 0.02})
        expected = whole_batch(noisy_loss, items=4, microbatches=microbatches, takes_key=True)
        assert_close(result.params, expected.params, 1e-4)


class Own:
    """A source that stays with the driver."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, indices: Any) -> Any:
        return {k: v[indices] for k, v in SOURCE.items()}


def test_a_source_that_the_driver_feeds(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster, fm.policies.coded(1, "cyclic"), 4, source=Own(), delays={"worker:1": 0.02})
    assert_close(result.params, whole_batch().params, 1e-4)
    check_account(result.ledger, 4)


def masked_loss(params: Any, batch: Any) -> Any:
    kept = batch["x"][:, 0] > 0
    each = jnp.mean((jnp.tanh(batch["x"] @ params["fc0"]["kernel"]) - 0.5) ** 2, axis=1)
    loss = jnp.sum(each * kept) / jnp.maximum(kept.sum(), 1) + 0 * sum(p.sum() for p in jax.tree.leaves(params))
    return loss, {"kept": kept.sum(), "mean": jnp.mean(batch["y"]), "most": jnp.sum(batch["y"] > 0, axis=0)}


@pytest.mark.parametrize("policy", [fm.policies.coded(1), fm.policies.coded(2, "cyclic")], ids=["fractional", "cyclic"])
def test_weights_and_aux_are_those_of_synchronous_training(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    """A cyclic code has fractions for coefficients, and counts stay whole."""
    expected = fit(threads_cluster, fm.Policy(), 4, masked_loss, weight="kept")
    result = fit(threads_cluster, policy, 4, masked_loss, weight="kept", delays={"worker:1": 0.02})
    assert_close(result.params, expected.params, 1e-4)
    for mine, its in zip(result.history, expected.history, strict=True):
        np.testing.assert_allclose(mine["loss"], its["loss"], rtol=1e-5)
        np.testing.assert_allclose(mine["aux"]["mean"], its["aux"]["mean"], rtol=1e-4, atol=1e-6)
        for name in ("kept", "most"):
            np.testing.assert_array_equal(mine["aux"][name], its["aux"][name])
            assert mine["aux"][name].dtype == its["aux"][name].dtype


def poisoned_loss(params: Any, batch: Any) -> Any:
    return mlp_loss(params, batch) * jnp.where(jnp.any(batch["x"][:, 0] > 1e8), jnp.nan, 1.0)


@pytest.mark.parametrize("policy", [fm.policies.coded(1), fm.policies.coded(1, "cyclic")], ids=["fractional", "cyclic"])
def test_a_gradient_that_is_not_finite_leaves_out_the_whole_step(
    threads_cluster: fm.Cluster, policy: fm.Policy
) -> None:
    """Without one replica's share the others' combinations stand for nothing, so no part of the step is applied."""
    x = SOURCE["x"].copy()
    x[5, 0] = 1e9  # in the first batch
    with pytest.warns(fm.FlowmlWarning, match="left out"):
        result = fit(threads_cluster, policy, 4, poisoned_loss, source={**SOURCE, "x": x}, shuffle=False)
    rest = {k: np.concatenate([v[BATCH:], v[:BATCH]]) for k, v in SOURCE.items()}
    expected = optax_loop(mlp_loss, mlp(), optax.adam(0.01), rest, 3, shuffle=False)
    first = fit(threads_cluster, fm.Policy(), 4, source=rest, shuffle=False)
    np.testing.assert_allclose(result.history[1]["loss"], expected.losses[0], rtol=1e-4)
    np.testing.assert_allclose(result.history[2]["loss"], first.history[1]["loss"], rtol=1e-4)
    assert np.isnan(result.history[0]["loss"])
    assert result.history[0]["replicas"] == 0


def test_a_batch_that_does_not_divide_is_refused(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(
        mlp_loss,
        optax.sgd(0.1),
        cluster=threads_cluster,
        replicas=3,
        policies=fm.policies.coded(1, "cyclic"),
        microbatches=3,
    )
    with pytest.raises(
        ValueError, match="does not divide into 3 partitions of a code x 3 microbatches; use a multiple of 9"
    ):
        trainer.plan(mlp(), jax.tree.map(lambda a: a[:24], SOURCE))


def test_a_layer_without_the_code_is_refused(threads_cluster: fm.Cluster) -> None:
    policies = {"fc0*": fm.policies.coded(1), "*": fm.Policy()}
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=4, policies=policies)
    with pytest.raises(fm.PolicyError, match="give all layers the same code"):
        trainer.plan(mlp(), jax.tree.map(lambda a: a[:24], SOURCE))
