"""SparseLoCo equals a loop over NumPy arrays: local steps, the largest elements of the change in few bits, feedback."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.reference import BATCH, EXAMPLES, assert_close, data, mlp, mlp_loss

SOURCE, STEPS, EVERY, RATE = data(), 13, 4, 0.1


def sent(value: np.ndarray, share: float, bits: int) -> np.ndarray:
    """The largest elements, each rounded to the nearest multiple of a scale: that of the largest of all."""
    flat, out = value.reshape(-1), np.zeros(value.size, np.float32)
    chosen = sorted(range(flat.size), key=lambda i: -abs(flat[i]))[: max(1, int(np.ceil(share * flat.size - 1e-9)))]
    levels = max(2 ** (bits - 1) - 1, 1)
    scale = max(abs(flat[i]) for i in chosen) / levels
    for i in chosen:
        out[i] = round(float(flat[i] / scale)) * scale if scale else 0.0
    return out.reshape(value.shape)


def loop(share: float, bits: int, decay: float, replicas: int = 2) -> Any:
    """Replicas that begin each round with the shared parameters, and remember what they could not send."""
    shared = jax.tree.map(np.asarray, mlp())
    kept = [jax.tree.map(np.zeros_like, shared) for _ in range(replicas)]
    own = [shared for _ in range(replicas)]
    gradient = jax.jit(jax.grad(mlp_loss))
    for step in range(STEPS):
        order = epoch_order(EXAMPLES, 0, step * BATCH // EXAMPLES)[step * BATCH % EXAMPLES :][:BATCH]
        for r, rows in enumerate(np.split(order, replicas)):
            found = gradient(own[r], {k: v[rows] for k, v in SOURCE.items()})
            own[r] = jax.tree.map(lambda x, g: x - np.float32(RATE) * np.asarray(g), own[r], found)
        if (step + 1) % EVERY and step + 1 != STEPS:
            continue
        changes = []
        for r in range(replicas):
            total = jax.tree.map(lambda s, x, e: s - x + np.float32(decay) * e, shared, own[r], kept[r])
            changes.append(jax.tree.map(lambda v: sent(v, share, bits), total))
            kept[r] = jax.tree.map(np.subtract, total, changes[r])
        shared = jax.tree.map(lambda s, *c: s - sum(c) / replicas, shared, *changes)
        own = [shared for _ in range(replicas)]
    return shared, kept


def fit(cluster: Any, policy: fm.Policy, **options: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.sgd(RATE), cluster=cluster, replicas=2, policies=policy, **options)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS, progress=False)


@pytest.mark.parametrize(("share", "bits", "decay"), [(0.1, 2, 0.95), (0.25, 4, 1.0)])
def test_it_equals_the_loop_on_both_clocks(threads_cluster: fm.Cluster, share: float, bits: int, decay: float) -> None:
    policy = fm.policies.sparse_loco(EVERY, share, bits, decay=decay)
    expected, kept = loop(share, bits, decay)
    real = fit(threads_cluster, policy)
    assert_close(real.params, expected)
    virtual = fit(fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9)), policy)
    assert_close(virtual.params, expected)
    assert virtual.traffic == real.traffic
    for layer in mlp():
        norm = np.sqrt(sum(np.sum(np.square(leaf)) for one in kept for leaf in one[layer].values()))
        for ledger in (real.ledger, virtual.ledger):
            np.testing.assert_allclose(ledger.kept[layer], norm, rtol=1e-4)
            assert f"kept by error feedback of {layer} and not sent: a norm of" in str(ledger)
    for layer, leaves in mlp().items():
        chain = policy.filters
        forms = [fm.filters.Form(leaf.shape, np.dtype(np.float32)) for leaf in leaves.values()]
        assert real.traffic[layer]["pushes"] == 2 * 4
        assert real.traffic[layer]["pushed_bytes"] <= 2 * 4 * sum(fm.filters.most_bytes(chain, form) for form in forms)


def test_two_stages_and_an_outer_optimizer_train(threads_cluster: fm.Cluster) -> None:
    policy = fm.policies.sparse_loco(EVERY, 0.25, outer=optax.sgd(0.7))
    result = fit(threads_cluster, policy, placement=fm.Pipeline(2))
    assert mlp_loss(result.params, SOURCE) < mlp_loss(mlp(), SOURCE)
    assert "top_k(0.25).with_error_feedback(0.95), quantise(2)" in policy.describe()


@pytest.mark.parametrize("decay", [0, 1.5, -1, float("nan"), "half"])
def test_a_decay_that_is_no_share_is_refused(decay: Any) -> None:
    with pytest.raises(fm.PolicyError, match="top_k"):
        fm.policies.sparse_loco(4, decay=decay)
