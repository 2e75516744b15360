"""stores: which parameters are kept together, what replicas send for them, and the task that applies it.

A store holds the parameters of one layer under one policy, together with whatever the optimizer couples to
them. Its contribution comes in parts, one for each stage and kind of payload. The store's home runs a
single XLA task: combine the contributions by their coefficients, then apply the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from flowml.errors import PolicyError
from flowml.factors import OuterProduct, find_outer_product, product_function, send_factors
from flowml.graph import Graph
from flowml.label import layer_of, parameter_path
from flowml.lower import ExecutableTable
from flowml.optimizer import OptimizerSlices
from flowml.plan import ArraySpec, Part, StoreSpec
from flowml.policy import Factors, Policy, check_composition
from flowml.program import PartBinding


@dataclass(frozen=True)
class Contributions:
    """For each parameter leaf the values sent for it, and the product to form from them at the home, if any."""

    values: Mapping[int, tuple[int, ...]]
    products: Mapping[int, OuterProduct]


@dataclass(frozen=True)
class PartDraft:
    """A part before lowering: the stage that makes it, its leaves (positions in the store), its values."""

    stage: int
    leaves: tuple[int, ...]
    values: tuple[int, ...]
    factors: bool


@dataclass(frozen=True)
class StoreDraft:
    """A store before lowering. `leaves` are positions in the flattened parameters."""

    name: str
    leaves: tuple[int, ...]
    policy: Policy
    parts: tuple[PartDraft, ...]
    readers: tuple[int, ...]


@dataclass
class StorePlanner:
    """Plans and lowers the stores of one model. `policies` maps parameter paths to policies."""

    paths: tuple[str, ...]
    slices: OptimizerSlices
    policies: Mapping[str, Policy]
    replicas: int
    microbatches: int
    notes: list[str] = field(default_factory=list[str])
    products: Mapping[int, OuterProduct] = field(default_factory=dict[int, OuterProduct])
    product_graph: Graph | None = None

    def __post_init__(self) -> None:
        self.notes.extend(check_composition({parameter_path(p): q for p, q in self.policies.items()}, self.replicas))
        for group in self.slices.groups:
            self._check_coupled(group)

    def _groups(self, alone: bool) -> list[tuple[int, ...]]:
        """Leaves kept together: by layer and policy, then whatever the optimizer couples.

        One replica on one device is `alone`: nothing leaves early, so one store a policy serves, applied as one
        update.
        """
        parent = {i: i for i in range(len(self.paths))}

        def find(i: int) -> int:
            while parent[i] != i:
                i = parent[i]
            return i

        first: dict[tuple[str, Policy], int] = {}
        for i, path in enumerate(self.paths):
            layer = "" if alone else layer_of(path)
            parent[find(i)] = find(first.setdefault((layer, self.policies[path]), i))
        for group in self.slices.groups:
            for leaf in group:
                parent[find(leaf)] = find(group[0])
        found: dict[int, list[int]] = {}
        for i in range(len(self.paths)):
            found.setdefault(find(i), []).append(i)
        return [tuple(g) for g in found.values()]

    def _check_coupled(self, group: Sequence[int]) -> None:
        policies = {self.policies[self.paths[i]] for i in group}
        if len(policies) > 1:
            a = self.paths[group[0]]
            b = next(self.paths[i] for i in group if self.policies[self.paths[i]] != self.policies[a])
            raise PolicyError(
                f"the optimizer couples {a!r} and {b!r} (as clipping by the global norm does), so they need one "
                "policy; give both the same, or use an optimizer that updates each parameter on its own"
            )

    def contributions(self, graph: Graph, gradients: Sequence[int]) -> tuple[Graph, Contributions]:
        """Decide what is sent for each gradient: itself, or the factors of its outer product."""
        products: dict[int, OuterProduct] = {}
        for leaf, value in enumerate(gradients):
            if isinstance(self.policies[self.paths[leaf]].payload, Factors):
                product = self._product(graph, leaf, value)
                if product is not None:
                    products[leaf] = product
        self.product_graph = graph
        self.products = products
        graph, sent = send_factors(graph, tuple(products.values())) if products else (graph, {})
        values = {leaf: sent[v] if leaf in products else (v,) for leaf, v in enumerate(gradients)}
        return graph, Contributions(values, products)

    def _product(self, graph: Graph, leaf: int, gradient: int) -> OuterProduct | None:
        path = parameter_path(self.paths[leaf])
        product = find_outer_product(graph, gradient)
        plain = graph.values[gradient].nbytes
        if product is None:
            if len(graph.values[gradient].shape) > 1:
                self.notes.append(f"{path}: its gradient is no single outer product, so the plain gradient is pushed.")
            return None
        factors = product.nbytes(graph) * self.microbatches
        if factors >= plain:
            self.notes.append(
                f"{path}: factors would take {factors:,} bytes and the gradient takes {plain:,}, so it is pushed plain."
            )
            return None
        self.notes.append(f"{path}: pushed as factors, {factors:,} bytes a step instead of {plain:,}.")
        return product

    def stores(self, graph: Graph, contributions: Contributions, stages: Sequence[str]) -> tuple[StoreDraft, ...]:
        """Group leaves into stores and their contributions into parts by stage, on a placed graph."""
        stage_of = {name: i for i, name in enumerate(stages)}
        groups = self._groups(alone=self.replicas == 1 and len(stages) == 1)
        names = self._names(groups)
        return tuple(
            self._draft(graph, name, group, contributions, stage_of) for name, group in zip(names, groups, strict=True)
        )

    def _names(self, groups: Sequence[Sequence[int]]) -> list[str]:
        """The layers in each store; its parameters where policies part a layer among several stores."""
        by_layer = [_joined([layer_of(self.paths[leaf]) for leaf in group]) for group in groups]
        by_path = [_joined([parameter_path(self.paths[leaf]) for leaf in group]) for group in groups]
        return [layer if by_layer.count(layer) == 1 else path for layer, path in zip(by_layer, by_path, strict=True)]

    def _draft(
        self,
        graph: Graph,
        name: str,
        group: tuple[int, ...],
        contributions: Contributions,
        stage_of: Mapping[str, int],
    ) -> StoreDraft:
        plain: dict[int, list[int]] = {}
        parts: list[PartDraft] = []
        for position, leaf in enumerate(group):
            values = contributions.values[leaf]
            stage = stage_of[graph.producer[values[0]].device]
            if leaf in contributions.products:
                parts.append(PartDraft(stage, (position,), values, factors=True))
            else:
                plain.setdefault(stage, []).append(position)
        for stage, positions in plain.items():
            values = tuple(contributions.values[group[p]][0] for p in positions)
            parts.append(PartDraft(stage, tuple(positions), values, factors=False))
        users = {stage_of[n.device] for leaf in group for n in graph.consumers.get(graph.inputs[leaf], ())}
        policy = self.policies[self.paths[group[0]]]
        return StoreDraft(name, group, policy, tuple(parts), tuple(sorted(users or {p.stage for p in parts})))

    def lower_parts(self, graph: Graph, stores: Sequence[StoreDraft], table: ExecutableTable) -> list[PartBinding]:
        """A task that adds two payloads, for every part that is ever added to."""
        bindings: list[PartBinding] = []
        for s, store in enumerate(stores):
            for p, part in enumerate(store.parts):
                adds = not part.factors and (self.microbatches > 1 or store.policy.every.push > 1)
                number = self._accumulate(graph, store.name, part, table) if adds else None
                bindings.append(PartBinding(s, p, part.values, number))
        return bindings

    def _accumulate(self, graph: Graph, name: str, part: PartDraft, table: ExecutableTable) -> int:
        specs = tuple(_strong(graph.values[v]) for v in part.values)
        count = len(specs)

        def add(*arrays: Any) -> tuple[Any, ...]:
            return tuple(arrays[i] + arrays[count + i] for i in range(count))

        return table.add_function(f"accumulate:{name}", add, specs * 2, specs)

    def lower_stores(
        self,
        graph: Graph,
        stores: Sequence[StoreDraft],
        bindings: Sequence[PartBinding],
        table: ExecutableTable,
        replicas: Sequence[Sequence[str]],
    ) -> tuple[StoreSpec, ...]:
        """Choose each store's home and export its apply task."""
        loads: dict[str, int] = {device: 0 for replica in replicas for device in replica}
        return tuple(
            self._lower_store(graph, s, store, [b for b in bindings if b.store == s], table, replicas, loads)
            for s, store in enumerate(stores)
        )

    def _lower_store(
        self,
        graph: Graph,
        number: int,
        store: StoreDraft,
        bindings: Sequence[PartBinding],
        table: ExecutableTable,
        replicas: Sequence[Sequence[str]],
        loads: dict[str, int],
    ) -> StoreSpec:
        specs = tuple(_strong(graph.values[graph.inputs[leaf]]) for leaf in store.leaves)
        state = self.slices.state_of(store.leaves)
        state_specs = tuple(self.slices.state_specs[i] for i in state)
        parts = tuple(
            Part(d.stage, d.leaves, self._payload(graph, d), d.factors, b.accumulate)
            for d, b in zip(store.parts, bindings, strict=True)
        )
        arity = self.replicas if store.policy.clocked else 1
        home = min((r[parts[0].stage] for r in replicas), key=lambda d: loads[d])
        loads[home] += sum(s.nbytes for s in (*specs, *state_specs)) + 1
        every = store.policy.every.push
        exact = arity == 1 and self.microbatches == 1 and every == 1
        apply = self._apply(store, state, parts, arity, exact)
        coefficients = ArraySpec((arity,), "float32")
        payloads = tuple(s for p in parts for s in p.payload) * arity
        arguments = (*specs, *state_specs, coefficients, *payloads)
        task = table.add_function(f"apply:{store.name}", apply, arguments, (*specs, *state_specs))
        return StoreSpec(
            name=store.name,
            paths=tuple(parameter_path(self.paths[leaf]) for leaf in store.leaves),
            leaves=store.leaves,
            state=state,
            specs=specs,
            state_specs=state_specs,
            home=home,
            readers=tuple(replica[stage] for replica in replicas for stage in store.readers),
            parts=parts,
            policy=store.policy.describe(),
            staleness=float(store.policy.staleness),
            every=every,
            clocked=store.policy.clocked,
            need=store.policy.quorum.need(self.replicas),
            apply_mode=store.policy.apply,
            apply=task,
            arity=arity,
        )

    def _payload(self, graph: Graph, part: PartDraft) -> tuple[ArraySpec, ...]:
        specs = tuple(_strong(graph.values[v]) for v in part.values)
        return specs * self.microbatches if part.factors else specs

    def _apply(
        self, store: StoreDraft, state: Sequence[int], parts: Sequence[Part], arity: int, exact: bool
    ) -> Callable[..., tuple[Any, ...]]:
        """(parameters, state, coefficients, contributions) -> (parameters, state), all flat.

        `exact` contributions come alone and with weight one: multiplying by 1.0 would change nothing but
        give the compiler another expression to contract, and with it another last bit.
        """
        update = self.slices.update(store.leaves, state)
        count, size = len(store.leaves), sum(len(p.payload) for p in parts)
        gradient = self._gradient_function(store, parts)

        def apply(*arrays: Any) -> tuple[Any, ...]:
            params, states = arrays[:count], arrays[count : count + len(state)]
            coefficients = arrays[count + len(state)]
            payloads = arrays[count + len(state) + 1 :]
            total: list[Any] = []
            for c in range(arity):
                leaves = gradient(payloads[c * size : (c + 1) * size])
                if not exact:
                    leaves = [g * coefficients[c].astype(g.dtype) for g in map(_wide, leaves)]
                total = [a + b for a, b in zip(total, leaves, strict=True)] if total else leaves
            total = [g.astype(p.dtype) for g, p in zip(total, params, strict=True)]
            return update(*total, *params, *states)

        return apply

    def _gradient_function(self, store: StoreDraft, parts: Sequence[Part]) -> Callable[[Sequence[Any]], list[Any]]:
        """One contribution's payloads -> the gradient of every leaf of the store."""
        graph = self.product_graph
        products = {
            part.leaves[0]: product_function(graph, self.products[store.leaves[part.leaves[0]]])
            for part in parts
            if part.factors and graph is not None
        }

        def gradient(payloads: Sequence[Any]) -> list[Any]:
            leaves: dict[int, Any] = {}
            start = 0
            for part in parts:
                arrays = payloads[start : start + len(part.payload)]
                start += len(part.payload)
                if part.factors:
                    form = products[part.leaves[0]]
                    pairs = [form(arrays[i], arrays[i + 1]) for i in range(0, len(arrays), 2)]
                    leaves[part.leaves[0]] = sum(pairs[1:], pairs[0])
                else:
                    leaves.update(zip(part.leaves, arrays, strict=True))
            return [jnp.asarray(leaves[i]) for i in range(len(leaves))]

        return gradient


def _joined(names: Sequence[str]) -> str:
    found = tuple(dict.fromkeys(names))
    return "+".join(found) if len(found) <= 3 else f"{found[0]}+{len(found) - 1} more"


def _wide(gradient: Any) -> Any:
    """Contributions are combined in float32 at least: a mean of many in bfloat16 would lose what they agree on."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))


def _strong(spec: ArraySpec) -> ArraySpec:
    return ArraySpec(spec.shape, spec.dtype)
