"""Says how long replicas stand for a snapshot that a late one holds up. Then it is withdrawn, and taken later."""

from __future__ import annotations

LEAST_S = 1.0
"""Replicas stand at least so long."""
STEPS = 3
"""And at least as long as so many steps take in the mean."""
AS_BEFORE = 2
"""And at least so many times as long as for the snapshot before."""


class Patience:
    """The patience of one run. After each snapshot that is withdrawn it is twice as long, until one is taken: so one is
    taken also if some replica always needs much longer for a step than the others."""

    def __init__(self) -> None:
        self._times = 1
        self._took_s = 0.0
        self._since_s: float | None = None
        self._heard, self._end_s = 0, 0.0

    def until(self, step_s: float, now: float, heard: int) -> float:
        """The time at which to withdraw the snapshot for which replicas stand.

        Args:
            step_s: how long a step takes in the mean.
            heard: how much has come of the snapshot. The time begins anew when more comes.
        """
        if self._since_s is None:
            self._since_s, self._heard = now, 0
        if heard > self._heard:
            self._heard = heard
            self._end_s = now + self._times * max(LEAST_S, STEPS * step_s, AS_BEFORE * self._took_s)
        return self._end_s

    def withdrawn(self) -> None:
        """The snapshot has been withdrawn."""
        self._times *= 2
        self._since_s = None

    def went_on(self) -> None:
        """A snapshot without late replicas has been taken, which says nothing of how long theirs takes."""
        self._since_s = None

    def taken(self, now: float) -> None:
        """A snapshot has been taken."""
        self._took_s = 0.0 if self._since_s is None else now - self._since_s
        self._times, self._since_s = 1, None
