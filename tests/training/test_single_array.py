"""Parameters that are one array, and no tree, have a name in tables, patterns and errors."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

SOURCE = {"x": np.ones((32, 4), np.float32)}


def fit(**policies: fm.Policy) -> fm.TrainingResult:
    cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9))
    trainer = fm.Trainer(
        lambda w, batch: jnp.mean(batch["x"] @ w), optax.sgd(0.1), cluster=cluster, replicas=2, policies=policies
    )
    return trainer.fit(jnp.zeros(4), SOURCE, batch_size=8, steps=4, progress=False)


def test_a_single_array_is_named_params() -> None:
    result = fit(params=fm.Policy(every=2))
    assert result.params.shape == (4,)
    assert list(result.traffic) == ["params"]
    assert "\nparams  every 2" in result.table()


def test_errors_name_it() -> None:
    with pytest.raises(fm.PolicyError, match="matches no parameter; there are: params"):
        fit(w=fm.Policy())
    with pytest.raises(fm.PolicyError, match=r"'params': Quorum\(5\) asks for more replicas"):
        fit(params=fm.policies.quorum(5))
