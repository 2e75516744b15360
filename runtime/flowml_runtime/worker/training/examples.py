"""Takes the examples of a microbatch out of a source or a batch, and makes the words of its key. Both clocks use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from flowml.data import epoch_order
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, aligned_copy


def of_source(
    start: wire.StartTraining, leaves: Mapping[int, Array], slots: Sequence[int], item: wire.Item, first: int, rows: int
) -> dict[int, Array]:
    """Rows of a work item, out of whole leaves."""
    order = _order(start.examples, start.seed, item.epoch, start.shuffle)
    indices = order[item.start + first : item.start + first + rows]
    return {s: aligned_copy(np.asarray(leaves[s])[indices]) for s in slots}


def of_batch(leaves: Mapping[int, Array], slots: Sequence[int], first: int, rows: int) -> dict[int, Array]:
    """Rows of a work item, out of its own leaves."""
    return {s: aligned_copy(np.asarray(leaves[s])[first : first + rows]) for s in slots}


def key_words(seed: int, item: wire.Item, microbatch: int) -> np.ndarray[Any, Any]:
    """The feed from which the loss makes its key."""
    return np.array([seed % 2**32, item.sequence % 2**32, microbatch], np.uint32)


@lru_cache(maxsize=4)
def _order(examples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray[Any, Any]:
    return epoch_order(examples, seed, epoch, shuffle=shuffle)
