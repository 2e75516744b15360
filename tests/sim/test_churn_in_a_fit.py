"""A machine that leaves in a record ends a fit on a simulated cluster, as a lost worker ends one on a real cluster."""

from __future__ import annotations

import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowml as fm

RECORD = {"metadata": {"gap_seconds": 300}, "data": [3, 3, 2, 3]}
CHURN = fm.sim.Churn.from_spot(RECORD, gap_s=1.0, seed=1)
SOURCE = {"x": np.ones((32, 4), np.float32)}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def fit(workers: int, steps: int) -> fm.TrainingResult:
    models = fm.sim.Constant(0.1), fm.sim.Network(0.0, float("inf"))
    cluster = fm.SimulatedCluster(workers, *models, arithmetic=False, faults=[CHURN])
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=workers)
    return trainer.fit({"w": jnp.ones((4, 2))}, SOURCE, batch_size=6 * workers, steps=steps)


def test_a_departure_ends_the_fit_with_the_worker_and_the_time() -> None:
    ((time_s, worker, up), *_) = CHURN.changes
    assert (time_s, up) == (2.0, False)
    with pytest.raises(fm.WorkerLostError, match=rf"worker:{worker}.*it stopped at 2 s"):
        fit(3, steps=100)


def test_a_fit_that_ends_before_the_departure_does_not_notice_it() -> None:
    assert fit(3, steps=15).virtual_seconds == pytest.approx(1.5)


def test_only_the_first_departure_of_each_worker_that_exists_counts() -> None:
    churn = fm.sim.Churn([(1.0, 0, False), (2.0, 0, True), (3.0, 0, False), (2.5, 5, False)])
    assert churn.crashes(workers=3) == (fm.sim.Crash(0, 1.0),)


@pytest.mark.filterwarnings("ignore:worker.+ was lost")
@pytest.mark.parametrize("policy", [fm.policies.asynchronous(every=50, apply="sum"), fm.policies.downpour(50, 50)])
def test_what_waits_for_a_push_outlives_a_newcomer_that_is_lost_again(policy: fm.Policy) -> None:
    """It got a share of what the others had gathered, and was lost with it."""
    down, up = False, True
    changes = [(0.5, 1, down), (0.9, 3, down), (2.9, 2, down), (4.9, 3, up), (6.9, 3, down)]
    models = fm.sim.LogNormal(0.1, 0.3), fm.sim.Network(1e-3, 1e8)
    cluster = fm.SimulatedCluster(4, *models, seed=71, faults=[fm.sim.Churn(changes, notice_s=0.3)])
    trainer = fm.Trainer(
        lambda params, batch: -jnp.mean(batch @ params["w"]),
        optax.sgd(1.0),
        cluster=cluster,
        replicas=4,
        policies=policy,
    )
    items = 4 * 60
    params, source = {"w": np.zeros(items, np.float32)}, np.eye(items, dtype=np.float32)
    found = trainer.fit(params, source, batch_size=4, epochs=1, progress=False, replicas="elastic")
    assert len(found.changes) + len(found.losses) == len(changes)
    np.testing.assert_array_equal(found.params["w"], 1.0)
    assert found.ledger.used == items


@pytest.mark.filterwarnings("ignore:worker.+ w(as|ere) lost")
@pytest.mark.parametrize("on_loss", ["replace", "shrink"])
@pytest.mark.parametrize("away_s", [0.3, 0.95, 1.05])
def test_a_worker_may_return_before_its_loss_is_noticed(on_loss: Any, away_s: float) -> None:
    churn = fm.sim.Churn([(0.8, 0, False), (0.8 + away_s, 0, True)])
    models = fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e8)
    cluster = fm.SimulatedCluster(2, *models, arithmetic=False, faults=[churn])
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=2)
    about: dict[str, Any] = {"batch_size": 8, "steps": 40, "progress": False}
    found = trainer.fit({"w": jnp.ones((4, 2))}, SOURCE, on_loss=on_loss, **about)
    assert [lost.workers for lost in found.losses] == [("worker:0",)]
    assert [record["step"] for record in found.history] == list(range(40))


@pytest.mark.filterwarnings("ignore:worker.+ w(as|ere) lost")
def test_the_error_of_a_fit_that_has_lost_all_does_not_advise_what_was_given() -> None:
    models = fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e8)
    churn = fm.sim.Churn([(0.5, 0, False), (0.55, 1, False)])
    cluster = fm.SimulatedCluster(2, *models, arithmetic=False, faults=[churn])
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=2)
    about: dict[str, Any] = {"batch_size": 8, "steps": 40, "progress": False}
    with pytest.raises(fm.WorkerLostError, match="0 of 2 replicas are left") as error:
        trainer.fit({"w": jnp.ones((4, 2))}, SOURCE, on_loss="shrink", **about)
    assert "lets a fit go on" not in str(error.value)


