"""What the policies of a fit did: in the records, in words and as values, with the same code on both clocks."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.policy.waits import MOST_LATE, Waits, waits
from flowml_runtime.driver.training.stragglers import Straggler, Stragglers
from flowml_runtime.protocol.training.summary import MOST_ROWS, Summary, Tally

STEPS = 20
X = np.random.default_rng(0).normal(size=(320, 4)).astype(np.float32)
SOURCE = {"x": X, "y": X.sum(axis=1, keepdims=True)}
PARAMS = {"w": jnp.zeros((4, 1)), "b": jnp.zeros(1)}


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def simulated(policies: Any, factor: float, slow: tuple[int, ...] = (3,), **options: Any) -> Any:
    """Twenty steps of four replicas; the slow ones take `factor` times as long as the others."""
    machines = fm.sim.Straggler(fm.sim.Constant(0.1), factor=factor, workers=slow)
    cluster = fm.SimulatedCluster(4, machines, fm.sim.Network(1e-4, 1e9), arithmetic=False)
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=4, policies=policies)
    return trainer.fit(PARAMS, SOURCE, batch_size=16, steps=STEPS, progress=False, **options)


@pytest.mark.parametrize(
    "policy",
    [fm.Policy(), fm.policies.every(5), fm.policies.all_reduce(), fm.policies.double_buffer()],
    ids=lambda p: p.describe(),
)
def test_a_persistent_straggler_is_named_with_what_it_cost(policy: fm.Policy) -> None:
    result, ideal = simulated(policy, 3), simulated(policy, 1)
    assert not ideal.stragglers(), "all are equal"
    (found,) = result.stragglers()
    decisions = STEPS // policy.every.push
    assert (found.replica, found.workers, found.late, found.left_out) == (3, ("worker:3",), decisions, 0)
    assert found.cost_s == pytest.approx(result.virtual_seconds - ideal.virtual_seconds, rel=0.05)
    text = str(result.stragglers())
    assert text.startswith(f"worker:3 (replica 3) was late at {decisions} of {decisions} steps, by ")
    assert f"others waited {found.cost_s:.3g} s for it" in text


def test_replicas_that_are_equally_slow_share_the_cost() -> None:
    result, ideal = simulated(fm.Policy(), 2, slow=(2, 3)), simulated(fm.Policy(), 1)
    assert {s.replica for s in result.stragglers()} == {2, 3}
    first, second = result.stragglers()
    assert first.cost_s == pytest.approx(second.cost_s, rel=0.01)
    assert result.stragglers().cost_s == pytest.approx(result.virtual_seconds - ideal.virtual_seconds, rel=0.01)


def test_replicas_that_are_left_out_cost_work_and_only_their_last_task_costs_time() -> None:
    result = simulated(fm.policies.quorum(0.75), 3)
    (found,) = result.stragglers()
    assert (found.replica, found.late, found.left_out) == (3, STEPS, STEPS)
    assert 0 < found.cost_s < 0.3
    assert found.cost_s == pytest.approx(result.virtual_seconds - result.history[-1]["seconds"], abs=0.01)
    assert found.items.dropped > 0 and found.items.used == 0
    text = str(simulated(fm.policies.compensate(0.75), 3).stragglers())
    assert f"it was left out of {STEPS}" in text and "folded in later" in text


def test_a_bound_makes_others_wait_and_no_bound_does_not() -> None:
    bounded, free = (simulated(fm.policies.asynchronous(s), 3) for s in (2, fm.UNBOUNDED))
    (found,), (slow,) = bounded.stragglers(), free.stragglers()
    assert found.replica == slow.replica == 3
    ideal = simulated(fm.policies.asynchronous(2), 1)
    assert found.cost_s == pytest.approx(bounded.virtual_seconds - ideal.virtual_seconds, rel=0.15)
    assert slow.late == 0 and "no other waited for it; the fit was 0.998 s longer for it" in str(free.stragglers())
    assert sum(bounded.staleness["w"].values()) == 4 * STEPS, "each contribution is counted once"
    assert max(bounded.staleness["w"]) > 0


def test_records_have_waits_bytes_and_staleness_before_callbacks_see_them() -> None:
    policies = {"w": fm.policies.quorum(0.75), "b": fm.policies.every(5)}
    seen: list[dict[str, Any]] = []
    result = simulated(policies, 3, callbacks=[lambda record: seen.append(dict(record))])
    assert len(seen) == STEPS and seen == result.history
    for record in seen:
        entry = record["waits"]["w (quorum 0.75 drop)"]
        assert entry["left_out"] in ([3], []) and entry["late"] == {}
        assert entry["waited_s"] >= 0.1 and 0 <= entry["spread_s"] < 0.01
        due = (record["step"] + 1) % 5 == 0
        assert ("b (every 5)" in record["waits"]) == ("b" in record["pushed_bytes"]) == due
        assert record["staleness"]["w"] == {0: 4 - len(entry["left_out"])}
    late = [record["waits"]["b (every 5)"]["late"] for record in seen if "b (every 5)" in record["waits"]]
    assert all(set(found) == {3} for found in late)
    for layer in ("w", "b"):
        assert sum(r["pushed_bytes"].get(layer, 0) for r in seen) == result.traffic[layer]["pushed_bytes"]
    json.dumps([r["waits"] for r in seen])


def test_a_slow_worker_is_named_in_a_real_fit(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(loss, optax.sgd(0.05), cluster=threads_cluster, replicas=3, delays={"worker:1": 0.1})
    began, steps = time.monotonic(), 10
    result = trainer.fit(PARAMS, SOURCE, batch_size=24, steps=steps)
    most = time.monotonic() - began
    worst = result.stragglers()[0]
    assert (worst.replica, worst.workers) == (1, ("worker:1",))
    assert worst.late >= steps / 2
    assert 0.5 * 0.1 * steps < worst.cost_s < most
    assert str(result.stragglers()).startswith("worker:1 (replica 1) was late at ")
    assert sum(r["pushed_bytes"]["w"] for r in result.history) == result.traffic["w"]["pushed_bytes"]
    assert result.staleness["w"] == {0: 3 * steps}


def test_every_stage_of_a_pipeline_tells_its_bytes(threads_cluster: fm.Cluster) -> None:
    def deep(params: Any, batch: Any) -> jax.Array:
        with fm.device("worker:0"):
            hidden = jnp.tanh(batch["x"] @ params["first"])
        with fm.device("worker:1"):
            return jnp.mean((hidden @ params["second"] - batch["y"]) ** 2)

    params = {"first": jnp.eye(4), "second": jnp.ones((4, 1))}
    trainer = fm.Trainer(deep, optax.sgd(0.05), cluster=threads_cluster)
    result = trainer.fit(params, SOURCE, batch_size=16, steps=5)
    for layer in params:
        assert sum(r["pushed_bytes"].get(layer, 0) for r in result.history) == result.traffic[layer]["pushed_bytes"] > 0


def test_the_shares_of_a_wait_are_those_of_a_naive_version() -> None:
    """Each moment after the last replica on time is shared by those that are missing then."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(2, 12))
        times = np.sort(np.concatenate([rng.uniform(1, 1.05, n - n // 3), rng.uniform(2, 3, n // 3)])).round(3)
        found = waits(dict(enumerate(times)), n, began=0, start=0, decided=times[-1])
        assert found.waited_s == times[-1] and found.spread_s == pytest.approx(times[-1] - times[0])
        on_time = n - len(found.late)
        shares = dict.fromkeys(range(n), 0.0)
        for tick in np.arange(times[on_time - 1], times[-1], 1e-3):
            missing = [r for r in range(n) if times[r] > tick + 5e-4]
            for r in missing:
                shares[r] += 1e-3 / len(missing)
        for replica, behind, cost in found.late:
            assert behind == pytest.approx(times[replica] - times[(n - 1) // 2])
            assert cost == pytest.approx(shares[replica], abs=2e-3)
        assert sum(cost for _, _, cost in found.late) == pytest.approx(times[-1] - times[on_time - 1])


def test_a_clock_waits_for_those_in_vain_that_a_grace_window_was_for() -> None:
    found = waits({0: 1.0, 1: 1.0, 2: 1.0}, 5, began=0, start=0, decided=1.5, missing=(3, 4))
    assert found == Waits(1.5, 0.0, ((3, 0.5, 0.25), (4, 0.5, 0.25)))
    assert waits({}, 2, began=1, start=1, decided=3) == Waits(2.0)
    many = waits(dict(enumerate([1.0] * 60 + [5.0] * 40)), 100, began=0, start=0, decided=5.0)
    assert len(many.late) == MOST_LATE, "what is told of a clock does not grow with the number of replicas"


def test_a_long_fit_has_a_short_ledger_and_a_whole_table() -> None:
    epochs = tuple(Tally(used=i) for i in range(1000))
    replicas = tuple(Tally(dropped=1) for _ in range(100))
    ledger = Summary(499500, 100, 0, 0, 0, 0, 0, 8, epochs, replicas)
    lines = str(ledger).splitlines()
    assert len(lines) == 2 + 2 * MOST_ROWS
    between = [line.split() for line in lines if "more" in line]
    assert between == [
        ["992", "more", "epochs", str(sum(range(4, 996))), "0", "0", "0", "0"],
        ["92", "more", "replicas", "0", "92", "0", "0", "0"],
    ]
    assert len(ledger.table().splitlines()) == 2 + 1000 + 100 and "epoch 500" in ledger.table()


def test_few_lines_tell_of_many_stragglers() -> None:
    late = tuple(Straggler(r, (f"worker:{r}",), 4, 0, 0.1, 9.0 - r, Tally(used=10)) for r in range(9))
    lines = str(Stragglers(10, 100.0, late)).splitlines()
    assert lines[0] == (
        "worker:0 (replica 0) was late at 4 of 10 steps, by 0.1 s on average: others waited 9 s for it (9% of the fit)."
    )
    assert lines[-1] == "4 more replicas were late at up to 4 steps: others waited 10 s in all."
    assert len(lines) == 6
    assert str(Stragglers(1, 1.0)) == "No replica was late in 1 step."
