"""A fit that ends before its replicas first exchange something: what it computes, and the warning that says so."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import BATCH, assert_close, data, mlp, mlp_loss

STEPS, REPLICAS, RATE = 6, 2, 0.1
EXAMPLES = 8 * BATCH


def fit(cluster: fm.Cluster, policies: Any, replicas: int = REPLICAS) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.sgd(RATE), cluster=cluster, replicas=replicas, policies=policies)
    return trainer.fit(mlp(), data(EXAMPLES), batch_size=BATCH, steps=STEPS, progress=False)


def told(cluster: fm.Cluster, policies: Any, replicas: int = REPLICAS) -> tuple[list[str], fm.TrainingResult]:
    """What a fit warns of, and its result."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = fit(cluster, policies, replicas)
    return [str(w.message) for w in found], result


def replica(number: int, *, apart: bool) -> Any:
    """The parameters of a replica that trains apart, or its mean gradient if it computes with the first parameters."""
    params, source = mlp(), data(EXAMPLES)
    share, total = BATCH // REPLICAS, None
    for step in range(STEPS):
        first = step * BATCH + number * share
        rows = epoch_order(len(source["x"]), 0, 0, shuffle=True)[first : first + share]
        gradient = jax.grad(mlp_loss)(params, {name: part[rows] for name, part in source.items()})
        if apart:
            params = jax.tree_util.tree_map(lambda p, g: p - RATE * g, params, gradient)
        else:
            total = gradient if total is None else jax.tree_util.tree_map(np.add, total, gradient)
    return params if apart else jax.tree_util.tree_map(lambda g: g / STEPS, total)


def mean_of_replicas(*, apart: bool) -> Any:
    first, second = (replica(number, apart=apart) for number in range(REPLICAS))
    return jax.tree_util.tree_map(lambda a, b: (a + b) / 2, first, second)


@pytest.mark.parametrize(
    ("policy", "remedy"),
    [
        (fm.policies.local_sgd(100), "more steps, or fm.Once() if that is meant"),
        (fm.policies.gossip("ring", every=100), "or more steps"),
    ],
    ids=["local SGD", "gossip"],
)
def test_replicas_train_apart_and_their_mean_is_the_result(
    threads_cluster: fm.Cluster, policy: fm.Policy, remedy: str
) -> None:
    found, result = told(threads_cluster, policy)
    assert found == [
        "replicas first exchange parameters after 100 steps, and the fit has 6: they train apart, and exchange once, "
        f"after the last step; give a shorter period, {remedy}"
    ]
    assert_close(result.params, mean_of_replicas(apart=True))


@pytest.mark.parametrize("policy", [fm.policies.every(100), fm.Policy(every=fm.Every(9, offset=7))], ids=str)
def test_gradients_are_added_up_for_one_update(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    found, result = told(threads_cluster, policy)
    first = 100 if policy.every.push == 100 else 7
    assert found == [
        f"gradients are first sent after {first} steps, and the fit has 6: they are added up for a single update, "
        "after the last step; give a shorter period, more steps, or fm.Once() if that is meant"
    ]
    gradient = mean_of_replicas(apart=False)
    assert_close(result.params, jax.tree_util.tree_map(lambda p, g: p - RATE * g, mlp(), gradient))


def test_replicas_that_take_no_new_values(threads_cluster: fm.Cluster) -> None:
    found, _ = told(threads_cluster, fm.Policy(staleness=fm.UNBOUNDED, every=fm.Every(1, pull=50)))
    assert found == [
        "replicas first take new values after 50 steps, and the fit has 6: all its steps compute with the first "
        "values; give a smaller pull, or more steps"
    ]


def test_layers_with_other_rhythms_are_named(threads_cluster: fm.Cluster) -> None:
    found, _ = told(threads_cluster, {"fc0*": fm.policies.local_sgd(8), "*": fm.policies.local_sgd(3)})
    assert [text.partition(" after ")[0] for text in found] == ["replicas first exchange parameters of fc0"]


@pytest.mark.parametrize(
    "policy",
    [
        fm.policies.local_sgd(STEPS),
        fm.Policy(every=fm.Once()),
        fm.policies.diloco(8, fragments=3, delay=2),
        fm.policies.asynchronous(100),
        fm.policies.gossip("ring", every=STEPS),
    ],
    ids=str,
)
def test_what_is_no_mistake(threads_cluster: fm.Cluster, policy: fm.Policy) -> None:
    layers = [text for text in told(threads_cluster, policy)[0] if "first" in text]
    assert [text.partition(" after ")[0] for text in layers] in ([], ["replicas first exchange parameters of fc0"])


def test_one_replica_exchanges_nothing(threads_cluster: fm.Cluster) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="one replica")
        assert not [t for t in told(threads_cluster, fm.policies.local_sgd(100), 1)[0] if "first exchange" in t]
    assert any("single update" in text for text in told(threads_cluster, fm.policies.every(100), 1)[0])
