"""Faults of a simulated cluster: the fit keeps its result, or ends as on a real cluster, and repeats exactly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(160, 8)).astype(np.float32), "y": RNG.normal(size=(160, 2)).astype(np.float32)}
PARAMS = {"w": jnp.zeros((8, 2))}
DISORDER = fm.sim.Disorder(delay_s=0.05, lost=0.2, resend_s=0.3, repeated=0.5)


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def fit(policies: Any, *faults: Any, workers: int = 4, **options: Any) -> fm.TrainingResult:
    network = fm.sim.Network(latency_s=1e-3, bytes_per_s=1e9)
    cluster = fm.SimulatedCluster(workers, fm.sim.Constant(0.1), network, seed=1, faults=faults)
    trainer = fm.Trainer(loss, optax.adam(0.1), cluster=cluster, replicas=4, policies=policies, **options)
    return trainer.fit(PARAMS, DATA, batch_size=16, steps=20, progress=False)


@pytest.mark.parametrize(
    "policy", [fm.policies.synchronous(), fm.policies.every(3), fm.policies.all_reduce()], ids=lambda p: p.describe()
)
def test_a_bad_network_costs_time_and_changes_no_bit(policy: fm.Policy) -> None:
    good, bad, again = fit(policy), fit(policy, DISORDER), fit(policy, DISORDER)
    jax.tree_util.tree_map(np.testing.assert_array_equal, bad.params, good.params)
    assert [r["loss"] for r in bad.history] == [r["loss"] for r in good.history]
    assert bad.ledger == good.ledger
    assert bad.virtual_seconds is not None and good.virtual_seconds is not None
    assert bad.virtual_seconds > 1.2 * good.virtual_seconds
    assert bad.trace_hash == again.trace_hash != good.trace_hash


@pytest.mark.parametrize("policy", [fm.policies.quorum(0.75), fm.policies.asynchronous(2)], ids=lambda p: p.describe())
def test_every_work_item_is_accounted_for_on_a_bad_network(policy: fm.Policy) -> None:
    for seed_of_trouble in range(5):
        trouble = fm.sim.Disorder(delay_s=0.05 + seed_of_trouble / 50, lost=0.2, repeated=0.5)
        ledger = fit(policy, trouble).ledger
        assert ledger.outstanding == 0
        assert ledger.used + ledger.dropped + ledger.unseen == 80


def test_a_partition_holds_a_synchronous_fit_and_a_quorum_goes_on_without_the_parted() -> None:
    parted = fm.sim.Partition([3], start_s=0.5, end_s=5.0)
    together = fit(fm.policies.synchronous(), parted)
    assert together.virtual_seconds == pytest.approx(20 * 0.102 + 4.5, abs=0.2)
    alone = fit(fm.policies.quorum(0.75), parted)
    at = [r["seconds"] for r in alone.history]
    assert at[15] < 2.0
    assert alone.ledger.replicas[3].used < 7


def test_a_crash_ends_a_fit_as_the_loss_of_a_real_worker_does() -> None:
    with pytest.raises(
        fm.WorkerLostError, match=r"worker:2 was lost during training at step 9: it stopped at 1 s; "
    ) as caught:
        fit(fm.policies.synchronous(), fm.sim.Crash(2, at_s=1.0, noticed_s=0.5))
    assert (caught.value.worker, caught.value.step) == ("worker:2", 9)
    unharmed = fit(fm.policies.synchronous(), fm.sim.Crash(5, at_s=1.0), workers=6)
    assert unharmed.ledger.used == 80


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ([fm.sim.Crash(4, 1.0)], "names worker 4, and the cluster has workers 0 to 3"),
        ([fm.sim.Partition([0, 7], 1.0, 2.0)], "names worker 7"),
        (["crash"], "faults has 'crash', which is none"),
    ],
)
def test_faults_of_workers_that_do_not_exist_are_refused(faults: Any, text: str) -> None:
    with pytest.raises(fm.FlowmlError, match=text):
        fit(fm.policies.synchronous(), *faults)


def test_faults_that_make_no_sense_are_refused() -> None:
    for make in (
        lambda: fm.sim.Crash(-1, 0.0),
        lambda: fm.sim.Crash(0, float("nan")),
        lambda: fm.sim.Partition([0], 2.0, 1.0),
        lambda: fm.sim.Disorder(lost=1.0),
        lambda: fm.sim.Disorder(delay_s=-1.0),
    ):
        with pytest.raises(fm.FlowmlError):
            make()
