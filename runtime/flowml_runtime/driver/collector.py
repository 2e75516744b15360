"""Pauses the collector of cyclic garbage while very many objects are made that stay.

Each of its full passes looks at all objects. So while the plan of a million workers is made, it would take more time
than the plan.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

MANY = 1000
"""With so many workers or more it pays."""


@contextmanager
def paused_collector(workers: int) -> Generator[None]:
    """Pause the collector within the block, if there are many workers."""
    pauses = workers >= MANY and gc.isenabled()
    if pauses:
        gc.disable()
    try:
        yield
    finally:
        if pauses:
            gc.enable()
