"""Reads batches from a source that stays with the driver, and finds the programs for the shape of each.

A plan has programs for one shape of batch. The first work item of another shape has a *variant* loaded: a plan for that
shape, whose stores are those of the fit's own. Stages run its programs on the batches that name it; all else that
happens in a fit knows nothing of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flowml.data import Source
from flowml.devices import worker_of
from flowml.errors import FlowmlError
from flowml.instructions import Feed
from flowml.placement.links import SHARED_MEMORY
from flowml.plan import ArraySpec
from flowml.rows import swapped
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.transport.arrays import own_copy

MAX_SHAPES = 32
"""Of the batches of one fit. Each takes a compilation, and memory on every worker."""

Shapes = tuple[int, tuple[tuple[tuple[int, ...], str], ...]]
"""The examples of a work item, and for each leaf the shape of an example and the dtype."""


@dataclass(frozen=True)
class Variant:
    """A loaded plan for batches of one shape. `slots` are the batch leaves that each device reads."""

    plan_id: str
    specs: tuple[ArraySpec, ...]
    slots: Mapping[str, tuple[int, ...]]

    @staticmethod
    def of(handle: LoadedPlan) -> Variant:
        training = handle.plan.training
        assert training is not None
        found: dict[str, tuple[int, ...]] = {}
        known: dict[int, tuple[int, ...]] = {}
        """Programs of replicas may share their instructions."""
        for program in handle.plan.programs:
            mine = known.get(id(program.instructions))
            if mine is None:
                slots = {s for i in program.instructions if isinstance(i, Feed) for s in i.slots}
                mine = known[id(program.instructions)] = tuple(sorted(s for s in slots if s < training.batch_leaves))
            if mine:
                found[program.device] = mine
        return Variant(handle.plan_id, training.batch_specs, found)


class Feeding:
    """The batches of one fit, each with its variant."""

    def __init__(self, handle: LoadedPlan, source: Source, load: Callable[[Any], LoadedPlan]) -> None:
        training = handle.plan.training
        assert training is not None
        self._source = source
        self._load = load
        self._item, self._items = training.item_size, training.items
        self._paths = training.batch_paths
        code = training.code
        self._load_of = len(code.row(0)) * training.items / code.partitions if code else 1
        """How many times the examples of its work item a replica computes."""
        first = self._item, tuple((tuple(s.shape[1:]), s.dtype) for s in training.batch_specs)
        self._variants: dict[Shapes, Variant] = {first: Variant.of(handle)}

    @property
    def shapes(self) -> tuple[str, ...]:
        """What an example of each shape is, as text."""
        return tuple(map(self._told, self._variants))

    def take(self, indices: np.ndarray) -> tuple[Variant, Sequence[np.ndarray]]:
        """The examples at `indices`, and the programs for them; for a new shape these are compiled and loaded here.

        Raises ValueError for a batch that is none, and for a shape that the model or the fit cannot take.
        """
        leaves = self._source.take(indices)
        for path, leaf in zip(self._paths, leaves, strict=True):
            if leaf.shape[:1] != (len(indices),):
                raise ValueError(
                    f"source[indices] gave shape {leaf.shape} for {path or 'the batch'!r} and {len(indices)} indices; "
                    + (
                        swapped({path or "it": leaf.shape}, len(indices))
                        or f"its first dimension must be {len(indices)}, a row for each index"
                    )
                )
        rows = round(len(indices) / self._load_of)
        structs = batch_structs(self._source, leaves, rows * self._items)
        key: Shapes = rows, tuple((x.shape[1:], str(x.dtype)) for x in jax.tree_util.tree_leaves(structs))
        if key not in self._variants:
            self._variants[key] = self._add(key, structs)
        return self._variants[key], leaves

    def _add(self, key: Shapes, structs: Any) -> Variant:
        what = self._told(key)
        if len(self._variants) == MAX_SHAPES:
            raise ValueError(
                f"a fit takes batches of at most {MAX_SHAPES} shapes, because a program is compiled for each, and the "
                f"source gave one more, with examples {what}; pad examples to a few lengths, such as powers of two, "
                "and leave the padding out of the loss with a mask and Trainer(weight=)"
            )
        try:
            return Variant.of(self._load(structs))
        except FlowmlError:
            raise
        except Exception as error:  # of the user's loss, of whatever kind
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"the source gave a batch with examples {what}, after others with {self.shapes[0]}, and the loss does "
                f"not take it ({type(error).__name__}: {reason}); give examples of one shape, or a loss that takes both"
            ) from error

    def _told(self, key: Shapes) -> str:
        rows, leaves = key
        short = f" in work items of {rows}" if rows != self._item else ""
        return ", ".join(_text(p, s) for p, s in zip(self._paths, leaves, strict=True)) + short


def batch_structs(source: Source, leaves: Sequence[Any], rows: int) -> Any:
    """A batch of `rows` examples such as these, as JAX sees it."""
    structs = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)) for x in leaves]
    return jax.tree_util.tree_unflatten(source.tree, structs)


def first_batch(source: Source, order: np.ndarray, batch_size: int, replicas: int) -> Any:
    """A global batch as ShapeDtypeStructs; its examples have the shape of those in the first work item."""
    item = max(1, batch_size // replicas)
    leaves = source.arrays if source.arrays is not None else source.take(order[:item])
    return batch_structs(source, leaves, batch_size)


def whole(spec: ArraySpec, array: np.ndarray) -> ArraySpec:
    """The spec of an array of several of these."""
    return ArraySpec(array.shape, spec.dtype)


def _text(path: str, shape: tuple[tuple[int, ...], str]) -> str:
    return f"{path} {shape[1]}{list(shape[0])}".lstrip()


def shipments(
    slots: Mapping[str, Sequence[int]], source: Source, specs: Sequence[ArraySpec], way: Callable[[str], str]
) -> Iterator[tuple[str, tuple[int, ...], tuple[ArraySpec, ...], list[np.ndarray]]]:
    """The whole leaves of a source for each worker: (worker, slots, specs, arrays). `slots` are what devices read, and
    `way` says how messages reach a worker."""
    assert source.arrays is not None
    by_worker: dict[str, set[int]] = {}
    for device, read in slots.items():
        by_worker.setdefault(worker_of(device), set()).update(read)
    lent: dict[int, np.ndarray] = {}
    """Copies for workers that get a reference, because the caller may change the source during the fit."""
    for worker, read in by_worker.items():
        order = tuple(sorted(read))
        if way(worker) != SHARED_MEMORY:  # shared memory copies while it sends
            lent |= {s: own_copy(source.arrays[s], specs[s].dtype) for s in order if s not in lent}
        arrays = [lent[s] if s in lent else np.ascontiguousarray(source.arrays[s], specs[s].dtype) for s in order]
        yield worker, order, tuple(whole(specs[s], a) for s, a in zip(order, arrays, strict=True)), arrays
