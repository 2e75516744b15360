"""Filters under a virtual clock: the parameters, the bytes and the residuals of a real fit."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

SOURCE = data()
CHAINS = [
    (fm.filters.top_k(0.1).with_error_feedback(), fm.filters.key_cache(), fm.filters.compress()),
    (fm.filters.random_k(0.2), fm.filters.quantise(8, stochastic=True)),
    (fm.filters.significance(0.5),),
]


def simulated(*, arithmetic: bool) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9), arithmetic=arithmetic)


def fit(cluster: Any, policy: fm.Policy) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=2, policies=policy)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=6)


@pytest.mark.parametrize("filters", CHAINS, ids=lambda chain: ", ".join(map(str, chain)))
@pytest.mark.parametrize("every", [1, 2])
def test_a_simulated_fit_filters_as_a_real_one(threads_cluster: fm.Cluster, filters: Any, every: int) -> None:
    policy = fm.Policy(filters=filters, every=every)
    virtual, real = fit(simulated(arithmetic=True), policy), fit(threads_cluster, policy)
    assert_same(virtual.params, real.params)
    assert virtual.traffic == real.traffic


def test_without_arithmetic_bytes_are_as_stated() -> None:
    filters = (fm.filters.top_k(0.1), fm.filters.quantise(4))
    result = fit(simulated(arithmetic=False), fm.Policy(filters=filters))
    forms = [fm.filters.Form(shape, np.dtype(np.float32)) for shape in ((16, 16), (16,))]
    each = sum(fm.filters.nbytes(filters, form) or 0 for form in forms)
    assert result.traffic["fc1"]["pushed_bytes"] == 12 * each


LOW_RANK = [{"filters": (fm.filters.low_rank(2),)}, {"pull_filters": (fm.filters.low_rank(2),)}]


@pytest.mark.parametrize("knobs", LOW_RANK, ids=lambda knobs: str(*knobs))
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("sites", [False, True])
def test_matrices_are_multiplied_as_on_a_real_worker(
    threads_cluster: fm.Cluster, knobs: dict[str, Any], every: int, sites: bool
) -> None:
    """A sum of gradients is an array of JAX, whose product with a matrix has other bits than NumPy's."""
    topology = fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), sites=2) if sites else fm.ParameterServer()
    policy = fm.Policy(topology=topology, every=every, **knobs)
    virtual, real = fit(simulated(arithmetic=True), policy), fit(threads_cluster, policy)
    assert_same(virtual.params, real.params)
    assert virtual.traffic == real.traffic


def test_a_kernel_of_numpy_takes_arrays_of_jax() -> None:
    matrix = np.random.default_rng(0).normal(size=(33, 17)).astype(np.float32)
    seen = fm.filters.on_numpy(lambda *arrays, xp: arrays, jnp.asarray(matrix), None)
    assert type(seen[0]) is np.ndarray and seen[1] is None
