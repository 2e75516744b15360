"""Says whom a clock waited for, and how long, from the times at which replicas arrived.

The replica in the middle of all is the measure. A replica is late if it arrives clearly after the middle one: by more
than twice the time from the first arrival to the middle one, which is the ordinary spread, and by more than a tenth of
the time that the middle one took; or by more than all of that time. What the clock would have saved without its late
replicas is their cost. Each part of that time is shared by the replicas that were still missing, so that two equally
slow replicas cost the same (the Shapley value of a maximum: Littlechild & Owen, A simple expression for the Shapley
value in a special case, 1973).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import msgspec

SPREADS = 2.0
"""A late replica is behind by more than so many times the ordinary spread."""
SHARE = 0.1
"""A late replica is behind by more than this share of the time that the middle replica took."""
MOST_LATE = 16
"""The most late replicas of a clock that are listed: the last ones."""


class Waits(msgspec.Struct, frozen=True):
    """What one clock waited for. All times are in seconds.

    Attributes:
        waited_s: the time from the decision before to this one.
        spread_s: the time from the first arrival that counts to the last one.
        late: (replica, how far behind the middle replica, what it cost), for replicas that were late but still counted,
            and for those that the clock waited for in vain. At most `MOST_LATE`.
    """

    waited_s: float = 0.0
    spread_s: float = 0.0
    late: tuple[tuple[int, float, float], ...] = ()


def waits(
    times: Mapping[int, float],
    members: int,
    *,
    began: float,
    start: float,
    decided: float,
    missing: Sequence[int] = (),
) -> Waits:
    """What a clock waited for. The cost beyond the two sorts is that of the late replicas.

    Args:
        times: when each replica arrived that counts, in the order of arrival.
        members: the number of replicas that can arrive.
        began: when the clock before was decided.
        start: when the middle replica could begin its work for this clock. Under staleness 0 that is `began`.
        decided: when this clock was decided.
        missing: the replicas that can arrive but had not when the clock was decided.
    """
    arrived = list(times.items())
    if not arrived:
        return Waits(waited_s=decided - began)
    first, last = arrived[0][1], arrived[-1][1]
    middle = arrived[min((members - 1) // 2, len(arrived) - 1)][1]
    took = max(middle - start, 0.0)
    on_time = punctual([time for _, time in arrived], middle, took)
    late = arrived[on_time:]
    before = arrived[on_time - 1][1]
    found = shared(late, before)
    if decided > last:  # a grace window or a time limit ended without these, and was for all of them alike
        found += [(replica, decided, (decided - last) / len(missing)) for replica in missing]
    total = decided - before
    most = decided - began - took  # what the clock took longer than the middle replica's work
    factor = min(1.0, max(most, 0.0) / total) if total > 0 else 0.0
    rows = tuple((replica, time - middle, cost * factor) for replica, time, cost in found[-MOST_LATE:])
    return Waits(decided - began, last - first, rows)


def punctual(times: Sequence[float], middle: float, took: float) -> int:
    """How many of these times, in ascending order, are not late beside the middle one, which took so long."""
    bound = middle + max(min(SPREADS * (middle - times[0]), took), SHARE * took)
    return bisect_right(times, bound)


def shared(late: Sequence[tuple[int, float]], before: float) -> list[tuple[int, float, float]]:
    """(replica, its arrival, its share of the wait after `before`) of each late replica, in the order of arrival."""
    found: list[tuple[int, float, float]] = []
    reached, share = before, 0.0
    for position, (replica, time) in enumerate(late):
        share += (time - reached) / (len(late) - position)
        reached = time
        found.append((replica, time, share))
    return found
