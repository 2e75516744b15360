"""Kinds of apply in whole trainings: each against a loop that does the same, and what a plan declares for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec
from tests.training.reference import BATCH, EXAMPLES, assert_close, data, mlp, mlp_loss

SOURCE = data()
STEPS = 6


def batches() -> Any:
    order = epoch_order(EXAMPLES, 0, 0, shuffle=True)
    per_epoch = EXAMPLES // BATCH
    for step in range(STEPS):
        order = epoch_order(EXAMPLES, 0, step // per_epoch, shuffle=True)
        rows = order[step % per_epoch * BATCH :][:BATCH]
        yield {k: v[rows] for k, v in SOURCE.items()}


def loop(optimizer: Any, after: Any = lambda p: p) -> Any:
    """`after` changes the parameters after each update."""
    params = mlp()
    state = optimizer.init(params)
    for batch in batches():
        updates, state = optimizer.update(jax.grad(mlp_loss)(params, batch), state, params)
        params = after(optax.apply_updates(params, updates))
    return params


def fit(cluster: fm.Cluster, policies: Any, optimizer: Any = None, **options: Any) -> Any:
    options = {"replicas": 2, **options}
    trainer = fm.Trainer(mlp_loss, optimizer or optax.sgd(0.1), cluster=cluster, policies=policies, **options)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


OUTER = [
    optax.adagrad(0.05),
    optax.adam(1e-2),
    optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
]


@pytest.mark.parametrize("optimizer", OUTER, ids=["adagrad", "adam", "clipped"])
@pytest.mark.parametrize("topology", [fm.ParameterServer(), fm.AllReduce()], ids=str)
def test_an_optimizer_of_the_home_takes_the_place_of_the_trainers(
    threads_cluster: fm.Cluster, optimizer: Any, topology: Any
) -> None:
    result = fit(threads_cluster, fm.Policy(topology=topology, apply=fm.Outer(optimizer)))
    assert_close(result.params, loop(optimizer))


def test_the_default_is_nesterov_momentum(threads_cluster: fm.Cluster) -> None:
    """For one step, because the rate 0.7 lets these gradients grow."""
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2, policies=fm.Policy(apply=fm.Outer())
    )
    params, nesterov = mlp(), optax.sgd(0.7, momentum=0.9, nesterov=True)
    gradient = jax.grad(mlp_loss)(params, next(iter(batches())))
    updates, _ = nesterov.update(gradient, nesterov.init(params), params)
    result = trainer.fit(params, SOURCE, batch_size=BATCH, steps=1)
    assert_close(result.params, optax.apply_updates(params, updates))


def test_layers_have_optimizers_of_their_own(threads_cluster: fm.Cluster) -> None:
    """The state of the trainer's optimizer is that of its own layers, and untouched for the others."""
    inner, outer = optax.sgd(0.1, momentum=0.5), optax.adam(1e-2)
    result = fit(threads_cluster, {"fc0/*": fm.Policy(apply=fm.Outer(outer)), "*": fm.Policy()}, inner)
    labels = {layer: jax.tree.map(lambda _, name=name: name, mlp()[layer]) for layer, name in
              {"fc0": "outer", "fc1": "inner", "fc2": "inner"}.items()}  # fmt: skip
    both = optax.multi_transform({"inner": inner, "outer": outer}, labels)  # pyright: ignore[reportArgumentType]
    assert_close(result.params, loop(both))
    trace = result.opt_state.own[0].trace
    assert float(jnp.abs(trace["fc0"]["kernel"]).max()) == 0
    assert float(jnp.abs(trace["fc1"]["kernel"]).max()) > 0


def test_an_outer_optimizer_couples_only_its_own_layers() -> None:
    clipped = fm.Policy(apply=fm.Outer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))))
    training = plan({"fc0/*": clipped, "fc1/*": clipped, "*": fm.Policy()}).training
    assert training is not None
    assert [s.name for s in training.stores] == ["fc0", "fc1", "fc2"]
    assert [c.stores for c in training.couplings] == [(0, 1)]


def plan(policies: Any, optimizer: Any = None, **options: Any) -> fm.Plan:
    spec = TrainingSpec(mlp_loss, optimizer or optax.sgd(0.1), policies=policies, **{"replicas": 2, **options})
    batch = {k: jax.ShapeDtypeStruct((BATCH, *v.shape[1:]), v.dtype) for k, v in SOURCE.items()}
    return compile_training(spec, mlp(), batch, ["worker:0", "worker:1"]).plan


def test_a_plan_names_what_stays_at_a_home(tmp_path: Path) -> None:
    policies = {"fc0/*": fm.Policy(apply=fm.Outer(optax.adam(1e-2))), "*": fm.Policy()}
    training = plan(policies, optax.sgd(0.1, momentum=0.9)).training
    assert training is not None
    buffers = {s.name: [(b.kind, b.name) for b in s.buffers] for s in training.stores}
    assert buffers["fc1"] == [
        ("parameter", "fc1/bias"),
        ("parameter", "fc1/kernel"),
        ("state", "optimizer/0/trace/fc1/bias"),
        ("state", "optimizer/0/trace/fc1/kernel"),
    ]
    kinds, names = zip(*buffers["fc0"], strict=True)
    assert kinds == ("parameter", "parameter", "state", "state", "state", "state", "state")
    moments = [f"outer/inner_state/0/{moment}/fc0/{leaf}" for moment in ("mu", "nu") for leaf in ("bias", "kernel")]
    assert names[2:] == ("outer/inner_state/0/count", *moments)
    for store in training.stores:
        assert len({b.name for b in store.buffers}) == len(store.buffers)
        assert isinstance(store.policy.apply, fm.Mean) or store.policy.apply == fm.Outer()  # compiled, so left out
    plan(policies).save(tmp_path / "plan")
    assert fm.Plan.load(tmp_path / "plan").training == plan(policies).training


