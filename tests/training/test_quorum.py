"""A quorum leaves the slowest behind: every clock is complete without it, every item is accounted for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import flowml as fm
from tests.training.reference import (
    BATCH,
    EXAMPLES,
    GATE,
    assert_close,
    data,
    hold_marked,
    mlp,
    mlp_loss,
    optax_loop,
)

SOURCE = data()
REPLICAS = 4
ITEMS = EXAMPLES // BATCH * REPLICAS
"""Work items of an epoch."""


def held_loss(params: Any, batch: Any) -> Any:
    with fm.layer("gate"):
        shape = jax.ShapeDtypeStruct(batch["x"].shape, batch["x"].dtype)
        x = jax.pure_callback(hold_marked, shape, batch["x"], batch["held"])
    return mlp_loss(params, {"x": x, "y": batch["y"]})


def items_of_last_replica() -> np.ndarray:
    """True for the examples that replica 3 computes on, when the order is that of the data."""
    return np.arange(EXAMPLES) // (BATCH // REPLICAS) % REPLICAS == REPLICAS - 1


def test_every_clock_commits_without_the_slow_replica(threads_cluster: fm.Cluster) -> None:
    """Replica 3 cannot finish a step before step 12 of 16 is done. Waiting for it would wait for ever."""
    GATE.clear()
    trainer = fm.Trainer(
        held_loss,
        optax.sgd(0.1),
        cluster=threads_cluster,
        replicas=REPLICAS,
        placement=fm.Pipeline(1),
        policies={"*": fm.policies.quorum(0.75)},
    )
    seen: list[int] = []

    def on_step(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        if record["step"] == 12:
            GATE.set()

    source = {**SOURCE, "held": items_of_last_replica()}
    result = trainer.fit(mlp(), source, batch_size=BATCH, epochs=4, shuffle=False, callbacks=[on_step])
    assert seen == list(range(16))
    assert [r["replicas"] for r in result.history[:12]] == [3] * 12
    ledger = result.ledger
    assert all(t.used >= 13 for t in ledger.replicas[:3]), "nobody else was left out meanwhile"
    assert ledger.replicas[3].used <= 3
    assert ledger.replicas[3].dropped >= 1, "the step that it was held up in came too late"
    check_account(ledger, epochs=4)
    last = result.history[-1]["loss"]
    assert last < 0.7 * result.history[0]["loss"]


def check_account(ledger: Any, epochs: int) -> None:
    """Every item is used or dropped as a whole, or was never begun by anyone."""
    assert ledger.outstanding == 0
    assert ledger.folded == ledger.requeued == 0
    assert ledger.used + ledger.dropped + ledger.unseen == epochs * ITEMS
    assert ledger.used == sum(t.used for t in ledger.replicas) == sum(t.used for t in ledger.epochs)
    assert ledger.dropped == sum(t.dropped for t in ledger.replicas)
    assert [t.used + t.dropped + t.unseen for t in ledger.epochs] == [ITEMS] * epochs
    assert ledger.item_size == BATCH // REPLICAS
    assert sum(times * examples for times, examples in ledger.seen) == ledger.used * ledger.item_size
    assert sum(examples for _, examples in ledger.seen) == EXAMPLES


def test_a_delayed_replica_is_dropped_and_the_loss_falls(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(
        mlp_loss,
        optax.adam(1e-2),
        cluster=threads_cluster,
        replicas=REPLICAS,
        policies={"fc0*": fm.Policy(quorum=fm.Quorum(3), every=2), "*": fm.policies.quorum(0.75)},
        delays={"worker:3": 1.0},  # far longer than steps of the others take, also on a busy machine
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=6)
    steps = 6 * EXAMPLES // BATCH
    assert [r["step"] for r in result.history] == list(range(steps))
    assert all(r["replicas"] >= 3 for r in result.history)
    check_account(result.ledger, epochs=6)
    assert result.ledger.used >= 3 * steps
    assert result.ledger.replicas[3].used < steps // 2
    assert float(mlp_loss(result.params, SOURCE)) < 0.6 * float(mlp_loss(mlp(), SOURCE))
    assert "replica 3" in str(result.ledger)
    often, rarely = result.ledger.groups.values()
    assert often.used + often.dropped == rarely.used + rarely.dropped == result.ledger.used + result.ledger.dropped


def test_a_quorum_of_everybody_says_so_and_equals_the_loop(threads_cluster: fm.Cluster) -> None:
    optimizer = optax.adam(1e-2)
    expected = optax_loop(mlp_loss, mlp(), optimizer, SOURCE, 6)
    for replicas, policy in ((2, fm.policies.quorum(0.75)), (3, fm.policies.quorum(3))):
        trainer = fm.Trainer(mlp_loss, optimizer, cluster=threads_cluster, replicas=replicas, policies={"fc*": policy})
        result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=6)
        assert any(f"of {replicas} can never drop" in note for note in result.plan.notes)
        assert_close(result.params, expected.params)
        assert result.ledger.dropped == 0


def test_stages_and_processes_drop_whole_items(process_cluster: fm.Cluster) -> None:
    """Replica 1 runs on worker:1; whoever is left out, no layer takes a part of its item."""
    trainer = fm.Trainer(
        mlp_loss,
        optax.sgd(0.1),
        cluster=process_cluster,
        replicas=2,
        policies={"*": fm.policies.quorum(1)},
        delays={"worker:1": 0.5},
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, epochs=3)
    ledger = result.ledger
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.unseen == 3 * 2 * EXAMPLES // BATCH
    assert ledger.replicas[0].used > ledger.replicas[1].used
    assert len(result.history) == 3 * EXAMPLES // BATCH


def test_accuracy_is_within_seed_noise() -> None:
    """Digits with the slowest quarter left behind, against waiting for all: no worse than another seed would be.

    In virtual time, so that the same replicas are late in each run.
    """
    slow = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.2), factor=5, workers=(3,))
    cluster = fm.SimulatedCluster(REPLICAS, slow, fm.sim.Network(1e-4, 1e9))
    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    train, test = slice(0, 1400), slice(1400, None)

    def logits(params: Any, x: Any) -> Any:
        return jax.nn.relu(x @ params["fc1"]["w"] + params["fc1"]["b"]) @ params["fc2"]["w"]

    def loss(params: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"]).mean()

    def accuracy(trainer: fm.Trainer, seed: int) -> float:
        one, two = jax.random.split(jax.random.key(seed))
        params = {
            "fc1": {"w": jax.random.normal(one, (64, 32)) / 8, "b": jnp.zeros(32)},
            "fc2": {"w": jax.random.normal(two, (32, 10)) / 6},
        }
        source = {"x": x[train], "y": y[train]}
        result = trainer.fit(params, source, batch_size=140, epochs=8, seed=seed)
        return float(np.mean(np.argmax(logits(result.params, x[test]), axis=1) == y[test]))

    def trainer(**options: Any) -> fm.Trainer:
        return fm.Trainer(loss, optax.adam(1e-2), cluster=cluster, replicas=REPLICAS, **options)

    patient = trainer()
    hurried = trainer(policies={"*": fm.policies.quorum(0.75)})
    full = [accuracy(patient, seed) for seed in range(3)]
    left = [accuracy(hurried, seed) for seed in range(3)]
    noise = max(max(full) - min(full), 0.02)
    assert min(full) > 0.85
    assert abs(np.mean(left) - np.mean(full)) <= noise, (full, left)
