"""Gaia among two and eleven sites: slow links between sites hardly cost time, and the loss is that of one server."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEP_S, LAN, STEPS, EACH = 0.1, 2e6, 24, 2


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)


def problem() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(704, 64)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(64, 16)) / 8).astype(np.float32)
    return {"w": jnp.zeros((64, 16))}, {"x": x, "y": y}


def fit(policy: fm.Policy, sites: int, slower: float) -> fm.TrainingResult:
    names = [f"site {i}" for i in range(sites)]
    table = {(a, b): (1e-3, LAN / slower) for a in names for b in names if a < b}
    links = fm.sim.Sites(table, dict.fromkeys(names, EACH), local=fm.sim.Network(1e-4, LAN), shared_lines=True)
    cluster = fm.SimulatedCluster(EACH * sites, fm.sim.Constant(STEP_S), links)
    trainer = fm.Trainer(loss, optax.sgd(2.0), cluster=cluster, replicas=EACH * sites, policies=policy)
    return trainer.fit(*problem(), batch_size=EACH * sites * 16, steps=STEPS, seed=0, progress=False)


@pytest.mark.parametrize("sites", [2, 11])
def test_sites_behind_slow_links_are_as_fast_and_as_good_as_in_a_lan(sites: int) -> None:
    """A server sends the gradients of a site's replicas and their parameters over each line, in every step."""
    gaia = fm.policies.gaia(0.1, sites=sites, staleness=2)
    lan, source = fit(fm.Policy(), sites, 1), problem()[1]
    for slower, speed in ((15, 1.5), (60, 3.0)):
        ours, server = fit(gaia, sites, slower), fit(fm.Policy(), sites, slower)
        assert ours.virtual_seconds is not None and server.virtual_seconds and lan.virtual_seconds
        assert server.virtual_seconds > speed * ours.virtual_seconds
        assert ours.virtual_seconds < 1.4 * lan.virtual_seconds
        assert loss(ours.params, source) < 1.05 * loss(lan.params, source) < 0.05 * loss(problem()[0], source)
