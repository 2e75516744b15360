"""Optimizers that want the loss or the gradient's function are refused in our own words."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import UnsupportedError


@pytest.mark.parametrize(
    ("optimizer", "wants"),
    [
        (optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=5)), "'value'"),
        (optax.lbfgs(), "'value_fn'"),
        (optax.polyak_sgd(), "'value'"),
        (optax.contrib.sam(optax.sgd(0.01), optax.sgd(0.1), opaque_mode=True), "grad_fn"),
    ],
)
def test_an_optimizer_that_wants_more_than_gradients_is_refused(
    threads_cluster: fm.Cluster, optimizer: Any, wants: str
) -> None:
    trainer = fm.Trainer(lambda p, x: jnp.mean((x @ p["w"]) ** 2), optimizer, cluster=threads_cluster, replicas=2)
    with pytest.raises(UnsupportedError, match=f"the optimizer wants more than gradients.*{wants}"):
        trainer.fit({"w": jnp.ones((4, 2))}, np.ones((16, 4), np.float32), batch_size=8, steps=1)
