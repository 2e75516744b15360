"""Where the layers of lost workers go, and that they are where they were once their workers are back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.devices import worker_of
from flowml.plan import Plan
from flowml.training.without import without

WORKERS, LAYERS, WIDTH = 4, 8, 8


def loss(params: Any, batch: Any) -> Any:
    for name, layer in sorted(params.items()):
        with fm.layer(name):
            batch = jnp.tanh(batch @ layer["w"])
    return jnp.mean(batch**2)


@pytest.fixture(scope="module")
def plan() -> Iterator[Plan]:
    params = {f"layer{number}": {"w": np.ones((WIDTH, WIDTH), np.float32)} for number in range(LAYERS)}
    with closing(fm.Cluster.threads(workers=WORKERS)) as cluster:
        trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=WORKERS)
        yield trainer.plan(params, jax.ShapeDtypeStruct((2 * WORKERS, WIDTH), jnp.float32))


def homes(plan: Plan) -> list[str]:
    assert plan.training is not None
    return [worker_of(store.home) for store in plan.training.stores]


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_each_worker_that_is_left_has_as_many_layers(plan: Plan, lost: int) -> None:
    before = homes(plan)
    for gone in combinations(sorted(set(before)), lost):
        after = homes(without(plan, gone))
        assert all(new == old for new, old in zip(after, before, strict=True) if old not in gone), "others stay"
        loads = Counter(after)
        assert len(loads) == WORKERS - lost
        assert max(loads.values()) - min(loads.values()) <= 1
    assert homes(without(plan, ())) == before, "once all are back"
