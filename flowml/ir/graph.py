"""Defines the intermediate representation: a traced program as a frozen list of nodes in topological order.

Values are integers; a node names those that it reads and writes. `equation` holds what JAX needs to run a node (its
primitive and parameters). Only tracing and lowering look into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flowml.ir import _jax
from flowml.ir.scopes import Scope
from flowml.plan import ArraySpec


@dataclass(frozen=True, slots=True, eq=False)
class Literal:
    """A scalar written into the program. `key` identifies equal literals."""

    value: Any
    aval: Any
    key: tuple[str, bytes]


Operand = int | Literal


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. The label pass sets `layer`, and placement sets `device`; before that they are ""."""

    id: int
    op: str
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    scope: Scope
    layer: str = ""
    device: str = ""
    equation: Any = field(default=None, repr=False, compare=False)
    calls_python: bool = False
    """It is a task of its own, because no executable of XLA can call a Python function of another process."""

    @property
    def reads(self) -> tuple[int, ...]:
        """The values among the inputs, without literals."""
        return tuple([i for i in self.inputs if not isinstance(i, Literal)])


@dataclass(frozen=True)
class Graph:
    """A program. `inputs` and `constants` are the values that no node makes; `input_names` are tree paths.

    `values` maps each value to its spec, `avals` to JAX's description of it. `parameters` are the values that are
    parameters or computed only from parameters; the label pass finds them.
    """

    nodes: tuple[Node, ...]
    values: Mapping[int, ArraySpec]
    avals: Mapping[int, Any] = field(repr=False)
    inputs: tuple[int, ...]
    input_names: tuple[str, ...]
    outputs: tuple[Operand, ...]
    output_names: tuple[str, ...]
    constants: Mapping[int, Any] = field(repr=False)
    parameters: frozenset[int] = frozenset()
    tokens: tuple[int, ...] = ()
    """The tokens of all effects. They must be made, also if no node reads them."""
    ordered: bool = False
    """Whether some effects are ordered."""

    @cached_property
    def producer(self) -> dict[int, Node]:
        return {v: n for n in self.nodes for v in n.outputs}

    @cached_property
    def position(self) -> dict[int, int]:
        """Node id -> its position in the program."""
        return {n.id: i for i, n in enumerate(self.nodes)}

    @cached_property
    def consumers(self) -> dict[int, tuple[Node, ...]]:
        found: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.reads):
                found.setdefault(value, []).append(node)
        return {v: tuple(ns) for v, ns in found.items()}

    @property
    def output_values(self) -> tuple[int, ...]:
        """Distinct values among the outputs, in order, and the tokens."""
        return tuple(dict.fromkeys((*(o for o in self.outputs if not isinstance(o, Literal)), *self.tokens)))

    @cached_property
    def is_wide(self) -> bool:
        """Whether any value has 64 bits, which JAX handles only if its 64-bit setting is on."""
        specs = self.values.values()
        return any(_jax.is_wide(s.dtype) for s in specs) or any(_jax.computes_wide(n.equation) for n in self.nodes)

    def parents(self, node: Node) -> Iterator[Node]:
        """The nodes that make what `node` reads, each once."""
        seen: set[int] = set()
        for value in node.reads:
            parent = self.producer.get(value)
            if parent is not None and parent.id not in seen:
                seen.add(parent.id)
                yield parent
