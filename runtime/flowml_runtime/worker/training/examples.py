"""Keeps the batches of a stage until their steps begin, takes the examples of a microbatch out of a source or a batch,
makes the words of its key, and adds up what the microbatches of a step report. Both clocks use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np

from flowml.arrays import unheard
from flowml.data import epoch_order
from flowml.plan import Plan
from flowml.splits import Shuffle
from flowml.training.pieces import Piece
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, aligned_copy

V = TypeVar("V")


class Fed(Generic[V]):
    """The batches that the driver feeds some devices, until their steps begin. Those of one device come in the order of
    grants, which is the order of its steps.

    A replica may get a work item again before a stage has used it: its first stage has given the item up, and another
    one has not heard of that yet. So a batch belongs to a grant, and each step uses up one.
    """

    def __init__(self, *, ahead: bool) -> None:
        """`ahead`: a portion of the next batch may be held meanwhile, so that steps have another order."""
        self._ahead = ahead
        self._waiting: dict[str, list[tuple[int, V]]] = {}

    def give(self, device: str, sequence: int, value: V) -> None:
        """A batch with the examples of this work item has come."""
        self._waiting.setdefault(device, []).append((sequence, value))

    def has(self, device: str, sequence: int) -> bool:
        return any(given == sequence for given, _ in self._waiting.get(device, ()))

    def take(self, device: str, sequence: int) -> V | None:
        """Remove the oldest batch of the work item, and those before it, whose steps are over or skipped.

        The oldest may be of an earlier grant whose step never began: the examples are the same. It is none of a later
        step, which would have nothing then. None if no batch is here.
        """
        waiting = self._waiting.get(device)
        place = next((n for n, (given, _) in enumerate(waiting) if given == sequence), None) if waiting else None
        if waiting is None or place is None:
            return None
        value = waiting[place][1]
        kept = [entry for entry in waiting[:place] if entry[0] > sequence] if self._ahead else []
        waiting[: place + 1] = kept
        return value

    def clear(self) -> None:
        self._waiting.clear()


def of_source(
    start: wire.StartTraining, leaves: Mapping[int, Array], slots: Sequence[int], epoch: int, piece: Piece
) -> dict[int, Array]:
    """The examples of a microbatch, out of whole leaves."""
    order = _order(start.examples, start.seed, epoch, start.shuffle)
    indices = order[piece.start : piece.start + piece.size]
    return {s: aligned_copy(np.asarray(leaves[s])[indices]) for s in slots}


def of_batch(leaves: Mapping[int, Array], slots: Sequence[int], microbatch: int, piece: Piece) -> dict[int, Array]:
    """The examples of a microbatch, out of leaves that hold those of all microbatches of the step."""
    first = microbatch * piece.size
    return {s: aligned_copy(np.asarray(leaves[s])[first : first + piece.size]) for s in slots}


def beside_batch(plan: Plan, slots: Sequence[int], seed: int, piece: Piece) -> dict[int, Array]:
    """The feeds of a microbatch that are leaves neither of the batch nor of the model's state: the words of the loss's
    key, and the coefficient."""
    training = plan.training
    assert training is not None
    found: dict[int, Array] = {}
    for slot in (s for s in slots if training.batch_leaves <= s < len(plan.inputs) - len(training.state)):
        if training.takes_rng and slot == training.batch_leaves:
            found[slot] = np.array([seed % 2**32, piece.sequence % 2**32, piece.microbatch], np.uint32)
        else:
            found[slot] = np.array(piece.coefficient, plan.inputs[slot].dtype)
    return found


@lru_cache(maxsize=4)
def _order(examples: int, seed: int, epoch: int, shuffle: Shuffle) -> np.ndarray[Any, Any]:
    return epoch_order(examples, seed, epoch, shuffle=shuffle)


class Fetched:
    """What the microbatches of one step report, by fetch slot."""

    def __init__(self) -> None:
        self._found: dict[int, dict[int, Array]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, slot: int, microbatch: int, array: Array) -> None:
        self._found.setdefault(slot, {})[microbatch] = array

    def sums(self, used: int, coded: Sequence[Piece]) -> tuple[tuple[int, ...], list[np.ndarray]]:
        """The slots, and for each the sum over the first `used` microbatches; another stage may have left out more."""
        slots = tuple(sorted(self._found))
        return slots, [over_microbatches([self._found[s][m] for m in range(used)], coded) for s in slots]


def over_microbatches(values: Sequence[Array], coded: Sequence[Piece] = ()) -> np.ndarray:
    """The sum: floats in float32 or wider, counts in 64 bits. The driver, which gets all replicas' sums, divides.

    With a code the step has multiplied floats by their coefficients, and counts are multiplied here.
    """
    arrays = [np.asarray(v) for v in values]
    kind, dtype = arrays[0].dtype.kind, arrays[0].dtype
    if coded and kind in "biu":
        scaled = [piece.coefficient * a for piece, a in zip(coded, arrays, strict=True)]
        return np.asarray(np.sum(scaled, axis=0, dtype=np.float64))
    wide = {"b": np.int64, "i": np.int64, "u": np.uint64}.get(kind, np.float32 if dtype.itemsize < 4 else dtype)
    with unheard():
        return np.sum([a.astype(wide, copy=False) for a in arrays], axis=0, dtype=wide)
