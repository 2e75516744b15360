"""Replicas that add up gradients among themselves: the same training, the same bits, the bytes that were promised."""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import DeadlineError, WorkerError, WorkerLostError
from tests.conftest import wait_until
from tests.runtime.test_trace import spans
from tests.stalls import stalls
from tests.training.reference import BATCH, assert_close, assert_same, data, mlp, mlp_loss, optax_loop

SOURCE = data()
ADAM = optax.adam(1e-2)
ALL_REDUCE = {"*": fm.policies.all_reduce()}
NoLeaks = Callable[[], AbstractContextManager[None]]
TOPOLOGIES = [fm.AllReduce(), fm.Ring(), fm.Tree(fanout=2), fm.Hierarchy()]
SMALL = fm.Pipeline(1)


def fit(cluster: fm.Cluster, policy: fm.Policy | dict[str, fm.Policy], **options: Any) -> Any:
    policies = policy if isinstance(policy, dict) else {"*": policy}
    loss, optimizer = options.pop("loss", mlp_loss), options.pop("optimizer", ADAM)
    params, steps = options.pop("params", None), options.pop("steps", 8)
    layout: dict[str, Any] = {"placement": SMALL, **options}
    trainer = fm.Trainer(loss, optimizer, cluster=cluster, policies=policies, **layout)
    return trainer.fit(mlp() if params is None else params, SOURCE, batch_size=BATCH, steps=steps)


@pytest.fixture(params=["process_cluster", "grpc_cluster"])
def processes(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("topology", "replicas"), [(fm.AllReduce(), 2), *((t, 3 + i % 2) for i, t in enumerate(TOPOLOGIES))], ids=str
)
def test_equal_to_one_loop_and_to_the_parameter_server(
    threads_cluster: fm.Cluster, topology: Any, replicas: int
) -> None:
    result = fit(threads_cluster, fm.Policy(topology=topology), replicas=replicas)
    loop = optax_loop(mlp_loss, mlp(), ADAM, SOURCE, 8, items=replicas)
    assert_close(result.params, loop.params)
    assert_close(result.opt_state, loop.opt_state)
    np.testing.assert_allclose([r["loss"] for r in result.history], loop.losses, rtol=1e-5)
    assert_close(result.params, fit(threads_cluster, fm.Policy(), replicas=replicas).params)
    assert (result.ledger.used, result.ledger.outstanding) == (8 * replicas, 0)
    assert {r["replicas"] for r in result.history} == {replicas}


@pytest.mark.parametrize("topology", [fm.AllReduce(), fm.Hierarchy()], ids=str)
def test_between_processes(processes: fm.Cluster, topology: Any) -> None:
    result = fit(processes, fm.Policy(topology=topology), replicas=2)
    assert_close(result.params, optax_loop(mlp_loss, mlp(), ADAM, SOURCE, 8).params)


@pytest.mark.parametrize(
    "layout",
    [
        {"replicas": 2, "placement": fm.Pipeline(2), "microbatches": 3},
        {"replicas": 1, "placement": fm.Pipeline(2)},
        {"replicas": 2, "placement": fm.Pipeline(2), "optimizer": optax.chain(optax.clip_by_global_norm(0.1), ADAM)},
    ],
    ids=["2 x 2 x 3", "one replica", "stages coupled by the optimizer"],
)
@pytest.mark.parametrize("every", [1, 3])
def test_with_pipelines_and_rhythms(threads_cluster: fm.Cluster, layout: dict[str, Any], every: int) -> None:
    served = fit(threads_cluster, fm.policies.every(every), **layout)
    summed = fit(threads_cluster, fm.policies.all_reduce(every=every), **layout)
    assert_close(summed.params, served.params)
    assert_close(summed.opt_state, served.opt_state)
    assert sum(t["pushes"] for t in summed.traffic.values()) > 0


