"""Reads training data by random access: the number of examples, and the examples at given indices.

A source is a pytree of arrays with equal first dimensions, or any object with `len(source)` and
`source[indices]`. The order of an epoch depends only on the seed, the epoch and the split (`flowml.splits`), so every
worker can compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flowml.errors import named
from flowml.leaves import check_array
from flowml.rows import swapped
from flowml.splits import Shards, Shuffle, WithReplacement


def epoch_order(examples: int, seed: int, epoch: int, *, shuffle: Shuffle = True) -> np.ndarray:
    """The order in which epoch `epoch` visits the examples: int64 indices of shape (examples,)."""
    if isinstance(shuffle, Shards | WithReplacement):
        return shuffle.order(examples, seed, epoch)
    if not shuffle:
        return np.arange(examples)
    return np.random.default_rng([seed, epoch]).permutation(examples)


@dataclass(frozen=True)
class Source:
    """A source as the trainer uses it.

    `arrays` are the leaves of a pytree of arrays, else None. `take` returns the leaves of a batch.
    """

    examples: int
    tree: Any
    take: Callable[[np.ndarray], list[np.ndarray]]
    arrays: tuple[np.ndarray, ...] | None

    def shapes_of(self, leaves: Sequence[np.ndarray]) -> dict[str, tuple[int, ...]]:
        """The shapes of the leaves of a batch, by their names."""
        paths = jax.tree_util.tree_leaves_with_path(jax.tree_util.tree_unflatten(self.tree, leaves))
        return {_name(path): leaf.shape for path, leaf in paths}


def as_source(source: Any) -> Source:
    """Adapt a user's source.

    Raises ValueError if arrays have different lengths or their rows are not the examples, TypeError if `source` is not
    a source or a leaf is not an array of numbers.
    """
    if isinstance(source, Source):
        return source
    leaves, tree = ([], None) if hasattr(source, "__next__") else jax.tree_util.tree_flatten_with_path(source)
    arrays = [isinstance(x, np.ndarray | jax.Array) for _, x in leaves]
    if leaves and (all(arrays) or _is_tree_of_arrays(source, arrays)):
        return _array_source(leaves, tree, _are_examples(source))
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"a source needs len(source) and source[indices], or to be a pytree of arrays; got {type(source).__name__}"
        )
    return _object_source(source)


def _is_tree_of_arrays(source: Any, arrays: Sequence[bool]) -> bool:
    """Whether a container holds whole arrays, as far as its leaves are arrays: it is a dict with an array or with a
    name, or a sequence with an array among its elements.

    Other sequences, and dicts from numbers to records without arrays, are sources of single records.
    """
    if isinstance(source, Mapping):
        names: Any = source if isinstance(source, dict) else ()
        return any(arrays) or any(isinstance(name, str) for name in names)
    elements: Any = source if isinstance(source, list | tuple) else ()
    return any(isinstance(x, np.ndarray | jax.Array) for x in elements)


def _are_examples(source: Any) -> bool:
    """Whether a sequence seems to hold examples, and not columns: it has several containers of the same shapes."""
    elements: Any = source if isinstance(source, list | tuple) else ()
    kinds = {str(jax.tree_util.tree_map(np.shape, element)) for element in elements}
    return len(elements) > 1 and len(kinds) == 1 and isinstance(elements[0], list | tuple | dict)


def _name(path: Any) -> str:
    return f"source leaf {jax.tree_util.keystr(path, simple=True, separator='/')!r}" if path else "the source"


_UNSTACKED = (
    "its elements seem to be examples; stack them: jax.tree.map(lambda *rows: np.stack(rows), *source), or give an "
    "object with len(source) and source[indices]"
)


def _array_source(leaves: Sequence[tuple[Any, Any]], tree: Any, are_examples: bool) -> Source:
    for path, leaf in leaves:
        check_array(_name(path), leaf)
    arrays = tuple(np.asarray(x) for _, x in leaves)
    sizes = {a.shape[0] if a.ndim else None for a in arrays}
    if len(sizes) != 1 or None in sizes:
        shapes = named([str(a.shape) for a in arrays])
        wrong = swapped({_name(path): a.shape for (path, _), a in zip(leaves, arrays, strict=True)})
        raise ValueError(
            f"the arrays of a source differ in their first dimension: {shapes}; "
            f"{_UNSTACKED if are_examples else wrong or 'each needs one row an example'}"
        )
    return Source(arrays[0].shape[0], tree, lambda indices: [a[indices] for a in arrays], arrays)


def _object_source(source: Any) -> Source:
    """A source that is read by `source[indices]`. If it gives single records (as Grain does), they are stacked here."""
    examples = len(source)
    if examples < 1:
        raise ValueError(f"the source, a {type(source).__name__}, has no examples")

    def stacked(indices: np.ndarray) -> Any:
        records = [jax.tree_util.tree_map(_own, source[int(i)]) for i in indices]
        return jax.tree_util.tree_map(lambda *xs: np.stack(xs), *records)

    batch: Callable[[np.ndarray], Any] = source.__getitem__ if _gives_batches(source) else stacked
    tree = jax.tree_util.tree_structure(batch(np.zeros(1, np.int64)))

    def take(indices: np.ndarray) -> list[np.ndarray]:
        leaves, got = jax.tree_util.tree_flatten_with_path(batch(indices))
        if got != tree:
            raise ValueError(f"the source gave a batch of structure {got}, before it gave {tree}")
        for path, leaf in leaves:
            check_array(_name(path), leaf)
        return [_own(x) for _, x in leaves]

    return Source(examples, tree, take, None)


def _own(leaf: Any) -> np.ndarray:
    """A copy of an array, because the source may return the same buffer again."""
    return np.array(leaf) if isinstance(leaf, np.ndarray) else np.asarray(leaf)


def _swapped(leaves: Sequence[tuple[Any, Any]], examples: int) -> str:
    return swapped({_name(path): np.shape(leaf) for path, leaf in leaves}, examples)


def _gives_batches(source: Any) -> bool:
    """Whether a source accepts an array of indices. A source of single records fails or treats it as one index.

    The test uses two indices, because an array of one can be used as a number. Raises TypeError if the source accepts
    the array but returns a list where an array is needed, ValueError if it returns the examples in another dimension.
    """
    try:
        batch = source[np.zeros(2, np.int64)]
    except Exception:
        return False
    lists = jax.tree_util.tree_flatten_with_path(batch, is_leaf=lambda x: isinstance(x, list))[0]
    if wrong := _swapped(lists, 2):  # unless it is a single record, which has this shape for any indices
        more = jax.tree_util.tree_flatten_with_path(source[np.zeros(3, np.int64)])[0]
        if _swapped(more, 3):
            raise ValueError(f"source[indices] gave for 2 indices {wrong}")
    rows = [np.shape(x)[:1] == (2,) for _, x in lists]
    for (path, leaf), right in zip(lists, rows, strict=True):
        if isinstance(leaf, list) and right and any(isinstance(x, np.ndarray | jax.Array) for _, x in lists):
            check_array(_name(path), leaf)
    return bool(lists) and all(rows)


__all__ = ["Source", "as_source", "epoch_order"]


def __dir__() -> list[str]:
    return __all__
