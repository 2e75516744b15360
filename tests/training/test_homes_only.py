"""Workers that are homes and nothing else: parameter servers on which no replica runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import PlacementError
from flowml.placement.homes import homes_only
from flowml.training.without import without
from tests.conftest import wait_until
from tests.training.reference import BATCH, assert_close, assert_same, data, mlp, mlp_loss, optax_loop
from tests.training.test_lost_and_replaced import COUPLED

STEPS = 12
POLICIES = {
    "synchronous": fm.Policy(),
    "every": fm.policies.every(4),
    "factors": fm.policies.factors(),
    "filters": fm.Policy(filters=(fm.filters.top_k(0.5).with_error_feedback(),)),
    "pulled": fm.Policy(pull_filters=(fm.filters.quantise(8),)),
    "DiLoCo": fm.policies.diloco(4),
    "speculate": fm.policies.speculate(2),
    "coded": fm.policies.coded(1),
    "sites": fm.Policy(topology=fm.Hierarchy(fm.Ring(), fm.ParameterServer(), 2)),
    "sites with a quorum": fm.Policy(
        topology=fm.Hierarchy(fm.ParameterServer(), fm.ParameterServer(), 2, quorum=fm.Quorum(1.0))
    ),
}
BYTES = {layer: sum(x.nbytes for x in jax.tree.leaves(leaves)) for layer, leaves in mlp().items()}
MACHINES = fm.sim.Constant(0.1), fm.sim.Network(1e-4, 1e9)


def trainer(cluster: Any, **options: Any) -> fm.Trainer:
    optimizer = options.pop("optimizer", optax.adam(1e-2))
    return fm.Trainer(mlp_loss, optimizer, cluster=cluster, **{"replicas": 2, "homes": 2, **options})


def fit(cluster: Any, fitted: dict[str, Any] | None = None, **options: Any) -> fm.TrainingResult:
    given = {"batch_size": BATCH, "steps": STEPS, "seed": 3, "progress": False, **(fitted or {})}
    return trainer(cluster, **options).fit(mlp(), data(), **given)


def loop(optimizer: Any = None, steps: int = STEPS, **options: Any) -> Any:
    return optax_loop(mlp_loss, mlp(), optimizer or optax.adam(1e-2), data(), steps, seed=3, **options)


def training_of(found: fm.TrainingResult) -> Any:
    assert found.plan.training is not None
    return found.plan.training


def killing(cluster: fm.Cluster, at: dict[int, str]) -> Callable[[dict[str, Any]], None]:
    def callback(record: dict[str, Any]) -> None:
        if record["step"] in at:
            cluster.end_worker(at.pop(record["step"]))

    return callback


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), COUPLED], ids=["adam", "coupled"])
def test_it_is_the_plain_loop_and_no_replica_computes_there(threads: fm.Cluster, optimizer: Any) -> None:
    found = fit(threads, optimizer=optimizer)
    assert_close((found.params, found.opt_state), _pair(loop(optimizer, items=2)))
    training = training_of(found)
    assert training.replicas == (("worker:0/cpu:0",), ("worker:1/cpu:0",))
    assert (
        {store.home for store in training.stores} == set(homes_only(training)) == {"worker:2/cpu:0", "worker:3/cpu:0"}
    )
    empty = {p.device for p in found.plan.programs if not p.instructions}
    assert empty == set(homes_only(training))


def _pair(reference: Any) -> tuple[Any, Any]:
    return reference.params, reference.opt_state


def test_all_that_is_pushed_and_published_crosses_workers(threads: fm.Cluster) -> None:
    """With homes on the workers of replicas, half of it would stay where it is."""
    own = fit(threads, homes=None)
    for found in (fit(threads), fit(fm.SimulatedCluster(4, *MACHINES))):
        for layer, nbytes in BYTES.items():
            traffic = found.traffic[layer]
            assert traffic["pushed_bytes"] == traffic["pushed_wire_bytes"] == 2 * STEPS * nbytes
            assert traffic["published_wire_bytes"] == 2 * (STEPS + 1) * nbytes
            assert own.traffic[layer]["pushed_wire_bytes"] == STEPS * nbytes


def test_one_replica_on_one_device_and_one_home(threads: fm.Cluster) -> None:
    found = fit(threads, replicas=1, homes="worker:0")
    assert_close((found.params, found.opt_state), _pair(loop()))
    assert {*training_of(found).replicas[0]} <= {"worker:1/cpu:0", "worker:2/cpu:0", "worker:3/cpu:0"}
    assert {store.home for store in training_of(found).stores} == {"worker:0/cpu:0"}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_kind_of_policy_has_the_same_result_as_with_homes_at_replicas(threads: fm.Cluster, policy: str) -> None:
    """And simulated as real. With a code the order of arrival decides from which replicas a batch is decoded."""
    real, usual = (fit(threads, homes=homes, policies=POLICIES[policy]) for homes in (2, None))
    simulated = fit(fm.SimulatedCluster(4, *MACHINES), policies=POLICIES[policy])
    assert_close(real.params, usual.params)
    (assert_close if policy == "coded" else assert_same)(real.params, simulated.params)
    assert real.ledger.outstanding == simulated.ledger.outstanding == 0
    assert real.ledger.examples == usual.ledger.examples == simulated.ledger.examples


def test_replicas_that_do_not_wait(threads: fm.Cluster) -> None:
    found = fit(threads, policies=fm.policies.asynchronous(), optimizer=optax.sgd(1e-2))
    assert found.ledger.used == 2 * STEPS
    assert found.history[-1]["loss"] < found.history[0]["loss"]


def test_stages_and_microbatches(threads: fm.Cluster) -> None:
    found = fit(threads, replicas=1, placement=fm.Pipeline(2), microbatches=2)
    assert_close((found.params, found.opt_state), _pair(loop(microbatches=2)))
    assert training_of(found).replicas == (("worker:0/cpu:0", "worker:1/cpu:0"),)


def test_layers_that_replicas_add_up_stay_with_them(threads: fm.Cluster) -> None:
    found = fit(threads, policies={"fc0/*": fm.policies.all_reduce(), "*": fm.Policy()})
    assert_close(found.params, loop(items=2).params)
    homes = {store.name: store.copies for store in training_of(found).stores}
    assert homes["fc0"] == ("worker:0/cpu:0", "worker:1/cpu:0")
    assert {*homes["fc1"], *homes["fc2"]} == {"worker:2/cpu:0", "worker:3/cpu:0"}


@pytest.mark.parametrize("worker", ["worker:0", "worker:3"])
@pytest.mark.parametrize("replicate", [0, 1])
def test_a_lost_home_or_replica_is_replaced(threads: fm.Cluster, worker: str, replicate: int) -> None:
    given = {"callbacks": [killing(threads, {5: worker})], "on_loss": "replace", "replicate": replicate}
    with pytest.warns(fm.FlowmlWarning, match=f"{worker} was lost"):
        found = fit(threads, given, optimizer=COUPLED)
    assert_same((found.params, found.opt_state), (fit(threads, optimizer=COUPLED).params, found.opt_state))
    assert found.ledger.outstanding == 0


def test_where_none_waits_the_loss_of_any_replica_stops_no_other(threads: fm.Cluster) -> None:
    """With homes on the workers of replicas, worker:0 would hold one and end the run."""
    given = {"callbacks": [killing(threads, {20: "worker:0"})], "on_loss": "shrink", "steps": 60}
    try:
        with pytest.warns(fm.FlowmlWarning, match="worker:0 was lost"):
            found = fit(threads, given, policies=fm.policies.asynchronous(), replicas=3, homes=1)
    finally:
        threads.bring_back(threads.lost)
    ((loss),) = found.losses
    assert (loss.workers, loss.seconds) == (("worker:0",), 0.0), "there is no next run"
    assert (found.ledger.used, found.ledger.outstanding) == (3 * 60, 0)


@pytest.mark.parametrize("on_loss", ["replace", "shrink"])
def test_a_killed_process_that_is_a_home(processes: fm.Cluster, on_loss: str, tmp_path: Path) -> None:
    given = {
        "callbacks": [killing(processes, {5: "worker:3"})],
        "on_loss": on_loss,
        "checkpoint": fm.Checkpoint(tmp_path, every_steps=3),
    }
    try:
        with pytest.warns(fm.FlowmlWarning, match="worker:3 was lost"):
            found = fit(processes, given)
    finally:
        processes.bring_back(processes.lost)
    assert found.ledger.used == 2 * STEPS
    assert_close(found.params, loop(items=2).params)


@pytest.mark.parametrize("policy", ["synchronous", "DiLoCo", "filters", "pulled"])
def test_a_lost_home_leaves_out_no_replica_and_its_layers_move(threads: fm.Cluster, policy: str) -> None:
    given = {"callbacks": [killing(threads, {4: "worker:3", 8: "worker:2"})], "on_loss": "shrink"}
    try:
        with pytest.warns(fm.FlowmlWarning, match=r"worker:\d was lost"):
            found = fit(threads, {**given, "min_replicas": 2}, policies=POLICIES[policy])
    finally:
        threads.bring_back(threads.lost)
    assert {record["replicas"] for record in found.history} == {2}
    assert found.ledger.used == 2 * STEPS
    assert_close(found.params, fit(threads, policies=POLICIES[policy]).params)


def test_layers_move_to_other_homes_first_and_then_to_replicas(threads: fm.Cluster) -> None:
    plan = trainer(threads).plan(mlp(), jax.tree.map(lambda x: x[:BATCH], data()))

    def homes(*lost: str) -> set[str]:
        training = without(plan, lost).training
        assert training is not None
        return {store.home.partition("/")[0] for store in training.stores}

    assert homes() == {"worker:2", "worker:3"}
    assert homes("worker:3") == homes("worker:3", "worker:0") == {"worker:2"}
    assert homes("worker:2", "worker:3") == {"worker:0", "worker:1"}
    assert homes("worker:2", "worker:3", "worker:0") == {"worker:1"}


def test_a_home_that_gives_notice_hands_over(threads: fm.Cluster) -> None:
    end = {40: lambda: threads.end_worker("worker:3", notice=True)}

    def callback(record: dict[str, Any]) -> None:
        end.pop(record["step"], bool)()

    try:
        found = fit(
            threads,
            {"callbacks": [callback], "on_loss": "shrink", "steps": 200},
            delays={"worker:0": 0.01},
        )
        wait_until(lambda: "worker:3" not in {d.worker for d in threads.devices}, "it has left")
    finally:
        threads.bring_back(threads.lost)
    ((change),) = found.changes
    assert (change.left, change.replicas, found.losses) == (("worker:3",), 2, ())
    assert found.ledger.used == 2 * 200
    assert_close(found.params, loop(steps=200, items=2).params)


def test_an_elastic_fit_names_its_homes(threads: fm.Cluster) -> None:
    with pytest.raises(ValueError, match="homes=2 counts workers, and those of an elastic fit change; name them"):
        fit(threads, {"replicas": "elastic"})
    found = fit(threads, {"replicas": "elastic"}, homes="worker:0")
    assert_close(found.params, loop(items=2).params)
    training = training_of(found)
    assert {store.home for store in training.stores} == {"worker:0/cpu:0"}
    assert [devices[0] for devices in training.replicas] == ["worker:1/cpu:0", "worker:2/cpu:0"]


@pytest.mark.parametrize("before", [2, None])
def test_a_fit_resumes_with_and_without_homes(threads: fm.Cluster, tmp_path: Path, before: int | None) -> None:
    kept = {"checkpoint": fm.Checkpoint(tmp_path, every_steps=3)}
    fit(threads, {**kept, "steps": 6}, homes=before)
    after = None if before else 2
    found = fit(threads, {**kept, "resume": "auto"}, homes=after)
    assert found.history[0]["step"] == 6
    assert_close((found.params, found.opt_state), _pair(loop(items=2)))
    assert_close(fm.restore(tmp_path).params, loop(items=2).params)


def test_a_crashed_home_ends_a_simulated_fit() -> None:
    cluster = fm.SimulatedCluster(4, *MACHINES, faults=[fm.sim.Crash(3, 0.55)])
    with pytest.raises(fm.WorkerLostError, match="worker:3"):
        fit(cluster)


def test_what_is_measured_and_shown(threads: fm.Cluster, tmp_path: Path) -> None:
    found = fit(threads, {"validation": data(24), "validate_every": 6})
    assert len(found.validation) == 2
    assert "worker:2" in found.table()
    for kind in ("svg", "html", "dot", "txt"):
        path = tmp_path / f"plan.{kind}"
        found.plan.render(path)
        assert path.stat().st_size


def test_batches_of_another_shape(threads: fm.Cluster) -> None:
    found = fit(threads, {"last": "use", "batch_size": 40, "steps": None, "epochs": 2})
    usual = fit(threads, {"last": "use", "batch_size": 40, "steps": None, "epochs": 2}, homes=None)
    assert_close(found.params, usual.params)


@pytest.mark.parametrize(
    ("homes", "error", "message"),
    [
        (0, ValueError, "homes=0: give at least 1"),
        (-1, ValueError, "homes=-1: give at least 1"),
        (True, TypeError, "homes=True is of type bool; give a whole number"),
        (1.5, TypeError, "homes=1.5 is of type float"),
        (float("nan"), TypeError, "homes=nan is of type float"),
        ({"worker:3"}, TypeError, "homes=.* is of type set"),
        ((), ValueError, "homes is empty; give names of workers"),
        ("", TypeError, "homes has '' of type str; give names of workers"),
        ([3], TypeError, "homes has 3 of type int; give names"),
        (["worker:3/cpu:0"], ValueError, "which is a device, and a home takes a whole worker; give 'worker:3'"),
        (4, PlacementError, "homes=4: there are 4 workers, and at least one has to compute"),
        (3, PlacementError, "2 replicas need at least as many devices, there are 1 beside homes"),
        ("worker:7", PlacementError, "homes names 'worker:7', which matches no worker; there are: worker:0, "),
        ("worker:*", PlacementError, "takes all 4 workers, and 2 replicas have to compute on others"),
    ],
)
def test_homes_that_cannot_be(threads: fm.Cluster, homes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(threads, homes=homes)


@pytest.mark.parametrize("policy", [fm.policies.all_reduce(), fm.policies.gossip()])
def test_homes_without_layers_are_refused(threads: fm.Cluster, policy: fm.Policy) -> None:
    with pytest.raises(PlacementError, match=r"homes= is for layers that a home holds, and all of these are held by"):
        fit(threads, policies=policy)


def test_more_homes_than_layers_is_a_warning(threads: fm.Cluster) -> None:
    params, source = {"w": np.ones((12, 2), np.float32)}, data()
    one = fm.Trainer(
        lambda p, b: ((b["x"] @ p["w"] - b["y"]) ** 2).mean(), optax.sgd(0.1), cluster=threads, replicas=2, homes=2
    )
    with pytest.warns(fm.FlowmlWarning, match="worker:3 holds nothing: there are fewer layers than homes"):
        one.fit(params, source, batch_size=BATCH, steps=2)


def test_a_home_takes_no_steps_that_could_be_delayed(threads: fm.Cluster) -> None:
    with pytest.raises(fm.FlowmlError, match=r"delays names 'worker:2', which holds parameters \(homes=\)"):
        fit(threads, delays={"worker:2": 0.1})
    assert fit(threads, {"steps": 2}, delays=fm.sim.Constant(0.001)).ledger.used == 4
