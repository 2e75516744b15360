"""Each record of a fit has the staleness of the contributions of its own step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEPS, REPLICAS = 12, 4
X = np.random.default_rng(0).normal(size=(320, 4)).astype(np.float32)
SOURCE = {"x": X, "y": X.sum(axis=1, keepdims=True)}
PARAMS = {"w": jnp.zeros((4, 1)), "b": jnp.zeros(1)}


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def told(policies: Any, cluster: Any = None, factor: float = 1) -> list[dict[str, dict[int, int]]]:
    """The staleness of each record, as a callback gets it."""
    seen: list[dict[str, dict[int, int]]] = []
    if cluster is None:
        machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor, workers=[3])
        cluster = fm.SimulatedCluster(REPLICAS, machines, fm.sim.Network(1e-3, 1e9), arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=REPLICAS, policies=policies)
    result = trainer.fit(
        PARAMS,
        SOURCE,
        batch_size=16,
        steps=STEPS,
        progress=False,
        callbacks=[lambda r: seen.append({n: dict(c) for n, c in r["staleness"].items()})],
    )
    assert len(seen) == STEPS
    for layer, found in result.staleness.items():
        assert sum(found.values()) == sum(sum(r["staleness"].get(layer, {}).values()) for r in result.history)
    return seen


def totals(seen: list[dict[str, dict[int, int]]], layer: str) -> list[int]:
    return [sum(record.get(layer, {}).values()) for record in seen]


def test_the_first_step_is_fresh_and_each_later_one_is_one_clock_behind() -> None:
    seen = told(fm.policies.double_buffer())
    assert [record["w"] for record in seen] == [{0: REPLICAS}, *[{1: REPLICAS}] * (STEPS - 1)]


@pytest.mark.parametrize(
    "policies", [fm.policies.double_buffer(), fm.policies.asynchronous()], ids=lambda p: p.describe()
)
def test_each_record_of_a_real_fit_has_its_contributions(policies: fm.Policy, threads_cluster: fm.Cluster) -> None:
    seen = told(policies, threads_cluster)
    assert totals(seen, "w") == [REPLICAS] * STEPS
    assert 0 in seen[0]["w"], "the first contribution is fresh"


def test_contributions_that_are_applied_as_they_arrive_belong_to_their_own_clock() -> None:
    seen = told({"w": fm.Policy(), "b": fm.policies.asynchronous(2)})
    assert totals(seen, "b") == [REPLICAS] * STEPS


def test_pushes_of_several_steps_belong_to_the_steps_that_push() -> None:
    seen = told({"w": fm.Policy(), "b": fm.policies.asynchronous(5, every=5)})
    assert totals(seen, "b") == [REPLICAS if step in (4, 9, 11) else 0 for step in range(STEPS)]


def test_without_common_clocks_a_step_has_as_many_contributions_as_replicas() -> None:
    seen = told(fm.policies.asynchronous(), factor=3)
    assert totals(seen, "w") == [REPLICAS] * STEPS
    assert seen[0]["w"][0] == 1, "of the first four only the first is fresh"


def test_what_is_folded_in_belongs_to_the_clock_that_takes_it() -> None:
    seen = told(fm.policies.compensate(), factor=3)
    late = [record["w"].get(3, 0) + record["w"].get(2, 0) for record in seen]
    assert seen[0]["w"] == {0: 3} and sum(late) >= 2
    assert all(total == 3 + more for total, more in zip(totals(seen, "w"), late, strict=True))
