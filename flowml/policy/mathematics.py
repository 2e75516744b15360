"""The mathematics behind the policies: when a read may go ahead, when a push is due, how much each part counts.

Pure functions of small integers. A clock is the number of a replica's step, from 0. `clocks[r]` of a store
is the number of steps of replica r whose contribution its home has, so it equals t once step t - 1 is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


def can_read(my_clock: int, clocks: Sequence[float], staleness: float, every: int) -> bool:
    """Whether a replica about to run step `my_clock` may use a version that has seen `clocks`.

    Contributions come every `every` steps, so a read at any step of such a window needs what was needed at
    its start: all that was pushed before the window, less `staleness` clocks. Staleness 0 with every 1 is
    bulk synchronous; unbounded never waits (Ho et al., stale synchronous parallel, NeurIPS 2013). A replica
    that has retired counts as infinitely far.
    """
    window = my_clock // every * every
    return min(clocks) >= window - staleness


def due(clock: int, every: int, last_clock: int) -> bool:
    """Whether step `clock` ends with a push: each `every`-th step does, and the last one, so that no work is left."""
    return (clock + 1) % every == 0 or clock == last_clock


def coefficients(apply: Literal["mean", "sum"], weights: Sequence[int], microbatches: int) -> tuple[float, ...]:
    """The factor for each payload, where payload i is the SUM of `weights[i]` microbatch gradients.

    `"mean"` is the mean over all microbatch gradients that take part, which keeps the update unbiased
    whatever the quorum left out. `"sum"` adds the mean gradients of the steps, as if each were applied alone.
    A payload of weight 0 stands for nothing and gets 0.
    """
    if min(weights, default=1) < 0 or microbatches < 1:
        raise ValueError(f"weights {tuple(weights)} and microbatches {microbatches} must count gradients")
    each = 1 / max(sum(weights), 1) if apply == "mean" else 1 / microbatches
    return tuple(each if w else 0.0 for w in weights)
