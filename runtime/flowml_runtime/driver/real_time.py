"""The time of a fit on real workers. A simulated cluster has another (`sim.session`)."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import TypeVar

from flowml_runtime import service
from flowml_runtime.protocol.training.driver import TrainingDriver

T = TypeVar("T")

LOOK_UP_S = 1.0
"""How often a fit that receives no messages checks that its cluster still exists."""


class RealTime:
    """Implements `training_session.Time`."""

    driver = TrainingDriver

    def now(self) -> float:
        return time.monotonic()

    def next(self, inbox: queue.SimpleQueue[T], until: float, *, patient: bool) -> T:
        return inbox.get(timeout=max(0.0, min(LOOK_UP_S, until - time.monotonic())))

    def begin_fit(self, *, goes_on: bool) -> None:
        """Nothing depends on when a fit begins."""

    def beside(self, name: str, act: Callable[[], None], failed: Callable[[str], None]) -> None:
        service.start(name, act, failed)

    def simulated(self) -> None:
        return None
