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
from flowml_runtime.protocol.training.terms import ReplicaLost, StoreTerms, Terms


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
