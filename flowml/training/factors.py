"""Moves a gradient's outer product to the parameter's home if its factors are smaller than the product.

The gradient of `y = a @ w` is one `dot_general(a, delta)`. Project Adam (Chilimbi et al., 2014) sends a (B x m) and
delta (B x n) for fully connected layers and forms the m x n product at the home: B(m + n) numbers instead of mn. Here
this only changes where one node runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal, Node

_BETWEEN = frozenset({"transpose", "reshape", "convert_element_type", "copy", "squeeze", "expand_dims", "mul", "neg"})


@dataclass(frozen=True)
class OuterProduct:
    """A gradient as a product: the nodes from `dot_general` to the gradient, and the values that it multiplies."""

    nodes: tuple[Node, ...]
    operands: tuple[int, ...]
    gradient: int

    def nbytes(self, graph: Graph) -> int:
        return sum(graph.values[v].nbytes for v in self.operands)


def find_outer_product(graph: Graph, gradient: int) -> OuterProduct | None:
    """The product behind a gradient, or None if it is not one `dot_general` of two computed values."""
    chain: list[Node] = []
    value = gradient
    while (node := graph.producer.get(value)) is not None:
        chain.append(node)
        if node.op == "dot_general":
            operands = tuple(node.reads)
            return OuterProduct(tuple(reversed(chain)), operands, gradient) if len(operands) == 2 else None
        if node.op not in _BETWEEN or len(node.reads) != 1 or len(node.outputs) != 1:
            return None
        value = node.reads[0]
    return None


def send_factors(graph: Graph, products: Sequence[OuterProduct]) -> tuple[Graph, dict[int, tuple[int, ...]]]:
    """The graph with factors as outputs instead of these gradients, and a mapping gradient -> the values to send.

    Each operand is copied on the device of its product, so that it exists there independent of its other uses. The
    product then has no reader and is removed.
    """
    values, avals = dict(graph.values), dict(graph.avals)
    nodes = list(graph.nodes)
    sent: dict[int, tuple[int, ...]] = {}
    next_id = max(n.id for n in nodes) + 1
    for product in products:
        template = product.nodes[-1]
        dot = product.nodes[0]
        copies: list[int] = []
        for operand in product.operands:
            copy = len(values)
            values[copy], avals[copy] = values[operand], avals[operand]
            nodes.append(
                replace(
                    template,
                    id=next_id,
                    inputs=(operand,),
                    outputs=(copy,),
                    scope=dot.scope,
                    layer=dot.layer,
                )
            )
            next_id += 1
            copies.append(copy)
        sent[product.gradient] = tuple(copies)
    outputs = tuple(o for o in graph.outputs if isinstance(o, Literal) or o not in sent)
    extra = tuple(c for copies in sent.values() for c in copies)
    return (
        replace(graph, nodes=tuple(nodes), values=values, avals=avals, outputs=(*outputs, *extra)),
        sent,
    )


def product_function(graph: Graph, product: OuterProduct) -> Callable[..., Any]:
    """The function that the home runs: (a, delta) -> gradient."""
    equations = [
        (n.equation, [i.value if isinstance(i, Literal) else i for i in n.inputs], n.outputs) for n in product.nodes
    ]
    run = _jax.as_function(_jax.build_jaxpr(equations, graph.avals, product.operands, (product.gradient,)))
    return lambda a, delta: run(a, delta)[0]
