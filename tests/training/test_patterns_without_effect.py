"""A pattern, or a vote, that has no effect says so before anything runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

PARAMS = {"fc1": {"w": np.ones((6, 5), np.float32), "b": np.zeros(5, np.float32)}, "fc2": np.ones((5, 3), np.float32)}
BATCH = {"x": np.ones((8, 6), np.float32)}


def loss(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch["x"] @ params["fc1"]["w"] + params["fc1"]["b"])
    return jnp.mean((hidden @ params["fc2"]) ** 2)


def plan(policies: Any) -> fm.Plan:
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    return fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=2, policies=policies).plan(PARAMS, BATCH)


def test_a_policy_pattern_that_earlier_ones_shadow_is_refused() -> None:
    with pytest.raises(fm.PolicyError) as caught:
        plan({"fc*": fm.Policy(), "fc1/w": fm.policies.every(4)})
    assert str(caught.value) == (
        "policies['fc1/w'] has no effect: the first pattern that matches decides, and 'fc*' before it matches all that "
        "it does (fc1/w); put the narrower pattern first, or leave this one out"
    )
    with pytest.raises(fm.PolicyError, match=r"and 'fc1/\*', '\*2' before it matches all"):
        plan({"fc1/*": fm.Policy(), "*2": fm.Policy(), "fc*": fm.policies.every(4)})


def test_the_rest_may_be_empty_and_a_pattern_may_lose_some_of_its_layers() -> None:
    assert plan({"fc1/*": fm.policies.every(2), "fc*": fm.Policy(), "*": fm.policies.every(4)}).training is not None


def test_a_placement_pattern_that_earlier_ones_shadow_is_refused() -> None:
    def model(x: jax.Array) -> jax.Array:
        with fm.layer("fc1"):
            x = jnp.tanh(x)
        with fm.layer("fc2"):
            return jnp.tanh(x)

    devices = ["worker:0", "worker:1"]
    with pytest.raises(fm.PlacementError, match=r"placement pattern 'fc2' has no effect: .*'fc\*' before it"):
        fm.compile(model, jnp.ones(3), devices=devices, placement={"fc*": "worker:0", "fc2": "worker:1"})
    fm.compile(model, jnp.ones(3), devices=devices, placement={"fc1": "worker:0", "fc2": "worker:1", "*": "worker:0"})


def test_a_put_pattern_that_earlier_ones_shadow_is_refused(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(fm.PlacementError, match=r"put: pattern 'fc2' has no effect"):
        fm.put(PARAMS, threads_cluster, {"fc*": "worker:0", "fc2": "worker:1"})


def test_a_vote_for_more_rows_than_a_layer_has_is_refused() -> None:
    with pytest.raises(fm.PolicyError, match=r"'fc2': fm\.Vote\(6\) .* largest parameter has 5 rows, .* at most 2"):
        plan({"fc2": fm.Policy(apply=fm.Vote(6))})
    with pytest.warns(fm.FlowmlWarning, match=r"Vote.* no effect"):
        (note,) = (n for n in plan({"fc2": fm.Policy(apply=fm.Vote(3))}).notes if "Vote" in n)
    assert "no effect" in note
    assert not any("Vote" in n for n in plan({"fc2": fm.Policy(apply=fm.Vote(2))}).notes)


def test_a_rank_that_makes_no_matrix_smaller_is_refused() -> None:
    with pytest.raises(fm.PolicyError, match=r"low_rank\(3\).* 'fc1/w', 6 x 5, are smaller than it up to rank 2; give"):
        plan(fm.policies.power_sgd(3))
    plan({"fc1/*": fm.policies.power_sgd(2), "fc2": fm.policies.power_sgd(1)})
    plan(fm.policies.power_sgd(2))  # of 'fc2', 5 x 3, the factors are not smaller, and it is sent as it is


def test_no_patterns_are_no_policies() -> None:
    assert plan({}).training == plan(None).training


def test_changes_between_sites_need_two() -> None:
    with pytest.raises(fm.PolicyError, match=r"gaia\(sites=1\): .* give 2 sites or more"):
        fm.policies.gaia(0.01, sites=1)
    with pytest.raises(fm.PolicyError, match=r"give 2 sites or more"):
        fm.policies.gaia(0.01, sites=((0, 1),))
    alone = fm.Policy(fm.Hierarchy(fm.AllReduce(), fm.Gossip("complete"), sites=1), 1, payload=fm.Delta())
    with pytest.warns(fm.FlowmlWarning, match="all replicas are in one site, so nothing is exchanged between sites"):
        plan(alone)
