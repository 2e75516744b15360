"""Computes when a replica may read, when it has to push, and the coefficient of each contribution.

These are pure functions of small integers. A clock is the number of a replica's step, from 0. `clocks[r]` of a
store is the number of steps of replica r whose contribution its home has: it is t once step t - 1 has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowml.policy.apply import Apply


def window(clock: int, every: int, offset: int = 0) -> int:
    """The first step after the last push before step `clock`; 0 before the first push."""
    return max((clock - offset) // every * every + offset, 0)


def can_read(
    my_clock: int, clocks: Sequence[float], staleness: float, every: int, offset: int = 0, delay: int = 0
) -> bool:
    """Whether a replica at step `my_clock` may read a version that contains the contributions of `clocks`.

    Contributions arrive every `every` steps, so all steps of such a window need the same version: it contains
    everything pushed up to `staleness` clocks before the window. Staleness 0 with every 1 is bulk synchronous; with
    unbounded staleness a read never waits (Ho et al., stale synchronous parallel, NeurIPS 2013). The clock of a
    retired replica counts as infinite. With a `delay` what a replica has pushed is needed so many steps later.
    """
    return min(clocks) >= window(max(my_clock - delay, 0), every, offset) - staleness


def newest_changes(clock: int, staleness: int, every: int) -> int:
    """The newest step whose changes a mirror adds at the end of step `clock`, of those that have come. A sender may be
    one exchange ahead of the bound. With staleness 0 its changes wait, so that they are added at one step in all runs.
    """
    return clock + staleness + every if staleness else clock


def due(clock: int, every: int, last_clock: int, offset: int = 0) -> bool:
    """Whether step `clock` ends with a push. Each `every`-th step does, and the last one, so that no work is lost. With
    an `offset` the first one is the `offset`-th."""
    return (clock + 1 - offset) % every == 0 or clock == last_clock


def coefficients(apply: Apply, weights: Sequence[int], microbatches: int, absent: int = 0) -> tuple[float, ...]:
    """The coefficient of each payload, where payload i is the sum of `weights[i]` microbatch gradients.

    A kind that averages takes the mean over all microbatch gradients that take part, so the update is unbiased if the
    quorum drops some. It also divides by `absent`, the weight of contributions that belong to the mean but are not here
    (below 0 for some that are here and do not). The others add the mean gradients of the steps, as if each were applied
    alone. A payload of weight 0 has coefficient 0.
    """
    if min(weights, default=1) < 0 or microbatches < 1:
        raise ValueError(f"weights {tuple(weights)} and microbatches {microbatches} must count gradients")
    each = 1 / max(sum(weights) + absent, 1) if apply.averages else 1 / microbatches
    return tuple(each if w else 0.0 for w in weights)


def shares(apply: Apply, weights: Sequence[int], absent: int = 0, summed: int = 1) -> tuple[float, ...]:
    """The coefficient of each payload that is one replica's change or parameters after `weights[i]` microbatches, or
    the sum of those of `summed` replicas, which have the same number.

    A kind that averages weighs each by its microbatches, so that a replica counts by the examples that it has seen. The
    others add the changes as they are. `absent` is as in `coefficients`.
    """
    total = max(sum(weights) + absent, 1)
    return tuple((w / total / summed if apply.averages else 1.0) if w else 0.0 for w in weights)
