"""The ledger and the table say for each layer what became of the work items, also where other layers count them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

OTHERS = {
    "asynchronous": fm.Policy(staleness=2),
    "unbounded": fm.Policy(staleness=fm.UNBOUNDED),
    "ring": fm.Policy(topology=fm.Ring()),
    "synchronous": fm.Policy(),
    "quorum": fm.policies.quorum(0.75),
}


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["a"]) ** 2) + jnp.mean((batch["x"] @ params["b"]) ** 2)


def fitted(late: str, other: fm.Policy) -> fm.TrainingResult:
    machines = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.2), factor=5, workers=(2,))
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-3, 1e7))
    policies = {"a": fm.policies.quorum(0.5, late=late), "b": other}
    trainer = fm.Trainer(loss, optax.sgd(0.01), cluster=cluster, replicas=4, policies=policies)
    params = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 3))}
    return trainer.fit(params, {"x": np.ones((96, 4), np.float32)}, batch_size=16, steps=12, progress=False)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("late", ["drop", "fold"])
def test_a_layer_counts_the_items_that_its_home_applied(late: str, other: str) -> None:
    result = fitted(late, OTHERS[other])
    name = next(name for name in result.ledger.groups if name.startswith("a "))
    tally, applied = result.ledger.groups[name], result.staleness["a"]
    assert tally.used + tally.folded == sum(applied.values())
    assert tally.used == 2 * 12
    assert (tally.folded > 0) == (late == "fold") and tally.dropped > 0
    row = next(line.split() for line in result.table().splitlines() if line.startswith("a "))
    fates = [str(tally.used), str(tally.dropped), str(tally.folded), str(tally.requeued)]
    assert any(row[i : i + 4] == fates for i in range(len(row)))


@pytest.mark.parametrize("other", OTHERS)
def test_only_layers_that_decide_are_listed(other: str) -> None:
    ledger = fitted("drop", OTHERS[other]).ledger
    found = [name[0] for name in ledger.groups]
    if other in ("synchronous", "quorum"):
        assert found == ["a", "b"]
    else:
        assert found == ["a"] and ledger.dropped == 0


def test_one_rule_for_all_layers_needs_no_groups() -> None:
    assert fitted("drop", fm.policies.quorum(0.5)).ledger.groups == {}
