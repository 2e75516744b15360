"""Real arithmetic at virtual time: a simulated fit has the losses, parameters and optimizer state of a real one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEP, LATENCY = 0.1, 1e-3
RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"w": jnp.asarray(RNG.normal(size=(16, 32)), jnp.float32) / 4},
    "b": {"w": jnp.asarray(RNG.normal(size=(32, 4)), jnp.float32) / 6},
}
DATA = {"x": RNG.normal(size=(240, 16)).astype(np.float32), "y": RNG.normal(size=(240, 4)).astype(np.float32)}


def loss(params: Any, batch: Any, rng: Any) -> Any:
    hidden = jnp.tanh(batch["x"] @ params["a"]["w"])
    hidden = hidden * jax.random.bernoulli(rng, 0.9, hidden.shape)
    error = hidden @ params["b"]["w"] - batch["y"]
    return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error), axis=1).mean()}


def fit(cluster: Any, policies: Any, *, replicas: int = 4, source: Any = DATA, **options: Any) -> fm.TrainingResult:
    function = options.pop("function", loss)
    trainer = fm.Trainer(
        function, optax.adam(1e-2), cluster=cluster, replicas=replicas, policies=policies, microbatches=2, **options
    )
    return trainer.fit(PARAMS, source, batch_size=24, steps=12, seed=3, progress=False)


def simulated(compute: Any = None, workers: int = 4) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(workers, compute or fm.sim.LogNormal(STEP, 0.5), fm.sim.Network(LATENCY, 1e7))


class Fed:
    """A source that stays with the driver."""

    def __len__(self) -> int:
        return len(DATA["x"])

    def __getitem__(self, indices: Any) -> Any:
        return {name: leaf[indices] for name, leaf in DATA.items()}


CASES: dict[str, dict[str, Any]] = {
    "synchronous": {"policies": fm.policies.synchronous()},
    "every 3": {"policies": fm.policies.every(3)},
    "all-reduce": {"policies": fm.policies.all_reduce()},
    "ring every 2": {"policies": fm.Policy(topology=fm.Ring(), every=2)},
    "tree": {"policies": fm.Policy(topology=fm.Tree(2))},
    "factors": {"policies": fm.policies.factors()},
    "mixed": {"policies": {"a*": fm.policies.all_reduce(), "*": fm.policies.every(4)}},
    "pipeline": {"policies": fm.policies.synchronous(), "replicas": 2, "placement": fm.Pipeline(2)},
    "pipeline, all-reduce": {"policies": fm.policies.all_reduce(), "replicas": 2, "placement": fm.Pipeline(2)},
    "local SGD": {"policies": fm.policies.local_sgd(3)},
    "DiLoCo": {"policies": fm.policies.diloco(4)},
    "fed": {"policies": fm.policies.synchronous(), "source": Fed()},
    "one asynchronous replica": {"policies": fm.policies.asynchronous(), "replicas": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_a_simulated_fit_equals_a_real_one_to_the_bit(name: str) -> None:
    case = CASES[name]
    workers = 1 if case.get("replicas") == 1 else 4
    with fm.Cluster.threads(workers) as cluster:
        real = fit(cluster, **case)
    result = fit(simulated(workers=workers), **case)
    for key in ("loss", "replicas", "epoch"):
        assert [r[key] for r in result.history] == [r[key] for r in real.history]
    assert [float(r["aux"]["worst"]) for r in result.history] == [float(r["aux"]["worst"]) for r in real.history]
    jax.tree_util.tree_map(np.testing.assert_array_equal, result.params, real.params)
    jax.tree_util.tree_map(np.testing.assert_array_equal, result.opt_state, real.opt_state)
    assert result.ledger == real.ledger
    assert result.traffic == real.traffic
    assert result.virtual_seconds is not None
    assert result.virtual_seconds > 12 * STEP / 2


def test_timing_decides_what_a_quorum_computes_and_one_seed_repeats_it() -> None:
    def run(factor: float) -> fm.TrainingResult:
        slow = fm.sim.Straggler(fm.sim.LogNormal(STEP, 0.2), factor, workers=(3,))
        return fit(simulated(slow), fm.policies.quorum(0.75))

    first, again, other = run(4), run(4), run(1)
    assert first.trace_hash == again.trace_hash
    assert [r["loss"] for r in first.history] == [r["loss"] for r in again.history]
    jax.tree_util.tree_map(np.testing.assert_array_equal, first.params, again.params)
    assert [r["loss"] for r in first.history] != [r["loss"] for r in other.history]
    assert first.ledger.replicas[3].used < 6


def test_clocks_and_bytes_are_the_same_with_and_without_arithmetic() -> None:
    models = fm.sim.LogNormal(STEP, 0.5), fm.sim.Network(LATENCY, 1e5, uplink_bytes_per_s=1e5)
    for policies in (
        fm.policies.synchronous(),
        fm.policies.quorum(0.5),
        fm.policies.asynchronous(2),
        fm.policies.diloco(3),
    ):
        on = fit(fm.SimulatedCluster(4, *models), policies)
        off = fit(fm.SimulatedCluster(4, *models, arithmetic=False), policies)
        assert (on.virtual_seconds, on.traffic) == (off.virtual_seconds, off.traffic)
        assert on.ledger == off.ledger


def test_a_gradient_that_is_not_finite_is_left_out_and_counted() -> None:
    def broken(params: Any, batch: Any, rng: Any) -> Any:
        value, aux = loss(params, batch, rng)
        return value * jnp.where(jnp.any(batch["x"][:, 0] > 2.3), jnp.nan, 1.0), aux

    for policies in (fm.policies.synchronous(), fm.policies.all_reduce()):
        with fm.Cluster.threads(4) as cluster, pytest.warns(fm.FlowmlWarning, match="holds NaN or infinity"):
            real = fit(cluster, policies, function=broken)
        with pytest.warns(fm.FlowmlWarning, match="holds NaN or infinity"):
            result = fit(simulated(), policies, function=broken)
        assert real.ledger.nonfinite == result.ledger.nonfinite != {}
        jax.tree_util.tree_map(np.testing.assert_array_equal, result.params, real.params)
    with pytest.raises(fm.FlowmlError, match="holds NaN or infinity"):
        fit(simulated(), fm.policies.synchronous(), function=broken, on_nonfinite="raise")


def test_an_exception_on_a_simulated_worker_is_the_error_of_a_real_one() -> None:
    def failing(params: Any, batch: Any, rng: Any) -> Any:
        def check(x: Any) -> Any:
            raise ValueError("this batch is odd")

        value, aux = loss(params, batch, rng)
        return value + jax.pure_callback(
            check, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(value)
        ), aux

    with pytest.raises(fm.WorkerError, match="this batch is odd"):
        fit(simulated(), fm.policies.synchronous(), function=failing)
