"""Replicas with own parameters add up their changes among themselves; each applies the sum to its copy of the global
ones, with an outer optimizer of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, assert_close, assert_same, data, mlp, mlp_loss
from tests.training.test_checkpoints import assert_goes_on, case
from tests.training.test_local import (
    LAYOUTS,
    STEPS,
    assert_equal_steps,
    replica_loop,
    shares,
    watched_fit,
)

OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)
SUMS = {"all-reduce": fm.AllReduce(), "ring": fm.Ring(), "tree": fm.Tree(2)}
KNOBS: dict[str, dict[str, Any]] = {
    "diloco": {"payload": fm.Delta(), "every": 3, "apply": fm.Outer(OUTER)},
    "weights": {"payload": fm.Weights(alpha=0.3), "every": 3},
    "elastic": {"payload": fm.Weights(), "every": 2, "apply": fm.Mix(0.2)},
    "fragments": {"payload": fm.Delta(), "every": fm.Every(4, fragments=2, delay=1), "apply": fm.Outer(OUTER)},
    "one clock old": {"payload": fm.Delta(), "every": 2, "staleness": 1, "quorum": fm.Quorum()},
}


@pytest.mark.parametrize(("layout", "topology"), list(zip(sorted(LAYOUTS) * 2, SUMS, strict=False)))
def test_diloco_over_a_sum_equals_the_loop_at_every_step(
    threads_cluster: fm.Cluster, layout: str, topology: str
) -> None:
    inner, policy = optax.adam(1e-2), fm.policies.diloco(3, topology=SUMS[topology])
    result = watched_fit(threads_cluster, policy, layout, inner, microbatches=2, check_replicas=2)
    loop = replica_loop(mlp_loss, mlp(), inner, shares, STEPS, dict.fromkeys(mlp(), fm.Every(3)), outer=OUTER)
    assert_equal_steps(result, loop)
    assert jax.tree.leaves(result.opt_state.outer)[0].any(), "the momentum of the outer optimizer"


def fit(cluster: Any, policy: Any, params: Any = None, loss: Any = mlp_loss, **options: Any) -> fm.TrainingResult:
    replicas = options.pop("replicas", 3)
    trainer = fm.Trainer(loss, optax.adam(1e-2), cluster=cluster, replicas=replicas, policies=policy, **options)
    return trainer.fit(params or mlp(), data(), batch_size=BATCH, steps=7, seed=3, progress=False)


def simulated(workers: int) -> fm.SimulatedCluster:
    network = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
    return fm.SimulatedCluster(workers, fm.sim.LogNormal(0.1, 0.5), network, arithmetic=True)


@pytest.mark.parametrize("name", KNOBS)
def test_a_sum_leads_to_what_a_home_makes(threads_cluster: fm.Cluster, name: str) -> None:
    """To rounding, as a sum adds in another order. Simulated workers make the same bits, and push the same bytes."""
    real = fit(threads_cluster, fm.Policy(topology=fm.Ring(), **KNOBS[name]))
    home, virtual = (
        fit(threads_cluster, fm.Policy(**KNOBS[name])),
        fit(simulated(3), fm.Policy(topology=fm.Ring(), **KNOBS[name])),
    )
    assert_close((real.params, real.opt_state), (home.params, home.opt_state), 1e-5)
    np.testing.assert_allclose([r["loss"] for r in real.history], [r["loss"] for r in home.history], rtol=1e-5)
    assert_same((virtual.params, virtual.opt_state), (real.params, real.opt_state))
    for layer, row in real.traffic.items():
        assert virtual.traffic[layer] == row


def test_processes_do_as_threads(threads_cluster: fm.Cluster, process_cluster: fm.Cluster) -> None:
    policies = {
        "fc0*": fm.policies.diloco(3, topology=fm.AllReduce()),
        "fc1*": fm.policies.all_reduce(),
        "*": fm.Policy(),
    }
    one, other = (fit(cluster, policies, replicas=2) for cluster in (threads_cluster, process_cluster))
    assert_same((one.params, one.opt_state), (other.params, other.opt_state))


def test_parameters_of_several_dtypes_have_a_sum_each(threads_cluster: fm.Cluster) -> None:
    narrow = {k: {"kernel": v["kernel"].astype(jnp.bfloat16), "bias": v["bias"]} for k, v in mlp().items()}

    def loss(params: Any, batch: Any) -> Any:
        return mlp_loss(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)

    found = [
        fit(threads_cluster, fm.policies.diloco(3, topology=t), narrow, loss) for t in (fm.Ring(), fm.ParameterServer())
    ]
    for a, b in zip(*(jax.tree.leaves(r.params) for r in found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.02)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    trainer = fm.Trainer(
        loss, clipped, cluster=threads_cluster, replicas=2, policies=fm.policies.diloco(3, topology=fm.Ring())
    )
    with pytest.raises(fm.PolicyError, match="couples parameters of the dtypes bfloat16, float32"):
        trainer.fit(narrow, data(), batch_size=BATCH, steps=2)


POLICIES = {"fc0*": fm.policies.diloco(3, topology=fm.Ring()), "*": fm.policies.local_sgd(4, topology=fm.AllReduce())}


def test_a_stopped_fit_goes_on_bit_by_bit(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    for name, cluster in (("real", threads_cluster), ("simulated", simulated(2))):
        assert_goes_on(case(cluster, tmp_path / name, POLICIES))


def test_a_gradient_that_is_not_finite_changes_no_parameters(threads_cluster: fm.Cluster) -> None:
    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(batch["x"]) * params["w"]

    source = {"x": np.ones(8, np.float32)}
    source["x"][5] = np.nan
    found: list[float] = []
    for topology in (fm.Ring(), fm.ParameterServer()):
        policy = fm.Policy(topology=topology, payload=fm.Delta(), every=2)
        trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=threads_cluster, replicas=2, policies=policy)
        with pytest.warns(fm.FlowmlWarning, match="NaN or infinity"):
            result = trainer.fit({"w": jnp.zeros(())}, source, batch_size=2, steps=4, shuffle=False, progress=False)
        assert result.ledger.nonfinite == {"w": {1: 1}}
        found.append(float(result.params["w"]))
    assert found == [-3.5, -3.5]
