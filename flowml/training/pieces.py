"""Says which examples a replica computes in each microbatch of a step.

Without a code they are its work item, cut into microbatches. With a code they are several partitions of the global
batch, which is made of the work items of all replicas, and each partition is cut into microbatches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowml.plan import Training


@dataclass(frozen=True, slots=True)
class Piece:
    """The examples of a microbatch: `size` from `start` in the order of the epoch.

    The loss's key is made of `sequence` and `microbatch`. The gradient is multiplied by `coefficient`.
    """

    start: int
    size: int
    sequence: int
    microbatch: int
    coefficient: float = 1.0


def short_items(rest: int, training: Training) -> tuple[int, ...]:
    """The sizes of the work items of a short batch of `rest` examples: as equal as whole microbatches allow. With a
    code they are equal, because replicas compute shares of the whole batch.

    Raises ValueError if it does not divide.
    """
    count, items, code = training.microbatches, training.items, training.code
    if code is None:
        return short_parts(rest, items, count)
    parts = code.partitions * (count // len(code.row(0)))
    unit = math.lcm(items, parts)
    if rest % unit:
        raise ValueError(
            f"last='use': the last batch of an epoch has {rest} examples, which do not divide into {parts} equal "
            f"microbatches of the whole batch for {items} replicas with a code; give last='drop', or a batch_size that "
            f"leaves a multiple of {unit}"
        )
    return (rest // items,) * items


def short_parts(rest: int, items: int, microbatches: int) -> tuple[int, ...]:
    """The same for so many items without a code."""
    each, more = divmod(rest // microbatches, items)
    if rest % microbatches or not each:
        raise ValueError(
            f"last='use': the last batch of an epoch has {rest} examples, which do not divide into {items} work items "
            f"of {microbatches} microbatches each; give last='drop', another batch_size, or fewer microbatches"
        )
    return tuple((each + (i < more)) * microbatches for i in range(items))


def pieces(training: Training, replica: int, sequence: int, start: int, item: int = 0) -> tuple[Piece, ...]:
    """What `replica` computes in the step of the work item `sequence`, by microbatch. It is `item` examples from
    `start`; 0 stands for the usual number."""
    count, code, replicas = training.microbatches, training.code, len(training.replicas)
    if code is None:
        size = (item or training.item_size) // count
        return tuple(Piece(start + m * size, size, sequence, m) for m in range(count))
    row = code.row(replica)
    each = count // len(row)  # microbatches of a partition
    batch, place = divmod(sequence, replicas)
    own = item or training.item_size
    share = replicas * own // code.partitions
    first, size = start - place * own, share // each
    return tuple(
        Piece(first + j * share + m * size, size, batch * code.partitions + j, m, coefficient)
        for j, coefficient in row
        for m in range(each)
    )
