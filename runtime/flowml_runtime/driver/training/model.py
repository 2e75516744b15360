"""The state of a model in a fit: what each replica begins with and ends with, and what they go on with together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    @staticmethod
    def of(state: Any, rules: Mapping[str, Rule] | None, replicas: int) -> Model:
        """The state that all replicas begin with. Raises ValueError for rules that do not fit it."""
        paths, tree = jax.tree_util.tree_flatten_with_path(state)
        leaves = [jax.numpy.asarray(x) for _, x in paths]
        found = rules_of(rules, [path_name(p) for p, _ in paths], [x.dtype for x in leaves])
        buffers = tuple(as_buffer(x) for x in leaves)
        return Model(tree, tuple(spec_of(x).dtype for x in leaves), found, (buffers,) * replicas)

    def after(self, ended: Sequence[Sequence[Any]]) -> Model:
        """The state that replicas go on with, if they have ended with these leaves."""
        leaves = [
            joined(rule, [begun[i] for begun in self.replicas], [end[i] for end in ended])
            for i, rule in enumerate(self.rules)
        ]
        return replace(self, replicas=tuple(zip(*leaves, strict=True)) or self.replicas)

    def state(self, replica: int = 0) -> Any:
        """The state of a replica, in the caller's structure."""
        pairs = zip(self.replicas[replica], self.dtypes, strict=True)
        return jax.tree_util.tree_unflatten(self.tree, [jax.numpy.asarray(from_buffer(x, d)) for x, d in pairs])
