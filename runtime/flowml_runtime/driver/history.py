"""The history of a fit: the reports of replicas become one record a step, in order of steps.

Where replicas share clocks a step is a clock, complete when every replica has reported it or cannot be in it
any more. Where each runs on its own a step is as many reports as there are replicas, in order of arrival. Either way
a fit of n steps has n records.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from flowml.plan import Training
from flowml_runtime import wire
from flowml_runtime.execution.streams import on_terminal

Record = dict[str, Any]


@dataclass
class _Unit:
    """What one replica reported of one clock: loss (slot 0) and aux leaves, which may come from several stages."""

    replica: int
    item: wire.Item
    values: dict[int, np.ndarray] = field(default_factory=dict[int, np.ndarray])


class History:
    """Gathers reports. The losses of work items that are known to be dropped are left out of the means."""

    def __init__(self, training: Training, clocks_per_epoch: int, aux_tree: Any, aux_slots: Sequence[int]) -> None:
        """`aux_slots`: for each leaf of `aux_tree` the fetch slot that it comes in."""
        self._replicas = len(training.replicas)
        self._aligned = any(s.clocked for s in training.stores)
        self._droppable = any(s.clocked and s.need < self._replicas for s in training.stores)
        self._clocks_per_epoch = clocks_per_epoch
        self._slots = 1 + training.aux_leaves
        self._aux_tree = aux_tree
        self._aux_slots = tuple(aux_slots)
        self._partial: dict[tuple[int, int], _Unit] = {}
        self._open: dict[int, list[_Unit]] = {}
        self._dropped: set[int] = set()
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
        self._complete += 1
        if step >= self.step:
            self._open.setdefault(step, []).append(unit)

    def settled(self, fates: Sequence[tuple[wire.Item, str]]) -> None:
        self._dropped.update(item.sequence for item, fate in fates if fate == "dropped")

    def ready(self) -> list[Record]:
        """Records of the steps that are complete."""
        found: list[Record] = []
        while self._is_complete():
            found.append(self._close())
        return found

    def rest(self) -> list[Record]:
        """Records of all other steps, once nothing more will be reported."""
        found: list[Record] = []
        while self.step in self._open:
            found.append(self._close())
        return found

    def _is_complete(self) -> bool:
        units = self._open.get(self.step)
        if units is None:
            return False
        # Who is two steps behind the others has been left out, where a quorum allows that.
        return len(units) == self._replicas or (self._droppable and max(self._open) > self.step + 1)

    def _close(self) -> Record:
        step = self.step
        units = sorted(self._open.pop(step), key=lambda u: u.item.sequence)
        kept = [u for u in units if u.item.sequence not in self._dropped] or units
        record: Record = {
            "step": step,
            "epoch": step // self._clocks_per_epoch,
            "loss": float(np.mean([float(u.values[0]) for u in kept])),
            "replicas": len(kept),
        }
        if self._aux_slots:
            leaves = [_over_replicas([u.values[s] for u in kept]) for s in self._aux_slots]
            record["aux"] = jax.tree_util.tree_unflatten(self._aux_tree, leaves)
        if self._aligned:
            self._partial = {k: u for k, u in self._partial.items() if k[1] > step}
        self.records.append(record)
        return record


def _over_replicas(values: Sequence[np.ndarray]) -> np.ndarray:
    """Floating values are averaged over the replicas, counts are summed."""
    total = sum(values[1:], values[0])
    return total if values[0].dtype.kind in "iub" else np.asarray(total / len(values), values[0].dtype)


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
