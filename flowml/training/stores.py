"""stores: which parameters are kept together, what replicas send for them, and the task that applies it.

A store holds the parameters of one layer under one policy, together with whatever the optimizer couples to
them. Its contribution comes in parts, one for each stage and kind of payload. The store's home runs a
single XLA task: combine the contributions by their coefficients, then apply the optimizer.

Where replicas add up their gradients among themselves a store is a bucket, of several layers if they are small. Each
replica is home to a copy, and gets one contribution that stands for all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import jax.numpy as jnp

from flowml.errors import FlowmlWarning, PolicyError
from flowml.ir.graph import Graph
from flowml.ir.label import layer_of, parameter_path
from flowml.lowering.lower import ExecutableTable
from flowml.lowering.program import PartBinding
from flowml.lowering.schedule import positions
from flowml.placement.links import Links, machines
from flowml.plan import ArraySpec, Part, Reduction, StoreSpec
from flowml.policy import Factors, Policy, Tree, check_composition, overruled
from flowml.policy.topology import schedule_name
from flowml.training.buckets import Bundle, pack
from flowml.training.factors import OuterProduct, find_outer_product, product_function, send_factors
from flowml.training.optimizer import OptimizerSlices


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
    packed: bool = False


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
    links: Links = field(default_factory=Links)
    notes: list[str] = field(default_factory=list[str])
    products: Mapping[int, OuterProduct] = field(default_factory=dict[int, OuterProduct])
    product_graph: Graph | None = None

    def __post_init__(self) -> None:
        policies = {parameter_path(p): q for p, q in self.policies.items()}
        self.notes.extend(check_composition(policies, self.replicas))
        warning = overruled(policies, self.replicas)
        if warning:
            self.notes.append(warning)
            warnings.warn(warning, FlowmlWarning, stacklevel=2)
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
        made = positions(graph)
        groups = pack(self._bundle(graph, group, contributions, made) for group in groups)
        names = self._names(groups)
        return tuple(
            self._draft(graph, name, group, contributions, stage_of) for name, group in zip(names, groups, strict=True)
        )

    def _collective(self, policy: Policy) -> bool:
        """Whether there is something to add up among replicas."""
        return policy.collective and self.replicas > 1

    def _bundle(
        self, graph: Graph, group: tuple[int, ...], contributions: Contributions, made: Mapping[int, int]
    ) -> Bundle:
        """What may share a bucket with it: leaves of one policy, made on one stage, of one dtype."""
        policy = self.policies[self.paths[group[0]]]
        values = [v for leaf in group for v in contributions.values[leaf]]
        nodes = [graph.producer[v] for v in values]
        kinds = {(n.device, graph.values[v].dtype) for n, v in zip(nodes, values, strict=True)}
        return Bundle(
            group,
            nbytes=sum(graph.values[v].nbytes for v in values),
            ready=max(made[n.id] for n in nodes),
            kind=(policy, *kinds) if self._collective(policy) and len(kinds) == 1 else None,
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
        policy = self.policies[self.paths[group[0]]]
        collective = self._collective(policy)
        plain: dict[tuple[int, str], list[int]] = {}
        parts: list[PartDraft] = []
        for position, leaf in enumerate(group):
            values = contributions.values[leaf]
            stage = stage_of[graph.producer[values[0]].device]
            if leaf in contributions.products:
                parts.append(PartDraft(stage, (position,), values, factors=True))
            else:
                dtype = graph.values[values[0]].dtype if collective else ""
                plain.setdefault((stage, dtype), []).append(position)
        for (stage, _), found in plain.items():
            values = tuple(contributions.values[group[p]][0] for p in found)
            parts.append(PartDraft(stage, tuple(found), values, factors=False, packed=collective and len(found) > 1))
        users = {stage_of[n.device] for leaf in group for n in graph.consumers.get(graph.inputs[leaf], ())}
        readers = users | {p.stage for p in parts}  # a stage pushes only what it may read: see `program.emit`
        return StoreDraft(name, group, policy, tuple(parts), tuple(sorted(readers)))

    def lower_parts(self, graph: Graph, stores: Sequence[StoreDraft], table: ExecutableTable) -> list[PartBinding]:
        """For each part the tasks that add two payloads and that pack one, where that is ever done."""
        bindings: list[PartBinding] = []
        for s, store in enumerate(stores):
            for p, part in enumerate(store.parts):
                adds = not part.factors and (self.microbatches > 1 or store.policy.every.push > 1)
                number = self._accumulate(graph, store.name, part, table) if adds else None
                packing = self._pack(graph, store.name, part, table) if part.packed else None
                bindings.append(PartBinding(s, p, part.values, number, packing))
        return bindings

    def _pack(self, graph: Graph, name: str, part: PartDraft, table: ExecutableTable) -> int:
        def together(*arrays: Any) -> tuple[Any, ...]:
            return (jnp.concatenate([a.reshape(-1) for a in arrays]),)

        specs = tuple(_strong(graph.values[v]) for v in part.values)
        return table.add_function(f"pack:{name}", together, specs, _sent(graph, part))

    def _accumulate(self, graph: Graph, name: str, part: PartDraft, table: ExecutableTable) -> int:
        specs = _sent(graph, part)
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
            self._part(graph, d, b, store.policy, replicas) for d, b in zip(store.parts, bindings, strict=True)
        )
        collective = self._collective(store.policy)
        arity = self.replicas if store.policy.clocked and not collective else 1
        candidates = [r[parts[0].stage] for r in replicas]
        homes = _one_a_worker(candidates) if collective else (min(candidates, key=lambda d: loads[d]),)
        for home in dict.fromkeys(homes):
            loads[home] += sum(s.nbytes for s in (*specs, *state_specs)) + 1
        every = store.policy.every.push
        exact = arity == 1 and self.microbatches == 1 and every == 1 and not collective
        apply = self._apply(store, state, parts, arity, exact, [s.shape for s in specs])
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
            home=homes[0],
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
            homes=homes if collective else (),
        )

    def _part(
        self, graph: Graph, draft: PartDraft, binding: PartBinding, policy: Policy, replicas: Sequence[Sequence[str]]
    ) -> Part:
        specs = _sent(graph, draft)
        payload = specs * self.microbatches if draft.factors else specs
        reduction = None
        if self._collective(policy):
            nbytes = sum(s.nbytes for s in payload)
            reduction = self._reduction(policy, nbytes, [replica[draft.stage] for replica in replicas])
        return Part(draft.stage, draft.leaves, payload, draft.factors, binding.accumulate, reduction, binding.pack)

    def _reduction(self, policy: Policy, nbytes: int, devices: Sequence[str]) -> Reduction:
        workers = tuple(dict.fromkeys(d.partition("/")[0] for d in devices))
        hosts = machines(self.links, workers)
        fanout = policy.topology.fanout if isinstance(policy.topology, Tree) else 0
        return Reduction(schedule_name(policy.topology, nbytes, hosts), workers, hosts, fanout)

    def _apply(
        self,
        store: StoreDraft,
        state: Sequence[int],
        parts: Sequence[Part],
        arity: int,
        exact: bool,
        shapes: Sequence[tuple[int, ...]],
    ) -> Callable[..., tuple[Any, ...]]:
        """(parameters, state, coefficients, contributions) -> (parameters, state), all flat.

        `exact` contributions come alone and with weight one: multiplying by 1.0 would change nothing but
        give the compiler another expression to contract, and with it another last bit.
        """
        update = self.slices.update(store.leaves, state)
        count, size = len(store.leaves), sum(len(p.payload) for p in parts)
        gradient = self._gradient_function(store, parts, shapes)

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

    def _gradient_function(
        self, store: StoreDraft, parts: Sequence[Part], store_shapes: Sequence[tuple[int, ...]]
    ) -> Callable[[Sequence[Any]], list[Any]]:
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
                if part.pack is not None:
                    (row,) = arrays
                    shapes = [store_shapes[i] for i in part.leaves]
                    leaves.update(zip(part.leaves, _split(row, shapes), strict=True))
                elif part.factors:
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


def _sent(graph: Graph, part: PartDraft) -> tuple[ArraySpec, ...]:
    """The arrays in which a part's gradients leave: as they are, or packed into one."""
    specs = tuple(_strong(graph.values[v]) for v in part.values)
    return (ArraySpec((sum(math.prod(s.shape) for s in specs),), specs[0].dtype),) if part.packed else specs


def _split(row: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """The arrays of these shapes that were packed into a row."""
    ends = list(accumulate(map(math.prod, shapes)))
    return [row[e - math.prod(s) : e].reshape(s) for e, s in zip(ends, shapes, strict=True)]


def _one_a_worker(devices: Sequence[str]) -> tuple[str, ...]:
    """The devices, those of one worker replaced by its first: its replicas read one copy."""
    first: dict[str, str] = {}
    return tuple(first.setdefault(d.partition("/")[0], d) for d in devices)


def _wide(gradient: Any) -> Any:
    """Contributions are combined in float32 at least: a mean of many in bfloat16 would lose what they agree on."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))


def _strong(spec: ArraySpec) -> ArraySpec:
    return ArraySpec(spec.shape, spec.dtype)
