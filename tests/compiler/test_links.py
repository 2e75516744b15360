"""The cost model reckons with each pair's own link: placement follows it, and the plan says what it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flowml as fm
from flowml.compiler import compile_function
from flowml.placement.links import ASSUMED, GRPC, SHARED_MEMORY, Link, Links
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec

NEAR = Link(1e-6, 1e11, SHARED_MEMORY, measured=True)
FAR = Link(0.05, 1e6, GRPC, measured=True)
X = jax.ShapeDtypeStruct((64, 256), jnp.float32)
LAYERS = {f"l{i}": jax.ShapeDtypeStruct((256, 256), jnp.float32) for i in range(4)}
LAYER_BYTES = 256 * 256 * 4


def model(params: Any, x: jax.Array) -> jax.Array:
    for w in params.values():
        x = jnp.tanh(x @ w)
    return x


def between_all(workers: int, link: Link, **others: Link) -> Links:
    """All pairs of workers by `link`, but for `others`: link(s) from worker a to worker b as "a_b"."""
    pairs = {(f"worker:{a}", f"worker:{b}"): link for a in range(workers) for b in range(workers)}
    for name, other in others.items():
        a, b = name.strip("w").split("_")
        pairs[f"worker:{a}", f"worker:{b}"] = other
    return Links(pairs=pairs)


def plan_of(workers: int, placement: Any, links: Links | None) -> fm.Plan:
    names = [f"worker:{i}" for i in range(workers)]
    return compile_function(model, (LAYERS, X), {}, devices=names, placement=placement, links=links).plan


def test_a_pair_has_its_own_link_else_that_of_its_workers_else_the_default() -> None:
    own, workers = Link(1.0, 1.0), Link(2.0, 2.0)
    links = Links(pairs={("a/cpu:0", "b/cpu:0"): own, ("a", "b"): workers})
    assert links.between("a/cpu:0", "b/cpu:0") is own
    assert links.between("a/cpu:1", "b/cpu:0") is workers
    assert links.between("b/cpu:0", "a/cpu:0") is links.default == ASSUMED[""]


def test_a_slow_link_changes_what_auto_chooses() -> None:
    throughput = fm.AutoPlacement(objective="throughput")
    near = plan_of(2, throughput, between_all(2, NEAR))
    far = plan_of(2, throughput, between_all(2, FAR))
    assert [c.name for c in near.choices if c.chosen] == ["pipeline of 2 stages"]
    assert [c.name for c in far.choices if c.chosen] == ["one device (worker:0/cpu:0)"]


def test_a_pipeline_goes_along_the_fastest_links() -> None:
    bound = fm.AutoPlacement(memory_bytes=3 * LAYER_BYTES)  # two stages at least
    hosts = between_all(3, NEAR, w0_1=FAR, w1_0=FAR, w2_1=FAR, w1_2=FAR)
    plan = plan_of(3, bound, hosts)
    assert plan.devices == ("worker:0/cpu:0", "worker:2/cpu:0")
    assert plan.notes == ("the stages follow the fastest links: worker:0/cpu:0, then worker:2/cpu:0.",)
    assert plan_of(3, bound, between_all(3, NEAR)).devices == ("worker:0/cpu:0", "worker:1/cpu:0")


def test_the_estimate_takes_the_link_of_the_direction() -> None:
    placement = {"l0": "worker:0", "l*": "worker:1"}
    there = plan_of(2, placement, between_all(2, NEAR, w0_1=FAR))
    back = plan_of(2, placement, between_all(2, NEAR, w1_0=FAR))
    crossing = sum(m.nbytes for m in there.messages)
    wait_s = FAR.seconds(crossing) - NEAR.seconds(crossing)
    assert there.estimate.step_seconds - back.estimate.step_seconds == pytest.approx(wait_s)


def test_a_plan_names_the_links_that_it_uses_and_no_others() -> None:
    plan = plan_of(3, {"l0": "worker:0", "l*": "worker:1"}, between_all(3, NEAR, w0_1=FAR))
    (link,) = plan.links
    assert (link.source, link.destination) == ("worker:0/cpu:0", "worker:1/cpu:0")
    assert (link.latency_s, link.bytes_per_s, link.way, link.measured) == (0.05, 1e6, GRPC, True)
    assert fm.Plan.decode(plan.encode()) == plan
    row = next(line for line in plan.explain().splitlines() if "gRPC" in line)
    assert row.split() == ["worker:0/cpu:0", "→", "worker:1/cpu:0", "gRPC", "50", "ms", "1", "MB/s", "measured"]


def test_without_a_cluster_a_link_is_assumed_and_said_to_be() -> None:
    plan = plan_of(2, {"l0": "worker:0", "l*": "worker:1"}, None)
    row = plan.explain().split("Links (as the estimate took them)\n")[1].splitlines()[1]
    assert row.split() == ["worker:0/cpu:0", "→", "worker:1/cpu:0", "-", "400", "µs", "1", "GB/s", "assumed"]
    assert plan_of(2, "auto", None).links == ()


def test_a_training_plan_names_the_links_to_homes() -> None:
    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean(model(params, batch) ** 2)

    import optax

    spec = TrainingSpec(loss, optax.sgd(0.1), replicas=2)
    links = between_all(2, NEAR)
    plan = compile_training(spec, LAYERS, X, ["worker:0", "worker:1"], links=links).plan
    assert {(k.source, k.destination) for k in plan.links} == {
        ("worker:0/cpu:0", "worker:1/cpu:0"),
        ("worker:1/cpu:0", "worker:0/cpu:0"),
    }
    assert "worker:0/cpu:0 ↔ worker:1/cpu:0  shared memory" in plan.explain()
