"""Whether a pipeline that `auto` chose is as fast as it promised.

The choice is by estimate. The first calls of such a plan are timed; if they take longer than one device was estimated
to take, the same calls are timed on one device, and the faster of the two is kept. Times come in from outside, so that
the decision is the same wherever they come from.
"""

from __future__ import annotations

import statistics
import threading

from flowml.placement import AutoPlacement
from flowml.plan import Choice, Plan

WARMING_CALLS = 2
"""Of each plan, not counted: the first ones also pay for memory and code that the others find there."""
TIMED_CALLS = 5


class Trial:
    """Of one plan. Safe to use from any thread."""

    def __init__(self, one_device_s: float) -> None:
        """`one_device_s` is what a step was estimated to take on one device."""
        self._estimate_s = one_device_s
        self._lock = threading.Lock()
        self._taken_s: dict[bool, list[float]] = {False: [], True: []}
        """Of the calls on one device (True) and of those of the pipeline, in order."""
        self.over = False
        self.on_one_device = False
        """Where the next call belongs."""

    def took(self, seconds: float, *, on_one_device: bool) -> None:
        """Take in the time of a call. One that began before the last decision counts for nothing."""
        with self._lock:
            if self.over or on_one_device != self.on_one_device:
                return
            taken_s = self._taken_s[on_one_device]
            taken_s.append(seconds)
            if len(taken_s) < WARMING_CALLS + TIMED_CALLS:
                return
            if on_one_device:
                self.over, self.on_one_device = True, self._median_s(True) < self._median_s(False)
            elif self._median_s(False) <= self._estimate_s:
                self.over = True
            else:
                self.on_one_device = True

    def _median_s(self, on_one_device: bool) -> float:
        return statistics.median(self._taken_s[on_one_device][WARMING_CALLS:])


def trial_of(plan: Plan, placement: object) -> Trial | None:
    """The trial of a plan whose pipeline `auto` chose for latency though the model fits on one device, else None."""
    asked = AutoPlacement() if placement == "auto" else placement
    if not isinstance(asked, AutoPlacement) or asked.objective != "latency" or not plan.choices:
        return None
    one_device: Choice = plan.choices[0]
    if one_device.chosen or one_device.note:  # the note says why one device does not do
        return None
    return Trial(one_device.step_seconds)
