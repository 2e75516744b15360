"""What is added up is added in float32 at least: gradients over microbatches, steps and replicas, and metrics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

ONES = 512


def ones_loss(params: Any, batch: Any) -> tuple[Any, Any]:
    """Each example's gradient is one, in the dtype of the parameter. In bfloat16, 256 + 1 is 256."""
    return jnp.mean(batch["x"] * params["w"]), {
        "mean": jnp.mean(batch["x"]),
        "count": jnp.int8(1),
        "yes": jnp.bool_(True),
    }


def fit(cluster: fm.Cluster, dtype: Any, policies: Any, *, steps: int = 1, rate: float = 1.0, **options: Any) -> Any:
    source = {"x": np.ones(ONES, dtype)}
    trainer = fm.Trainer(ones_loss, optax.sgd(rate), cluster=cluster, policies=policies, **options)
    return trainer.fit({"w": jnp.zeros((), dtype)}, source, batch_size=ONES // steps, steps=steps, shuffle=False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("apply", ["mean", "sum"])
@pytest.mark.parametrize(
    ("topology", "replicas"),
    [(t, n) for t in (fm.ParameterServer(), fm.AllReduce()) for n in (1, 2)] + [(fm.Ring(), 2)],
    ids=str,
)
def test_over_microbatches(threads_cluster: fm.Cluster, dtype: Any, apply: Any, topology: Any, replicas: int) -> None:
    policy = fm.Policy(topology=topology, apply=apply)
    result = fit(threads_cluster, dtype, policy, replicas=replicas, microbatches=ONES // replicas)
    expected = -1.0 if apply == "mean" else -float(replicas)
    assert float(result.params["w"]) == expected
    record = result.history[0]
    assert float(record["aux"]["mean"]) == 1.0
    assert int(record["aux"]["count"]) == ONES
    assert int(record["aux"]["yes"]) == ONES


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
@pytest.mark.parametrize("topology", [fm.ParameterServer(), fm.AllReduce()], ids=str)
def test_over_steps(kind: str, topology: Any, request: pytest.FixtureRequest) -> None:
    """Every 512 steps, as sums: what is applied is 512 for each replica, which 1 + 1 + … in bfloat16 never reaches."""
    policy = fm.Policy(topology=topology, every=ONES, apply="sum")
    source = {"x": np.ones(2 * ONES, jnp.bfloat16)}
    trainer = fm.Trainer(ones_loss, optax.sgd(1.0), cluster=request.getfixturevalue(kind), replicas=2, policies=policy)
    result = trainer.fit({"w": jnp.zeros((), jnp.bfloat16)}, source, batch_size=2, steps=ONES, shuffle=False)
    assert float(result.params["w"]) == -2.0 * ONES


@pytest.mark.parametrize("topology", [fm.ParameterServer(), fm.AllReduce(), fm.Ring(), fm.Tree(2)], ids=str)
def test_over_replicas(threads_cluster: fm.Cluster, topology: Any) -> None:
    """Gradients 256, 1, 1 and 1: their sum is 259, whose quarter bfloat16 has as 64.75; in bfloat16 it would be 64."""
    source = {"x": np.array([256, 1, 1, 1], np.float32)}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(batch["x"].astype(jnp.bfloat16) * params["w"]).astype(jnp.float32)

    trainer = fm.Trainer(
        loss, optax.sgd(1.0), cluster=threads_cluster, replicas=4, policies=fm.Policy(topology=topology)
    )
    result = trainer.fit({"w": jnp.zeros((), jnp.bfloat16)}, source, batch_size=4, steps=1, shuffle=False)
    assert float(result.params["w"]) == -float(jnp.bfloat16(64.75))


def test_factors_of_several_microbatches_are_added_wide(threads_cluster: fm.Cluster) -> None:
    source = {"x": np.ones((ONES, 64), jnp.bfloat16)}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(batch["x"] @ params["fc"]["w"])

    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=threads_cluster, microbatches=16, policies=fm.policies.factors())
    values = {"fc": {"w": jnp.zeros((64, 64), jnp.bfloat16)}}
    result = trainer.fit(values, {"x": source["x"][:16]}, batch_size=16, steps=1, shuffle=False)
    expected = jax.grad(loss)(
        jax.tree.map(lambda x: x.astype(jnp.float32), values), {"x": np.ones((16, 64), np.float32)}
    )
    np.testing.assert_allclose(np.asarray(result.params["fc"]["w"], np.float32), -expected["fc"]["w"], rtol=2**-8)
