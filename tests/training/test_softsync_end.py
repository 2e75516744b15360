"""With `Quorum(k, late="fold")` and a staleness, each contribution counts 1 / k, however many are applied together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.policy import UNBOUNDED, Policy, Quorum
from flowml_runtime.protocol.training.home import Apply, Home, StageRetired, StoreLoaded
from flowml_runtime.protocol.training.store import ContributionReceived
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms


def linear(w: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Its gradient is 1 wherever the parameter is."""
    return jnp.mean(batch["x"]) * w


@pytest.mark.parametrize(("replicas", "n", "steps"), [(2, 1, 3), (4, 2, 3), (3, 1.5, 2), (5, 2, 3)])
def test_the_update_of_a_fit_is_that_of_all_its_work_items(replicas: int, n: float, steps: int) -> None:
    source = {"x": np.ones(replicas * steps, np.float32)}
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), 3.5, workers=[0])
    cluster = fm.SimulatedCluster(replicas, machines, fm.sim.Network(1e-4, 1e9), arithmetic=True)
    policy = fm.policies.softsync(n, scale=False)
    trainer = fm.Trainer(linear, optax.sgd(1.0), cluster=cluster, replicas=replicas, policies=policy)
    result = trainer.fit(jnp.zeros(()), source, batch_size=replicas, steps=steps, progress=False)
    need = policy.quorum.need(replicas)
    assert result.ledger.used == replicas * steps
    assert float(result.params) == pytest.approx(-replicas * steps / need)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_loop_of_numpy_that_follows_the_page_makes_the_same_parameters(n: int, scale: bool) -> None:
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    y = (x @ np.random.default_rng(1).normal(size=(6, 3))).astype(np.float32)
    source = {"x": np.tile(x, (16, 1)), "y": np.tile(y, (16, 1))}  # each work item has the same four examples
    seconds, rate = (0.1, 0.137123, 0.171317, 0.291719), 0.05

    def loss(w: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    cluster = fm.SimulatedCluster(4, fm.sim.Recorded([[s] for s in seconds]), fm.sim.Network(1e-6, 1e12))
    policy = fm.policies.softsync(n, scale=scale)
    trainer = fm.Trainer(loss, optax.sgd(rate), cluster=cluster, replicas=4, policies=policy)
    result = trainer.fit(np.zeros((6, 3), np.float32), source, batch_size=16, steps=12, shuffle=False, progress=False)

    together, home, version = -(-4 // n), np.zeros((6, 3)), 0
    read, waiting = [(home, version)] * 4, list[tuple[Any, int]]()
    steps = [tally.used for tally in result.ledger.replicas]
    ends = sorted((number * s, r) for r, s in enumerate(seconds) for number in range(1, steps[r] + 1))
    for left, (_, replica) in zip(range(len(ends) - 1, -1, -1), ends, strict=True):
        w, of = read[replica]
        waiting.append((2 * x.T @ (x @ w - y) / y.size, of))
        if len(waiting) == together or not left:
            for gradient, of in waiting:
                home = home - rate * gradient / together / (max(version - of, 1) if scale else 1)
            version, waiting = version + 1, []
        read[replica] = home, version
    np.testing.assert_allclose(result.params, home, atol=1e-5)


def test_replicas_that_have_nothing_left_to_do_do_not_lower_the_quorum_of_the_others() -> None:
    """Contributions of the last step came in groups of two, one and one, and the last ones counted as stale."""
    machines: Any = fm.sim.Constant(0.1)
    for worker, factor in ((1, 1.37), (2, 1.71), (3, 2.91)):
        machines = fm.sim.Straggler(machines, factor, workers=(worker,))
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9), arithmetic=True)
    trainer = fm.Trainer(linear, optax.sgd(1.0), cluster=cluster, replicas=4, policies=fm.policies.softsync(1))
    result = trainer.fit(jnp.zeros(()), {"x": np.ones(4, np.float32)}, batch_size=4, steps=1, progress=False)
    assert dict(result.staleness) == {"params": {0: 4}}
    assert float(result.params) == pytest.approx(-1)


def test_a_share_is_one_of_the_replicas_that_are_not_lost() -> None:
    policy = Policy(staleness=UNBOUNDED, quorum=Quorum(0.5, late="fold"))
    home = Home(Terms(4, 1, 1, (StoreTerms((0,), policy),), 8), [0])
    home.step(StoreLoaded(0))
    for replica in (2, 3):
        home.step(ReplicaLost(replica))
    (apply,) = (a for a in home.step(ContributionReceived(0, 0, 0, 0, 0, 0, 1, 7)) if isinstance(a, Apply))
    assert apply.contributions == (((7,), 1.0),), "one is half of two"


def test_a_count_stays_a_count() -> None:
    home = Home(Terms(3, 1, 1, (StoreTerms((0,), Policy(staleness=9, quorum=Quorum(3, late="fold"))),), 8), [0])
    home.step(StoreLoaded(0))
    home.step(ContributionReceived(0, 0, 0, 0, 0, 0, 1, 7))
    home.step(StageRetired(1, 0))
    (apply,) = (a for a in home.step(StageRetired(2, 0)) if isinstance(a, Apply))
    assert apply.contributions == (((7,), 1 / 3),)


@pytest.mark.parametrize(("replicas", "n", "steps"), [(2, 1, 3), (4, 2, 3), (3, 1.5, 2), (5, 2, 3)])
def test_weighted_gradients_count_alike_in_the_last_group(replicas: int, n: float, steps: int) -> None:
    """All weights are 3, so weighted means are those without weights. The last group counted as a full one."""

    def weighted(w: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return linear(w, batch), {"tokens": 3 * jnp.sum(batch["x"])}

    source = {"x": np.ones(replicas * steps, np.float32)}
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), 3.5, workers=[0])
    cluster = fm.SimulatedCluster(replicas, machines, fm.sim.Network(1e-4, 1e9), arithmetic=True)
    policy = fm.policies.softsync(n, scale=False)
    trainer = fm.Trainer(weighted, optax.sgd(1.0), cluster=cluster, replicas=replicas, policies=policy, weight="tokens")
    result = trainer.fit(jnp.zeros(()), source, batch_size=replicas, steps=steps, progress=False)
    assert result.ledger.used == replicas * steps
    assert float(result.params) == pytest.approx(-replicas * steps / policy.quorum.need(replicas))


def test_weighted_gradients_that_come_late_do_not_count_on_top() -> None:
    """With a quorum that folds, a mean is one over all replicas, whether the gradients carry weights or not."""

    def weighted(w: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        return linear(w, batch), {"tokens": jnp.sum(batch["x"])}

    found: list[float] = []
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), 1.5, workers=[3])
    for loss, weight in ((linear, None), (weighted, "tokens")):
        cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9), arithmetic=True)
        policy = fm.policies.compensate(0.75)
        trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=4, policies=policy, weight=weight)
        result = trainer.fit(
            jnp.zeros(()), {"x": np.ones(24, np.float32)}, batch_size=4, steps=6, shuffle=False, progress=False
        )
        assert result.ledger.folded
        found.append(float(result.params))
    assert found[1] == pytest.approx(found[0])
