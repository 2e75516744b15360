"""Plans stores: which parameters are kept together, what replicas send for them, and the task that applies it.

A store holds the parameters of one layer under one policy, and the parameters that the optimizer couples to them.
Its contribution has one part for each stage and kind of payload. The store's home runs one XLA task, which combines
the contributions by their coefficients and applies the optimizer.

If replicas add up their gradients among themselves, a store is a bucket and may hold several small layers. Each
replica is then the home of a copy and gets one contribution, which is the sum of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax.numpy as jnp

from flowml.callers import warn
from flowml.devices import Device
from flowml.disjoint import DisjointSets
from flowml.errors import PolicyError, named
from flowml.home import Applies, Buffer, Coupled, Coupling, Local
from flowml.ir.graph import Graph
from flowml.ir.label import layer_of, parameter_path
from flowml.lowering.lower import ExecutableTable
from flowml.lowering.program import PartBinding
from flowml.lowering.schedule import positions
from flowml.placement.homes import idle, lives_at_home
from flowml.placement.links import Links
from flowml.plan import ArraySpec, Part, StoreSpec
from flowml.policy import Distill, Factors, Policy, check_composition
from flowml.policy.apply import Vote, base_of, most_at_once, scales
from flowml.policy.compose import lonely, unweighed
from flowml.policy.filtering import check_ranks
from flowml.policy.filters import Form, check_array, is_exchanged, sum_sizes
from flowml.policy.replicas import weighs
from flowml.training.apply import FOLD_WIDTH, HomeTasks, Payload, normalised
from flowml.training.buckets import Bundle, joined, pack
from flowml.training.couplings import Exchange, across_clocks, exchanges, lower, lower_member, on_several_devices
from flowml.training.distil import apart
from flowml.training.drafts import Contributions, PartDraft, StoreDraft, coefficient_dtype, strong, value_of
from flowml.training.factors import OuterProduct, find_outer_product, product_function, send_factors
from flowml.training.groups import alone, one_a_worker, reduction_of, sites_of, split
from flowml.training.local import HomeUpdate, Optimizers, local_tasks
from flowml.training.shared import check_shared
from flowml.training.step import Treatment
from flowml.training.updates import changed, check_prox, check_vote


@dataclass
class StorePlanner:
    """Plans and lowers the stores of one model.

    `policies` maps parameter paths to policies. `treatments` has an entry for the gradient of each leaf. Batches are
    `weighed` by what the user says.
    """

    paths: tuple[str, ...]
    optimizers: Optimizers
    policies: Mapping[str, Policy]
    treatments: Sequence[Treatment]
    replicas: int
    microbatches: int
    links: Links = field(default_factory=Links)
    weighed: bool = False
    homes: Sequence[Device] = ()
    """The devices of workers that only hold parameters."""
    notes: list[str] = field(default_factory=list[str])
    products: Mapping[int, OuterProduct] = field(default_factory=dict[int, OuterProduct])
    product_graph: Graph | None = None
    couplings: tuple[Coupling, ...] = ()
    """The stores whose homes exchange values, once they are lowered."""
    _exchange_of: dict[int, tuple[int, Exchange]] = field(default_factory=dict[int, tuple[int, Exchange]])

    def __post_init__(self) -> None:
        policies = {parameter_path(p): q for p, q in self.policies.items()}
        self.notes.extend(check_composition(policies, self.replicas))
        self._warn((*lonely(policies, self.replicas), *(unweighed(policies, self.replicas) if self.weighed else ())))
        for group, why in self._coupled:
            self._check_coupled(group, why)
        self._warn(self._scaled_but_remembered(policies))
        self._warn(self._coupling_notes(), "; give these layers the same quorum, topology and every")

    def _warn(self, found: Sequence[str], fix: str = "") -> None:
        """Say what is sound but may not be what was meant, in the plan and as warnings."""
        for text in found:
            self.notes.append(f"{text}.")
            warn(f"{text}{fix}")

    def _scaled_but_remembered(self, policies: Mapping[str, Policy]) -> list[str]:
        """Layers whose stale gradients are scaled, but which an optimizer remembers."""
        remembers = self.optimizers.own.remembers_gradients
        if not (found := [n for i, (n, p) in enumerate(policies.items()) if scales(p.apply) and remembers([i])]):
            return []
        return [
            f"{named(found)}: stale gradients are scaled, but the optimizer remembers gradients, so a stale one acts "
            "again (momentum) or its scaling is divided out (squares); use optax.sgd without momentum, or apply='mean'"
        ]

    def _coupling_notes(self) -> list[str]:
        """Layers that the optimizer couples across clocks."""
        layers = list(map(layer_of, self.paths))
        return across_clocks((use for use, _ in self.optimizers.uses(self._of_leaves)), layers)

    def _shared_homes(self) -> list[str]:
        """Say which layers share a home because of the optimizer."""
        layers = list(map(layer_of, self.paths))
        return [
            f"{named(names)} share a home: the optimizer couples them, and {why}."
            for group, why in self._coupled
            if len(names := tuple(dict.fromkeys(layers[leaf] for leaf in group))) > 1
        ]

    @cached_property
    def _of_leaves(self) -> list[Policy]:
        return [self.policies[path] for path in self.paths]

    @cached_property
    def _coupled(self) -> list[tuple[list[int], str]]:
        """The leaves that share a home because of the optimizer, and why."""
        return self.optimizers.coupled(self._of_leaves)

    def _groups(self, alone: bool) -> list[tuple[int, ...]]:
        """Groups of leaves that share a store: those of one layer and policy, and those that the optimizer couples.

        `alone` means one replica on one device. No gradient is sent early then, so one store for each policy is
        enough, and one update applies it.
        """
        found, first = DisjointSets(len(self.paths)), dict[tuple[str, Policy], int]()
        for i, path in enumerate(self.paths):
            layer = "" if alone else layer_of(path)
            found.join((i, first.setdefault((layer, self.policies[path]), i)))
        for group, _ in self._coupled:
            found.join(group)
        return [tuple(group) for group in found.sets()]

    def _check_coupled(self, group: Sequence[int], why: str) -> None:
        a, *others = (self.paths[i] for i in group)
        b = next((path for path in others if self.policies[path] != self.policies[a]), None)
        if b is not None:
            raise PolicyError(
                f"the optimizer couples {a!r} and {b!r}, and {why}, so they need one policy; give both the same, or "
                "use an optimizer that updates each parameter on its own"
            )

    def contributions(self, graph: Graph, fetched: int) -> tuple[Graph, Contributions]:
        """Decide what is sent for each gradient: the treated gradient, or the factors of its outer product.

        After the `fetched` outputs, the graph outputs the treated gradients, if they differ, and the plain gradients.
        The new graph keeps only those that are sent.
        """
        metrics, gradients = graph.outputs[:fetched], tuple(map(value_of, graph.outputs[fetched:]))
        treated, raw = gradients[: len(self.paths)], gradients[-len(self.paths) :]
        products: dict[int, OuterProduct] = {}
        for leaf, value in enumerate(raw):
            if isinstance(self.policies[self.paths[leaf]].payload, Factors):
                product = self._product(graph, leaf, value, graph.values[treated[leaf]].nbytes)
                if product is not None:
                    products[leaf] = product
        self.product_graph = graph
        self.products = products
        graph, sent = send_factors(graph, tuple(products.values())) if products else (graph, {})
        values = {leaf: sent[raw[leaf]] if leaf in products else (v,) for leaf, v in enumerate(treated)}
        forms = {path: Form.of(graph.values[v]) for path, v in zip(self.paths, treated, strict=True)}
        for path, form in forms.items():
            check_prox(parameter_path(path), self.policies[path].apply, form.dtype)
            for chain in (self.policies[path].filters, self.policies[path].pull_filters):
                check_array(chain, form, parameter_path(path))
        check_ranks(self.policies, forms)
        outputs = (*metrics, *(v for found in values.values() for v in found))
        return replace(graph, outputs=outputs), Contributions(values, products)

    def _product(self, graph: Graph, leaf: int, gradient: int, plain: int) -> OuterProduct | None:
        """The outer product of a gradient, if it has one and the factors are smaller than `plain` bytes."""
        path = parameter_path(self.paths[leaf])
        product = find_outer_product(graph, gradient)
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
        alone = self.replicas == 1 and len(stages) == 1 and not self.homes  # all layers share a home then
        self.notes.extend([] if alone else self._shared_homes())
        groups = self._groups(alone)
        groups = [part for group in groups for part in self._by_stage(graph, group, contributions)]
        made = positions(graph)
        groups = pack(self._bundle(graph, group, contributions, made) for group in groups)
        names = self._names(groups)
        return tuple(
            self._draft(graph, name, group, contributions, stage_of) for name, group in zip(names, groups, strict=True)
        )

    def _by_stage(
        self, graph: Graph, group: tuple[int, ...], contributions: Contributions
    ) -> Sequence[tuple[int, ...]]:
        """The leaves of a group that one stage can update by itself, if replicas update parameters of their own. If
        replicas add these up, they have one dtype."""
        policy = self.policies[self.paths[group[0]]]
        if not (policy.local or policy.shared):
            return [group]
        if self._collective(policy):
            dtypes = {leaf: graph.values[graph.inputs[leaf]].dtype for leaf in group}
            if len(set(dtypes.values())) > 1 and self._are_coupled(group):
                raise PolicyError(
                    f"{parameter_path(self.paths[group[0]])!r} ({policy.describe()}): the optimizer couples "
                    f"parameters of the dtypes {named(sorted(set(dtypes.values())))}, and a sum over replicas has one; "
                    "give them one dtype, or topology=fm.ParameterServer()"
                )
            if len(set(dtypes.values())) > 1:
                alike = (tuple(leaf for leaf in group if dtypes[leaf] == d) for d in dict.fromkeys(dtypes.values()))
                return [part for found in alike for part in self._by_stage(graph, found, contributions)]
        users: dict[frozenset[str], list[int]] = {}
        for leaf in group:
            readers = {n.device for n in graph.consumers.get(graph.inputs[leaf], ())}
            made = {graph.producer[v].device for v in contributions.values[leaf]}
            users.setdefault(frozenset(readers | made), []).append(leaf)
        coupled = self._are_coupled(group) and len(users) > 1
        if coupled or any(len(devices) > 1 for devices in users):
            if isinstance(base_of(policy.apply), Distill):
                raise apart(policy, set().union(*users))
            paths = [parameter_path(self.paths[leaf]) for leaf in group]
            raise on_several_devices(paths, policy, coupled=coupled)
        return [tuple(found) for found in users.values()]

    def _are_coupled(self, group: Sequence[int]) -> bool:
        """Whether the optimizer couples some of these leaves."""
        return any(len(set(found) & set(group)) > 1 for found, _ in self._coupled)

    def _collective(self, policy: Policy) -> bool:
        """Whether replicas add up gradients among themselves."""
        return policy.collective and self.replicas > 1

    def _bundle(
        self, graph: Graph, group: tuple[int, ...], contributions: Contributions, made: Mapping[int, int]
    ) -> Bundle:
        """The bundle of a group. Groups of one policy, stage and dtype may share a bucket."""
        policy = self.policies[self.paths[group[0]]]
        values = [v for leaf in group for v in contributions.values[leaf]]
        nodes = [graph.producer[v] for v in values]
        added = [graph.inputs[leaf] for leaf in group] if policy.local else values  # changes are like parameters
        kinds = {(n.device, graph.values[v].dtype) for n, v in zip(nodes, added, strict=True)}
        return Bundle(
            group,
            nbytes=sum(graph.values[v].nbytes for v in values),
            ready=max(made[n.id] for n in nodes),
            kind=(policy, *kinds) if self._collective(policy) and len(kinds) == 1 else None,
        )

    def _names(self, groups: Sequence[Sequence[int]]) -> list[str]:
        """The name of each store: its layers, or its parameters if several stores share a layer."""
        by_layer = [joined([layer_of(self.paths[leaf]) for leaf in group]) for group in groups]
        by_path = [joined([parameter_path(self.paths[leaf]) for leaf in group]) for group in groups]
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
        collective = self._collective(policy) and not policy.local  # else what is added up is not what a step makes
        weighted = self.treatments[group[0]].weighted
        plain: dict[tuple[int, str], list[int]] = {}
        parts: list[PartDraft] = []
        for position, leaf in enumerate(group):
            values = contributions.values[leaf]
            device = graph.producer[values[0]].device
            stage, weight = stage_of[device], contributions.weights[device] if weighted else None
            if leaf in contributions.products:
                parts.append(PartDraft(stage, (position,), values, factors=True, weight=weight))
            else:
                dtype = graph.values[values[0]].dtype if collective else ""
                plain.setdefault((stage, dtype), []).append(position)
        for (stage, _), found in plain.items():
            values = tuple(contributions.values[group[p]][0] for p in found)
            weight = contributions.weights[graph.producer[values[0]].device] if weighted else None
            packed = collective and len(values) + weighted > 1 and not policy.filters  # they filter each array
            parts.append(PartDraft(stage, tuple(found), values, factors=False, packed=packed, weight=weight))
        users = {stage_of[n.device] for leaf in group for n in graph.consumers.get(graph.inputs[leaf], ())}
        readers = users | {p.stage for p in parts}  # a stage pushes only what it may read: see `program.emit`
        return StoreDraft(name, group, policy, tuple(parts), tuple(sorted(readers)))

    def lower_parts(self, graph: Graph, stores: Sequence[StoreDraft], table: ExecutableTable) -> list[PartBinding]:
        """For each part, the tasks that add two payloads, pack a payload and finish a payload, where needed."""
        bindings: list[PartBinding] = []
        for s, store in enumerate(stores):
            for p, part in enumerate(store.parts):
                gathers = store.policy.every.push > 1 and not store.policy.local
                adds = not part.factors and (self.microbatches > 1 or gathers)
                number = self._accumulate(graph, store.name, part, table) if adds else None
                packing = self._pack(graph, store.name, part, table) if part.packed else None
                steps = part.weight is not None and not part.factors and self._adds_steps(store)
                finish = self._finish(graph, store.name, part, table) if steps else None
                bindings.append(PartBinding(s, p, part.sent, number, packing, finish))
        return bindings

    def _adds_steps(self, store: StoreDraft) -> bool:
        """Whether the mean gradients of steps are added up, so that each is divided by its weight before it is sent."""
        return not store.policy.apply.averages and not store.policy.local

    def _pack(self, graph: Graph, name: str, part: PartDraft, table: ExecutableTable) -> int:
        def together(*arrays: Any) -> tuple[Any, ...]:
            return (jnp.concatenate([a.reshape(-1).astype(arrays[0].dtype) for a in arrays]),)

        specs = tuple(strong(graph.values[v]) for v in part.sent)
        return table.add_function(f"pack:{name}", together, specs, part.payload(graph))

    def _accumulate(self, graph: Graph, name: str, part: PartDraft, table: ExecutableTable) -> int:
        specs = part.payload(graph)
        count = len(specs)

        def add(*arrays: Any) -> tuple[Any, ...]:
            return tuple(arrays[i] + arrays[count + i] for i in range(count))

        return table.add_function(f"accumulate:{name}", add, specs * 2, specs)

    def _finish(self, graph: Graph, name: str, part: PartDraft, table: ExecutableTable) -> int:
        specs = part.payload(graph)
        return table.add_function(f"normalise:{name}", partial(normalised, packed=part.packed), specs, specs)

    def lower_stores(
        self,
        graph: Graph,
        stores: Sequence[StoreDraft],
        bindings: Sequence[PartBinding],
        table: ExecutableTable,
        replicas: Sequence[Sequence[str]],
    ) -> tuple[StoreSpec, ...]:
        """Choose each store's home and export its apply task."""
        loads = {device: 0 for replica in replicas for device in replica} | {home.name: 0 for home in self.homes}
        found = exchanges(self.optimizers.uses(self._of_leaves), [store.leaves for store in stores])
        self.couplings = tuple(lower(exchange, number, table) for number, exchange in enumerate(found))
        self._exchange_of = {store: (number, e) for number, e in enumerate(found) for store in e.stores}
        specs = tuple(
            self._lower_store(graph, s, store, [b for b in bindings if b.store == s], table, replicas, loads)
            for s, store in enumerate(stores)
        )
        self._warn(idle(self.homes, {home for spec in specs for home in spec.copies}))
        return specs

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
        specs = tuple(strong(graph.values[graph.inputs[leaf]]) for leaf in store.leaves)
        parts = tuple(
            self._part(graph, d, b, store.policy, replicas) for d, b in zip(store.parts, bindings, strict=True)
        )
        self._check_vote(store, [s.shape for s in specs])
        sites = sites_of(store.name, store.policy, parts, replicas, self.links)
        self._warn(alone(store.name, store.policy, sites, self.replicas))
        leaders = {r: site.replicas[0] for site in sites for r in site.replicas}
        given = self._payload_of(store, parts, [s.shape for s in specs])
        local: Local | None = None
        if store.policy.local:
            every = self.optimizers
            one = self.microbatches == 1 and not (store.policy.sited and self.replicas > 1)
            dtype = coefficient_dtype(s.dtype for s in specs)
            weighed = given.weighted and weighs(store.policy, self.replicas)
            local, given = local_tasks(
                store.name, store.policy, specs, store.leaves, every, given, table, dtype, exact=one, weighed=weighed
            )
            parts = tuple(given.parts)
        collective = self._collective(store.policy)
        update, exchange = self._update(number, store, len(sites) or self.replicas)
        candidates = [replicas[leaders.get(r, r)][parts[0].stage] for r in range(self.replicas)]
        check_shared(store.name, store.policy, candidates)
        if self.homes and lives_at_home(store.policy):
            candidates = [home.name for home in self.homes]
        homes = one_a_worker(candidates) if collective else (min(candidates, key=lambda d: loads[d]),)
        for home in dict.fromkeys(homes):
            loads[home] += sum(s.nbytes for s in (*specs, *update.state_specs)) + 1
        return StoreSpec(
            name=store.name,
            buffers=self._buffers(store, specs, update),
            home=homes[0],
            readers=tuple(replica[stage] for replica in replicas for stage in store.readers),
            parts=parts,
            policy=store.policy.travelling,
            applies=self._applies(store, given, specs, exchange or update, table, len(sites) or self.replicas),
            homes=homes if collective else (),
            local=local,
            sites=sites,
            coupled=None if exchange is None else self._couple(number, store, specs, update, table),
        )

    def _update(self, number: int, store: StoreDraft, senders: int) -> tuple[HomeUpdate, HomeUpdate | None]:
        """How the home of a store updates it, and how it makes gradients before, if it exchanges values with others."""
        leaves = len(store.leaves)
        if (found := self._exchange_of.get(number)) is None:
            return self.optimizers.at_home(store.policy, store.leaves, senders), None
        update = self.optimizers.exchanged(store.policy, found[1], number, leaves)
        gradients = changed(base_of(store.policy.apply), lambda *arrays: arrays[:leaves], leaves)
        return update, HomeUpdate(gradients, (), ())

    def _couple(
        self, number: int, store: StoreDraft, specs: Sequence[ArraySpec], update: HomeUpdate, table: ExecutableTable
    ) -> Coupled:
        (coupling, exchange), given = self._exchange_of[number], (*specs, *specs, *update.state_specs)
        return lower_member(exchange, coupling, number, update.update, given, store.name, table)

    def _check_vote(self, store: StoreDraft, shapes: Sequence[tuple[int, ...]]) -> None:
        kind = base_of(store.policy.apply)
        self._warn(check_vote(store.name, kind, shapes) if isinstance(kind, Vote) else ())

    def _buffers(self, store: StoreDraft, specs: Sequence[ArraySpec], update: HomeUpdate) -> tuple[Buffer, ...]:
        named_leaves = zip(store.leaves, specs, strict=True)
        parameters = (Buffer(parameter_path(self.paths[i]), s, "parameter", i) for i, s in named_leaves)
        return (*parameters, *self.optimizers.buffers(update))

    def _applies(
        self,
        store: StoreDraft,
        given: Payload,
        specs: Sequence[ArraySpec],
        update: HomeUpdate,
        table: ExecutableTable,
        senders: int,
    ) -> Applies:
        """Export the functions of the store's home, which is `given` these payloads by so many senders."""
        policy, kind = store.policy, base_of(store.policy.apply)
        most = most_at_once(policy, senders)
        whole = policy.local or self.microbatches == policy.every.push == 1
        home = HomeTasks(
            update.update,
            given,
            params=len(specs),
            states=len(update.state),
            exact=most == 1 and whole and not (policy.adds_up and self.replicas > 1) and not scales(policy.apply),
            voted=kind.rows if isinstance(kind, Vote) else 0,
            distils=self.optimizers.distilling if isinstance(kind, Distill) else None,
        )
        kept = (*specs, *update.state_specs)
        payload = tuple(s for p in given.parts for s in p.payload)
        width = int(min(most, policy.members(senders), FOLD_WIDTH))
        arguments = (ArraySpec((2, width), coefficient_dtype(s.dtype for s in specs)), *payload * width)
        apply = table.add_function(f"apply:{store.name}", home.apply, (*kept, *arguments), kept)
        weighted = home.payload.weighted
        if most <= width:
            return Applies(width, apply, weighted=weighted)
        total = tuple(map(strong, table.outputs(partial(home.folded, None), arguments)))
        donate = tuple(range(len(total)))
        fold = table.add_function(f"fold:{store.name}", home.fold, (*total, *arguments), total, donate)
        finish = table.add_function(f"finish:{store.name}", home.finish, (*kept, *total), kept)
        return Applies(width, apply, fold, finish, total, weighted)

    def _part(
        self, graph: Graph, draft: PartDraft, binding: PartBinding, policy: Policy, replicas: Sequence[Sequence[str]]
    ) -> Part:
        specs = draft.payload(graph)
        payload = specs * self.microbatches if draft.factors else specs
        reduction = None
        if self._collective(policy):
            filtered = range(len(payload) - (draft.weight is not None))
            slotted = is_exchanged(policy.summed_filters)
            sizes = (0,) if slotted else sum_sizes(policy.summed_filters, payload, filtered)
            devices = [replica[draft.stage] for replica in replicas]
            if policy.sited:
                devices = [devices[site[0]] for site in split(policy.topology, replicas, self.links)]
            reduction = reduction_of(policy.remote, max(sizes), devices, self.links, exchanges=slotted)
        tasks = binding.accumulate, reduction, binding.pack, binding.finish
        return Part(draft.stage, draft.leaves, payload, draft.factors, *tasks)

    def _payload_of(self, store: StoreDraft, parts: Sequence[Part], shapes: Sequence[tuple[int, ...]]) -> Payload:
        graph = self.product_graph
        products = {
            part.leaves[0]: product_function(graph, self.products[store.leaves[part.leaves[0]]])
            for part in parts
            if part.factors and graph is not None
        }
        weighted = self.treatments[store.leaves[0]].weighted
        return Payload(parts, shapes, products, weighted, weighted and self._adds_steps(store))
