"""Factors: the same training as with plain gradients, and exactly the bytes that the method promises."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, FEATURES, assert_close, data, mlp, mlp_loss, optax_loop

SOURCE = data()
WIDTHS = (40, 32)
STEPS = 6
FLOAT = 4


@pytest.mark.parametrize(
    "layout",
    [{"replicas": 4}, {"replicas": 2, "placement": fm.Pipeline(2)}, {"replicas": 2, "microbatches": 3}],
    ids=str,
)
def test_the_same_training_as_with_gradients(threads_cluster: fm.Cluster, layout: dict[str, Any]) -> None:
    optimizer = optax.adam(1e-2)
    expected = optax_loop(mlp_loss, mlp(WIDTHS), optimizer, SOURCE, STEPS)
    trainer = fm.Trainer(
        mlp_loss, optimizer, cluster=threads_cluster, policies={"fc1/*": fm.policies.factors()}, **layout
    )
    result = trainer.fit(mlp(WIDTHS), SOURCE, batch_size=BATCH, steps=STEPS)
    assert any("fc1/kernel: pushed as factors" in note for note in result.plan.notes)
    assert_close(result.params, expected.params)


def test_bytes_are_those_of_the_factors(process_cluster: fm.Cluster) -> None:
    """B(m + n) numbers instead of mn, on the wire, for the replica that is not with the home."""
    m, n = WIDTHS
    share = BATCH // 2
    sizes = {"factors": share * (m + n), "plain": m * n}
    for kind, policy in (("factors", fm.policies.factors()), ("plain", fm.Policy())):
        trainer = fm.Trainer(
            mlp_loss, optax.sgd(0.1), cluster=process_cluster, replicas=2, policies={"fc1/kernel": policy}
        )
        result = trainer.fit(mlp(WIDTHS), SOURCE, batch_size=BATCH, steps=STEPS)
        traffic = result.traffic["fc1/kernel" if kind == "factors" else "fc1"]
        bias = 0 if kind == "factors" else n  # one rule for all of a layer keeps it in one store
        assert traffic["pushed_bytes"] == STEPS * 2 * (sizes[kind] + bias) * FLOAT
        assert traffic["pushed_wire_bytes"] == STEPS * (sizes[kind] + bias) * FLOAT
        assert traffic["pushes"] == 2 * STEPS


def test_beyond_the_crossover_the_gradient_is_pushed(threads_cluster: fm.Cluster) -> None:
    """fc0 is 12 x 40: with 12 examples a replica the factors are larger than the gradient, with 4 they are not."""
    batch = {k: v[:BATCH] for k, v in SOURCE.items()}
    m, n = FEATURES, WIDTHS[0]
    for replicas, share in ((2, 12), (4, 6)):
        trainer = fm.Trainer(
            mlp_loss,
            optax.sgd(0.1),
            cluster=threads_cluster,
            replicas=replicas,
            policies={"fc0/kernel": fm.policies.factors()},
        )
        plan = trainer.plan(mlp(WIDTHS), batch)
        factors, plain = share * (m + n) * FLOAT, m * n * FLOAT
        (note,) = [note for note in plan.notes if "fc0/kernel" in note]
        assert f"{factors:,} bytes" in note
        assert f"{plain:,}" in note
        assert ("pushed as factors" in note) == (factors < plain)
        store = next(s for s in plan.training.stores if "fc0/kernel" in s.paths)
        assert any(p.factors for p in store.parts) == (factors < plain)


def test_what_is_no_outer_product_is_pushed_plain(threads_cluster: fm.Cluster) -> None:
    params = {"embed": jnp.ones((50, 8)) * 0.1, "out": jnp.ones((8, 2)) * 0.1}
    source = {"token": np.arange(96) % 50, "y": SOURCE["y"]}

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((params["embed"][batch["token"]] @ params["out"] - batch["y"]) ** 2)

    expected = optax_loop(loss, params, optax.sgd(0.5), source, STEPS)
    result = fm.Trainer(
        loss, optax.sgd(0.5), cluster=threads_cluster, replicas=4, policies={"*": fm.policies.factors()}
    ).fit(params, source, batch_size=BATCH, steps=STEPS)
    assert any(note.startswith("embed: its gradient is no single outer product") for note in result.plan.notes)
    assert_close(result.params, expected.params)
