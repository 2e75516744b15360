"""Handles equinox modules and flax nnx objects among the arguments of a call.

This module imports neither library: an argument can be of one of them only if the user has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.tree_util import tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from flowml.errors import UnsupportedError

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def _known(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


# equinox


def is_static_leaf(leaf: Any) -> bool:
    """Whether `equinox.filter_jit` treats a leaf as static."""
    return not (isinstance(leaf, _ARRAYS) or hasattr(leaf, "__jax_array__"))  # or the handle of an array


def takes_static_leaves(fn: Callable[..., Any], tree: Any) -> bool:
    """Whether leaves of `tree` other than arrays are static: equinox filters `fn`, or `tree` has an equinox module."""
    module = _known("equinox", "Module")
    if module is None:
        return False
    if type(fn).__module__.partition(".")[0] == "equinox":
        return True
    return any(isinstance(x, module) for x in tree_leaves(tree, is_leaf=lambda x: isinstance(x, module)))


def static_leaves(fn: Callable[..., Any], given: Any, leaves: Sequence[Any]) -> dict[int, Any]:
    """The leaves of the arguments that are static without being named so, by position."""
    if _known("equinox", "Module") is None or not any(map(is_static_leaf, leaves)):
        return {}
    if type(fn).__module__.partition(".")[0] == "equinox":
        return {i: leaf for i, leaf in enumerate(leaves) if is_static_leaf(leaf)}
    return leaves_of_modules(given)


def leaves_of_modules(given: Any) -> dict[int, Any]:
    """The leaves of equinox modules that are no arrays, such as functions, by position among all leaves."""
    module = _known("equinox", "Module")
    if module is None:
        return {}
    found: dict[int, Any] = {}
    position = 0
    for part in tree_leaves(given, is_leaf=lambda x: isinstance(x, module)):
        inside = tree_leaves(part) if isinstance(part, module) else [None]
        found |= {position + i: leaf for i, leaf in enumerate(inside) if leaf is not None and is_static_leaf(leaf)}
        position += len(inside)
    return found


def array_leaves(tree: Any) -> tuple[list[tuple[Any, Any]], Callable[[Sequence[Any]], Any]]:
    """The leaves of a tree with their paths, without those of equinox modules that are no arrays, and what makes the
    tree of other leaves in their places."""
    leaves, structure = tree_flatten_with_path(tree)
    fixed = leaves_of_modules(tree)

    def made(others: Sequence[Any]) -> Any:
        rest = iter(others)
        return tree_unflatten(structure, [fixed[i] if i in fixed else next(rest) for i in range(len(leaves))])

    return [pair for i, pair in enumerate(leaves) if i not in fixed], made


# flax nnx


def is_object(value: Any) -> bool:
    """Whether a value is an nnx object: a module, an optimizer, a stream of random keys, a variable."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    kinds = (getattr(nnx, "Pytree", None) or getattr(nnx, "Object", None), getattr(nnx, "Variable", None))
    return isinstance(value, tuple(k for k in kinds if isinstance(k, type)))


def _is_state(value: Any) -> bool:
    """Whether this is what `nnx.split` gives. Its variables are values of a pytree, which a call leaves as they are."""
    state = _known("flax.nnx", "State")
    return isinstance(state, type) and isinstance(value, state)


@dataclass(frozen=True)
class Objects:
    """The nnx objects of a call. An object that is passed twice, or shared by two others, is stored once."""

    nodes: tuple[Any, ...]
    graph: Any
    """The structure of the objects without their arrays. Hashable."""
    given: Any
    """The arguments, where each object is replaced by its state."""
    _tree: Any
    _places: tuple[int, ...]

    @staticmethod
    def of(arguments: Any) -> Objects | None:
        """The objects among the arguments; None if there are none."""
        if "flax.nnx" not in sys.modules:
            return None
        parts, tree = tree_flatten(arguments, is_leaf=lambda value: is_object(value) or _is_state(value))
        places = tuple(i for i, part in enumerate(parts) if is_object(part))
        if not places:
            return None
        nodes = tuple(parts[i] for i in places)
        graph, states = _split(nodes)
        for place, state in zip(places, states, strict=True):
            parts[place] = state
        return Objects(nodes, graph, tree_unflatten(tree, parts), tree, places)

    def merged(self, given: Any) -> tuple[Any, tuple[Any, ...]]:
        """The arguments with new objects made from the states in `given`, and these objects."""
        nnx: Any = sys.modules["flax.nnx"]
        parts = self._tree.flatten_up_to(given)
        nodes = nnx.merge(self.graph, _joined([parts[i] for i in self._places]))
        for place, node in zip(self._places, nodes, strict=True):
            parts[place] = node
        return tree_unflatten(self._tree, parts), tuple(nodes)

    def states(self, nodes: Sequence[Any], name: str) -> tuple[Any, ...]:
        """The states of objects from `merged`. Raises UnsupportedError if their structure has changed."""
        graph, states = _split(tuple(nodes))
        if graph != self.graph:
            raise UnsupportedError(
                f"{name} adds, removes or replaces parts of the nnx objects that it is given; make all their variables "
                "before the call and change only the values, or return the new object"
            )
        return states

    def update(self, states: Sequence[Any]) -> None:
        """Update the caller's objects with new states."""
        nnx: Any = sys.modules["flax.nnx"]
        nnx.update(self.nodes, _joined(states))


def _split(nodes: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    nnx: Any = sys.modules["flax.nnx"]
    graph, state = nnx.split(nodes)
    return graph, tuple(state.get(i, nnx.State({})) for i in range(len(nodes)))


def _joined(states: Sequence[Any]) -> Any:
    nnx: Any = sys.modules["flax.nnx"]
    return nnx.State(dict(enumerate(states)))
