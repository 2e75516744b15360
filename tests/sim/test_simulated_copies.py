"""Simulated workers copy what they keep to others (`replicate=`): a lost home loses no step that was acknowledged, and
copies take time."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.sim import Churn, Crash
from flowml_runtime.sim.copies import SimulatedCopies
from tests.sim.test_members_in_a_fit import POLICIES, SOURCE, fit, loss
from tests.training.reference import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:worker.+ (was|were) lost")

ONE_AFTER_THE_OTHER = Churn([(3.0, 2, False), (5.0, 2, True), (7.0, 0, False), (9.0, 0, True)], start_s=0.5)
AT_ONCE = Churn([(3.0, w, up) for w, up in ((0, False), (1, False), (2, False))] + [(5.0, w, True) for w in (0, 1, 2)])
STEPS = 120


def survive(policy: str, *faults: Any, **options: Any) -> tuple[fm.TrainingResult, list[dict[str, Any]]]:
    """A fit with copies, and the records that its callbacks have seen."""
    seen: list[dict[str, Any]] = []
    options = {"on_loss": "replace", "replicate": 1, "arithmetic": True, "steps": STEPS, **options}
    return fit(policy, *faults, callbacks=[seen.append], **options), seen


def assert_no_step_again(found: fm.TrainingResult, seen: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in seen] == list(range(STEPS))
    assert all(told is kept for told, kept in zip(seen, found.history, strict=True))
    assert found.ledger.outstanding == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_no_step_that_callbacks_have_seen_is_done_again(policy: str) -> None:
    found, seen = survive(policy, ONE_AFTER_THE_OTHER)
    again, _ = survive(policy, ONE_AFTER_THE_OTHER)
    assert [lost.workers for lost in found.losses] == [("worker:2",), ("worker:0",)]
    assert_no_step_again(found, seen)
    assert (found.trace_hash, found.events) == (again.trace_hash, again.events)
    if policy in ("synchronous", "sums", "ring"):
        assert all(lost.step - 2 <= lost.resumed_at for lost in found.losses), "and no other step but the last ones"
        assert_same(found.params, fit(policy, arithmetic=True, steps=STEPS).params)


def test_fewer_replicas_go_on_from_the_copies() -> None:
    found, seen = survive("synchronous", Crash(1, 2.0), Crash(3, 6.0), on_loss="shrink", replicate=2)
    assert [lost.workers for lost in found.losses] == [("worker:1",), ("worker:3",)]
    assert all(lost.step - 2 <= lost.resumed_at for lost in found.losses)
    assert_no_step_again(found, seen)


def test_if_the_copies_are_lost_too_the_snapshot_in_memory_is_left() -> None:
    found, _ = survive("synchronous", AT_ONCE)
    assert [lost.workers for lost in found.losses] == [("worker:0", "worker:1", "worker:2")]
    assert_same(found.params, fit("synchronous", arithmetic=True, steps=STEPS).params)


def test_what_was_on_a_worker_that_was_away_is_gone() -> None:
    away = {"worker:1": 2.0}
    copies = SimulatedCopies("fit", lambda: 1.0, lambda worker, since: away.get(worker, 0.0) <= since)
    copies.begin(["worker:0", "worker:1"])
    for worker in ("worker:0", "worker:1"):
        assert copies.of(worker).export("driver", "fit", ("plan", 0, 1), f"of {worker}", {"a": np.ones(1)})
    assert copies.buffers("plan/0/1", {"of worker:0": ["a"]}) == {"of worker:0": {"a": np.ones(1)}}
    assert copies.buffers("plan/0/1", {"of worker:0": ["a"], "of worker:1": ["a"]}) is None
    assert copies.buffers("plan/0/2", {"of worker:0": ["a"]}) is None


def test_a_pipeline_with_state_of_its_own_goes_on() -> None:
    def train(*faults: Any, **options: Any) -> fm.TrainingResult:
        models = fm.sim.LogNormal(0.1, 0.2), fm.sim.Network(1e-3, 1e8)
        cluster = fm.SimulatedCluster(4, *models, faults=faults)
        layout: dict[str, Any] = {"placement": fm.Pipeline(2), "microbatches": 2, "policies": fm.policies.diloco(4)}
        trainer = fm.Trainer(deep, optax.adam(0.01), cluster=cluster, replicas=2, **layout)
        return trainer.fit(two, SOURCE, batch_size=32, steps=60, progress=False, **options)

    def deep(params: Any, batch: Any) -> Any:
        return jnp.mean((jnp.tanh(batch["x"] @ params["a"]["w"]) @ params["b"]["w"] - batch["y"]) ** 2)

    two = {"a": {"w": jnp.full((8, 8), 0.1)}, "b": {"w": jnp.full((8, 3), 0.1)}}
    found = train(ONE_AFTER_THE_OTHER, on_loss="replace", replicate=1)
    assert len(found.losses) == 2
    assert_same(found.params, train().params)


def test_copies_take_the_time_of_their_bytes() -> None:
    """Each replica copies what it keeps over its own link, one layer and its optimizer state of 1 MB from one home."""
    params = {"fc": {"w": jnp.zeros((8, 3))}, "more": {"w": jnp.zeros(2**18)}}

    def wide(params: Any, batch: Any) -> Any:
        return loss(params, batch) + jnp.mean(params["more"]["w"] ** 2)

    def seconds(**options: Any) -> float:
        cluster = fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(0.0, 1e7))
        trainer = fm.Trainer(wide, optax.sgd(0.1), cluster=cluster, replicas=2)
        found = trainer.fit(params, SOURCE, batch_size=32, steps=10, progress=False, on_loss="replace", **options)
        assert found.virtual_seconds is not None
        return found.virtual_seconds

    nbytes = 4 * 2**18
    assert seconds(replicate=1) - seconds() == pytest.approx(10 * nbytes / 1e7, rel=0.2)


def test_without_values_it_is_refused_with_the_reason() -> None:
    with pytest.raises(fm.SimulationError, match=r"without arithmetic simulated workers have none.* arithmetic=True"):
        survive("synchronous", arithmetic=False)
    with pytest.raises(ValueError, match=r"replicate=4: .* need 5 workers, and the cluster has 4"):
        survive("synchronous", replicate=4)
