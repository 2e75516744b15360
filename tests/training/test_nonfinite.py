"""Gradients that hold NaN or infinity: left out and counted by layer and replica, or the end of the fit, or applied."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import assert_close, assert_same

ROWS = 8
STEPS = 4
BAD_STEP, BAD_REPLICA = 1, 1


def loss(params: Any, batch: Any) -> Any:
    """`bad` is NaN or infinity for the examples whose gradient of layer `b` is so, else one."""
    h = batch["x"] @ params["a"]["w"]
    return jnp.mean(h**2) + jnp.mean((batch["x"] * batch["bad"][:, None]) @ params["b"]["w"])


def everywhere(params: Any, batch: Any) -> Any:
    return loss(params, {**batch, "bad": jnp.ones_like(batch["bad"])}) * jnp.mean(batch["bad"])


def source(bad: float = np.nan, replicas: int = 2) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(STEPS * ROWS, 4)).astype(np.float32)
    marks = np.ones(len(x), np.float32)
    share = ROWS // replicas
    first = BAD_STEP * ROWS + BAD_REPLICA * share
    marks[first : first + share] = bad
    return {"x": x, "bad": marks}


def params() -> dict[str, Any]:
    return {"a": {"w": jnp.full((4, 3), 0.5)}, "b": {"w": jnp.full((4, 2), 0.5)}}


def loop(skip: set[tuple[str, int, int]], loss: Any = loss, replicas: int = 2) -> Any:
    """Steps by the mean over replicas of their gradients, without those in `skip`: (layer, step, replica)."""
    values, data, share = params(), source(), ROWS // replicas
    for step in range(STEPS):
        parts = [{k: v[step * ROWS + r * share :][:share] for k, v in data.items()} for r in range(replicas)]
        gradients = [jax.grad(loss)(values, p) for p in parts]
        for layer in list(values):
            kept = [g[layer]["w"] for r, g in enumerate(gradients) if (layer, step, r) not in skip]
            if kept:
                values = {**values, layer: {"w": values[layer]["w"] - 0.1 * sum(kept) / len(kept)}}
    return values


def fit(cluster: fm.Cluster, loss: Any = loss, bad: float = np.nan, **options: Any) -> fm.TrainingResult:
    options = {"replicas": 2, **options}
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, **options)
    return trainer.fit(params(), source(bad, options["replicas"]), batch_size=ROWS, steps=STEPS, shuffle=False)


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_home_leaves_out_the_replica_for_that_layer(kind: str, bad: float, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    with pytest.warns(fm.FlowmlWarning, match=r"gradient of layer 'b' of replica 1 at step 1 holds NaN") as caught:
        result = fit(cluster, bad=bad)
    assert len(caught) == 1
    assert_close(result.params, loop({("b", 1, 1)}))
    assert result.ledger.nonfinite == {"b": {1: 1}}
    assert "not finite and left out of b: replica 1 × 1" in str(result.ledger)
    assert all(math.isfinite(r["loss"]) for r in result.history)
    assert [r["replicas"] for r in result.history] == [2, 1, 2, 2]


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
@pytest.mark.parametrize("topology", [fm.AllReduce(), fm.Ring()], ids=str)
def test_replicas_leave_out_a_sum_alike(kind: str, topology: Any, request: pytest.FixtureRequest) -> None:
    cluster = request.getfixturevalue(kind)
    rules = {"a*": fm.Policy(), "b*": fm.Policy(topology=topology)}
    with pytest.warns(fm.FlowmlWarning, match=r"gradient of layer 'b' .* at step 1 holds NaN"):
        result = fit(cluster, policies=rules, check_replicas=1)
    assert_close(result.params, loop({("b", 1, 0), ("b", 1, 1)}))
    assert result.ledger.nonfinite == {"b": {1: 1}}


def test_every_layer_of_a_replica(threads_cluster: fm.Cluster) -> None:
    for policy in (fm.Policy(), fm.policies.factors()):
        with pytest.warns(fm.FlowmlWarning, match=r"layer '[ab]' of replica 1 at step 1"):
            result = fit(threads_cluster, everywhere, policies=policy)
        assert_close(result.params, loop({("a", 1, 1), ("b", 1, 1)}, everywhere))
        assert result.ledger.nonfinite == {"a": {1: 1}, "b": {1: 1}}
        assert result.ledger.used == 2 * STEPS


def test_layers_that_the_optimizer_couples(threads_cluster: fm.Cluster) -> None:
    """Clipping by the global norm couples both layers, which two stages make: one part is NaN, the other is applied."""
    optimizer = optax.chain(optax.clip_by_global_norm(1e6), optax.sgd(0.1))
    trainer = fm.Trainer(
        loss, optimizer, cluster=threads_cluster, replicas=2, placement={"a": "worker:0", "b": "worker:1"}
    )
    with pytest.warns(fm.FlowmlWarning, match="of replica 1 at step 1"):
        result = trainer.fit(params(), source(), batch_size=ROWS, steps=STEPS, shuffle=False)
    assert_close(result.params, loop({("b", 1, 1)}))


def test_no_coupled_layer_is_updated_if_one_has_nothing_to_apply(threads_cluster: fm.Cluster) -> None:
    optimizer = optax.chain(optax.clip_by_global_norm(1e6), optax.sgd(0.1))
    trainer = fm.Trainer(loss, optimizer, cluster=threads_cluster, placement={"a": "worker:0", "b": "worker:1"})
    with pytest.warns(fm.FlowmlWarning, match="of replica 0 at step 1"):
        result = trainer.fit(params(), source(), batch_size=ROWS, steps=STEPS, shuffle=False)
    assert_close(result.params, loop({("a", 1, 0), ("b", 1, 0)}, replicas=1))


@pytest.mark.parametrize("policy", [fm.policies.every(2), fm.policies.asynchronous(), fm.policies.quorum(0.5)], ids=str)
def test_other_rules_stay_finite(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        result = fit(threads_cluster, policies=policy)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    assert all(math.isfinite(r["loss"]) == (r["replicas"] > 0) for r in result.history)


def test_nothing_finite_leaves_the_parameters(threads_cluster: fm.Cluster) -> None:
    for policy in (fm.Policy(), fm.policies.all_reduce()):
        with pytest.warns(fm.FlowmlWarning, match="at step 0"):
            result = fit(threads_cluster, lambda p, b: loss(p, b) * jnp.nan, policies=policy)
        assert_same(result.params, params())
        assert result.history[0]["replicas"] == 0
        assert math.isnan(result.history[0]["loss"])


@pytest.mark.parametrize(
    ("policy", "first"), [(fm.Policy(), ""), (fm.policies.all_reduce(), "|the loss of replica 1 is nan")], ids=str
)
def test_a_fit_may_end_with_it(threads_cluster: fm.Cluster, policy: fm.Policy, first: str) -> None:
    """A sum may be known later than the loss, which is NaN too."""
    with pytest.raises(
        fm.WorkerError, match=rf"at step 1: .*(the gradient of layer 'b'.* holds NaN or infinity{first})"
    ) as error:
        fit(threads_cluster, policies={"a*": fm.Policy(), "b*": policy}, on_nonfinite="raise")
    assert error.value.step == 1


@pytest.mark.parametrize("policy", [fm.Policy(), fm.policies.all_reduce()], ids=str)
def test_a_fit_may_apply_it(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    result = fit(threads_cluster, policies=policy, on_nonfinite="apply")
    assert np.isnan(result.params["b"]["w"]).all()
    assert np.isfinite(result.params["a"]["w"]).all()
    assert math.isnan(result.history[1]["loss"])
    assert result.ledger.nonfinite == {}


def test_large_values_are_finite(threads_cluster: fm.Cluster) -> None:
    """Their sum is not, but each is."""

    def steep(params: Any, batch: Any) -> Any:
        return jnp.mean(batch["x"]) + 0 * loss(params, batch) + jnp.float32(2e38) * jnp.sum(params["b"]["w"])

    data = {**source(1.0), "x": np.ones((STEPS * ROWS, 4), np.float32)}
    trainer = fm.Trainer(steep, optax.sgd(1e-37), cluster=threads_cluster, replicas=2)
    with pytest.warns(fm.FlowmlWarning, match="the loss of replica 0 at step 0 is NaN or infinite although"):
        result = trainer.fit(params(), data, batch_size=ROWS, steps=1)
    np.testing.assert_allclose(result.params["b"]["w"], 0.5 - 20.0, rtol=1e-6)


def test_the_choice_is_checked(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite='ignore' is unknown; give 'refuse' or 'raise' or 'apply'"):
        fit(threads_cluster, on_nonfinite="ignore")


WATCHERS = {
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
    "zero_nans": optax.chain(optax.zero_nans(), optax.sgd(0.1)),
    "skip_not_finite": optax.MultiSteps(optax.sgd(0.1), 2, should_skip_update_fn=optax.skip_not_finite),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_an_optimizer_that_watches_for_nan_is_told_of_it_or_says_why_not(name: str) -> None:
    optimizer = WATCHERS[name]
    cluster = fm.SimulatedCluster(1, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=True)
    with pytest.warns(fm.FlowmlWarning) as caught:
        fm.Trainer(everywhere, optimizer, cluster=cluster).fit(
            params(), source(replicas=1), batch_size=ROWS, steps=1, shuffle=False, progress=False
        )
    (warned,) = caught
    assert f"not finite ({name}), and it gets none" in str(warned.message)
    assert "give Trainer(on_nonfinite='apply')" in str(warned.message)
    assert warned.filename == __file__


def test_with_apply_the_optimizer_counts_what_is_not_finite() -> None:
    cluster = fm.SimulatedCluster(1, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9), arithmetic=True)
    optimizer = WATCHERS["apply_if_finite"]
    data = {**source(replicas=1), "bad": np.repeat([1, np.nan, 1, 1], ROWS).astype(np.float32)}
    trainer = fm.Trainer(everywhere, optimizer, cluster=cluster, on_nonfinite="apply")
    result = trainer.fit(params(), data, batch_size=ROWS, steps=STEPS, shuffle=False, progress=False)
    assert int(result.opt_state.total_notfinite) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


SERVER, HALVES = fm.ParameterServer(), ((0, 1), (2, 3))
NAMED: dict[str, tuple[fm.Policy, int, str]] = {
    "each replica": (fm.Policy(), 3, "of replica 3"),
    "portions": (fm.policies.speculate(2), 3, "of replica [0-3]"),
    "sites": (fm.Policy(fm.Hierarchy(SERVER, SERVER, HALVES)), 2, "of the site of replica 2"),
    "own parameters of sites": (
        fm.Policy(fm.Hierarchy(SERVER, SERVER, HALVES), payload=fm.Delta()),
        2,
        "of the site of replica 2",
    ),
    "sums of leaders": (
        fm.Policy(fm.Hierarchy(SERVER, fm.Ring(), HALVES)),
        2,
        "of (the site of replica 2|all replicas together)",
    ),
    "leaders that count": (fm.Policy(fm.Hierarchy(SERVER, SERVER, HALVES, quorum=fm.Quorum())), 3, "of replica 3"),
    "ring": (fm.policies.ring(), 3, "of (replica 3|all replicas together)"),
}


@pytest.mark.parametrize("simulated", [False, True], ids=["threads", "simulated"])
@pytest.mark.parametrize("kind", NAMED)
def test_who_made_it_is_named_and_each_layer_counts_it(threads_cluster: fm.Cluster, kind: str, simulated: bool) -> None:
    policy, number, who = NAMED[kind]
    virtual = fm.SimulatedCluster(4, fm.sim.Straggler(fm.sim.Constant(0.1), 3, workers=(0,)), fm.sim.Network(1e-3, 1e8))
    cluster, data = virtual if simulated else threads_cluster, source(1.0, 4)
    data["bad"][BAD_STEP * ROWS + 6 :][:2] = np.nan  # the share of replica 3
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=4, policies=policy)
    with pytest.warns(fm.FlowmlWarning, match=rf"layer '.*' {who} at step 1 holds"):
        ledger = trainer.fit(params(), data, batch_size=ROWS, steps=STEPS, shuffle=False).ledger
    layers = {"a", "b"} if policy.collective else {"b"}
    assert set(ledger.nonfinite) == layers
    if kind != "portions":
        assert all(counts == {number: 1} for counts in ledger.nonfinite.values())
    else:  # any replica may take the portion, and another a copy of it
        assert all(replica < 4 for replica in ledger.nonfinite["b"])


HARSH: dict[str, Any] = {
    "top-k with feedback": fm.Policy(filters=(fm.filters.top_k(1).with_error_feedback(),)),
    "random-k of all together": fm.Policy(
        topology=fm.AllReduce(), filters=(fm.filters.random_k(1).with_error_feedback(),)
    ),
    "top-k of all together": fm.Policy(topology=fm.AllReduce(), filters=(fm.filters.top_k(1),)),
    "a ring": fm.policies.ring(),
    "coded": fm.policies.coded(1),
}


@pytest.mark.parametrize("on", ["refuse", "apply"])
@pytest.mark.parametrize("simulated", [False, True], ids=["threads", "simulated"])
@pytest.mark.parametrize("kind", HARSH)
def test_numpy_says_nothing_about_infinities_that_are_added(
    threads_cluster: fm.Cluster, kind: str, simulated: bool, on: Any
) -> None:
    """One replica has infinity where the other has minus infinity, and both have losses of the kind."""
    data = {"g": np.ones((16, 8), np.float32)}
    data["g"][4:6], data["g"][6:8] = np.inf, -np.inf
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e8)) if simulated else threads_cluster
    trainer = fm.Trainer(
        lambda p, b: jnp.mean(b["g"] @ p["w"]),
        optax.sgd(0.1),
        cluster=cluster,
        replicas=2,
        policies=HARSH[kind],
        on_nonfinite=on,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = trainer.fit({"w": jnp.zeros((8, 2))}, data, batch_size=4, steps=4, shuffle=False, progress=False)
    assert [str(w.message) for w in told if not issubclass(w.category, fm.FlowmlWarning)] == []
    assert bool(found.ledger.nonfinite) == (on == "refuse"), "what is applied is not left out, and does not count"


@pytest.mark.parametrize("simulated", [False, True], ids=["threads", "simulated"])
@pytest.mark.parametrize("policy", [fm.Policy(), fm.policies.local_sgd(2)], ids=["home", "own"])
def test_the_error_names_the_layer(threads_cluster: fm.Cluster, policy: Any, simulated: bool) -> None:
    cluster: Any = (
        fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e8)) if simulated else threads_cluster
    )
    with pytest.raises(fm.WorkerError, match=rf"worker:\d failed during training in 'store b.*' at step {BAD_STEP}: "):
        fit(cluster, policies=policy, on_nonfinite="raise")
