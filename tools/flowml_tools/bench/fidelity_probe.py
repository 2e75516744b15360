"""Measures what a simulated cluster needs to know of this machine: the costs of a step, of a message and of an apply.

One synchronous fit on real workers is recorded, with artificial delays that a model draws. Its spans have the compute
time of a step (less the delay), the time of an apply, and how long a replica waits for new parameters. The last replica
of a clock waits for two messages and the apply between them. Rates are those of the cluster's measured links.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowml.sim import ComputeModel
from flowml_tools.bench.rows import BenchError


@dataclass(frozen=True)
class Calibration:
    """The measured costs of one kind of cluster."""

    step_s: float
    """Compute time of a step."""
    latency_s: float
    """A message of small arrays, with all that a worker does to send and to receive it."""
    bytes_per_s: float
    apply_s: float

    def cluster(self, workers: int) -> Any:
        """A simulated cluster with these costs."""
        import flowml as fm

        network = fm.sim.Network(self.latency_s, self.bytes_per_s)
        homes = fm.sim.Homes(self.apply_s)
        return fm.SimulatedCluster(workers, fm.sim.Constant(self.step_s), network, homes=homes)

    def __str__(self) -> str:
        rate = "by reference" if math.isinf(self.bytes_per_s) else f"at {self.bytes_per_s / 1e9:.2g} GB/s"
        return (
            f"a step computes {self.step_s * 1e3:.2f} ms, a message takes {self.latency_s * 1e3:.2f} ms and moves "
            f"arrays {rate}, an apply takes {self.apply_s * 1e3:.2f} ms"
        )


def calibrate(cluster: Any, fit: Callable[[], object], delays: ComputeModel) -> Calibration:
    """Measure a cluster by a synchronous `fit` of a new trainer on it, whose seed is 0 and which has these delays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with cluster.trace(path):
            fit()
        events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e.get("ph") == "X"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    apply_s = statistics.median(_seconds(s) for s in _of(spans, "apply"))
    waits = statistics.median(min(by_worker.values()) for by_worker in _by_step(_of(spans, "read")).values())
    first, *_ = dict.fromkeys(d.worker for d in cluster.devices)
    others = [cluster.measure_links().between(first, d.worker) for d in cluster.devices if d.worker != first]
    return Calibration(
        step_s=max(0.0, _computed(spans, names, delays)),
        latency_s=max(0.0, waits - apply_s) / 2,
        bytes_per_s=min(link.bytes_per_s for link in others),
        apply_s=apply_s,
    )


_BUSY = ("run", "push", "fetch", "feed")


def _computed(spans: Iterable[Mapping[str, Any]], names: Mapping[int, str], delays: ComputeModel) -> float:
    """The median over workers and steps of the time in which a step neither waits for others nor is delayed."""
    found = _by_step([s for s in spans if s["cat"] in _BUSY])
    return statistics.median(
        seconds - delays.seconds(0, int(names[pid].rpartition(":")[2]), step)
        for step, by_worker in found.items()
        for pid, seconds in by_worker.items()
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