def test_sums_of_steps_as_if_each_were_applied_alone(threads_cluster: fm.Cluster) -> None:
    served = fit(threads_cluster, fm.policies.every(2, apply="sum"), replicas=2)
    summed = fit(threads_cluster, fm.policies.all_reduce(every=2, apply="sum"), replicas=2)
    assert_close(summed.params, served.params)


def test_layers_of_one_model_by_different_rules(threads_cluster: fm.Cluster, process_cluster: fm.Cluster) -> None:
    rules = {
        "fc0*": fm.policies.all_reduce(),
        "fc1/bias": fm.policies.all_reduce(every=2),
        "fc1*": fm.policies.synchronous(),
    }
    for cluster, layout in ((threads_cluster, {"placement": fm.Pipeline(2)}), (process_cluster, {})):
        served = fit(cluster, {"fc1/bias": fm.policies.every(2)}, replicas=2, **layout)
        result = fit(cluster, rules, replicas=2, **layout)
        assert_close(result.params, served.params)
        assert result.traffic["fc0"]["published_wire_bytes"] == 0
        arriving = fit(cluster, {**rules, "fc1*": fm.policies.asynchronous(staleness=2)}, replicas=2, **layout)
        assert arriving.ledger.used == 16
        assert len(arriving.history) == 8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters(threads_cluster: fm.Cluster, dtype: Any) -> None:
    params = {**mlp(dtype=dtype), "fc1": mlp()["fc1"]}
    result = fit(threads_cluster, ALL_REDUCE, params=params, replicas=2, optimizer=optax.sgd(0.1))
    assert_close(result.params, optax_loop(mlp_loss, params, optax.sgd(0.1), SOURCE, 8).params, 0.03)


def bits(tree: Any) -> bytes:
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("options", [{}, {"every": 2}], ids=["each step", "every other step"])
def test_trainings_under_random_delays_agree_to_the_bit(
    process_cluster: fm.Cluster, options: dict[str, Any], seed: int
) -> None:
    policies = {"fc0*": fm.Policy(topology=fm.Ring(), **options), "*": fm.policies.all_reduce(**options)}
    trainer = fm.Trainer(mlp_loss, ADAM, cluster=process_cluster, replicas=2, placement=SMALL, policies=policies)
    found: set[bytes] = set()
    for run in range(8):
        with stalls(list(process_cluster.pids.values()), seed + run):
            result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=6, seed=seed)
        found.add(bits((result.params, result.opt_state, [r["loss"] for r in result.history])))
    assert len(found) == 1


SEEN: Counter[bytes] = Counter()


def note(*params: Any) -> np.ndarray:
    SEEN[hashlib.sha256(bits(params)).digest()] += 1
    return np.zeros(1, np.float32)


def watched_loss(params: Any, batch: Any) -> Any:
    """As `mlp_loss`; what each replica reads at each step is noted."""
    zero = jax.pure_callback(
        note, jax.ShapeDtypeStruct((1,), jnp.float32), *jax.lax.stop_gradient(jax.tree.leaves(params))
    )
    return mlp_loss(params, batch) + 0 * zero[0]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_all_replicas_hold_the_same_bits(threads_cluster: fm.Cluster, topology: Any) -> None:
    SEEN.clear()
    fit(threads_cluster, fm.Policy(topology=topology), replicas=4, loss=watched_loss, placement=SMALL)
    assert list(SEEN.values()) == [4] * 8


@pytest.fixture
def two_by_two() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.threads(workers=2, devices_per_worker=2)) as cluster:
        yield cluster


