"""Filters of factors, of reports of ADMM, and of what neighbours of a gossip send."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import assert_same, data, mlp, mlp_loss

f = fm.filters
SOURCE = data()
WIDE = {"fc": jnp.asarray(np.random.default_rng(0).normal(size=(12, 64)), jnp.float32) / 8}
ROWS = {"x": SOURCE["x"], "y": np.tanh(np.asarray(SOURCE["x"]) @ np.ones((12, 64), np.float32) / 12)}


def wide_loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["fc"]) - batch["y"]) ** 2)


def simulated() -> fm.SimulatedCluster:
    return fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9))


def fit(cluster: Any, policy: fm.Policy, loss: Any = wide_loss, params: Any = WIDE, source: Any = ROWS) -> Any:
    trainer = fm.Trainer(loss, optax.sgd(0.5), cluster=cluster, replicas=2, policies=policy)
    return trainer.fit(params, source, batch_size=8, steps=8)


@pytest.mark.parametrize("chain", [(f.compress(),), (f.quantise(8),), (f.random_skip(0.5), f.compress())], ids=str)
def test_factors_are_filtered(threads_cluster: fm.Cluster, chain: Any) -> None:
    plain = fit(threads_cluster, fm.Policy(payload=fm.Factors()))
    real, virtual = (fit(c, fm.Policy(payload=fm.Factors(), filters=chain)) for c in (threads_cluster, simulated()))
    assert_same(virtual.params, real.params)
    assert virtual.traffic == real.traffic
    assert wide_loss(real.params, ROWS) < wide_loss(WIDE, ROWS)
    sent, whole = (r.traffic["fc"]["pushed_bytes"] for r in (real, plain))
    assert whole == 8 * 8 * (12 + 64) * 4, "factors, not gradients"
    if chain == (f.compress(),):
        assert_same(real.params, plain.params)
    else:
        assert sent < whole * 0.7
        changes = [np.asarray(p["fc"] - WIDE["fc"]).ravel() for p in (real.params, plain.params)]
        assert np.corrcoef(*changes)[0, 1] > 0.7


def test_the_expectation_of_filtered_factors_is_their_product() -> None:
    rng = np.random.default_rng(0)
    a, delta = (rng.normal(size=(4, n)).astype(np.float32) for n in (3, 5))
    for chain in ((f.random_skip(0.5),), (f.random_k(0.5),), (f.quantise(2, stochastic=True),)):
        total, runs = np.zeros((3, 5)), 4000
        for i in range(runs):
            decoded: list[Any] = []
            for j, value in enumerate((a, delta)):
                wire, _ = f.encode(chain, value, {}, f.Context(seed=(i, j)))
                decoded.append(f.decode(chain, iter(wire), f.Form(value.shape, value.dtype), {})[0])
            total += decoded[0].T @ decoded[1]
        assert np.abs(total / runs - a.T @ delta).max() < 0.5


@pytest.mark.filterwarnings("ignore:.*is not convex")
def test_reports_with_error_feedback_reach_the_same_consensus(threads_cluster: fm.Cluster) -> None:
    def admm(**knobs: Any) -> fm.Policy:
        return fm.Policy(every=2, payload=fm.Delta(), apply=fm.Consensus(0.5), **knobs)

    with pytest.raises(fm.PolicyError, match=r"for good; give top_k\(0.5\).with_error_feedback\(\)"):
        admm(filters=(f.top_k(0.5),))
    found = [fit(threads_cluster, admm(filters=c)) for c in ((), (f.quantise(8).with_error_feedback(),))]
    plain, coarse = (np.asarray(r.params["fc"]) for r in found)
    assert 0 < np.abs(plain - coarse).max() < 0.05 * np.abs(plain - np.asarray(WIDE["fc"])).max()


@pytest.mark.parametrize("knobs", [{}, {"apply": fm.Outer(optax.sgd(0.7)), "every": 2}], ids=["plain", "outer"])
def test_neighbours_send_packed_parameters(threads_cluster: fm.Cluster, knobs: Any) -> None:
    params = jax.tree.map(jnp.zeros_like, mlp())  # zeros can be packed
    rule: dict[str, Any] = {"loss": mlp_loss, "params": params, "source": SOURCE}
    plain = fit(threads_cluster, fm.Policy(topology=fm.Gossip("ring"), **knobs), **rule)
    policy = fm.Policy(topology=fm.Gossip("ring"), filters=(f.compress(),), **knobs)
    real, virtual = (fit(c, policy, **rule) for c in (threads_cluster, simulated()))
    assert_same(real.params, plain.params)
    assert_same(virtual.params, real.params)
    assert virtual.traffic == real.traffic
    sent, whole = (sum(t["pushed_wire_bytes"] for t in r.traffic.values()) for r in (real, plain))
    assert 0 < sent < whole


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: fm.Policy(payload=fm.Factors(), filters=(f.top_k(0.1),)), "is missing from all of the product"),
        (lambda: fm.Policy(payload=fm.Factors(), filters=(f.low_rank(1),)), "is missing from all of the product"),
        (lambda: fm.Policy(payload=fm.Factors(), filters=(f.sign().with_error_feedback(),)), "which are others"),
    ],
)
def test_unsound_policies_are_refused(make: Any, why: str) -> None:
    with pytest.raises(fm.PolicyError, match=why):
        make()
