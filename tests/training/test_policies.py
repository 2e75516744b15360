"""What each policy does to training: accumulation, staleness, and rules that differ from layer to layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
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
STEPS = 10


def batches(steps: int) -> list[Any]:
    per_epoch = EXAMPLES // BATCH
    orders = [epoch_order(EXAMPLES, 0, s // per_epoch)[s % per_epoch * BATCH :][:BATCH] for s in range(steps)]
    return [{k: v[order] for k, v in SOURCE.items()} for order in orders]


def accumulating_loop(every: dict[str, int], optimizer: Any, steps: int, apply: str = "mean") -> Any:
    """Layers that are updated once in `every[layer]` steps, and after the last, with the gradients since then."""
    params = mlp()
    states = {k: optimizer.init(v) for k, v in params.items()}
    gathered: dict[str, list[Any]] = {k: [] for k in params}
    gradient = jax.jit(jax.grad(mlp_loss))
    for step, batch in enumerate(batches(steps)):
        fresh = gradient(params, batch)
        for layer, k in every.items():
            gathered[layer].append(fresh[layer])
            if (step + 1) % k and step + 1 < steps:
                continue
            total = jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *gathered[layer])
            scale = len(gathered[layer]) if apply == "mean" else 1
            updates, states[layer] = optimizer.update(
                jax.tree.map(lambda x, s=scale: x / s, total), states[layer], params[layer]
            )
            params = {**params, layer: optax.apply_updates(params[layer], updates)}
            gathered[layer] = []
    return params


@pytest.mark.parametrize(
    "layout",
    [{"placement": fm.Pipeline(1)}, {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 2}],
    ids=["one device", "2 x 2 x 2"],
)
def test_every_k_accumulates_gradients(threads_cluster: fm.Cluster, layout: dict[str, Any]) -> None:
    for policy, apply in ((fm.policies.every(4), "mean"), (fm.policies.every(4, apply="sum"), "sum")):
        expected = accumulating_loop(dict.fromkeys(mlp(), 4), optax.adam(1e-2), STEPS, apply)
        result = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=threads_cluster, policies={"*": policy}, **layout).fit(
            mlp(), SOURCE, batch_size=BATCH, steps=STEPS
        )
        assert_close(result.params, expected)
        replicas = layout.get("replicas", 1)
        assert [t["pushes"] for t in result.traffic.values()] == [3 * replicas] * len(result.traffic)
        assert len(result.history) == STEPS


def test_layers_accumulate_at_their_own_rhythm(threads_cluster: fm.Cluster) -> None:
    expected = accumulating_loop({"fc0": 3, "fc1": 1, "fc2": 2}, optax.sgd(0.1, momentum=0.9), STEPS)
    result = fm.Trainer(
        mlp_loss,
        optax.sgd(0.1, momentum=0.9),
        cluster=threads_cluster,
        replicas=2,
        placement=fm.Pipeline(2),
        policies={"fc0/*": fm.policies.every(3), "fc2/*": fm.policies.every(2)},
    ).fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    assert_close(result.params, expected)
    assert {r["replicas"] for r in result.history} == {2}, "a replica that is slow to report is waited for"


@pytest.mark.parametrize("policy", [fm.policies.asynchronous(), fm.policies.asynchronous(staleness=2)], ids=str)
def test_asynchronous_with_one_replica_is_serial(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    optimizer = optax.adam(1e-2)
    expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, STEPS)
    alone = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, placement=fm.Pipeline(1), policies={"*": policy})
    assert_same(alone.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS).params, expected.params)
    piped = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, placement=fm.Pipeline(2), policies={"*": policy})
    result = piped.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    assert_close(result.params, expected.params)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)


@pytest.mark.parametrize(
    "policy",
    [
        fm.policies.asynchronous(),
        fm.policies.asynchronous(staleness=3),
        fm.policies.asynchronous(staleness=2, every=2),
        fm.Policy(staleness=2, quorum=fm.Quorum(1.0)),
    ],
    ids=fm.Policy.describe,
)
def test_stale_reads_converge(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    trainer = fm.Trainer(
        mlp_loss,
        optax.sgd(0.1),
        cluster=threads_cluster,
        replicas=2,
        placement=fm.Pipeline(2),
        policies={"*": policy},
        delays={"worker:2": 0.005},
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=12)
    first, last = whole_loss(mlp()), whole_loss(result.params)
    assert last < 0.4 * first
    steps = 12 * (EXAMPLES // BATCH)
    assert [r["step"] for r in result.history] == list(range(steps))
    ledger = result.ledger
    assert (ledger.used, ledger.dropped, ledger.unseen, ledger.outstanding) == (2 * steps, 0, 0, 0)
    assert ledger.seen == ((12, EXAMPLES),)


def whole_loss(params: Any) -> float:
    return float(mlp_loss(params, SOURCE))


def test_a_fast_replica_does_more_of_the_work_when_asynchronous(threads_cluster: fm.Cluster) -> None:
    result = fm.Trainer(
        mlp_loss,
        optax.sgd(0.05),
        cluster=threads_cluster,
        replicas=2,
        placement=fm.Pipeline(1),
        policies={"*": fm.policies.asynchronous()},
        delays={"worker:1": 0.25},
    ).fit(mlp(), SOURCE, batch_size=BATCH, steps=20)
    fast, slow = result.ledger.replicas
    assert fast.used + slow.used == 40
    assert fast.used > 2 * slow.used


def test_each_layer_by_its_own_rule(threads_cluster: fm.Cluster, process_cluster: fm.Cluster) -> None:
    params = {"conv": mlp()["fc0"], "fc": mlp()["fc1"], "head": mlp()["fc2"]}

    def loss(params: Any, batch: Any) -> Any:
        layers = {f"fc{i}": params[name] for i, name in enumerate(("conv", "fc", "head"))}
        return jnp.mean((predict(layers, batch["x"]) - batch["y"]) ** 2)

    for cluster, layout in ((threads_cluster, {"placement": fm.Pipeline(2)}), (process_cluster, {})):
        trainer = fm.Trainer(
            loss,
            optax.adam(1e-2),
            cluster=cluster,
            replicas=2,
            microbatches=2,
            policies={
                "conv*": fm.policies.every(4),
                "fc*": fm.policies.asynchronous(staleness=3),
                "*": fm.Policy(),
            },
            **layout,
        )
        result = trainer.fit(params, SOURCE, batch_size=BATCH, epochs=10)
        assert float(loss(result.params, SOURCE)) < 0.4 * float(loss(params, SOURCE))
        assert len(result.history) == 40
        assert result.ledger.used == 80
        pushes = {name: t["pushes"] for name, t in result.traffic.items()}
        assert pushes == {"conv": 20, "fc": 80, "head": 80}
        table = result.table()
        assert all(word in table for word in ("every 4", "async ≤3", "sync"))
