"""Slice an optax optimizer by layer, so that each home updates its own parameters and nothing else.

The whole update (`optimizer.update`, then `apply_updates`) is traced once over the full tree. What each new
parameter depends on says which layers the optimizer couples: an elementwise rule couples none, clipping by
the global norm couples all. Coupled leaves must live in one store; state that depends on no gradient (a step
count) is kept by every store that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from flowml.ir import _jax
from flowml.ir.graph import Graph, Literal
from flowml.ir.simplify import drop_dead
from flowml.ir.trace import trace
from flowml.plan import ArraySpec


@dataclass(frozen=True)
class OptimizerSlices:
    """The traced update of a whole parameter tree, and how it comes apart.

    Inputs of `graph` are the gradients, the parameters and the state leaves, in that order; outputs the new
    parameters and the new state leaves.
    """

    graph: Graph
    count: int
    state_tree: Any
    state_specs: tuple[ArraySpec, ...]
    depends: tuple[frozenset[int], ...]

    @property
    def groups(self) -> list[list[int]]:
        """Leaves of the parameters that the optimizer couples, each group sorted."""
        parent = list(range(self.count))

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        for output in range(len(self.depends)):
            leaves = self.leaves_behind(output)
            if output < self.count:
                leaves = leaves | {output}
            for leaf in leaves:
                parent[find(leaf)] = find(min(leaves))
        found: dict[int, list[int]] = {}
        for leaf in range(self.count):
            found.setdefault(find(leaf), []).append(leaf)
        return list(found.values())

    def leaves_behind(self, output: int) -> set[int]:
        """Parameter leaves whose gradient, value or own state the output depends on."""
        leaves: set[int] = set()
        for i in self._closure(output):
            if i < 2 * self.count:
                leaves.add(i % self.count)
        return leaves

    def _closure(self, output: int) -> set[int]:
        """Inputs behind an output, through the state: a state leaf stands for what its update depends on."""
        seen: set[int] = set()
        todo = list(self.depends[output])
        while todo:
            i = todo.pop()
            if i not in seen:
                seen.add(i)
                if i >= 2 * self.count:
                    todo.extend(self.depends[i - self.count])
        return seen

    def state_of(self, leaves: Sequence[int]) -> tuple[int, ...]:
        """State leaves that a store of these parameters keeps: what it reads, and what only it can update."""
        wanted = set(leaves)
        kept = {i - 2 * self.count for leaf in leaves for i in self._closure(leaf) if i >= 2 * self.count}
        for s in range(len(self.state_specs)):
            behind = self.leaves_behind(self.count + s)
            if behind <= wanted and (behind or not self._anyone_reads(s)):
                kept.add(s)
        return tuple(sorted(kept))

    def _anyone_reads(self, state: int) -> bool:
        return any(2 * self.count + state in self._closure(leaf) for leaf in range(self.count))

    def update(self, leaves: Sequence[int], state: Sequence[int]) -> Callable[..., tuple[Any, ...]]:
        """A function of (gradients, parameters, state) of one store, flat, to its (parameters, state)."""
        outputs = tuple(self.graph.outputs[i] for i in (*leaves, *(self.count + s for s in state)))
        inputs = tuple(
            self.graph.inputs[i]
            for i in (*leaves, *(self.count + leaf for leaf in leaves), *(2 * self.count + s for s in state))
        )
        kept = drop_dead(replace(self.graph, outputs=outputs))
        equations = [
            (n.equation, [i.value if isinstance(i, Literal) else i for i in n.inputs], n.outputs) for n in kept.nodes
        ]
        constants = tuple(kept.constants)
        values = tuple(o for o in outputs if not isinstance(o, Literal))
        run = _jax.build_function(equations, self.graph.avals, (*inputs, *constants), values)

        def updated(*arrays: Any) -> tuple[Any, ...]:
            results = iter(run(*arrays, *(kept.constants[c] for c in constants)))
            return tuple(_jax.literal_value(o.value) if isinstance(o, Literal) else next(results) for o in outputs)

        return updated


def slice_optimizer(optimizer: Any, params: Any) -> OptimizerSlices:
    """Trace `optimizer` (an `optax.GradientTransformation`) over `params` (arrays or ShapeDtypeStructs)."""
    import optax

    params = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.eval_shape(optimizer.init, params)

    def update(gradients: Any, params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    graph = drop_dead(trace(update, (params, params, state), {}, name="the optimizer").graph)
    leaves, tree = jax.tree_util.tree_flatten(state)
    count = len(jax.tree_util.tree_leaves(params))
    return OptimizerSlices(graph, count, tree, tuple(_jax.spec_of(x) for x in leaves), _dependencies(graph))


def _dependencies(graph: Graph) -> tuple[frozenset[int], ...]:
    """For each output, the positions of the inputs that it depends on."""
    behind: dict[int, frozenset[int]] = {v: frozenset({i}) for i, v in enumerate(graph.inputs)}
    nothing: frozenset[int] = frozenset()
    for node in graph.nodes:
        union = nothing.union(*(behind.get(v, nothing) for v in node.reads))
        behind.update(dict.fromkeys(node.outputs, union))
    return tuple(nothing if isinstance(o, Literal) else behind.get(o, nothing) for o in graph.outputs)