@pytest.mark.parametrize("options", [{"replicas": 4, "microbatches": 2}, {"replicas": 2}], ids=str)
def test_replicas_of_one_worker_share_a_copy(two_by_two: fm.Cluster, options: dict[str, Any]) -> None:
    policies = {"fc0*": fm.policies.all_reduce(every=2), "*": fm.policies.all_reduce()}
    first, second = (fit(two_by_two, policies, **options) for _ in range(2))
    assert_close(first.params, fit(two_by_two, {"fc0*": fm.policies.every(2)}, **options).params)
    assert_same(first.params, second.params)
    crossed = {name: t["pushed_wire_bytes"] for name, t in first.traffic.items()}
    alone = options["replicas"] == 2  # both on the first worker
    assert crossed == {"fc0": 0 if alone else 4 * 2 * 832, "fc1+fc2": 0 if alone else 8 * 2 * 1224}


def test_a_worker_that_reads_two_copies() -> None:
    """Two replicas of three stages on three workers of two devices; clipping makes all layers one store."""
    layout: dict[str, Any] = {"replicas": 2, "placement": fm.Pipeline(3), "microbatches": 2}
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), ADAM)
    with fm.Cluster.threads(workers=3, devices_per_worker=2) as cluster:
        for _ in range(3):
            result = fit(cluster, ALL_REDUCE, optimizer=optimizer, **layout)
            assert_close(result.params, optax_loop(mlp_loss, mlp(), optimizer, SOURCE, 8).params)


def test_a_ring_sends_what_it_says(threads_cluster: fm.Cluster, processes: fm.Cluster) -> None:
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(mlp()))
    for cluster, n in ((threads_cluster, 4), (processes, 2)):
        result = fit(cluster, fm.Policy(topology=fm.Ring()), replicas=n)
        (traffic,) = result.traffic.values()
        assert traffic == {
            "pushes": 8 * n,
            "pushed_bytes": 8 * n * size,
            "pushed_wire_bytes": 8 * 2 * (n - 1) * size,
            "published_wire_bytes": 0,
            "shared_wire_bytes": 0,
        }
        assert "all 2 replicas" in result.table() or n == 4


def wide(params: Any, batch: Any) -> Any:
    x = batch["x"]
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x[:, :2] - batch["y"]) ** 2)


def wide_params(width: int = 600) -> Any:
    sizes = [12, 600, width, 600, 600, 2]
    return {f"l{i}": jnp.full((m, n), 0.01) for i, (m, n) in enumerate(pairwise(sizes))}


def plan(cluster: fm.Cluster, **options: Any) -> fm.Plan:
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype), SOURCE)
    trainer = fm.Trainer(wide, ADAM, cluster=cluster, policies=ALL_REDUCE, placement=SMALL, **options)
    return trainer.plan(wide_params(), structs)


def test_small_layers_share_a_bucket_and_the_size_decides_how_it_is_reduced(
    threads_cluster: fm.Cluster, grpc_cluster: fm.Cluster
) -> None:
    text = plan(threads_cluster, replicas=4).explain()
    assert re.search(r"l0\+l1 .* sync, all-reduce  all 4 replicas", text)
    assert re.search(r"l2 .* all 4 replicas", text)
    assert re.search(r"l3\+l4 .* all 4 replicas", text)
    assert (
        "Replicas add up 4.15 MiB a step in 3 buckets (3 by doubling); each worker sends 8.3 MiB for that on average."
    ) in text
    apart = plan(grpc_cluster, replicas=2)
    assert "by ring" in apart.explain()
    assert apart.training is not None
    assert {p.reduction.hosts for s in apart.training.stores for p in s.parts if p.reduction} == {(0, 1)}


def test_gradients_leave_during_the_backward_pass(threads_cluster: fm.Cluster) -> None:
    from flowml.instructions import Push, Run

    found = plan(threads_cluster, replicas=2)
    assert found.training is not None
    packing = {p.pack for s in found.training.stores for p in s.parts}
    code = found.programs[0].instructions
    first = next(i for i, x in enumerate(code) if isinstance(x, Push))
    assert any(isinstance(x, Run) and x.task not in packing for x in code[first:])


