"""With speculation an update is that of the whole batch, a slow worker delays it little, and the ledger adds up."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import BATCH, EXAMPLES, GATE, assert_close, data, hold_marked, mlp, mlp_loss, optax_loop

SOURCE = data()
STEPS = 8
EPOCHS = STEPS * BATCH // EXAMPLES
SLOW = fm.sim.Straggler(fm.sim.Constant(1.0), 5, workers=[1])


class Fed:
    """A source that stays with the driver."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, indices: Any) -> Any:
        return {name: leaf[indices] for name, leaf in SOURCE.items()}


def simulated(policy: fm.Policy, *, optimizer: Any = None, **settings: Any) -> fm.TrainingResult:
    network = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
    cluster = fm.SimulatedCluster(workers=4, compute=SLOW, network=network, seed=0, **settings)
    trainer = fm.Trainer(mlp_loss, optimizer or optax.adam(0.01), cluster=cluster, replicas=4, policies=policy)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)


def check_account(ledger: Any, portions: int) -> None:
    """Each example is used once in each epoch, and every grant is accounted for."""
    assert (ledger.used, ledger.outstanding) == (STEPS * portions, 0)
    assert ledger.dropped == ledger.folded == ledger.requeued == ledger.returned == ledger.unseen == 0
    assert ledger.seen == ((EPOCHS, EXAMPLES),)
    for name in ("used", "duplicate"):
        assert sum(getattr(t, name) for t in ledger.epochs) == getattr(ledger, name)
        assert sum(getattr(t, name) for t in ledger.replicas) == getattr(ledger, name)


@pytest.mark.parametrize("portions", [1, 3])
def test_the_simulated_update_is_that_of_the_whole_batch(portions: int) -> None:
    result = simulated(fm.policies.speculate(portions, after=0.1))
    expected = optax_loop(mlp_loss, mlp(), optax.adam(0.01), SOURCE, STEPS, items=1)
    assert_close(result.params, expected.params, 1e-5)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)
    check_account(result.ledger, 4 * portions)
    assert result.ledger.duplicate > 0 or portions > 1


def test_one_slow_worker_of_four_delays_a_simulated_step_by_one_portion() -> None:
    """The slow worker takes 5 s for a step, and the others 1 s."""
    synchronous = simulated(fm.Policy(), arithmetic=False)
    shared = simulated(fm.policies.speculate(3, copies=0), arithmetic=False)
    copied = simulated(fm.policies.speculate(1), arithmetic=False)
    both = simulated(fm.policies.speculate(3, after=0.1), arithmetic=False)
    seconds = [r.virtual_seconds or 0.0 for r in (synchronous, shared, copied, both)]
    assert [round(s / STEPS, 1) for s in seconds[:3]] == [5.0, 1.7, 3.0]  # 5 s; 5/3 s; 1 s, a wait of 1 s, and the copy
    assert seconds[3] < seconds[1]
    assert (synchronous.ledger.duplicate, shared.ledger.duplicate) == (0, 0)
    assert both.ledger.duplicate > 0
    again = simulated(fm.policies.speculate(3, after=0.1), arithmetic=False)
    assert again.trace_hash == both.trace_hash


def test_lbfgs_on_portions_with_copies_equals_serial_lbfgs() -> None:
    """Sandblaster L-BFGS: the update needs the gradient of the whole batch."""
    lbfgs = optax.chain(optax.scale_by_lbfgs(memory_size=5), optax.scale(-0.05))
    with jax.enable_x64(True):
        wide = jax.tree_util.tree_map(lambda x: np.asarray(x, np.float64), (mlp(), SOURCE))
        params, source = wide
        expected = optax_loop(mlp_loss, params, lbfgs, source, STEPS, items=1)
        network = fm.sim.Network(latency_s=1e-4, bytes_per_s=1e9)
        cluster = fm.SimulatedCluster(workers=4, compute=SLOW, network=network, seed=0)
        rule = fm.policies.speculate(2, after=0.1)
        result = fm.Trainer(mlp_loss, lbfgs, cluster=cluster, replicas=4, policies=rule).fit(
            params, source, batch_size=BATCH, steps=STEPS
        )
        assert_close(result.params, expected.params, 1e-6)
        assert result.ledger.duplicate > 0


