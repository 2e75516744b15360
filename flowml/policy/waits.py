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
        spare_s: how much earlier the decision would have been, on average, if one replica that it leaves out had been
            like those that arrived; 0 if it leaves out none, or did not come with an arrival.
    """

    waited_s: float = 0.0
    spread_s: float = 0.0
    late: tuple[tuple[int, float, float], ...] = ()
    spare_s: float = 0.0


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
    spare = _spare([time for _, time in arrived], members) if missing and decided <= last else 0.0
    return Waits(decided - began, last - first, rows, spare)


def _spare(times: Sequence[float], members: int) -> float:
    """How much earlier the last of these arrivals would be on average, if one of `members` more were like the others.

    That one is as likely between any two of the others. Before the last but one of k arrivals it makes that one the
    last, and between the last two it is the last itself: in the middle of them, on average.
    """
    count = len(times)
    return (times[-1] - times[-2]) * (count - 0.5) / members if count > 1 else 0.0


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


def side_by_side(sites: Sequence[Waits], whole: Waits | None) -> Waits:
    """What a clock waited for that is over when all of these sites have decided. `whole` is about the clock itself.

    Without their late replicas it would be over when the slowest of the others is. The time after that is shared by the
    sites that were still missing, as in `waits`.
    """
    costs = [sum(cost for *_, cost in site.late) for site in sites]
    before = max(site.waited_s - cost for site, cost in zip(sites, costs, strict=True))
    order = sorted((site.waited_s, number) for number, site in enumerate(sites))
    share = {n: cost for n, _, cost in shared([(n, waited) for waited, n in order if waited > before], before)}
    late = [
        (replica, behind, cost * share.get(number, 0.0) / costs[number] if cost else 0.0)
        for number, site in enumerate(sites)
        for replica, behind, cost in site.late
    ]
    late.sort(key=lambda found: -found[2])
    longest = sites[order[-1][1]]
    spare = min(longest.spare_s, longest.waited_s - (order[-2][0] if len(order) > 1 else 0.0))
    about = whole or Waits(longest.waited_s, max(site.spread_s for site in sites))
    return Waits(about.waited_s, about.spread_s, tuple(late[:MOST_LATE]), spare)
