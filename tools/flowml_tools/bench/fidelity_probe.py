"""Measures what a simulated cluster needs to know of this machine: the costs of a step, of a message and of an apply.

One synchronous fit on real workers is recorded, with artificial delays that a model draws. Its spans have the compute
times of its steps (less the delays), the time of an apply, and how long a replica waits for new parameters. The last
replica of a clock waits for two messages and the apply between them. Rates are those of the cluster's measured links.

Compute times vary, because the replicas share the cores of one machine, and a pause takes longer than it should. So a
simulated step draws from all times that were measured. Steps that do other work, such as several microbatches, are
measured by a fit that does this work and leaves no replica out.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowml.sim import ComputeModel
from flowml_tools.bench.rows import BenchError


@dataclass(frozen=True)
class Calibration:
    """The measured costs of one kind of cluster."""

    steps_s: tuple[float, ...]
    """Compute times of steps."""
    latency_s: float
    """A message of small arrays, with all that a worker does to send and to receive it."""
    bytes_per_s: float
    apply_s: float

    def cluster(self, workers: int, steps_s: Sequence[float] = ()) -> Any:
        """A simulated cluster with these costs, or with other compute times of steps."""
        import flowml as fm

        network = fm.sim.Network(self.latency_s, self.bytes_per_s)
        homes = fm.sim.Homes(self.apply_s)
        compute = fm.sim.Empirical(tuple(steps_s or self.steps_s))
        return fm.SimulatedCluster(workers, compute, network, homes=homes, seed=1)  # delays are drawn with seed 0

    def __str__(self) -> str:
        rate = "by reference" if math.isinf(self.bytes_per_s) else f"at {self.bytes_per_s / 1e9:.2g} GB/s"
        step_s = statistics.median(self.steps_s)
        return (
            f"a step computes {step_s * 1e3:.2f} ms, a message takes {self.latency_s * 1e3:.2f} ms and moves "
            f"arrays {rate}, an apply takes {self.apply_s * 1e3:.2f} ms"
        )


def calibrate(cluster: Any, fit: Callable[[], object], delays: ComputeModel) -> Calibration:
    """Measure a cluster by a synchronous `fit` of a new trainer on it, whose seed is 0 and which has these delays."""
    spans, names = _recorded(cluster, fit)
    apply_s = statistics.median(_seconds(s) for s in _of(spans, "apply"))
    waits = statistics.median(min(by_worker.values()) for by_worker in _by_step(_of(spans, "read")).values())
    first, *_ = dict.fromkeys(d.worker for d in cluster.devices)
    others = [cluster.measure_links().between(first, d.worker) for d in cluster.devices if d.worker != first]
    return Calibration(
        steps_s=_computed(spans, names, delays),
        latency_s=max(0.0, waits - apply_s) / 2,
        bytes_per_s=min(link.bytes_per_s for link in others),
        apply_s=apply_s,
    )


def step_times(cluster: Any, fit: Callable[[], object], delays: ComputeModel) -> tuple[float, ...]:
    """The compute times of the steps of another such fit."""
    return _computed(*_recorded(cluster, fit), delays)


def _recorded(cluster: Any, fit: Callable[[], object]) -> tuple[list[Mapping[str, Any]], Mapping[int, str]]:
    """The spans of a fit, and the name of each process in them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with cluster.trace(path):
            fit()
        events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    return [e for e in events if e.get("ph") == "X"], names


_BUSY = ("run", "push", "fetch", "feed")
WARM_UP = 4
"""The first steps of a fit are not measured: they start threads and fill caches."""


def _computed(spans: Iterable[Mapping[str, Any]], names: Mapping[int, str], delays: ComputeModel) -> tuple[float, ...]:
    """The times in which steps neither wait for others nor are delayed."""
    found = _by_step([s for s in spans if s["cat"] in _BUSY])
    return tuple(
        max(seconds - delays.seconds(0, int(names[pid].rpartition(":")[2]), step), 0.0)
        for step, by_worker in found.items()
        for pid, seconds in by_worker.items()
        if step >= min(found) + WARM_UP
    )


def _by_step(spans: Iterable[Mapping[str, Any]]) -> Mapping[int, Mapping[int, float]]:
    """Seconds by step and process, which is a worker."""
    found: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        found[int(span["args"]["step"])][span["pid"]] += _seconds(span)
    return found


def _of(spans: Iterable[Mapping[str, Any]], category: str) -> list[Mapping[str, Any]]:
    found = [s for s in spans if s["cat"] == category]
    if not found:
        raise BenchError(f"the recorded fit has no span of kind {category!r}")
    return found


def _seconds(span: Mapping[str, Any]) -> float:
    return float(span["dur"]) / 1e6
