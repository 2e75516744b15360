"""The history of a fit: the reports of replicas become one record a step, in order of steps.

Where replicas share clocks a step is a clock. Where some may be left out its record is made of the reports of those
that the decision counts, and of no others; a clock without a decision of its own goes with the next that has one.
Where each replica runs on its own a step is as many reports as there are replicas, in order of arrival. Either way a
fit of n steps has n records. Reports are sums, and so is the weight beside them if the loss has one: a record divides
once.
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
    """What one replica reported of one clock: loss (slot 0) and aux leaves, which may come from several stages."""

    replica: int
    item: wire.Item
    values: dict[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])


def drops(training: Training) -> bool:
    """Whether a decision may leave a replica out."""
    return any(s.decided and s.need < len(training.replicas) for s in training.stores)


class History:
    """Gathers reports. A record is about the work items that count, and no others."""

    def __init__(
        self, training: Training, clocks_per_epoch: int, metrics: Metrics, *, leaves_out: bool = False
    ) -> None:
        """`leaves_out`: gradients that are not finite take no part, and so neither do losses that are not."""
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
        """By clock that is decided, and has no record yet, the replicas whose work counts."""
        self.nonfinite: dict[str, Counter[int]] = {}
        self._sums: dict[tuple[str, int], set[int]] = {}
        self._complete = 0
        self.records: list[Record] = []

    @property
    def step(self) -> int:
        """The step whose record comes next."""
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
        """The decision at `clock`: these replicas are left out, there and at the clocks since the decision before."""
        counted = frozenset(range(self._replicas)).difference(excluded)
        for earlier in range(self._decided + 1, clock + 1):
            self._counted[earlier] = counted
        self._decided = max(self._decided, clock)

    def refused(self, layer: str, clock: int, replicas: Sequence[int]) -> str | None:
        """Count gradients that were left out. One sentence to warn with, the first time that a layer has one."""
        first = layer not in self.nonfinite
        counts = self.nonfinite.setdefault(layer, Counter())
        counts.update(replicas)
        sums = self._sums.setdefault((layer, clock), set())
        sums.update(replicas)
        if not first:
            return None
        whose = f"of replica {', '.join(map(str, replicas))}" if replicas else "of all replicas together"
        return (
            f"the gradient of layer {layer!r} {whose} at step {clock} holds NaN or infinity and is left out of the "
            "update; result.ledger counts such gradients, Trainer(on_nonfinite='raise') ends the fit at the first, and "
            "'apply' applies them"
        )

    def nonfinite_counts(self) -> dict[str, dict[int, int]]:
        """By layer and replica. Sums that no replica's own gradient explains are under -1."""
        counts = {layer: dict(found) for layer, found in self.nonfinite.items()}
        for (layer, _), replicas in self._sums.items():
            if not replicas:
                counts[layer][-1] = counts[layer].get(-1, 0) + 1
        return counts

    def ready(self) -> list[Record]:
        """Records of the steps that are complete."""
        found: list[Record] = []
        while self._is_complete():
            found.append(self._close())
        return found

    def rest(self) -> list[Record]:
        """Records of all other steps, once nothing more will be reported."""
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
            kept = [u for u in kept if np.isfinite(u.values[0])]
        weight = self._weight(kept)
        record: Record = {
            "step": step,
            "epoch": step // self._clocks_per_epoch,
            "loss": float(self._total(kept, 0)) / weight if weight else math.nan,
            "replicas": len(kept),
        }
        if self._metrics.slots:
            record["aux"] = jax.tree_util.tree_unflatten(self._metrics.tree, self._aux(kept, weight))
        if self._aligned:
            self._partial = {k: u for k, u in self._partial.items() if k[1] > step}
        self.records.append(record)
        return record

    def _weight(self, units: Sequence[_Unit]) -> float:
        """What the sums of these reports are divided by: their weights, or how many microbatches they are of."""
        slot = self._metrics.weight
        return float(self._total(units, slot)) if slot is not None else float(len(units) * self._microbatches)

    def _total(self, units: Sequence[_Unit], slot: int) -> np.ndarray:
        """The sum of a slot over reports, in their order and in 64 bits."""
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
                leaves.append(total)  # more than its own dtype holds
            else:
                leaves.append(total if dtype.kind == "b" else np.asarray(total, dtype))
        return leaves


class Progress:
    """One line on stderr, rewritten a few times a second, where somebody can see it."""

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
