"""The state of a model in a fit: what each replica begins with and ends with, and what they go on with together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from flowml.ir._jax import path_name, spec_of
from flowml.training.state import Rule, joined, rules_of
from flowml_runtime.driver.training.outcome import as_buffer, from_buffer


@dataclass(frozen=True)
class Model:
    """The state of a model, flat. `replicas` holds the leaves of each replica, as they are sent."""

    tree: Any = None
    dtypes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    replicas: tuple[tuple[Any, ...], ...] = field(default=(), repr=False)
    lost: Mapping[int, tuple[Any, ...]] = field(default_factory=dict[int, tuple[Any, ...]], repr=False)
    """The replicas that are left out, and the leaves that each of them had at the snapshot before."""

    @staticmethod
    def of(state: Any, rules: Mapping[str, Rule] | None, replicas: int) -> Model:
        """The state that all replicas begin with. Raises ValueError for rules that do not fit it."""
        paths, tree = jax.tree_util.tree_flatten_with_path(state)
        leaves = [jax.numpy.asarray(x) for _, x in paths]
        found = rules_of(rules, [path_name(p) for p, _ in paths], leaves)
        buffers = tuple(as_buffer(x) for x in leaves)
        return Model(tree, tuple(spec_of(x).dtype for x in leaves), found, (buffers,) * replicas)

    def without(self, lost: Iterable[int], ended: Sequence[tuple[Any, ...]]) -> Model:
        """The same for a run that leaves out these replicas, which have ended with these leaves."""
        return replace(self, lost={r: self.lost.get(r, ended[r]) for r in lost})

    def with_sums(self) -> Model:
        """The same for a run whose first replica goes on with what all others have added up, the lost ones included."""
        lost: dict[int, tuple[Any, ...]] = {}
        for r, leaves in self.lost.items():
            triples = zip(self.rules, self.replicas[r], leaves, strict=True)
            lost[r] = tuple(begun if rule == "sum" else x for rule, begun, x in triples)
        return replace(self, lost=lost)

    def last(self, ended: Sequence[tuple[Any, ...]]) -> Model:
        """The last state of each replica, if those that are left have ended with these leaves."""
        return replace(self, replicas=tuple(self.lost.get(r, leaves) for r, leaves in enumerate(ended)))

    def after(self, ended: Sequence[tuple[Any, ...]]) -> Model:
        """The state that replicas go on with, if those that are left have ended with these leaves."""
        last = self.last(ended).replicas
        leaves = [
            joined(rule, [begun[i] for begun in self.replicas], [end[i] for end in last], self.lost)
            for i, rule in enumerate(self.rules)
        ]
        return replace(self, replicas=tuple(zip(*leaves, strict=True)) or self.replicas)

    def state(self, replica: int | None = None) -> Any:
        """The state of a replica, by default the first that is left, in the caller's structure."""
        if replica is None:
            replica = next(r for r in range(len(self.replicas)) if r not in self.lost)
        pairs = zip(self.replicas[replica], self.dtypes, strict=True)
        return jax.tree_util.tree_unflatten(self.tree, [jax.numpy.asarray(from_buffer(x, d)) for x, d in pairs])
