"""Invariant 1: whatever the function and wherever its nodes run, the result is that of `jax.jit`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest

import flowml as fm
from flowml.errors import PlacementError
from flowml.ir.graph import Graph
from tests.zoo import CASES, Case

PLACEMENTS = ("explicit", "pipeline", "random")


def placement_of(kind: str, case: Case, workers: int, seed: int) -> Any:
    """Layers in turn on the workers, a pipeline over all of them, or every node anywhere."""
    if kind == "explicit":
        if case.layers is None:
            return by_turns
        return {pattern: f"worker:{i % workers}" for i, pattern in enumerate(case.layers)}
    if kind == "pipeline":
        return fm.Pipeline(stages=workers)
    return at_random(f"{case.name} {seed}")


def by_turns(graph: Graph, devices: Sequence[fm.Device]) -> Mapping[int, fm.Device]:
    return {n.id: devices[i * len(devices) // len(graph.nodes)] for i, n in enumerate(graph.nodes)}


def at_random(seed: str) -> Any:
    """Runs of nodes anywhere: single nodes in a small graph, longer runs in a large one, so that it compiles soon."""

    def rule(graph: Graph, devices: Sequence[fm.Device]) -> Mapping[int, fm.Device]:
        draw = random.Random(seed)
        longest = max(1, len(graph.nodes) // 12)
        found: dict[int, fm.Device] = {}
        nodes = iter(graph.nodes)
        while node := next(nodes, None):
            device = draw.choice(devices)
            found[node.id] = device
            for _ in range(draw.randrange(longest)):
                if extra := next(nodes, None):
                    found[extra.id] = device
        return found

    return rule


def reference(case: Case) -> tuple[Any, Any, Any]:
    """The function, its arguments, and what jit makes of (copies of) them."""
    fn, args = case.make()
    copies = jax.tree_util.tree_map(lambda x: x.copy() if isinstance(x, jax.Array) else x, args)
    return fn, args, case.jit(fn)(*copies, **case.kwargs)


def program(case: Case, fn: Any, placement: Any, cluster: fm.Cluster) -> Any:
    return fm.dataflow(
        fn,
        cluster=cluster,
        placement=placement,
        static_argnums=case.static_argnums,
        donate_argnums=case.donate_argnums,
    )


def check_everywhere(
    case: Case, cluster: fm.Cluster, workers: int, seed: int, placements: Sequence[str] = PLACEMENTS
) -> None:
    fn, args, expected = reference(case)
    ran = 0
    for kind in placements:
        f = program(case, fn, placement_of(kind, case, workers, seed), cluster)
        try:
            first = f(*args, **case.kwargs)
        except PlacementError as error:
            assert kind == "pipeline" and "layers to cut" in str(error)  # fewer layers than workers
            continue
        case.check(expected, first)
        assert_same_bits(first, f(*args, **case.kwargs))
        ran += 1
    assert ran >= min(2, len(placements))


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True):
        assert bits(x) == bits(y)


def bits(array: Any) -> bytes:
    if jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_threads(case: Case, threads_cluster: fm.Cluster, seed: int) -> None:
    check_everywhere(case, threads_cluster, 4, seed)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_processes(case: Case, process_cluster: fm.Cluster, seed: int) -> None:
    check_everywhere(case, process_cluster, 2, seed)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_processes_by_grpc(case: Case, grpc_cluster: fm.Cluster, seed: int) -> None:
    """What differs is how values travel: so one placement, by which most of them do."""
    check_everywhere(case, grpc_cluster, 2, seed, ["random"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_one_task_is_equal_to_the_bit(case: Case, threads_cluster: fm.Cluster) -> None:
    fn, args, expected = reference(case)

    def one_device(graph: Graph, devices: Sequence[fm.Device]) -> Mapping[int, fm.Device]:
        return {n.id: devices[0] for n in graph.nodes}

    f = program(case, fn, one_device, threads_cluster)
    assert_same_bits(expected, f(*args, **case.kwargs))
    plan = f.plan(*args, **case.kwargs)
    assert sum(len(p.tasks) for p in plan.partitions) <= 1
