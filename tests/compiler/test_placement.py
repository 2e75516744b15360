"""Where nodes go: pins, patterns, pipelines, callables, "auto", and what is refused."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.devices import as_devices
from flowml.ir.cost import node_seconds
from flowml.ir.graph import Graph
from flowml.ir.label import label
from flowml.ir.trace import trace
from flowml.placement.links import Link, Links
from flowml.placement.pipeline import cut, pipeline_items

X = jnp.ones((4, 8))
TWO = ["worker:0", "worker:1"]


def layered(depth: int, widths: list[int] | None = None) -> tuple[Any, Any]:
    sizes = widths or [8] * (depth + 1)
    params = {f"l{i}": {"w": jnp.ones((sizes[i], sizes[i + 1]))} for i in range(depth)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for i in range(depth):
            x = jnp.tanh(x @ params[f"l{i}"]["w"])
        return x

    return fn, params


def devices_of_layers(plan: fm.Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in plan.nodes:
        found.setdefault(node.layer, set()).add(node.device.split("/")[0])
    return found


def test_patterns_place_layers() -> None:
    fn, params = layered(3)
    plan = fm.compile(fn, params, X, devices=TWO, placement={"l0": "worker:1", "l*": "worker:0"})
    assert devices_of_layers(plan) == {"l0": {"worker:1"}, "l1": {"worker:0"}, "l2": {"worker:0"}}
    assert [(t.source, t.destination, t.shape) for t in plan.transfers] == [
        ("worker:1/cpu:0", "worker:0/cpu:0", (4, 8))
    ]


def test_what_is_weighed_is_what_is_estimated() -> None:
    fn, params = layered(4)
    alone = fm.compile(fn, params, X, devices=TWO)
    assert [c.name for c in alone.choices if c.chosen] == ["one device (worker:0/cpu:0)"]
    pipeline = fm.compile(fn, params, X, devices=TWO, placement=fm.Pipeline(2))
    weighed = [c.step_seconds for c in alone.choices]
    assert weighed == pytest.approx([alone.estimate.step_seconds, pipeline.estimate.step_seconds])
    assert [c.note for c in alone.choices] == ["", "1 value crosses"]


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf")])
def test_a_search_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"AutoPlacement: time_limit_s=.*give seconds above 0"):
        fm.AutoPlacement(time_limit_s=seconds)


def test_pins_win_over_the_placement() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("a"):
            x = jnp.sin(x)
        with fm.layer("a"), fm.device("worker:1"):
            return jnp.cos(x)

    plan = fm.compile(fn, X, devices=TWO, placement={"a": "worker:0"})
    assert {(n.op, n.device) for n in plan.nodes} == {("sin", "worker:0/cpu:0"), ("cos", "worker:1/cpu:0")}


def test_a_callable_places_nodes_and_the_rest_follows_its_data() -> None:
    fn, params = layered(2)

    def rule(graph: Graph, devices: Any) -> dict[int, str]:
        return {n.id: "worker:1" for n in graph.nodes if n.op == "tanh"}

    plan = fm.compile(fn, params, X, devices=TWO, placement=rule)
    assert {n.device for n in plan.nodes if n.op == "tanh"} == {"worker:1/cpu:0"}
    assert len(plan.partitions) >= 1


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            {"l0": "worker:7"},
            r"placement pattern 'l0' names device 'worker:7', which does not exist; there are: worker:0",
        ),
        ({"nope*": "worker:0"}, r"placement pattern 'nope\*' matches no layer; layers are: l0, l1"),
        (fm.Pipeline(3), r"Pipeline\(stages=3\) needs 3 devices, there are 2"),
        ("best", "placement='best' is not a placement; give 'auto', a mapping"),
        (lambda graph, devices: {10**6: "worker:0"}, "which the graph does not have"),
        (lambda graph, devices: {graph.nodes[0].id: "worker:5"}, "the placement callable names device 'worker:5'"),
    ],
)
def test_bad_placements_are_refused_before_anything_runs(placement: Any, message: str) -> None:
    fn, params = layered(2)
    with pytest.raises(fm.PlacementError, match=message):
        fm.compile(fn, params, X, devices=TWO, placement=placement)


def test_contradicting_pins_are_refused() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.device("worker:0"), fm.layer("torn"), fm.device("worker:1"):
            return jnp.sin(x)

    with pytest.raises(
        fm.PlacementError, match=r"layer 'torn' is pinned to 'worker:0' and, inside that, to 'worker:1'"
    ):
        fm.compile(fn, X, devices=TWO)


def test_a_nested_pin_may_narrow_the_outer_one() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.device("worker:1"), fm.device("worker:1/cpu:0"):
            return jnp.sin(x)

    assert fm.compile(fn, X, devices=TWO).devices == ("worker:1/cpu:0",)


def test_a_pin_to_a_missing_device_is_refused() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("far"), fm.device("worker:9"):
            return jnp.sin(x)

    with pytest.raises(fm.PlacementError, match=r"fm\.device in layer 'far' names device 'worker:9'"):
        fm.compile(fn, X, devices=TWO)


def test_auto_keeps_a_small_model_on_one_device_and_says_why() -> None:
    fn, params = layered(4)
    plan = fm.compile(fn, params, X, devices=TWO)
    assert plan.devices == ("worker:0/cpu:0",)
    assert {c.name for c in plan.choices} == {"one device (worker:0/cpu:0)", "pipeline of 2 stages"}
    assert [c.name for c in plan.choices if c.chosen] == ["one device (worker:0/cpu:0)"]


def test_auto_splits_what_does_not_fit_on_one_device() -> None:
    fn, params = layered(4)
    total = 4 * 8 * 8 * 4
    plan = fm.compile(fn, params, X, devices=TWO, placement=fm.AutoPlacement(memory_bytes=total - 100))
    assert len(plan.partitions) == 2


def test_a_model_that_fits_nowhere_is_refused_with_the_bytes() -> None:
    fn, params = layered(4)
    with pytest.raises(fm.PlacementError, match=r"fits on no device.* needs at least [\d,]+ bytes.*devices have 100"):
        fm.compile(fn, params, X, devices=TWO, placement=fm.AutoPlacement(memory_bytes=100))
    with pytest.raises(fm.PlacementError, match=r"does not fit on worker:0/cpu:0: it needs at least [\d,]+ bytes"):
        small = [fm.Device("worker:0/cpu:0", memory_bytes=100), fm.Device("worker:1/cpu:0", memory_bytes=100)]
        fm.compile(fn, params, X, devices=small, placement={"*": "worker:0"})


def test_devices_are_checked() -> None:
    fn, params = layered(1)
    with pytest.raises(fm.PlacementError, match="no devices given"):
        fm.compile(fn, params, X, devices=[])
    with pytest.raises(fm.PlacementError, match="given twice"):
        fm.compile(fn, params, X, devices=["worker:0", "worker:0"])


def slowest(work: list[float], transfer: list[list[float]], bounds: tuple[int, ...]) -> float:
    edges = [0, *bounds, len(work)]
    stages = [(sum(work[a:b]), transfer[s][a]) for s, (a, b) in enumerate(pairwise(edges))]
    return max(max(stage) for stage in stages)


@given(
    st.lists(st.integers(1, 64), min_size=3, max_size=7),
    st.integers(1, 3),
    st.lists(st.sampled_from([1e9, 1e8, 1e7]), min_size=2, max_size=2),
)
def test_the_pipeline_cut_is_the_optimum(widths: list[int], stages: int, rates: list[float]) -> None:
    depth = len(widths) - 1
    stages = min(stages, depth)
    fn, params = layered(depth, widths)
    traced = trace(fn, (params, jnp.ones((4, widths[0]))), {})
    graph = label(traced.graph, traced.parameters)
    devices = as_devices([f"worker:{i}" for i in range(stages)])
    into = [Link(1e-9, rate) for rate in rates[: stages - 1]]
    links = Links(pairs={(f"worker:{i}", f"worker:{i + 1}"): link for i, link in enumerate(into)})
    items = pipeline_items(graph)
    found = cut(graph, items, devices, links)
    work = [sum(node_seconds(graph, n, devices[0]) for n in item) for item in items]
    transfer = [[0.0] * depth, *([0.0, *(link.seconds(4 * 4 * w) for w in widths[1:-1])] for link in into)]
    best = min(slowest(work, transfer, b) for b in combinations(range(1, len(items)), stages - 1))
    bounds = tuple(i for i in range(1, len(found)) if found[i] != found[i - 1])
    assert found == sorted(found)
    assert slowest(work, transfer, bounds) == pytest.approx(best)
