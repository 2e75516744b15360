"""Training data by random access: how many examples there are, and the examples at given indices.

A source is a pytree of arrays that share their first dimension, or any object with `len(source)` and
`source[indices]`. The order of an epoch is a function of the seed alone, so that every worker knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


def epoch_order(examples: int, seed: int, epoch: int, *, shuffle: bool = True) -> np.ndarray:
    """The order in which epoch `epoch` visits the examples: int64 indices of shape (examples,)."""
    if not shuffle:
        return np.arange(examples)
    return np.random.default_rng([seed, epoch]).permutation(examples)


@dataclass(frozen=True)
class Source:
    """A source as the trainer uses it.

    `arrays` are its whole leaves if it is a pytree of arrays, else None; `take` gives the leaves of a batch.
    """

    examples: int
    tree: Any
    take: Callable[[np.ndarray], list[np.ndarray]]
    arrays: tuple[np.ndarray, ...] | None


def as_source(source: Any) -> Source:
    """Adapt what the user gave. Raises ValueError for arrays of different lengths, TypeError for no source."""
    if isinstance(source, Source):
        return source
    leaves, tree = ([], None) if hasattr(source, "__next__") else jax.tree_util.tree_flatten(source)
    if leaves and all(isinstance(x, np.ndarray | jax.Array) for x in leaves):
        return _array_source(leaves, tree)
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"a source needs len(source) and source[indices], or to be a pytree of arrays; got {type(source).__name__}"
        )
    return _object_source(source)


def _array_source(leaves: Sequence[Any], tree: Any) -> Source:
    arrays = tuple(np.asarray(x) for x in leaves)
    sizes = {a.shape[0] if a.ndim else None for a in arrays}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise ValueError(
            f"the arrays of a source differ in their first dimension: {shapes}; each needs one row an example"
        )
    return Source(arrays[0].shape[0], tree, lambda indices: [a[indices] for a in arrays], arrays)


def _object_source(source: Any) -> Source:
    """`source[indices]` for an array of indices; a source of single records (Grain's, say) is stacked here."""
    examples = len(source)
    if examples < 1:
        raise ValueError(f"the source, a {type(source).__name__}, has no examples")

    def stacked(indices: np.ndarray) -> Any:
        records = [source[int(i)] for i in indices]
        return jax.tree_util.tree_map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *records)

    batch: Callable[[np.ndarray], Any] = source.__getitem__ if _gives_batches(source) else stacked
    tree = jax.tree_util.tree_structure(batch(np.zeros(1, np.int64)))

    def take(indices: np.ndarray) -> list[np.ndarray]:
        leaves, got = jax.tree_util.tree_flatten(batch(indices))
        if got != tree:
            raise ValueError(f"the source gave a batch of structure {got}, before it gave {tree}")
        return [np.asarray(x) for x in leaves]

    return Source(examples, tree, take, None)


def _gives_batches(source: Any) -> bool:
    """Whether a source understands an array of indices. One of single records fails, or takes it for an index.

    Two indices, because an array of one passes for a number.
    """
    try:
        leaves = jax.tree_util.tree_leaves(source[np.zeros(2, np.int64)])
    except Exception:
        return False
    return bool(leaves) and all(np.shape(x)[:1] == (2,) for x in leaves)
