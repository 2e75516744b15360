"""The artificial delays of a fit: `Trainer(delays=)`, and what the workers are told of it.

A worker pauses in the tasks of each step, up to the one whose result it sends last. The simulator adds the same
seconds, so one experiment runs on both clocks with the same slow steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from flowml.arguments import seconds
from flowml.devices import Device
from flowml.errors import FlowmlError
from flowml.sim import ComputeModel

Delays = Mapping[str, float] | ComputeModel
Rows = tuple[tuple[str, tuple[float, ...]], ...]
"""(worker, seconds added to its steps). The step of clock n has element n, modulo their number."""

DRAWN = 1024
"""The most steps for which a model is drawn. The steps after them repeat these draws."""


def delays_of(given: Any) -> Delays:
    """The argument of `Trainer`, checked. Raises TypeError or ValueError for anything else."""
    if isinstance(given, ComputeModel):
        return given
    if not isinstance(given, Mapping | None):
        raise TypeError(
            f"delays={given!r} is a {type(given).__name__}; give a mapping from worker names to seconds, or a model of "
            "fm.sim"
        )
    return {worker: seconds(f"delays[{worker!r}]", delay, zero=True) for worker, delay in (given or {}).items()}


def workers_of(
    devices: Sequence[Device],
    delays: Delays,
    homes: Sequence[Device] = (),
    *,
    elastic: bool,
    lost: Collection[str] = (),
) -> tuple[str, ...]:
    """The workers of devices, in order. Raises FlowmlError if the delays name another worker that was not lost, unless
    the fit is elastic: that worker may join later. Those of `homes` have no steps that could be delayed."""
    workers = tuple(dict.fromkeys(d.worker for d in devices))
    if isinstance(delays, ComputeModel):
        delays.check(len(workers))
        return workers
    for worker in delays:
        if not elastic and worker not in (*workers, *lost):
            raise FlowmlError(f"delays names {worker!r}, which does not exist; there are {', '.join(workers)}")
        if any(home.worker == worker for home in homes):
            raise FlowmlError(
                f"delays names {worker!r}, which holds parameters (homes=) and takes no steps; name workers of replicas"
            )
    return workers


def rows_of(delays: Delays, workers: Sequence[str], seed: int, clocks: int) -> Rows:
    """The delays of workers in a fit. A model draws for worker number i, which is at position i."""
    if isinstance(delays, ComputeModel):
        numbers = np.arange(len(workers))[:, None]
        drawn = delays.drawn(seed, numbers, np.arange(min(clocks, DRAWN)))
        return tuple((worker, tuple(row)) for worker, row in zip(workers, drawn.tolist(), strict=True))
    return tuple((worker, (delay,)) for worker, delay in delays.items())
