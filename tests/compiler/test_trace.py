"""Tracing, simplifying and labelling: what the graph says about the function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import flowml as fm
from flowml.ir.label import label, layer_of, matches
from flowml.ir.scopes import parse
from flowml.ir.simplify import simplify
from flowml.ir.trace import Trace, trace

X = jnp.ones((4, 8))
PARAMS = {"fc1": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}, "fc2": {"kernel": jnp.ones((16, 2))}}


def mlp(params: Any, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return jnp.mean((hidden @ params["fc2"]["kernel"]) ** 2)


def labelled(fn: Any, *args: Any) -> Trace:
    traced = trace(fn, args, {})
    graph = label(simplify(traced.graph), traced.parameters, closed_over=traced.closed_over)
    return replace(traced, graph=graph)


def layers(fn: Any, *args: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node in labelled(fn, *args).graph.nodes:
        found.setdefault(node.layer, set()).add(node.op)
    return found


def test_plain_functions_take_their_layers_from_the_parameters_they_touch() -> None:
    found = layers(mlp, PARAMS, X)
    assert set(found) == {"fc1", "fc2"}
    assert {"dot_general", "add"} <= found["fc1"]
    assert {"dot_general", "max"} <= found["fc2"]  # an activation goes with what reads it


def test_backward_nodes_belong_to_the_layer_of_their_forward() -> None:
    found = layers(jax.value_and_grad(mlp), PARAMS, X)
    assert set(found) == {"fc1", "fc2"}
    assert {"max", "gt", "select_n"} <= found["fc2"]  # relu, its mask and its derivative stay together


def test_a_scope_wins_over_parameters_and_nests() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        with fm.layer("encoder"), fm.layer("first"):
            return x @ params["fc1"]["kernel"]

    assert set(layers(fn, PARAMS, X)) == {"encoder/first"}


def test_a_scope_that_holds_a_parameters_layer_takes_its_name() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("CNN"), jax.named_scope("fc1"):
            return x @ params["fc1"]["kernel"]

    assert set(layers(fn, PARAMS, X)) == {"fc1"}


def test_scopes_survive_grad_vmap_and_jit() -> None:
    @jax.jit
    def inner(x: jax.Array) -> jax.Array:
        with fm.layer("deep"):
            return jnp.sin(x) * x

    fn = jax.vmap(jax.grad(lambda x: inner(x).sum()))
    assert set(layers(fn, X)) == {"deep"}


def test_name_stacks_are_taken_apart() -> None:
    stack = (("transpose", True), ("jvp", True), ("fc1", False), ("fm.device(worker:1/cpu:0)", False), ("inner", False))
    scope = parse(stack)
    assert (scope.path, scope.pins, scope.backward) == ("fc1/inner", ("worker:1/cpu:0",), True)


@pytest.mark.parametrize("name", ["", "@x"])
def test_layer_names_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match="layer name"):
        fm.layer(name)


def test_outside_a_trace_annotations_change_nothing() -> None:
    with fm.layer("a"), fm.device("worker:9"):
        assert float(jnp.sum(X)) == 32.0


@pytest.mark.parametrize(
    ("path", "layer"),
    [("conv1/kernel", "conv1"), ("params/enc/conv1/kernel", "enc/conv1"), ("w1", "w1"), ("params/w1", "w1")],
)
def test_layer_of_a_parameter_path(path: str, layer: str) -> None:
    assert layer_of(path) == layer


def test_patterns_match_whole_layers_or_from_a_component_on() -> None:
    assert matches("model/conv1", "conv*")
    assert matches("conv1", "conv*")
    assert not matches("deconv1", "conv*")


def test_nested_jit_and_custom_rules_are_inlined_and_loops_kept_whole() -> None:
    def fn(x: jax.Array) -> jax.Array:
        y = jax.jit(lambda v: jax.nn.relu(v) + 1)(x)
        return jax.lax.fori_loop(0, 3, lambda _, v: v * 2, y)

    ops = {n.op for n in trace(fn, (X,), {}).graph.nodes}
    assert not ops & {"jit", "pjit", "custom_jvp_call"}
    assert ops & {"scan", "while"}


def test_dead_and_equal_nodes_go() -> None:
    def fn(x: jax.Array) -> jax.Array:
        jnp.exp(x)
        return jnp.sin(x) + jnp.sin(x)

    ops = [n.op for n in simplify(trace(fn, (X,), {}).graph).nodes]
    assert sorted(ops) == ["add", "sin"]


def test_equal_nodes_of_different_layers_stay_apart() -> None:
    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("a"):
            a = jnp.sin(x)
        with fm.layer("b"):
            b = jnp.sin(x)
        return a * b

    assert [n.op for n in simplify(trace(fn, (X,), {}).graph).nodes].count("sin") == 2
