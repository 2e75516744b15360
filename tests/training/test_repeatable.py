"""The same run again gives the same bytes, whatever the machine does to the timing of its processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.stalls import stalls
from tests.training.reference import BATCH, data, mlp, mlp_loss

RUNS = 20
SOURCE = data()


def bits(tree: Any) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree_util.tree_leaves(tree))


@pytest.mark.parametrize(
    "options",
    [
        {"replicas": 2, "placement": fm.Pipeline(1)},
        {"replicas": 1, "placement": fm.Pipeline(2), "microbatches": 4},
        {"replicas": 2, "placement": fm.Pipeline(1), "policies": {"*": fm.policies.every(2)}},
    ],
    ids=["two replicas", "a pipeline", "two replicas in step every other step"],
)
def test_twenty_trainings_under_random_delays_agree_to_the_bit(
    process_cluster: fm.Cluster, options: dict[str, Any], seed: int
) -> None:
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=process_cluster, **options)
    pids = list(process_cluster.pids.values())
    found: set[bytes] = set()
    for run in range(RUNS):
        with stalls(pids, seed + run):
            result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=6, seed=seed)
        losses = [record["loss"] for record in result.history]
        found.add(bits((result.params, result.opt_state, losses)))
    assert len(found) == 1


def test_calls_in_flight_under_random_delays_agree_to_the_bit(process_cluster: fm.Cluster, seed: int) -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("a"):
            y = jnp.sin(x) @ x
        with fm.layer("b"):
            y = jnp.tanh(y) @ x
        with fm.layer("c"):
            return jnp.cos(y) @ x

    x = jax.random.normal(jax.random.key(seed), (96, 96))
    program = fm.dataflow(fn, cluster=process_cluster, placement={"[ac]": "worker:0", "b": "worker:1"})
    pids = list(process_cluster.pids.values())
    with stalls(pids, seed, longest_s=0.004):
        futures = [program.submit(x) for _ in range(RUNS * 5)]
        found = {bits(f.result(timeout=60)) for f in futures}
    assert len(found) == 1
