"""Builds the history of a fit: it combines the reports of replicas into one record per step, in order of steps.

If replicas share clocks, a step is a clock. If some replicas may be left out, a record contains only the reports of
the replicas that the decision counts; a clock without its own decision uses the next decision. If each replica runs
independently, a step is as many reports as there are replicas, in order of arrival. In all cases a fit of n steps has
n records. Reports are sums, and so is their weight if the loss has one, so that a record divides only once.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from flowml.plan import Training
from flowml.training.step import Metrics
from flowml_runtime import wire
from flowml_runtime.execution.streams import on_terminal

Record = dict[str, Any]


@dataclass
class _Unit:
    """The report of one replica for one clock: loss (slot 0) and aux leaves, which may come from several stages."""

    replica: int
    item: wire.Item
    values: dict[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])


def drops(training: Training) -> bool:
    """Whether a decision may leave a replica out."""
    return any(s.decided and s.need < len(training.replicas) for s in training.stores)


class History:
    """Gathers reports into records. A record contains only the work items that count."""

    def __init__(
        self, training: Training, clocks_per_epoch: int, metrics: Metrics, *, leaves_out: bool = False
    ) -> None:
        """`leaves_out`: gradients that are not finite are left out, and therefore such losses are left out too."""
        self._leaves_out = leaves_out
        self._replicas = len(training.replicas)
        self._microbatches = training.microbatches
        self._aligned = any(s.clocked for s in training.stores)
        self._clocks_per_epoch = clocks_per_epoch
        self._slots = 1 + training.aux_leaves
        self._metrics = metrics
        self._partial: dict[tuple[int, int], _Unit] = {}
        self._open: dict[int, dict[int, _Unit]] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._drops = drops(training)
        self._decided = -1
        self._counted: dict[int, frozenset[int]] = {}
        """Decided clock without a record -> the replicas whose work counts."""
        self.nonfinite: dict[str, Counter[int]] = {}
        self._sums: dict[tuple[str, int], set[int]] = {}
        self._complete = 0
        self.records: list[Record] = []

    @property
    def step(self) -> int:
        """The step of the next record."""
        return len(self.records)

    def report(self, report: wire.Report, arrays: Sequence[Any]) -> None:
        key = (report.replica, report.clock)
        unit = self._partial.setdefault(key, _Unit(report.replica, report.item))
        unit.values.update((slot, np.asarray(a)) for slot, a in zip(report.slots, arrays, strict=True))
        if len(unit.values) < self._slots:
            return
        del self._partial[key]
        step = report.clock if self._aligned else self._complete // self._replicas
        place = report.replica if self._aligned else self._complete % self._replicas
        self._complete += 1
        if step >= self.step:
            self._open.setdefault(step, {})[place] = unit

    def committed(self, clock: int, excluded: Collection[int]) -> None:
        """Process the decision at `clock`: it leaves these replicas out, at all clocks since the previous decision."""
        counted = frozenset(range(self._replicas)).difference(excluded)
        for earlier in range(self._decided + 1, clock + 1):
            self._counted[earlier] = counted
        self._decided = max(self._decided, clock)

    def refused(self, layer: str, clock: int, replicas: Sequence[int]) -> str | None:
        """Count gradients that were left out. Returns one sentence for a warning, the first time for each layer."""
        first = layer not in self.nonfinite
        counts = self.nonfinite.setdefault(layer, Counter())
        counts.update(replicas)
        sums = self._sums.setdefault((layer, clock), set())
        sums.update(replicas)
        if not first:
            return None
        whose = f"of replica {', '.join(map(str, replicas))}" if replicas else "of all replicas together"
        weights = "" if self._metrics.weight is None else " (as it does if a weight is below 0 or not finite)"
        return (
            f"the gradient of layer {layer!r} {whose} at step {clock} holds NaN or infinity{weights} and is left out "
            "of the update; result.ledger counts such gradients, Trainer(on_nonfinite='raise') ends the fit at the "
            "first, and 'apply' applies them"
        )

    def nonfinite_counts(self) -> dict[str, dict[int, int]]:
        """Counts by layer and replica. Sums that are not finite although every gradient was are under replica -1."""
        counts = {layer: dict(found) for layer, found in self.nonfinite.items()}
        for (layer, _), replicas in self._sums.items():
            if not replicas:
                counts[layer][-1] = counts[layer].get(-1, 0) + 1
        return counts

    def ready(self) -> list[Record]:
        """Records of the steps that are now complete."""
        found: list[Record] = []
        while self._is_complete():
            found.append(self._close())
        return found

    def rest(self) -> list[Record]:
        """Records of all remaining steps, after the last report."""
        found: list[Record] = []
        while self._open and self.step <= max(self._open):
            found.append(self._close())
        return found

    def _is_complete(self) -> bool:
        units = self._open.get(self.step, {})
        if not self._drops:
            return len(units) == self._replicas
        counted = self._counted.get(self.step)
        return counted is not None and counted <= units.keys()

    def _close(self) -> Record:
        step = self.step
        units = self._open.pop(step, {})
        used = self._counted.pop(step, units.keys() if not self._drops else ())
        kept = sorted((u for place, u in units.items() if place in used), key=lambda u: u.item.sequence)
        for unit in units.values():
            self._shapes.update((slot, value.shape) for slot, value in unit.values.items())
        if self._leaves_out:
            kept = [u for u in kept if np.isfinite(u.values[0]) and math.isfinite(self._weight([u]))]
        weight = self._weight(kept)
        record: Record = {
            "step": step,
            "epoch": step // self._clocks_per_epoch,
            "loss": float(self._total(kept, 0)) / weight if weight else math.nan,
            "replicas": len(kept) if weight else 0,  # a mean over nothing has no terms
        }
        if self._metrics.slots:
            record["aux"] = jax.tree_util.tree_unflatten(self._metrics.tree, self._aux(kept, weight))
        if self._aligned:
            self._partial = {k: u for k, u in self._partial.items() if k[1] > step}
        self.records.append(record)
        return record

    def _weight(self, units: Sequence[_Unit]) -> float:
        """The divisor for the sums of these reports: their weight, or their number of microbatches."""
        slot = self._metrics.weight
        return float(self._total(units, slot)) if slot is not None else float(len(units) * self._microbatches)

    def _total(self, units: Sequence[_Unit], slot: int) -> np.ndarray:
        """The sum of a slot over reports, added in their order and in 64 bits."""
        values = [u.values[slot] for u in units] or [np.zeros(self._shapes.get(slot, ()))]
        wide = np.result_type(values[0].dtype, np.float64) if values[0].dtype.kind in "fc" else values[0].dtype
        return np.sum(values, axis=0, dtype=wide)

    def _aux(self, units: Sequence[_Unit], weight: float) -> list[np.ndarray]:
        metrics = self._metrics
        leaves: list[np.ndarray] = []
        for slot, name, is_sum in zip(metrics.slots, metrics.dtypes, metrics.summed, strict=True):
            total = self._total(units, slot)
            dtype = np.dtype(name)
            if not is_sum:
                leaves.append(np.asarray(total / (weight or math.nan), dtype))
            elif dtype.kind in "iu" and np.any(total != total.astype(dtype)):
                leaves.append(total)  # the sum exceeds the range of the leaf's dtype
            else:
                leaves.append(total if dtype.kind == "b" else np.asarray(total, dtype))
        return leaves


class Progress:
    """One line on stderr that is rewritten a few times a second, if stderr is a terminal."""

    def __init__(self, total: int, wanted: bool | None) -> None:
        self._total = total
        self._shown = on_terminal() if wanted is None else wanted and sys.stderr is not None
        self._next_s = time.monotonic() + 0.5
        self._open = False

    def show(self, record: Record) -> None:
        now = time.monotonic()
        if not self._shown or now < self._next_s:
            return
        self._next_s = now + 0.25
        self._open = True
        rate = (record["step"] + 1) / max(record["seconds"], 1e-9)
        line = f"step {record['step'] + 1}/{self._total}  epoch {record['epoch']}  loss {record['loss']:.4f}"
        sys.stderr.write(f"\r\x1b[K{line}  {rate:.1f} steps/s")
        sys.stderr.flush()

    def close(self) -> None:
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
