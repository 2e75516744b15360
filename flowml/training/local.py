"""Builds the tasks of replicas that update parameters of their own (`Delta`, `Weights`), and of the homes they send to.

A stage keeps three buffers for each of its local stores between steps: its parameters, its optimizer state, and the
parameters that it *started* from, which are the global ones that it took last. Their tasks are

    update   (parameters, state, coefficients, gradients) -> (parameters, state)    at the end of each step
    send     (started, parameters[, weight]) -> what is sent, where this is not the parameters themselves
    take     (global, parameters, started) -> (parameters, started), where a replica does not just take the global ones
    fold     (average, what a replica sends, weight) -> average, with a gossip topology
    mix      (average, parameters after the step, parameters before it) -> parameters, with a gossip topology; with an
             outer optimizer "before" is the beginning of the round, both parameters are sent, and it keeps a state
    mix      (average of public copies, parameters after the step, own public copy) -> parameters, with lossy filters
    mix      (sum of what others have sent, parameters after the step, before it, started, share of the step that is
             done) -> (parameters, started), with a gossip of deltas

With a consensus of ADMM a stage also keeps dual variables u and its last report, and "started" is z - u, which a
step is pulled to:

    update   (parameters, state, coefficients, gradients, started) -> (parameters, state)
    send     (started, parameters, last report) -> (what is sent, u, report)
    take     (global, u) -> started

The update is the optimizer of the Trainer, sliced as for a home. The home has an optimizer of its own or none.

If batches have weights, and the home takes a mean, what is sent is multiplied by the mean weight of a step in it, and
ends with that weight, as weighted gradients do. The home multiplies it by the number of steps, so each replica counts
by the sum of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import msgspec
import numpy as np

from flowml.arrays import dtype_of
from flowml.errors import PolicyError, named
from flowml.home import Buffer, Local
from flowml.ir.label import layer_of
from flowml.lowering.lower import ExecutableTable
from flowml.plan import ArraySpec, Part
from flowml.policy import Consensus, Delta, Gossip, Mix, Outer, Policy, Prox, Weights
from flowml.policy.apply import base_of
from flowml.training.apply import HomeTasks, Payload
from flowml.training.couplings import Exchange, Use, together, uses
from flowml.training.distil import Distilling, distilling
from flowml.training.optimizer import OptimizerSlices, slice_optimizer
from flowml.training.step import is_narrow, scaled, wide
from flowml.training.updates import changed, proximal


def fragmented(policies: Mapping[str, Policy]) -> dict[str, Policy]:
    """The policies of parameters, where each of a policy with fragments has the rhythm of its layer's fragment."""
    found = dict(policies)
    for policy in dict.fromkeys(p for p in policies.values() if p.every.fragments > 1):
        mine = [path for path, p in policies.items() if p == policy]
        layers = list(dict.fromkeys(layer_of(path) for path in mine))
        count = policy.every.fragments
        if len(layers) < count:
            raise PolicyError(
                f"{policy.describe()}: there are {len(layers)} layers ({named(layers)}) for {count} fragments, and "
                f"each needs one at least; give fragments={len(layers)} or less"
            )
        for path in mine:
            number = layers.index(layer_of(path)) * count // len(layers)
            found[path] = msgspec.structs.replace(policy, every=policy.every.fragment(number))
    return found


@dataclass(frozen=True)
class Restarting:
    """An optimizer whose state belongs to one fit: the next one begins with that of `init`."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def _consensus(replicas: int) -> Any:
    """Keeps the mean of the replicas' last reports, from the sum of their changes; the update leads to the mean."""
    import optax

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        after = jax.tree_util.tree_map(lambda m, d: (wide(m) - wide(d) / replicas).astype(m.dtype), state, updates)
        return jax.tree_util.tree_map(lambda m, p: m - p, after, params), after

    return optax.GradientTransformation(lambda params: jax.tree_util.tree_map(lambda p: p + 0, params), update)


