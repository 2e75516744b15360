"""Estimates the time of a node on a device from its shapes.

The time of a node is the larger of its arithmetic and its memory traffic (the roofline of Williams, Waterman
and Patterson, 2009). A task adds one dispatch; a transfer adds the latency and rate of its link. The estimates are
good enough to choose between placements, but are not exact times.
"""

from __future__ import annotations

import math
from typing import Any

from flowml.devices import Device
from flowml.ir import _jax
from flowml.ir.graph import Graph, Node

FREE = frozenset({"reshape", "squeeze", "expand_dims", "stop_gradient", "copy", "copy_p", "optimization_barrier"})
FUSED = FREE - {"optimization_barrier"} | {
    *("add", "add_any", "sub", "mul", "div", "neg", "abs", "sign", "square", "integer_pow", "max", "min", "clamp"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "select_n", "is_finite"),
    *("convert_element_type", "broadcast_in_dim", "transpose", "rev"),
}
"""Operations of one element at a time that cost no more than reading the element."""
TRANSCENDENTAL = frozenset({"exp", "log", "tanh", "logistic", "erf", "sin", "cos", "pow", "rsqrt", "sqrt", "cbrt"})


def node_flops(node: Node) -> float:
    """Floating point operations of one node."""
    return _equation_flops(node.equation)


def node_bytes(graph: Graph, node: Node) -> float:
    """Bytes read and written by one node, before fusion."""
    if node.op in FREE:
        return 0.0
    return float(sum(graph.values[v].nbytes for v in (*node.reads, *node.outputs)))


def node_seconds(graph: Graph, node: Node, device: Device) -> float:
    # XLA fuses elementwise chains, so most of their traffic never reaches memory; a quarter is a typical share.
    traffic = node_bytes(graph, node) * (1.0 if node.op in ("dot_general", "conv_general_dilated") else 0.25)
    return max(node_flops(node) / device.flops_per_s, traffic / device.bytes_per_s)


def _equation_flops(equation: Any) -> float:
    name = equation.primitive.name
    outputs = sum(math.prod(v.aval.shape) for v in equation.outvars)
    if name in FREE:
        return 0.0
    if name == "dot_general":
        ((contracted, _), _) = equation.params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2.0 * outputs * math.prod(lhs[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * outputs * math.prod(kernel) / max(out_features, 1)
    inner = _jax.nested_jaxprs(equation)
    if inner:
        bodies = [sum(_equation_flops(e) for e in j.eqns) for j in inner]
        return max(bodies) * _repeats(equation) if name == "cond" else sum(bodies) * _repeats(equation)
    if name.startswith("reduce_") or name in ("argmax", "argmin", "cumsum"):
        return float(sum(math.prod(v.aval.shape) for v in equation.invars))
    if name == "sort":
        return outputs * math.log2(max(outputs, 2))
    return float(outputs * (8 if name in TRANSCENDENTAL else 1))


def _repeats(equation: Any) -> int:
    # A while loop's trip count is unknown; ten is a guess, so that the loop has a cost.
    if equation.primitive.name == "scan":
        return int(equation.params["length"])
    return 10 if equation.primitive.name == "while" else 1
