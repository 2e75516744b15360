"""A quorum of the microbatches of all replicas: what a step uses equals a plain NumPy model of the replicas' times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from flowml.instructions import Run
from flowml.plan import Plan
from flowml_runtime.sim.program import programs
from tests.training.reference import data, mlp, mlp_loss

SOURCE = data()
EXAMPLES = len(SOURCE["x"])
MICROBATCHES = 4
AT_ONCE = fm.sim.Network(1e-12, 1e18)
UNEVEN = fm.sim.LogNormal(0.1, 0.8)


def fit(
    cluster: Any, quorum: fm.Quorum, *, replicas: int, batch: int, steps: int = 1, knobs: Any = None, **options: Any
) -> Any:
    policy = fm.Policy(quorum=quorum, **(knobs or {}))
    options = {"placement": fm.Pipeline(1), "microbatches": MICROBATCHES, **options}
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1), cluster=cluster, replicas=replicas, policies=policy, **options)
    result = trainer.fit(mlp(), SOURCE, batch_size=batch, steps=steps, seed=5, progress=False)
    ledger = result.ledger
    assert ledger.used == replicas * steps, "every replica contributes to every step"
    assert not ledger.outstanding and not ledger.dropped
    assert ledger.examples == sum(times * many for times, many in ledger.seen) == batch * steps - ledger.left_out
    return result


def left_out(result: Any, batch: int) -> list[int]:
    """The microbatches that each replica has left out."""
    rows = batch // len(result.ledger.replicas) // MICROBATCHES
    return [t.left_out // rows for t in result.ledger.replicas]


def parts(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """When each microbatch of a step on one stage begins, and when it is computed, as shares of the step's time."""
    assert plan.training is not None
    program = programs(plan, plan.training)[0, 0]
    ends = np.cumsum(program.shares)
    runs = [(n, i) for n, i in enumerate(program.instructions) if isinstance(i, Run)]
    mine = [[n for n, i in runs if i.microbatch == m and i.role == "compute"] for m in range(MICROBATCHES)]
    return np.array([ends[n[0]] - program.shares[n[0]] for n in mine]), np.array([ends[n[-1]] for n in mine])


def naive_used(begins: np.ndarray, ends: np.ndarray, enough: int) -> np.ndarray:
    """How many microbatches each replica uses. `begins` and `ends` are by replica and microbatch."""
    reached = np.sort(ends, axis=None)[enough - 1]
    return np.maximum(1, np.sum(begins <= reached + 1e-9, axis=1))