def hold_replica_3(x: Any) -> Any:
    """Holds up the steps of replica 3, which is on worker 3, until GATE is set."""
    return hold_marked(x, threading.current_thread().name.startswith("worker:3/"))


def held_loss(params: Any, batch: Any) -> Any:
    shape = jax.ShapeDtypeStruct(batch["x"].shape, batch["x"].dtype)
    with fm.layer("gate"):
        x = jax.pure_callback(hold_replica_3, shape, batch["x"])
    return mlp_loss(params, {"x": x, "y": batch["y"]})


@pytest.mark.parametrize("source", [SOURCE, Fed()], ids=["shipped", "fed"])
def test_workers_get_round_a_stopped_one(threads_cluster: fm.Cluster, source: Any) -> None:
    """Replica 3 cannot finish a portion before the last step but one is done."""
    GATE.clear()

    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == STEPS - 2:
            GATE.set()

    trainer = fm.Trainer(
        held_loss,
        optax.adam(0.01),
        cluster=threads_cluster,
        replicas=4,
        placement=fm.Pipeline(1),
        policies=fm.policies.speculate(1),
    )
    result = trainer.fit(mlp(), source, batch_size=BATCH, steps=STEPS, callbacks=[on_step])
    expected = optax_loop(mlp_loss, mlp(), optax.adam(0.01), SOURCE, STEPS, items=1)
    assert_close(result.params, expected.params, 1e-5)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)
    check_account(result.ledger, 4)
    assert result.ledger.replicas[3].duplicate > 0


def test_pipelines_compute_portions_and_copies(threads_cluster: fm.Cluster) -> None:
    rule = fm.policies.speculate(3, after=0.0)
    trainer = fm.Trainer(
        mlp_loss,
        optax.adam(0.01),
        cluster=threads_cluster,
        replicas=2,
        placement=fm.Pipeline(stages=2),
        microbatches=2,
        policies=rule,
        delays={"worker:3": 0.02},
    )
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=STEPS)
    expected = optax_loop(mlp_loss, mlp(), optax.adam(0.01), SOURCE, STEPS, items=1)
    assert_close(result.params, expected.params, 1e-5)
    np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)
    check_account(result.ledger, 6)


def test_a_batch_divides_into_portions_or_the_error_says_how_many(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=4, policies=fm.policies.speculate(5)
    )
    with pytest.raises(ValueError, match=r"24 does not divide into 4 replicas x 5 portions x 1 .*multiple of 20"):
        trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=1)


def test_layers_share_one_speculation(threads_cluster: fm.Cluster) -> None:
    rules = {"fc0*": fm.policies.speculate(2), "*": fm.Policy()}
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=threads_cluster, replicas=4, policies=rules)
    with pytest.raises(fm.PolicyError, match="give all layers the same"):
        trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=1)


UNSOUND = {
    "stale": ({"staleness": 1}, "the same parameters"),
    "every": ({"every": 2}, "use every=1"),
    "local": ({"payload": fm.Delta()}, "payload=Gradient"),
    "sum": ({"apply": "sum"}, "apply='mean'"),
    "filters": ({"filters": (fm.filters.top_k(0.1),)}, "lossless"),
    "ring": ({"topology": fm.Ring()}, "takes the first result"),
    "gossip": ({"topology": fm.Gossip("ring")}, "takes the first result"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_an_unsound_composition_says_why(case: str) -> None:
    knobs, why = UNSOUND[case]
    with pytest.raises(fm.PolicyError, match=why):
        fm.Policy(quorum=fm.Speculate(), **knobs)


@pytest.mark.parametrize(
    "knobs", [{"portions": 0}, {"portions": 1.5}, {"copies": -1}, {"after": -0.1}, {"after": float("inf")}]
)
def test_numbers_out_of_range_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(fm.PolicyError, match=f"Speculate\\({next(iter(knobs))}="):
        fm.Speculate(**knobs)