@pytest.mark.filterwarnings("ignore::flowml.FlowmlWarning")
@settings(deadline=None, max_examples=16)
@given(seed=st.integers(0, 1_000_000), beside=st.booleans(), resumed=st.booleans())
def test_the_ledger_is_exact_after_losses_joins_and_leaves(seed: int, beside: bool, resumed: bool) -> None:
    """Layers with rhythms and rules of their own, `beside` one with common clocks or not, in a fit that may be resumed.
    An item counts as used if some layer has it, and as in part there if others lost it with a replica, also if members
    changed between the step and the push."""
    rng = np.random.default_rng(seed)
    replicas, kinds = int(rng.integers(3, 6)), (fm.policies.synchronous(), *map(folding, (0.5, 0.75)))
    policies = [
        *([kinds[int(rng.integers(len(kinds)))]] if beside else ()),
        *(drawn(rng) for _ in range(int(rng.integers(1, 3 if beside else 4)))),
    ]
    steps = int(rng.integers(20, 60))
    changes, notice_s = members(rng, replicas), float(rng.choice([0, 0.3, 5]))
    churn = fm.sim.Churn(changes, notice_s=notice_s) if notice_s else fm.sim.Churn(changes)
    models = fm.sim.LogNormal(0.1, 0.3), fm.sim.Network(1e-3, 1e8)
    cluster = fm.SimulatedCluster(replicas, *models, seed=int(rng.integers(1000)), faults=[churn])
    layers, items = "abc"[: len(policies)], replicas * steps
    trainer = fm.Trainer(
        lambda params, batch: -sum(jnp.mean(batch @ params[layer]) for layer in layers),
        optax.sgd(1.0),
        cluster=cluster,
        replicas=replicas,
        policies=dict(zip(layers, policies, strict=True)),
    )
    params = {layer: np.zeros(items, np.float32) for layer in layers}
    stops = {int(rng.integers(3, steps - 3))} if resumed else set[int]()

    def stop(record: dict[str, Any]) -> None:
        if record["step"] in stops:
            stops.clear()
            raise KeyboardInterrupt

    about: dict[str, Any] = {"batch_size": replicas, "epochs": 1, "progress": False, "replicas": "elastic"}
    about |= {"callbacks": [stop]}
    with tempfile.TemporaryDirectory() as folder:
        about |= {"checkpoint": fm.Checkpoint(folder, every_steps=int(rng.integers(1, 4)))} if resumed else {}
        try:
            found = trainer.fit(params, np.eye(items, dtype=np.float32), **about)
        except KeyboardInterrupt:
            found = trainer.fit(params, np.eye(items, dtype=np.float32), resume="auto", **about)
    drawing = f"{policies}, {replicas} x {steps} items, {changes}, notice {notice_s} s"
    applied = np.stack([np.asarray(found.params[layer]) for layer in layers])
    assert applied.max() <= 1.00001, f"twice: {drawing}"
    there = applied > 1e-6
    some, every = there.any(0), there.all(0)
    ledger = found.ledger
    assert np.count_nonzero(some) == ledger.used + ledger.folded, drawing
    if not beside or policies[0] == fm.policies.synchronous():  # else a decision may leave items out, too
        assert np.count_nonzero(some & ~every) == ledger.partly, drawing
    rows = {name.partition(" ")[0]: tally.used + tally.folded for name, tally in ledger.groups.items()}
    for layer, own in zip(layers, there, strict=True):
        assert np.count_nonzero(own) == rows.get(layer, ledger.used + ledger.folded), f"{layer}: {drawing}"
    assert beside or ledger.used + ledger.dropped == items, drawing


def folding(share: float) -> fm.Policy:
    return fm.policies.quorum(share, late="fold")


def drawn(rng: np.random.Generator) -> fm.Policy:
    """A rule that applies contributions as they arrive, each as a whole."""
    every = int(rng.integers(1, 9))
    kinds = [
        fm.policies.asynchronous(every=every, apply="sum"),
        fm.policies.asynchronous(every=every, apply="sum", staleness=int(rng.integers(every, 4 * every + 1))),
        fm.policies.softsync(int(rng.integers(1, 4)), scale=False, every=every, apply="sum"),
        fm.policies.downpour(every, every),
    ]
    return kinds[int(rng.integers(len(kinds)))]


def members(rng: np.random.Generator, replicas: int) -> list[tuple[float, int, bool]]:
    """Times at which machines go and come again, all but the first one."""
    changes: list[tuple[float, int, bool]] = []
    up = [True] * replicas
    for at in np.cumsum(rng.exponential(float(rng.choice([0.3, 0.7, 1.5])), 8)):
        worker = int(rng.integers(1, replicas))
        up[worker] = not up[worker]
        changes.append((float(at), worker, up[worker]))
    return changes
