"""`fm.SimulatedCluster` in `fm.Trainer` without arithmetic: times in closed form, bytes of real runs, repeatability."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

STEP, LATENCY = 0.1, 1e-3
FREE = fm.sim.Network(LATENCY, 1e30)


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["a"]["w"]) @ params["b"]["w"] - batch["y"]) ** 2)


PARAMS = {"a": {"w": jnp.ones((16, 32)) / 16}, "b": {"w": jnp.ones((32, 1)) / 32}}
DATA = {"x": np.random.default_rng(0).normal(size=(240, 16)).astype(np.float32), "y": np.ones((240, 1), np.float32)}
NBYTES = 16 * 32 * 4
"""Of layer a."""


def one_layer(params: Any, batch: Any) -> Any:
    """All of its gradient is sent at once, so nothing overlaps."""
    return jnp.mean((batch["x"] @ params["a"]["w"] - batch["y"]) ** 2)


def fit(cluster: Any, policies: Any, *, replicas: int = 4, steps: int = 10, **options: Any) -> fm.TrainingResult:
    layers = options.pop("layers", 1)
    function, params = (one_layer, {"a": PARAMS["a"]}) if layers == 1 else (loss, PARAMS)
    trainer = fm.Trainer(function, optax.sgd(0.1), cluster=cluster, replicas=replicas, policies=policies, **options)
    return trainer.fit(params, DATA, batch_size=24, steps=steps, progress=False)


def simulated(compute: Any = None, network: Any = FREE, workers: int = 4, seed: int = 0) -> fm.SimulatedCluster:
    return fm.SimulatedCluster(workers, compute or fm.sim.Constant(STEP), network, seed=seed, arithmetic=False)


def periods(result: fm.TrainingResult) -> list[float]:
    """The time from each record to the next, without the first, in which the workers start."""
    at = [record["seconds"] for record in result.history]
    return [b - a for a, b in pairwise(at[1:])]


def test_a_synchronous_step_takes_its_computation_and_a_round_trip() -> None:
    result = fit(simulated(), fm.policies.synchronous())
    assert periods(result) == pytest.approx([STEP + 2 * LATENCY] * 8)
    assert result.virtual_seconds == result.seconds
    assert [r["replicas"] for r in result.history] == [4] * 10
    assert all(math.isnan(r["loss"]) for r in result.history)
    assert result.ledger.used == 40
    np.testing.assert_array_equal(result.params["a"]["w"], PARAMS["a"]["w"])


def test_the_slowest_worker_of_each_step_sets_the_pace_of_full_synchrony() -> None:
    times = [[0.1, 0.1], [0.3, 0.1], [0.1, 0.2], [0.1, 0.1]]
    result = fit(simulated(fm.sim.Recorded(times)), fm.policies.synchronous())
    assert periods(result) == pytest.approx([0.3 + 2 * LATENCY, 0.2 + 2 * LATENCY] * 4)


def test_a_quorum_does_not_wait_for_a_slow_replica_and_the_ledger_says_so() -> None:
    slow = fm.sim.Straggler(fm.sim.Constant(STEP), 5, workers=(3,))
    result = fit(simulated(slow), fm.policies.quorum(0.75), steps=30)
    assert periods(result)[:-1] == pytest.approx([STEP + 2 * LATENCY] * 27)
    assert [t.used for t in result.ledger.replicas[:3]] == [30] * 3
    assert result.ledger.replicas[3].used == 0
    assert result.ledger.dropped == result.ledger.replicas[3].dropped > 4
    together = fit(simulated(slow), fm.policies.synchronous(), steps=30)
    assert together.virtual_seconds == pytest.approx(5 * STEP * 30, rel=0.02)
    assert together.ledger.dropped == 0


def test_one_asynchronous_replica_is_serial_and_several_share_the_work_by_their_speed() -> None:
    alone = fit(simulated(workers=1), fm.policies.asynchronous(), replicas=1)
    assert periods(alone) == pytest.approx([STEP] * 8)
    fast = fm.sim.Straggler(fm.sim.Constant(STEP), 3, workers=(1, 2, 3))
    result = fit(simulated(fast), fm.policies.asynchronous())
    counts = [t.used for t in result.ledger.replicas]
    assert sum(counts) == 40
    assert counts[0] == pytest.approx(20, abs=2)
    assert counts[1:] == pytest.approx([20 / 3] * 3, abs=2)


def test_a_sum_by_doubling_takes_a_message_for_each_of_its_rounds() -> None:
    result = fit(simulated(), fm.policies.all_reduce())
    assert periods(result) == pytest.approx([STEP + 2 * LATENCY] * 8)  # log2 of 4
    ring = fit(simulated(), fm.Policy(topology=fm.Ring()))
    assert periods(ring) == pytest.approx([STEP + 6 * LATENCY] * 8)


def test_a_sum_of_many_workers_takes_the_same_time_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fm.sim.Network(LATENCY, 1e5)
    for topology in (fm.AllReduce(), fm.Ring(), fm.Tree(2), fm.Tree(3)):
        policy = fm.Policy(topology=topology)
        exact = fit(simulated(network=network), policy)
        with monkeypatch.context() as patch:
            patch.setattr("flowml_runtime.sim.collectives.MOST_MESSAGES", 0)
            closed = fit(simulated(network=network), policy)
        assert closed.events is not None and exact.events is not None
        assert closed.events < exact.events
        assert periods(closed) == pytest.approx(periods(exact), rel=0.02), topology
        assert closed.traffic["a"]["pushed_wire_bytes"] == pytest.approx(
            exact.traffic["a"]["pushed_wire_bytes"], rel=0.01
        )


def test_bytes_take_time_on_links_of_their_own_and_on_links_that_are_shared() -> None:
    own = fit(simulated(network=fm.sim.Network(LATENCY, 1e5)), fm.policies.synchronous())
    assert periods(own) == pytest.approx([STEP + 2 * (LATENCY + NBYTES / 1e5)] * 8)
    network = fm.sim.Network(LATENCY, 1e30, uplink_bytes_per_s=1e5, downlink_bytes_per_s=1e5)
    shared = fit(simulated(network=network), fm.policies.synchronous())
    # The versions leave the home one after the other, so the replicas begin and end in a row.
    assert periods(shared) == pytest.approx([STEP + 2 * LATENCY + 4 * NBYTES / 1e5] * 8)


@pytest.mark.parametrize(
    "policy",
    [
        fm.policies.synchronous(),
        fm.policies.every(3),
        fm.policies.all_reduce(),
        fm.policies.factors(),
        fm.policies.all_reduce(every=2),
    ],
    ids=lambda p: p.describe(),
)
def test_bytes_are_those_that_real_workers_count(policy: fm.Policy) -> None:
    with fm.Cluster.threads(4) as cluster:
        real = fit(cluster, policy, microbatches=2, layers=2)
    assert fit(simulated(), policy, microbatches=2, layers=2).traffic == real.traffic


def test_the_stages_of_a_pipeline_share_the_compute_time_and_overlap() -> None:
    one = fit(simulated(workers=2), fm.policies.synchronous(), replicas=1, layers=2, placement=fm.Pipeline(2))
    assert one.virtual_seconds == pytest.approx(10 * (STEP + 2 * LATENCY), rel=0.05)
    many = fit(
        simulated(workers=2), fm.policies.synchronous(), replicas=1, layers=2, placement=fm.Pipeline(2), microbatches=6
    )
    assert many.virtual_seconds is not None
    assert many.virtual_seconds < 0.95 * one.virtual_seconds


def test_one_seed_gives_one_trace_and_another_seed_another() -> None:
    def run(seed: int) -> fm.TrainingResult:
        return fit(simulated(fm.sim.LogNormal(STEP, 0.5), seed=seed), fm.policies.quorum(0.75), steps=20, layers=2)

    first, again, other = run(1), run(1), run(2)
    assert (first.trace_hash, first.virtual_seconds, first.events) == (
        again.trace_hash,
        again.virtual_seconds,
        again.events,
    )
    assert [r["seconds"] for r in first.history] == [r["seconds"] for r in again.history]
    assert first.ledger == again.ledger
    assert first.trace_hash != other.trace_hash
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=simulated(fm.sim.LogNormal(STEP, 0.5), seed=1), replicas=4,
                         policies=fm.policies.quorum(0.75))  # fmt: skip
    twice = [trainer.fit(PARAMS, DATA, batch_size=24, steps=20) for _ in range(2)]
    assert twice[0].trace_hash == first.trace_hash == twice[1].trace_hash


def test_delays_slow_a_simulated_worker_down() -> None:
    result = fit(simulated(), fm.policies.synchronous(), delays={"worker:2": 0.4})
    assert periods(result) == pytest.approx([STEP + 0.4 + 2 * LATENCY] * 8)


def test_a_block_makes_it_current_for_a_trainer_and_a_dataflow_function_refuses_it() -> None:
    with simulated():
        trainer = fm.Trainer(loss, optax.sgd(0.1), replicas=4)
        assert trainer.fit(PARAMS, DATA, batch_size=24, steps=2).virtual_seconds
        with pytest.raises(
            fm.ClusterError, match=r"SimulatedCluster of 4 workers, no arithmetic> runs fm\.Trainer only"
        ):
            fm.dataflow(lambda x: x + 1)(jnp.ones(3))
    with pytest.raises(fm.ClusterError, match="there is no cluster"):
        trainer.fit(PARAMS, DATA, batch_size=24, steps=2)


def test_callbacks_see_virtual_time_and_may_end_the_fit() -> None:
    seen: list[float] = []

    def stop(record: dict[str, Any]) -> None:
        seen.append(record["seconds"])
        if record["step"] == 3:
            raise KeyError("enough")

    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=simulated(), replicas=4)
    with pytest.raises(KeyError, match="enough"):
        trainer.fit(PARAMS, DATA, batch_size=24, steps=10, callbacks=[stop])
    assert len(seen) == 4
    assert trainer.fit(PARAMS, DATA, batch_size=24, steps=10).ledger.used == 40


def test_a_source_that_is_no_array_is_not_read_for_its_data() -> None:
    class Source:
        reads = 0

        def __len__(self) -> int:
            return 240

        def __getitem__(self, indices: Any) -> Any:
            Source.reads += 1
            return {"x": DATA["x"][indices], "y": DATA["y"][indices]}

    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=simulated(), replicas=4)
    trainer.fit(PARAMS, Source(), batch_size=24, steps=10)
    assert Source.reads < 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"compute": 0.1}, r"compute=0.1\) is of type float; give a model of fm.sim"),
        ({"network": fm.sim.Constant(1)}, r"network=Constant\(s=1.0\)\) is of type Constant"),
        (
            {"network": fm.sim.Sites({("a", "b"): (0.1, 1e6)}, ["a", "b"])},
            "members has 2 workers and the cluster has 4",
        ),
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "seed"),
    ],
)
def test_models_that_make_no_sense_are_refused(arguments: dict[str, Any], text: str) -> None:
    values = {"workers": 4, "compute": fm.sim.Constant(0.1), "network": FREE, **arguments}
    with pytest.raises((fm.FlowmlError, ValueError), match=text):
        fm.SimulatedCluster(**values)


def test_more_replicas_than_workers_are_refused_as_on_a_real_cluster() -> None:
    with pytest.raises(fm.PlacementError, match="4 replicas need at least as many devices, there are 2"):
        fit(simulated(workers=2), fm.policies.synchronous())