def test_a_bucket_is_under_way_while_the_rest_is_computed(process_cluster: fm.Cluster, tmp_path: Path) -> None:
    trainer = fm.Trainer(wide, ADAM, cluster=process_cluster, replicas=2, policies=ALL_REDUCE)
    trainer.fit(wide_params(), SOURCE, batch_size=BATCH, steps=1)
    with process_cluster.trace(tmp_path / "t.json"):
        trainer.fit(wide_params(), SOURCE, batch_size=BATCH, steps=3)
    found = spans(tmp_path / "t.json")
    for device in ("worker:0/cpu:0", "worker:1/cpu:0"):
        reduced = [s for s in found if s["lane"].startswith(f"{device} reduce")]
        runs = [s for s in found if s["lane"] == device and s["cat"] == "run"]
        assert len(reduced) == 3 * 3
        for step in {s["args"]["step"] for s in runs}:
            over = max(s["ts"] + s["dur"] for s in runs if s["args"]["step"] == step)
            assert min(s["ts"] for s in reduced if s["args"]["step"] == step) < over


def test_large_buckets_in_pieces(processes: fm.Cluster) -> None:
    trainer: dict[str, Any] = {
        "loss": wide,
        "replicas": 2,
        "optimizer": optax.sgd(0.1),
        "params": wide_params(4000),
        "steps": 2,
    }
    results = [fit(processes, policy, **trainer) for policy in (fm.Policy(), fm.policies.all_reduce())]
    assert_close(results[1].params, results[0].params)


def test_a_killed_replica_ends_the_fit_at_once(no_leaks: NoLeaks) -> None:
    with no_leaks(), fm.Cluster.local(workers=2) as cluster:

        def kill(record: dict[str, Any]) -> None:
            if record["step"] == 3:
                os.kill(cluster.pids["worker:1"], signal.SIGKILL)

        trainer = fm.Trainer(mlp_loss, ADAM, cluster=cluster, replicas=2, policies=ALL_REDUCE)
        with pytest.raises(WorkerLostError, match="worker:1 was lost during training at step") as caught:
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=1_000_000, callbacks=[kill])
        assert "heartbeat" not in str(caught.value), "that would take 5 s"
        assert caught.value.worker == "worker:1"
        wait_until(lambda: len(cluster.devices) == 1, "the cluster has one device less")
        assert_close(fit(cluster, ALL_REDUCE).params, optax_loop(mlp_loss, mlp(), ADAM, SOURCE, 8).params)


def test_an_end_in_the_middle_leaves_nothing_behind(process_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, ADAM, cluster=process_cluster, replicas=2, policies=ALL_REDUCE)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=1_000_000, callbacks=[stop])
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=8)
    assert_close(result.params, optax_loop(mlp_loss, mlp(), ADAM, SOURCE, 8).params)


def test_one_that_is_too_slow_is_named() -> None:
    with fm.Cluster.threads(workers=2, deadline_s=0.5) as cluster:
        with pytest.raises(DeadlineError, match="longer deadline"):
            fit(cluster, ALL_REDUCE, replicas=2, delays={"worker:0": 5.0})
        cluster.session._deadline_s = 60.0  # the next one is in time on any machine
        assert_close(fit(cluster, ALL_REDUCE, replicas=2).params, optax_loop(mlp_loss, mlp(), ADAM, SOURCE, 8).params)


def refuse(x: Any) -> Any:
    raise ValueError("not this one")


def test_what_fails_on_one_replica_ends_the_fit(threads_cluster: fm.Cluster) -> None:
    def loss(params: Any, batch: Any) -> Any:
        x = jax.pure_callback(refuse, jax.ShapeDtypeStruct(batch["x"].shape, batch["x"].dtype), batch["x"])
        return mlp_loss(params, {"x": x, "y": batch["y"]})

    with pytest.raises(WorkerError, match="not this one"):
        fit(threads_cluster, ALL_REDUCE, replicas=2, loss=loss)
