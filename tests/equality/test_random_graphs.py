"""Invariant 1 over programs nobody wrote: random small functions, every node on a random device, equal to `jax.jit`.

A program is a list of steps, each an operation on values that earlier steps made. Values are of every shape and kind of
type; operations include reductions, products, casts, control flow and nested jit. So that the comparison is honest,
what is discontinuous (comparing, rounding to integers) is only done to *exact* values, those that no reassociation of
floating point sums can have changed: a last bit may differ there, a branch taken must not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import flowml as fm
from flowml.ir.graph import Graph
from tests.zoo import Case

SHAPES = ((), (1,), (3,), (2, 3), (3, 3), (0, 3), (2, 1, 3))
DTYPES = (jnp.float32, jnp.float32, jnp.int32, jnp.uint8, jnp.bool_, jnp.bfloat16, jnp.complex64)
Value = jax.Array

LAST = Path(os.environ["XDG_CACHE_HOME"]) / "random-program.txt"
"""Holds the program that is being checked. If XLA aborts the process, this file stays, and nothing else names it."""


def is_float(x: Value) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def bounded(x: Value) -> Value:
    """Keeps a long chain of products within the range of its type."""
    return jnp.sin(x) if is_float(x) else x


def total(x: Value) -> Value:
    return x.sum(dtype=x.dtype) if x.dtype != jnp.bool_ else x.any()


def meet(x: Value, y: Value) -> tuple[Value, Value]:
    """Two values that broadcast against each other: where shapes clash, the second is summed up."""
    try:
        np.broadcast_shapes(x.shape, y.shape)
    except ValueError:
        y = total(y)
    return x, y


def add(x: Value, y: Value) -> Value:
    x, y = meet(x, y)
    return jnp.add(x, y) if x.dtype == y.dtype == jnp.bool_ else bounded(x + y)


def multiply(x: Value, y: Value) -> Value:
    x, y = meet(x, y)
    return bounded(x * y)


def matmul(x: Value, y: Value) -> Value:
    a, b = jnp.atleast_2d(x).reshape(-1, max(1, x.shape[-1] if x.ndim else 1)), jnp.atleast_2d(y)
    b = b.reshape(-1, b.shape[-1]) if b.ndim > 2 else b
    return bounded(a @ b) if a.shape[1] == b.shape[0] else bounded(jnp.vdot(total(x), total(y)))


def concatenate(x: Value, y: Value) -> Value:
    return jnp.concatenate([x.ravel(), y.ravel()])[:6]


def nested_jit(x: Value, y: Value) -> Value:
    return jax.jit(lambda a, b: add(a, a) if is_float(a) else a * b)(*meet(x, y))


def loop(x: Value, y: Value) -> Value:
    s = total(y.real if jnp.iscomplexobj(y) else y).astype(x.dtype)
    return jax.lax.fori_loop(0, 3, lambda i, c: bounded(c + s) if x.dtype != jnp.bool_ else c ^ s, x)


def scan(x: Value, y: Value) -> Value:
    return jax.lax.scan(lambda c, row: (bounded(c + total(row)), c * row), total(x), x)[1] if x.ndim else x


def choose(x: Value, y: Value) -> Value:
    """Reads the kind of its condition from an exact value: see `Op.exact`."""
    flat = total(y) != 0
    return jax.lax.cond(flat, lambda v: v, jnp.flip, x)


def compare(x: Value, y: Value) -> Value:
    x, y = meet(x, y)
    return x == y


def to_integer(x: Value, y: Value) -> Value:
    return (x.real if jnp.iscomplexobj(x) else x).astype(jnp.int32)


def checkpointed(x: Value, y: Value) -> Value:
    return jax.checkpoint(lambda a: bounded(a * a))(x)


@dataclass(frozen=True)
class Op:
    """`needs_exact` names the operands that must be exact; the result is exact if it `keeps` exactness and all are."""

    fn: Callable[[Value, Value], Value]
    needs_exact: tuple[bool, bool] = (False, False)
    keeps: bool = False


OPS = (
    Op(add),
    Op(multiply),
    Op(matmul),
    Op(nested_jit),
    Op(loop),
    Op(scan),
    Op(checkpointed),
    Op(lambda x, y: bounded(total(x))),
    Op(lambda x, y: jax.nn.softmax(x.ravel().real) if is_float(x) else x),
    Op(lambda x, y: -x if x.dtype != jnp.bool_ else ~x, keeps=True),
    Op(lambda x, y: x.T, keeps=True),
    Op(lambda x, y: x.ravel()[1:], keeps=True),
    Op(lambda x, y: jnp.broadcast_to(x, (2, *x.shape)) if x.ndim < 3 else x[0], keeps=True),
    Op(lambda x, y: jnp.sort(x.ravel()), needs_exact=(True, False), keeps=True),
    Op(concatenate, keeps=True),
    Op(compare, needs_exact=(True, True), keeps=True),
    Op(choose, needs_exact=(False, True), keeps=True),
    Op(to_integer, needs_exact=(True, False), keeps=True),
)


@dataclass(frozen=True)
class Step:
    op: int
    operands: tuple[int, int]
    layer: str


@dataclass(frozen=True)
class Program:
    """Arguments by shape and type, steps over earlier values (counted from the newest), and which values are returned.

    Node number i goes to `places[i % len(places)]`.
    """

    arguments: tuple[tuple[tuple[int, ...], Any], ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    places: tuple[int, ...]

    def __call__(self, *arguments: Value) -> dict[str, Any]:
        values = list(arguments)
        exact = [True] * len(values)
        for step in self.steps:
            op, (i, j) = OPS[step.op], (max(0, len(values) - 1 - k) for k in step.operands)
            if not all(exact[k] or not needed for k, needed in zip((i, j), op.needs_exact, strict=True)):
                continue
            with fm.layer(step.layer):
                values.append(op.fn(values[i], values[j]))
            exact.append((op.keeps and exact[i] and exact[j]) or not is_float(values[-1]))
        return {"last": values[-1], **{f"r{n}": values[k % len(values)] for n, k in enumerate(self.results)}}

    def inputs(self, seed: int) -> list[Value]:
        draw = np.random.default_rng(seed)
        return [jnp.asarray(draw.integers(-3, 4, size=shape)).astype(dtype) for shape, dtype in self.arguments]

    def placement(self, graph: Graph, devices: Sequence[fm.Device]) -> Mapping[int, fm.Device]:
        return {n.id: devices[self.places[i % len(self.places)] % len(devices)] for i, n in enumerate(graph.nodes)}


small = st.integers(0, 30)
recent = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5])
programs = st.builds(
    Program,
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=3).map(tuple),
    st.lists(
        st.builds(Step, st.integers(0, len(OPS) - 1), st.tuples(recent, recent), st.sampled_from(["a", "b", "c"])),
        min_size=2,
        max_size=12,
    ).map(tuple),
    st.lists(small, max_size=3).map(tuple),
    st.lists(st.integers(0, 3), min_size=2, max_size=12).map(tuple),
)


def check(program: Program, cluster: fm.Cluster, seed: int) -> None:
    LAST.write_text(f"{program!r}, {seed}")
    inputs = program.inputs(seed)
    half = any(dtype == jnp.bfloat16 for _, dtype in program.arguments)
    case = Case("random program", lambda: (program, tuple(inputs)), tolerance=0.06 if half else 1e-5)
    f = fm.dataflow(program, cluster=cluster, placement=program.placement)
    first = f(*inputs)
    case.check(jax.jit(program)(*inputs), first)
    again = f(*inputs)
    for a, b in zip(jax.tree_util.tree_leaves(first), jax.tree_util.tree_leaves(again), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@hypothesis.settings(max_examples=50)
@hypothesis.given(program=programs, inputs=small)
def test_on_threads(program: Program, inputs: int, threads_cluster: fm.Cluster) -> None:
    check(program, threads_cluster, inputs)


@hypothesis.settings(max_examples=20)
@hypothesis.given(program=programs, inputs=small)
def test_on_processes(program: Program, inputs: int, process_cluster: fm.Cluster) -> None:
    check(program, process_cluster, inputs)


@hypothesis.settings(max_examples=10)
@hypothesis.given(program=programs, inputs=small)
def test_on_processes_by_grpc(program: Program, inputs: int, grpc_cluster: fm.Cluster) -> None:
    check(program, grpc_cluster, inputs)