def naive_params(used: Sequence[np.ndarray], batch: int, *, added: bool = False) -> Any:
    """Plain gradient descent on exactly the examples that were used."""
    params, gradient = mlp(), jax.jit(jax.grad(mlp_loss))
    for step, row in enumerate(used):
        epoch, place = divmod(step, EXAMPLES // batch)
        order, size = epoch_order(EXAMPLES, 5, epoch), batch // len(row)
        chosen = [order[place * batch + r * size :][: size * n // MICROBATCHES] for r, n in enumerate(row)]
        groups = chosen if added else [np.concatenate(chosen)]
        for found in [gradient(params, {k: v[g] for k, v in SOURCE.items()}) for g in groups]:
            params = jax.tree_util.tree_map(lambda p, g: p - 0.1 * g, params, found)
    return params


def close(result: Any, params: Any) -> None:
    for a, b in zip(jax.tree_util.tree_leaves(result.params), jax.tree_util.tree_leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


CASES: dict[str, tuple[fm.Quorum, dict[str, Any]]] = {
    "a share": (fm.Quorum(0.75, of="microbatches"), {}),
    "a number": (fm.Quorum(7, of="microbatches"), {}),
    "fewer than replicas": (fm.Quorum(1, of="microbatches"), {}),
    "an all-reduce": (fm.Quorum(0.6, of="microbatches"), {"topology": fm.AllReduce()}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_step_uses_equals_the_plain_model(case: str) -> None:
    quorum, knobs = CASES[case]
    steps, replicas = 4, 4
    cluster = fm.SimulatedCluster(replicas, UNEVEN, AT_ONCE, seed=3)
    result = fit(cluster, quorum, replicas=replicas, batch=16, steps=steps, knobs=knobs)
    begins, ends = parts(result.plan)
    enough = quorum.need(replicas * MICROBATCHES)
    times = [np.array([[UNEVEN.seconds(3, r, step)] for r in range(replicas)]) for step in range(steps)]
    used = [naive_used(begins * t, ends * t, enough) for t in times]
    assert left_out(result, 16) == [sum(MICROBATCHES - row[r] for row in used) for r in range(replicas)]
    assert sum(map(sum, used)) >= enough * steps
    close(result, naive_params(used, 16))


def test_random_arrivals_equal_the_plain_model() -> None:
    replicas = 6
    for seed in range(8):
        quorum = fm.Quorum((0.3, 0.5, 0.8, 0.95)[seed % 4], of="microbatches")
        compute = (UNEVEN, fm.sim.Pareto(0.05, 1.1), fm.sim.ShiftedExponential(0.05, 0.1))[seed % 3]
        cluster = fm.SimulatedCluster(replicas, compute, AT_ONCE, seed=seed, arithmetic=False)
        result = fit(cluster, quorum, replicas=replicas, batch=24)
        begins, ends = parts(result.plan)
        times = np.array([[compute.seconds(seed, r, 0)] for r in range(replicas)])
        used = naive_used(begins * times, ends * times, quorum.need(replicas * MICROBATCHES))
        assert left_out(result, 24) == list(MICROBATCHES - used), f"seed {seed}"


@pytest.mark.parametrize(("stages", "schedule"), [(2, "1f1b"), (3, "gpipe")])
def test_all_stages_of_a_pipeline_leave_out_the_same(stages: int, schedule: str) -> None:
    compute = fm.sim.Straggler(fm.sim.Constant(0.1), 3.0, workers=tuple(range(stages, 2 * stages)))
    runs = [
        fit(
            fm.SimulatedCluster(2 * stages, compute, fm.sim.Network(1e-5, 1e9), arithmetic=arithmetic),
            fm.Quorum(5, of="microbatches"),
            replicas=2,
            batch=24,
            placement=fm.Pipeline(stages),
            schedule=schedule,
        )
        for arithmetic in (True, False)
    ]
    first, second = left_out(runs[0], 24)
    if schedule == "1f1b":  # a stage runs all forward passes first otherwise, and what has begun is finished
        assert first == 0 < second
    assert left_out(runs[1], 24) == [first, second]
    close(runs[0], naive_params([np.array([MICROBATCHES - first, MICROBATCHES - second])], 24))


def test_it_shortens_steps_where_replicas_vary_and_loses_less_than_a_quorum_of_replicas() -> None:
    def seconds(quorum: fm.Quorum) -> tuple[float, int]:
        cluster = fm.SimulatedCluster(8, UNEVEN, fm.sim.Network(1e-4, 1e9), arithmetic=False)
        result = fit(cluster, quorum, replicas=8, batch=64, steps=20)
        return result.virtual_seconds, result.ledger.left_out

    waits, nothing = seconds(fm.Quorum())
    stops, some = seconds(fm.Quorum(0.75, of="microbatches"))
    assert nothing == 0 < some <= 20 * 64 / 4
    assert stops < 0.7 * waits


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
def test_a_slow_replica_stops_on_real_workers(kind: str, request: pytest.FixtureRequest) -> None:
    """The slow one takes a second for a microbatch. The others need a moment for all of theirs, which are enough."""
    cluster = request.getfixturevalue(kind)
    quorum = fm.Quorum(4, of="microbatches")
    result = fit(cluster, quorum, replicas=2, batch=24, delays={"worker:1": 4.0})
    assert left_out(result, 24) == [0, 3]
    close(result, naive_params([np.array([4, 1])], 24))


def test_a_slow_replica_of_two_stages_stops_on_real_workers(threads_cluster: fm.Cluster) -> None:
    quorum, knobs = fm.Quorum(4, of="microbatches"), {"topology": fm.AllReduce()}
    placement = fm.Pipeline(2)
    result = fit(
        threads_cluster, quorum, replicas=2, batch=24, knobs=knobs, delays={"worker:2": 4.0}, placement=placement
    )
    fast, slow = left_out(result, 24)
    assert fast == 0 < slow
    close(result, naive_params([np.array([4, 4 - slow])], 24))


def test_more_microbatches_than_a_step_has_are_refused() -> None:
    cluster = fm.SimulatedCluster(2, UNEVEN, AT_ONCE)
    with pytest.raises(fm.PolicyError, match=r"asks for more microbatches than a step of 2 replicas has \(8\)"):
        fit(cluster, fm.Quorum(9, of="microbatches"), replicas=2, batch=24)