@pytest.mark.parametrize("topology", [fm.ParameterServer(), fm.AllReduce()], ids=str)
def test_prox_follows_each_update(threads_cluster: fm.Cluster, topology: Any) -> None:
    def shrink(params: Any) -> Any:
        soft = lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.01, 0) / 1.02  # noqa: E731
        return jax.tree.map(lambda x: jnp.clip(soft(x), -0.2, 0.3), params)

    prox = fm.Prox(l1=0.01, l2=0.02, low=-0.2, high=0.3)
    result = fit(threads_cluster, fm.Policy(topology=topology, apply=prox))
    assert_close(result.params, loop(optax.sgd(0.1), shrink))
    assert sum(float((x == 0).mean()) for x in jax.tree.leaves(result.params)) > 0


def test_proximal_gradient_reaches_the_optimum_of_the_lasso(threads_cluster: fm.Cluster) -> None:
    """At the optimum 0 is in the subgradient: |gradient| is l1 where w is not 0, and at most l1 where it is."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    source = {"x": x, "y": x @ np.array([3, -2, 0, 0, 0, 1, 0, 0], np.float32)}

    def loss(params: Any, batch: Any) -> Any:
        return 0.5 * jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    rate, l1 = 0.2, 0.3
    policy = fm.Policy(apply=fm.Prox(l1=rate * l1))
    trainer = fm.Trainer(loss, optax.sgd(rate), cluster=threads_cluster, replicas=2, policies=policy)
    w = np.asarray(trainer.fit({"w": jnp.zeros(8)}, source, batch_size=64, steps=150).params["w"])
    gradient = np.asarray(jax.grad(loss)({"w": jnp.asarray(w)}, source)["w"])
    np.testing.assert_allclose(gradient[w != 0], -l1 * np.sign(w[w != 0]), atol=1e-4)
    assert (np.abs(gradient[w == 0]) <= l1).all()
    assert 0 < (w == 0).sum() < 8


@pytest.mark.parametrize(
    "options", [{}, {"microbatches": 2, "weight": lambda batch: batch["x"].shape[0]}], ids=["plain", "weighted"]
)
def test_a_fresh_contribution_counts_with_the_rate(threads_cluster: fm.Cluster, options: dict[str, Any]) -> None:
    """One replica sees its own writes, so it is never stale."""
    policy = fm.Policy(staleness=2, apply=fm.StalenessScaled(0.5))
    result = fit(threads_cluster, policy, replicas=1, **options)
    assert_close(result.params, loop(optax.sgd(0.05)))


def test_stale_contributions_are_scaled_on_every_home(threads_cluster: fm.Cluster) -> None:
    """The gradient is 1, so parameters move by 1 / σ for each contribution that missed σ > 0 versions."""
    slow = fm.sim.Straggler(fm.sim.Constant(0.1), 3.5, workers=[0])
    virtual = fm.SimulatedCluster(3, slow, fm.sim.Network(1e-4, 1e9))
    for cluster, options in ((threads_cluster, {"delays": {"worker:0": 0.02}}), (virtual, {})):
        trainer = fm.Trainer(
            lambda w, batch: w * jnp.mean(batch),
            optax.sgd(1.0),
            cluster=cluster,
            replicas=3,
            policies=fm.policies.softsync(3),
            **options,
        )
        result = trainer.fit(jnp.zeros(()), np.ones(36, np.float32), batch_size=3, steps=12)
        (missed,) = result.staleness.values()
        assert sum(missed.values()) == 36
        if cluster is virtual:  # a real replica that is much faster than the others may do nearly all steps alone
            assert max(missed) >= 2, "some are scaled"
        assert float(result.params) == pytest.approx(-sum(n / max(v, 1) for v, n in missed.items()), rel=1e-5)


def test_scaling_under_momentum_warns() -> None:
    scaled = fm.Policy(staleness=2, apply=fm.StalenessScaled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan({"fc0/*": scaled, "*": fm.Policy()}, optax.sgd(0.1))
    with pytest.warns(fm.FlowmlWarning, match="fc0/bias, fc0/kernel: .*remembers gradients"):
        noted = plan({"fc0/*": scaled, "*": fm.Policy()}, optax.sgd(0.1, momentum=0.9))
    assert any("remembers gradients" in note for note in noted.notes)


def test_only_the_winning_rows_move(threads_cluster: fm.Cluster) -> None:
    result = fit(threads_cluster, {"fc1/kernel": fm.Policy(apply=fm.Vote(1)), "*": fm.Policy()}, replicas=2)
    assert np.isfinite(result.history[-1]["loss"])
    first = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=2,
        policies={"fc1/kernel": fm.Policy(apply=fm.Vote(1)), "*": fm.Policy()},
    ).fit(mlp(), SOURCE, batch_size=BATCH, steps=1)  # fmt: skip
    moved = np.any(np.asarray(first.params["fc1"]["kernel"] != mlp()["fc1"]["kernel"]), axis=1)
    gradients = [
        np.asarray(jax.grad(mlp_loss)(mlp(), {k: v[half] for k, v in next(iter(batches())).items()})["fc1"]["kernel"])
        for half in (slice(0, BATCH // 2), slice(BATCH // 2, None))
    ]
    votes = {int((g**2).sum(1).argmax()) for g in gradients}
    assert moved.sum() == 2
    assert votes <= set(np.flatnonzero(moved).tolist())