def _optimizer(outer: Outer | Consensus, mine: Sequence[bool], params: Any, replicas: int) -> Any:
    """The optimizer of the leaves that are `mine`. It sees no others, which it could couple."""
    import optax

    if isinstance(outer, Consensus):
        kept = _consensus(replicas)
        found = kept if all(mine) else optax.masked(kept, jax.tree.unflatten(jax.tree.structure(params), mine))
        return Restarting(found.init, found.update)
    found = optax.sgd(0.7, momentum=0.9, nesterov=True) if outer.optimizer is None else outer.optimizer
    if all(mine):
        return found
    return optax.masked(found, jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(params), mine))


@dataclass(frozen=True)
class Optimizers:
    """The slices of the Trainer's optimizer, and those of the homes' own ones.

    The state of all optimizers is one flat list: that of the Trainer's, then that of each outer one. `first` says where
    an outer one's begins.
    """

    own: OptimizerSlices
    outer: Mapping[Outer | Consensus, OptimizerSlices]
    first: Mapping[Outer | Consensus, int]
    outer_optimizers: tuple[Any, ...]
    distilling: Distilling | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The name of each leaf of the state, unique unless two outer optimizers have leaves of one name."""
        outer = (f"outer/{path}" for slices in self.outer.values() for path in slices.state_paths)
        return (*(f"optimizer/{path}" for path in self.own.state_paths), *outer)

    def buffers(self, update: HomeUpdate) -> tuple[Buffer, ...]:
        """The state that a home keeps for an update."""
        kept = zip(update.state, update.state_specs, strict=True)
        return tuple(Buffer(self.paths[i], spec, "state", i) for i, spec in kept)

    @property
    def is_wide(self) -> bool:
        return any(slices.graph.is_wide for slices in (self.own, *self.outer.values()))

    @staticmethod
    def of(optimizer: Any, policies: Sequence[Policy], params: Any, replicas: int) -> Optimizers:
        own = slice_optimizer(optimizer, params)
        kinds = [base_of(p.apply) for p in policies]
        outers = [kind for kind in dict.fromkeys(kinds) if isinstance(kind, Outer | Consensus)]
        made = {o: _optimizer(o, [kind == o for kind in kinds], params, replicas) for o in outers}
        outer = {o: slice_optimizer(optimizer, params) for o, optimizer in made.items()}
        first, at = dict[Outer | Consensus, int](), len(own.state_specs)
        for o, slices in outer.items():
            first[o], at = at, at + len(slices.state_specs)
        return Optimizers(own, outer, first, tuple(made.values()), distilling(policies, params))

    def uses(self, policies: Sequence[Policy]) -> list[tuple[Use, int]]:
        """Where each optimizer updates which leaves, where `policies` are those of the leaves, and where its state
        begins."""
        if self.distilling is not None:
            return []
        first = {id(slices): self.first[outer] for outer, slices in self.outer.items()}
        return [(use, first.get(id(use.slices), 0)) for use in uses(self.own, self.outer, policies)]

    def coupled(self, policies: Sequence[Policy]) -> list[tuple[list[int], str]]:
        """The leaves that must share a home, and why."""
        if self.distilling is not None:
            return [(list(range(len(policies))), "they are distilled together")]
        return [found for use, _ in self.uses(policies) for found in together(use)]

    def at_home(self, policy: Policy, leaves: Sequence[int], replicas: int) -> HomeUpdate:
        """How the home of these leaves updates them."""
        kind = base_of(policy.apply)
        if isinstance(kind, Outer | Consensus) and not isinstance(policy.remote, Gossip):
            found = _sliced(self.outer[kind], leaves, self.first[kind])
        elif not policy.local:
            found = _sliced(self.own, leaves, 0)
        elif self.distilling is not None:
            found = HomeUpdate(self.distilling.update, (), ())
        else:
            found = HomeUpdate(_averaging(policy, len(leaves), replicas if policy.clocked else 1), (), ())
        found = replace(found, update=changed(kind, found.update, len(leaves)))
        return after_update(policy, found, len(leaves))

    def exchanged(self, policy: Policy, exchange: Exchange, store: int, leaves: int) -> HomeUpdate:
        """How the home of a store with so many leaves updates them, with what it exchanges with others."""
        member = exchange.division.members[exchange.stores.index(store)]
        specs = tuple(exchange.slices.state_specs[s] for s in member.state)
        state = tuple(exchange.first + s for s in member.state)
        return after_update(policy, HomeUpdate(member.update.run, state, specs), leaves)

    def at_replica(self, policy: Policy, leaves: Sequence[int]) -> HomeUpdate | None:
        """The outer optimizer that each replica has itself, because a gossip topology has no home in its rounds."""
        if not isinstance(policy.apply, Outer) or not isinstance(policy.remote, Gossip):
            return None
        return _sliced(self.outer[policy.apply], leaves, self.first[policy.apply])


@dataclass(frozen=True)
class HomeUpdate:
    """(mean contribution, parameters, state) -> (parameters, state), flat, and the state that the home keeps."""

    update: Callable[..., tuple[Any, ...]]
    state: tuple[int, ...]
    state_specs: tuple[ArraySpec, ...]


def after_update(policy: Policy, update: HomeUpdate, leaves: int) -> HomeUpdate:
    """The update, and what the policy does to its parameters."""
    if not isinstance(policy.apply, Prox):
        return update
    return replace(update, update=proximal(policy.apply, update.update, leaves))


def _sliced(slices: OptimizerSlices, leaves: Sequence[int], first: int) -> HomeUpdate:
    if slices.is_closed(leaves):
        state = slices.state_of(leaves)
        update = slices.update(leaves, state)
    else:
        (alone,) = slices.divide([leaves]).members
        state, update = alone.state, alone.update.run
    specs = tuple(slices.state_specs[i] for i in state)
    return HomeUpdate(update, tuple(first + i for i in state), specs)


def _averaging(policy: Policy, leaves: int, together: int) -> Callable[..., tuple[Any, ...]]:
    """The update of a home without an optimizer, from the mean (or sum) of what `together` replicas send at once."""

    def update(*arrays: Any) -> tuple[Any, ...]:
        pairs = zip(arrays[:leaves], arrays[leaves:], strict=True)
        kind = base_of(policy.apply)
        if isinstance(kind, Mix):
            return tuple(p + (wide(mean) - wide(p)).astype(p.dtype) * (kind.pull * together) for mean, p in pairs)
        if isinstance(policy.payload, Weights) or isinstance(policy.remote, Gossip):
            return tuple(arrays[:leaves])
        return tuple((wide(p) - wide(delta)).astype(p.dtype) for delta, p in pairs)

    return update


def local_tasks(
    name: str,
    policy: Policy,
    specs: tuple[ArraySpec, ...],
    leaves: Sequence[int],
    optimizers: Optimizers,
    gradients: Payload,
    table: ExecutableTable,
    dtype: str,
    *,
    exact: bool,
    weighed: bool = False,
) -> tuple[Local, Payload]:
    """Export the tasks of one store, which sends the payload. `gradients` is what a step of one replica computes for
    it, `dtype` that of its coefficient; `exact` is as in `HomeTasks`. What is sent is `weighed`, or each counts alike.
    """
    own, outer = _sliced(optimizers.own, leaves, 0), optimizers.at_replica(policy, leaves)
    home = HomeTasks(own.update, gradients, len(specs), len(own.state), exact)
    kind = base_of(policy.apply)
    update = partial(_pulled, home, kind.rho) if isinstance(kind, Consensus) else home.apply
    state_specs = own.state_specs
    payload = tuple(s for p in gradients.parts for s in p.payload)
    arguments = (*specs, *state_specs, ArraySpec((2, 1), dtype), *payload)
    first, sent = gradients.parts[0], _weighed(specs) if weighed else specs
    part = Part(first.stage, first.leaves, sent, reduction=first.reduction)
    given = Payload((part,), gradients.shapes, {}, weighed, steps=False, kept=isinstance(policy.payload, Weights))
    if isinstance(kind, Consensus):
        local = Local(
            update=table.add_function(f"update:{name}", update, (*arguments, *specs), (*specs, *state_specs)),
            send=table.add_function(f"send:{name}", report, specs * 3, specs * 3),
            take=table.add_function(f"take:{name}", anchor, specs * 2, specs),
            state=own.state,
            state_specs=state_specs,
            dual=True,
        )
        return local, given
    send, take = sending(policy, weighed=weighed), taking(policy)
    weight = (real(sent[-1]),) if weighed else ()
    local = Local(
        update=table.add_function(f"update:{name}", update, arguments, (*specs, *state_specs)),
        send=send and table.add_function(f"send:{name}", send, (*specs * 2, *weight), sent),
        take=take and table.add_function(f"take:{name}", take, specs * 3, specs * 2),
        state=own.state,
        state_specs=state_specs,
    )
    if isinstance(policy.remote, Gossip):
        local = _gossiping(local, name, policy, specs, outer, table, dtype)
    return local, given


def _weighed(specs: Sequence[ArraySpec]) -> tuple[ArraySpec, ...]:
    """Arrays that are multiplied by a weight, and the weight. What is added up among replicas has one dtype."""
    found = tuple(ArraySpec(s.shape, "float32") if is_narrow(dtype_of(s.dtype)) else s for s in specs)
    return (*found, ArraySpec((), found[0].dtype))


def real(weight: ArraySpec) -> ArraySpec:
    """A weight as a replica has it. Beside complex arrays it is sent as a complex number."""
    return ArraySpec((), np.real(np.zeros(0, dtype_of(weight.dtype))).dtype.name)


def _gossiping(
    local: Local,
    name: str,
    policy: Policy,
    specs: tuple[ArraySpec, ...],
    outer: HomeUpdate | None,
    table: ExecutableTable,
    dtype: str,
) -> Local:
    """Add the tasks of rounds, and the state of the outer optimizer."""
    sent = specs * (1 if outer is None else 2)
    wides = tuple(table.outputs(lambda *arrays: tuple(map(wide, arrays)), sent))
    kept = () if outer is None else outer.state_specs
    add = table.add_function(f"fold:{name}", fold, (*wides, *sent, ArraySpec((), dtype)), wides)
    if policy.mirrored:
        joined = table.add_function(f"join:{name}", join, (*wides, *specs * 3, ArraySpec((), dtype)), specs * 2)
        return msgspec.structs.replace(local, fold=add, mix=joined, accumulator=wides)
    topology = policy.remote
    assert isinstance(topology, Gossip)
    if policy.tracked:
        ends = partial(drawn, topology.pull)
    else:
        ends = mix if outer is None else partial(outer_mix, outer.update, len(specs), topology.pull)
    return msgspec.structs.replace(
        local,
        state=(*local.state, *(() if outer is None else outer.state)),
        state_specs=(*local.state_specs, *kept),
        fold=add,
        mix=table.add_function(f"mix:{name}", ends, (*wides, *specs * 2, *kept), (*specs, *kept)),
        accumulator=wides,
        outer=len(kept),
    )


Function = Callable[..., tuple[Any, ...]]


def _pulled(home: HomeTasks, rho: float, *arrays: Any) -> tuple[Any, ...]:
    """(parameters, state, coefficients, gradients, started) -> (parameters, state), pulled to "started"."""
    count = home.params
    anchors = arrays[-count:]

    def update(*given: Any) -> tuple[Any, ...]:
        triples = zip(given[:count], given[count : 2 * count], anchors, strict=True)
        gradients = (g + (rho * (wide(x) - wide(c))).astype(g.dtype) for g, x, c in triples)
        return home.update(*gradients, *given[count:])

    return replace(home, update=update).apply(*arrays[:-count])


def report(*arrays: Any) -> tuple[Any, ...]:
    """(started, parameters, last report) -> (its change, dual variables, report), where a report is their sum."""
    third = len(arrays) // 3
    started, own, last = (arrays[i : i + third] for i in range(0, len(arrays), third))
    duals = [x - c for c, x in zip(started, own, strict=True)]
    reports = [x + u for x, u in zip(own, duals, strict=True)]
    return (*(before - now for before, now in zip(last, reports, strict=True)), *duals, *reports)


def anchor(*arrays: Any) -> tuple[Any, ...]:
    """(global parameters, dual variables) -> what a step is pulled to."""
    half = len(arrays) // 2
    return tuple(z - u for z, u in zip(arrays[:half], arrays[half:], strict=True))


def sending(policy: Policy, *, weighed: bool = False) -> Function | None:
    """(started, parameters) -> delta; if `weighed`, (started, parameters, weight) -> (what is sent, weight)."""

    def product(*arrays: Any) -> tuple[Any, ...]:
        half, weight = len(arrays) // 2, arrays[-1]
        pairs = zip(arrays[:half], arrays[half:-1], strict=True)
        found = [wide(p) if isinstance(policy.payload, Weights) else wide(s) - wide(p) for s, p in pairs]
        return (*(scaled(x, weight) for x in found), weight.astype(found[0].dtype))

    if weighed:
        return product

    def delta(*arrays: Any) -> tuple[Any, ...]:
        half = len(arrays) // 2
        return tuple((wide(s) - wide(p)).astype(p.dtype) for s, p in zip(arrays[:half], arrays[half:], strict=True))

    return delta if isinstance(policy.payload, Delta) else None


def fold(*arrays: Any) -> tuple[Any, ...]:
    """(accumulator, parameters of a replica, its weight) -> accumulator."""
    half, weight = len(arrays) // 2, arrays[-1]
    pairs = zip(arrays[:half], arrays[half:-1], strict=True)
    return tuple(total + wide(x) * weight.astype(total.dtype) for total, x in pairs)


def join(*arrays: Any) -> tuple[Any, ...]:
    """(sum of the deltas of others, own parameters after the step, before it, started, the share of the step that is
    done) -> (parameters, started).

    What the own steps have changed since the last delta, started - parameters, is not changed by those of others.
    """
    leaves, share = len(arrays) // 4, arrays[-1]
    parts = [arrays[i * leaves : (i + 1) * leaves] for i in range(4)]
    params: list[Any] = []
    begun: list[Any] = []
    for total, after, before, started in zip(*parts, strict=True):
        own = wide(before) + (wide(after) - wide(before)) * share.astype(total.dtype)
        params.append((own - total).astype(after.dtype))
        begun.append((wide(started) - total).astype(after.dtype))
    return (*params, *begun)


def mix(*arrays: Any) -> tuple[Any, ...]:
    """(average of the parameters at the beginning of the step, own ones after it, own ones before it) -> parameters."""
    third = len(arrays) // 3
    average, after, before = (arrays[i : i + third] for i in range(0, len(arrays), third))
    triples = zip(average, after, before, strict=True)
    return tuple((m + (wide(x) - wide(b))).astype(x.dtype) for m, x, b in triples)


def drawn(pull: float, *arrays: Any) -> tuple[Any, ...]:
    """(average of public copies, own parameters, own public copy) -> parameters (Koloskova et al., CHOCO-SGD, 2019)."""
    third = len(arrays) // 3
    average, own, copy = (arrays[i : i + third] for i in range(0, len(arrays), third))
    triples = zip(average, own, copy, strict=True)
    return tuple((wide(x) + pull * (m - wide(c))).astype(x.dtype) for m, x, c in triples)


def outer_mix(update: Callable[..., tuple[Any, ...]], leaves: int, pull: float, *arrays: Any) -> tuple[Any, ...]:
    """(averages of the parameters at the beginning of the round and now, own ones now, own ones then, state)
    -> (parameters, state)."""
    parts = [arrays[i * leaves : (i + 1) * leaves] for i in range(4)]
    gradients = [
        (mean_then - mean_now + pull * (wide(then) - mean_then)).astype(then.dtype)
        for mean_then, mean_now, _, then in zip(*parts, strict=True)
    ]
    return update(*gradients, *parts[3], *arrays[4 * leaves :])


def taking(policy: Policy) -> Function | None:
    """(global, parameters, started) -> (parameters, started)."""
    payload = policy.payload
    if not isinstance(payload, Delta | Weights):
        return None
    kind = base_of(policy.apply)
    alpha = 1 - kind.pull if isinstance(kind, Mix) else payload.alpha

    def take(*arrays: Any) -> tuple[Any, ...]:
        third = len(arrays) // 3
        taken, own, started = (arrays[i : i + third] for i in range(0, len(arrays), third))
        mixed = [(p * alpha + g * (1 - alpha)).astype(p.dtype) for g, p in zip(taken, own, strict=True)]
        if not policy.owes:
            return (*mixed, *taken)
        return (*mixed, *(m + (s - p) for m, s, p in zip(mixed, started, own, strict=True)))

    return take if alpha or policy.owes else None
