"""Checks the options with which workers are started. A wrong one raises ClusterError before anything starts."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from flowml.errors import ClusterError
from flowml.numbers import MOST, whole_number

MAX_THREAD_WORKERS = 1024
"""The most workers inside one process. Each has threads of its own."""

MAX_DEVICES = 1024
"""The most devices of one worker. Each has a thread of its own."""


@contextmanager
def refusing() -> Generator[None]:
    """Raise ClusterError for an argument that is refused."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ClusterError(str(error)) from None


def counts(workers: object, devices_per_worker: object, *, most: int = MOST) -> tuple[int, int]:
    """The numbers of workers and devices. Raises TypeError or ValueError for numbers that cannot be."""
    return (
        whole_number("workers", workers, least=1, most=most),
        whole_number("devices_per_worker", devices_per_worker, least=1, most=MAX_DEVICES),
    )
