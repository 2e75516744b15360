"""The replicas of a site that exchanges changes with others compute with the same parameters at each step."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

EVERY = 3
STEPS = 8


def _loss(params: dict[str, jnp.ndarray], batch: dict[str, jnp.ndarray]) -> jnp.ndarray:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    return {"x": x, "y": x @ rng.normal(size=(8, 3)).astype(np.float32)}


def _mirrors(shared: list[np.ndarray], data: dict[str, np.ndarray], rate: float) -> np.ndarray:
    """The mean of all steps, each of which sees those of the other site once they are exchanged. A plain loop."""
    start = np.zeros((8, 3))
    mirrors, fresh = [start.copy(), start.copy()], [np.zeros((8, 3)), np.zeros((8, 3))]
    for step, rows in enumerate(shared):
        for site in range(2):
            mine = rows.reshape(4, -1)[2 * site : 2 * site + 2]
            gradients = []
            for part in mine:
                x, y = data["x"][part].astype(float), data["y"][part].astype(float)
                gradients.append(2 * x.T @ (x @ mirrors[site] - y) / y.size)
            change = -rate * np.mean(gradients, axis=0) / 2  # a site has half of all replicas
            mirrors[site] = mirrors[site] + change
            fresh[site] += change
        if (step + 1) % EVERY == 0 or step == len(shared) - 1:
            mirrors = [mirrors[0] + fresh[1], mirrors[1] + fresh[0]]
            fresh = [np.zeros((8, 3)), np.zeros((8, 3))]
    return mirrors[0]


def _fit(cluster: fm.Cluster | fm.SimulatedCluster, data: dict[str, np.ndarray]) -> np.ndarray:
    topology = fm.Hierarchy(fm.AllReduce(), fm.Gossip("complete", every=EVERY), sites=2)
    policy = fm.Policy(topology=topology, payload=fm.Delta())
    trainer = fm.Trainer(_loss, optax.sgd(0.3), cluster=cluster, replicas=4, policies=policy)
    result = trainer.fit({"w": jnp.zeros((8, 3))}, data, batch_size=16, steps=STEPS, shuffle=False)
    return np.asarray(result.params["w"])


@pytest.mark.parametrize("clock", ["threads", "simulated"])
def test_steps_between_two_exchanges_are_those_of_the_site(clock: str, data: dict[str, np.ndarray]) -> None:
    """Only the leader weighed its steps by the share of its site until the next exchange."""
    expected = _mirrors([np.arange(16) + 16 * (step % 4) for step in range(STEPS)], data, 0.3)
    if clock == "threads":
        with fm.Cluster.threads(workers=4) as cluster:
            found = _fit(cluster, data)
    else:
        network = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
        found = _fit(fm.SimulatedCluster(4, fm.sim.Constant(0.1), network), data)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
