"""A site has no rhythm of its own: steps of more microbatches send as rarely in a site, and make the same updates."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

EVERY, BATCH, ROUNDS = 3, 8, 4
DATA = {"x": np.random.default_rng(0).normal(size=(EVERY * BATCH * ROUNDS, 5)).astype(np.float32)}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]["w"]) @ params["b"]["w"] - 1) ** 2)


def fit(cluster: Any, rule: fm.Policy, *, microbatches: int, batch_size: int) -> Any:
    params = {"a": {"w": jnp.full((5, 4), 0.3)}, "b": {"w": jnp.full((4, 1), -0.2)}}
    trainer = fm.Trainer(loss, optax.adam(0.05), cluster=cluster, replicas=4, policies=rule, microbatches=microbatches)
    return trainer.fit(params, DATA, batch_size=batch_size, epochs=1, shuffle=False, progress=False)


@pytest.fixture(params=["threads", "simulated"])
def four_workers(request: pytest.FixtureRequest) -> Any:
    if request.param == "threads":
        return fm.Cluster.threads(workers=4)
    models: dict[str, Any] = {"compute": fm.sim.Constant(0.1), "network": fm.sim.Network(1e-3, 1e9)}
    return fm.SimulatedCluster(workers=4, **models)


@pytest.mark.parametrize("remote", [fm.ParameterServer(), fm.Ring()])
def test_more_microbatches_are_a_rhythm_inside_sites(four_workers: Any, remote: fm.Topology) -> None:
    sited = fm.Policy(topology=fm.Hierarchy(fm.ParameterServer(), remote, sites=2))
    with four_workers as cluster:
        rarely = fit(cluster, fm.Policy(every=EVERY), microbatches=1, batch_size=BATCH)
        whole = fit(cluster, sited, microbatches=EVERY, batch_size=EVERY * BATCH)
    assert (len(rarely.history), len(whole.history)) == (EVERY * ROUNDS, ROUNDS)
    for one, other in ((rarely.params[n]["w"], whole.params[n]["w"]) for n in "ab"):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_the_argument_that_would_give_it_is_refused() -> None:
    with pytest.raises(fm.PolicyError, match=r"Hierarchy has no argument every=; .*Hierarchy has local=, remote="):
        fm.Hierarchy(fm.ParameterServer(), fm.Ring(), every=3)  # pyright: ignore[reportCallIssue]
