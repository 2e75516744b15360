"""Fits whose optimizers couple layers with homes of their own: the loop of one device, snapshots, and virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.render.units import bytes_text
from tests.training.reference import BATCH, data, mlp, mlp_loss
from tests.training.test_checkpoints import STEPS, assert_goes_on, case

CLIP = optax.clip_by_global_norm(0.05)
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "clip": optax.chain(CLIP, optax.adam(1e-2)),
    "skipped steps": optax.apply_if_finite(optax.chain(CLIP, optax.sgd(0.1)), 3),
    "two rounds": optax.contrib.mechanize(optax.sgd(0.1)),
}
FAST = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
UNEVEN = fm.sim.LogNormal(mean_s=0.1, sigma=0.5)


def simulated(**options: Any) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(4, UNEVEN, FAST, **{"arithmetic": True, **options})


def fit(cluster: fm.Cluster, name: str, policies: Any = None, *, replicas: int = 2) -> fm.TrainingResult:
    trainer = fm.Trainer(
        mlp_loss, OPTIMIZERS[name], cluster=cluster, replicas=replicas, policies=policies, on_nonfinite="apply"
    )
    return trainer.fit(mlp(), data(), batch_size=BATCH, steps=STEPS, seed=3, progress=False)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_homes_together_do_what_one_device_does(threads_cluster: fm.Cluster, name: str) -> None:
    whole, one = fit(threads_cluster, name), fit(threads_cluster, name, replicas=1)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["clip", "two rounds"])
def test_a_fit_goes_on_bit_by_bit(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    assert_goes_on(case(threads_cluster, tmp_path, optimizer=OPTIMIZERS[name]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_simulated_fit_is_the_real_one(threads_cluster: fm.Cluster, name: str) -> None:
    real, virtual = fit(threads_cluster, name), fit(simulated(), name)
    for a, b in zip(jax.tree.leaves(virtual.params), jax.tree.leaves(real.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_traffic_has_what_homes_share(threads_cluster: fm.Cluster) -> None:
    """The first of three homes shares one sum of squares, and each other one those of its two leaves."""
    real, virtual = (fit(cluster, "clip") for cluster in (threads_cluster, simulated()))
    assert real.traffic == virtual.traffic
    training = real.plan.training
    assert training is not None
    workers = len({store.home for store in training.stores})
    assert [t["shared_wire_bytes"] for t in real.traffic.values()] == [n * STEPS * (workers - 1) for n in (4, 8, 8)]
    rows = {line.split()[0]: line for line in real.table().splitlines()[2:]}
    for layer, sent in real.traffic.items():
        assert rows[layer].endswith(bytes_text(sum(n for name, n in sent.items() if name.endswith("_wire_bytes"))))


def test_a_simulated_fit_goes_on_bit_by_bit(tmp_path: Path) -> None:
    assert_goes_on(case(simulated(), tmp_path, optimizer=OPTIMIZERS["clip"]))


def test_any_number_of_processes_simulates_the_same_rounds() -> None:
    results = [fit(simulated(arithmetic=False, jobs=jobs), "clip", fm.policies.quorum(0.5)) for jobs in (1, 2)]
    assert results[0].trace_hash == results[1].trace_hash
    assert results[0].table() == results[1].table()
