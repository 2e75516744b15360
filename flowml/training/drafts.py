"""Defines the values with which stores are planned, before anything is lowered: what is sent for each parameter, the
parts of a contribution, and the stores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flowml.ir.graph import Graph, Operand
from flowml.plan import ArraySpec
from flowml.policy import Policy
from flowml.training.factors import OuterProduct
from flowml.training.step import Treatment


@dataclass(frozen=True)
class Contributions:
    """For each parameter leaf, the values sent for it, and the product that the home forms from them, if any.

    `weights` maps each device to the weight of the microbatch, a value that it sends with weighted gradients.
    """

    values: Mapping[int, tuple[int, ...]]
    products: Mapping[int, OuterProduct]
    weights: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class PartDraft:
    """A part before lowering: the stage that makes it, its leaves (positions in the store), values and weight."""

    stage: int
    leaves: tuple[int, ...]
    values: tuple[int, ...]
    factors: bool
    packed: bool = False
    weight: int | None = None

    @property
    def sent(self) -> tuple[int, ...]:
        return self.values if self.weight is None else (*self.values, self.weight)

    def payload(self, graph: Graph) -> tuple[ArraySpec, ...]:
        """The arrays that are sent: the gradients and their weight, separate or packed into one."""
        specs = tuple(strong(graph.values[v]) for v in self.sent)
        return (ArraySpec((sum(math.prod(s.shape) for s in specs),), specs[0].dtype),) if self.packed else specs


@dataclass(frozen=True)
class StoreDraft:
    """A store before lowering. `leaves` are positions in the flattened parameters."""

    name: str
    leaves: tuple[int, ...]
    policy: Policy
    parts: tuple[PartDraft, ...]
    readers: tuple[int, ...]


def value_of(output: Operand) -> int:
    """An output of the step function as a value; outputs are copies, so none is a literal."""
    assert isinstance(output, int)
    return output


def coefficient_dtype(dtypes: Iterable[Any]) -> str:
    """The dtype of coefficients: float64 if parameters have 64 bits, so that 1/3 has their precision."""
    return "float64" if any(str(d) in ("float64", "complex128") for d in dtypes) else "float32"


def strong(spec: ArraySpec) -> ArraySpec:
    """The same array without a weak type."""
    return ArraySpec(spec.shape, spec.dtype)


def share_weight(
    graph: Graph, contributions: Contributions, weight: int, treatments: Sequence[Treatment]
) -> tuple[Graph, Contributions]:
    """Copy the weight of a microbatch to each device that sends weighted gradients."""
    weighted = [leaf for leaf, t in enumerate(treatments) if t.weighted]
    devices = dict.fromkeys(graph.producer[v].device for leaf in weighted for v in contributions.values[leaf])
    made = graph.producer[weight]
    weights = {device: weight for device in devices if device == made.device}
    nodes, values, avals = list(graph.nodes), dict(graph.values), dict(graph.avals)
    for device in devices:
        if device not in weights:
            weights[device] = copy = max(values) + 1
            values[copy], avals[copy] = values[weight], avals[weight]
            number = max(n.id for n in nodes) + 1
            nodes.append(replace(made, id=number, inputs=(weight,), outputs=(copy,), device=device))
    outputs = (*graph.outputs, *weights.values())
    graph = replace(graph, nodes=tuple(nodes), values=values, avals=avals, outputs=outputs)
    return graph, replace(contributions, weights=weights)
