"""Tests whether a pipeline that `auto` chose is as fast as estimated.

The first calls of such a plan are timed. If they take longer than the estimate for one device, the next calls are timed
on one device, and the faster of the two is kept. The caller passes the times in, so that the decision depends on
nothing else.
"""

from __future__ import annotations

import statistics
import threading

from flowml.placement import AutoPlacement
from flowml.plan import Choice, Plan

WARMING_CALLS = 2
"""The first calls of each plan, which are not counted, because they also pay for allocating memory and loading code."""
TIMED_CALLS = 5


class Trial:
    """The trial of one plan. Safe to use from any thread."""

    def __init__(self, one_device_s: float) -> None:
        """`one_device_s` is the estimated time of a step on one device."""
        self._estimate_s = one_device_s
        self._lock = threading.Lock()
        self._taken_s: dict[bool, list[float]] = {False: [], True: []}
        """The times of the calls on one device (True) and of those of the pipeline (False), in order."""
        self.over = False
        self.on_one_device = False
        """Whether the next call runs on one device."""

    def took(self, seconds: float, *, on_one_device: bool) -> None:
        """Count the time of a call. A call that began before the last decision is ignored."""
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
    """A trial, if `auto` chose the plan's pipeline for latency although the model fits on one device; else None."""
    asked = AutoPlacement() if placement == "auto" else placement
    if not isinstance(asked, AutoPlacement) or asked.objective != "latency" or not plan.choices:
        return None
    one_device: Choice = plan.choices[0]
    if one_device.chosen or one_device.note:  # the note says why one device is not an option
        return None
    return Trial(one_device.step_seconds)
