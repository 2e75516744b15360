"""Builds the history of a fit: it combines the reports of replicas into one record per step, in order of steps.

If replicas share clocks, a step is a clock. If some replicas may be left out, a record contains only the reports of
the replicas that the decision counts; a clock without its own decision uses the next decision. If batches are cut into
portions, a step is the first report of each portion. A replica that counts may stop before its report; the record goes
without it once MAX_AHEAD newer clocks are fully reported. If each replica runs independently, a step is as many reports
as there are replicas, in order of arrival. In all cases a fit of n steps has n records. Reports are sums, and so is
their weight if the loss has one, so that a record divides only once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

from flowml.arrays import unheard
from flowml.plan import Training
from flowml.training.buckets import layers_of
from flowml.training.step import Metrics
from flowml_runtime import wire
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.worker.training.finite import sender

Record = dict[str, Any]

MAX_AHEAD = 8
"""How many newer clocks may be fully reported while a record waits for the report of a replica that counts. A replica
reports a clock before it starts the next one, so only a replica that has stopped falls so far behind."""

NEWS_STEPS = 2
"""How many steps later than its loss a gradient may be reported as left out."""


class _Unit(msgspec.Struct):
    """The report of one replica for one clock: loss (slot 0) and aux leaves, which may come from several stages."""

    replica: int
    item: wire.Item
    step: int
    values: dict[int, np.ndarray] | tuple[np.ndarray, ...] = {}
    """By slot. A tuple if one report has them all, which takes less memory."""
    coefficient: float | None = None
    """What the values are multiplied by before they are added up; None without a code."""


def drops(training: Training) -> bool:
    """Whether a decision may leave a replica out."""
    return Terms.of(training, 0).drops


class History:
    """Gathers reports into records. A record contains only the work items that count."""

    def __init__(
        self,
        training: Training,
        clocks_per_epoch: int,
        metrics: Metrics,
        *,
        leaves_out: bool = False,
        first: int = 0,
        done: int = 0,
    ) -> None:
        """`leaves_out`: losses that are not finite are left out and counted, as such gradients are. `first` is the step
        of the first record. `done` is the number of work items that were used before."""
        self._training = training
        self._first = first
        self._leaves_out = leaves_out
        self._members = training.items
        self._portions = training.speculation is not None
        absent = () if self._portions else training.lost  # others compute the portions of lost replicas
        self._able = frozenset(range(self._members)).difference(absent)
        """The members of a clock that report it if they are not left out. Not each decision names lost replicas."""
        self._row = len(self._able)
        """The reports of a step of replicas that share clocks, if none is left out."""
        self._microbatches = training.microbatches
        self._coded_microbatches = float(training.microbatches / training.code.load) if training.code else 0.0
        """The microbatches of a global batch that is coded; 0 without a code."""
        self._aligned = any(s.policy.aligns for s in training.stores)
        self._clocks_per_epoch = clocks_per_epoch
        self._ends_early = any(s.policy.epoch_share is not None for s in training.stores)
        self._slots = 1 + training.aux_leaves
        self._all_slots = tuple(range(self._slots))
        self._metrics = metrics
        self._partial: dict[tuple[int, int], _Unit] = {}
        self._open: dict[int, dict[int, _Unit]] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._drops = drops(training)
        self._decided = first - 1
        self._counted: dict[int, frozenset[int]] = {}
        """Decided clock without a record -> the replicas whose work counts."""
        self._coefficients: dict[int, Mapping[int, float]] = {}
        """The same -> with a code, the coefficients of these replicas, which decode the mean over microbatches."""
        self.nonfinite: dict[str, Counter[int]] = {}
        self._sums: dict[tuple[str, int], set[int]] = {}
        self.nonfinite_losses: Counter[int] = Counter()
        """By replica, the losses that were left out of a record."""
        self._left_out: tuple[int, int, bool] | None = None
        """(step, replica, whether its weight is at fault) of the first such loss, until there is a warning of it."""
        if not self._aligned:
            self._row = self._members
        self._complete = first * self._row if self._aligned else done
        self._before = self._complete - first * self._row
        """Those reports of the first step that came before, in a fit that goes on."""
        self.records: list[Record] = []

    @property
    def step(self) -> int:
        """The step of the next record."""
        return self._first + len(self.records)

    @property
    def reached(self) -> int:
        """The number of steps that are reported in full, if replicas share no clocks."""
        return self._complete // self._row

    def filled(self, used: int) -> int:
        """The number of steps that so many used items fill. There may be more reports, of steps that are done again
        because what they made was lost with their replica, and fewer: a silent replica does not report its last
        steps."""
        return used // self._row

    def missed(self, replica: int, items: Sequence[wire.Item]) -> None:
        """These steps of a lost replica count, and it could not report them any more."""
        for item in items:
            step, place = divmod(self._complete, self._members)
            self._complete += 1
            if step >= self.step:
                self._open.setdefault(step, {}).setdefault(place, _Unit(replica, item, step))

    def report(self, report: wire.Report, arrays: Sequence[Any]) -> None:
        step, place = report.clock, report.replica
        key = (place, step)
        if self._portions:
            step, place = divmod(report.item.sequence, self._members)
        unit = self._partial.pop(key, None) if self._partial else None
        if unit is None:
            unit = _Unit(report.replica, report.item, step)
        if report.slots == self._all_slots:
            unit.values = tuple(map(np.asarray, arrays))
        elif isinstance(unit.values, dict):
            unit.values |= zip(report.slots, map(np.asarray, arrays), strict=True)
        if len(unit.values) < self._slots:
            self._partial[key] = unit
            return
        if not self._aligned:
            step, place = divmod(self._complete, self._members)
        self._complete += 1
        if step >= self.step:
            self._open.setdefault(step, {}).setdefault(place, unit)

    def committed(self, clock: int, excluded: Collection[int], coefficients: Sequence[tuple[int, float]] = ()) -> None:
        """Process the decision at `clock`: it leaves these replicas out, at all clocks since the previous decision.

        With a code it counts those that have a coefficient.
        """
        counted = self._able.difference(excluded)
        if coefficients:
            self._coefficients[clock] = dict(coefficients)
            counted = frozenset(self._coefficients[clock])
        for earlier in range(self._decided + 1, clock + 1):
            self._counted[earlier] = counted
        self._decided = max(self._decided, clock)

    def refused(self, store: int, clock: int, replicas: Sequence[int], *, weight: bool = False) -> str | None:
        """Count gradients that were left out, for each layer of a bucket. Returns one sentence for a warning, the first
        time for each store. The `weight` of these replicas may be at fault."""
        spec = self._training.stores[store]
        layers = layers_of(spec)
        first = layers[0] not in self.nonfinite
        for layer in layers:
            self.nonfinite.setdefault(layer, Counter()).update(replicas)
            self._sums.setdefault((layer, clock), set()).update(replicas)
        if not first:
            return None
        layer, terms = spec.name, Terms.of(self._training, 0).stores[store]
        whose = f"of {' and '.join(sender(terms, r) for r in replicas)}" if replicas else "of all replicas together"
        what = f"the gradient of layer {layer!r} {whose} at step {clock} holds NaN or infinity and is"
        if weight:
            what = f"the weight {whose} at step {clock} is below 0 or not finite; the gradient of layer {layer!r} is"
        return (
            f"{what} left out of the update; result.ledger counts such gradients, Trainer(on_nonfinite='raise') ends "
            "the fit at the first, and 'apply' applies them"
        )

    def why_not_finite(self, report: wire.Report, arrays: Sequence[Any]) -> str | None:
        """What is wrong with the loss of a report, or with its weight, as a sentence; None if both are finite."""
        values = dict(zip(report.slots, arrays, strict=True))
        out = (
            "Trainer(on_nonfinite='refuse') to leave such losses out of the history, and such gradients out of the "
            "update"
        )
        if self._metrics.weight in values and not np.isfinite(values[self._metrics.weight]):
            return (
                f"the weight of replica {report.replica} is below 0 or not finite; give weights that are finite and at "
                f"least 0 by Trainer(weight=), or {out}"
            )
        if 0 in values and not np.isfinite(values[0]):
            return (
                f"the loss of replica {report.replica} is {float(values[0])}; lower the learning rate or look at the "
                f"data of this step, or give {out}"
            )
        return None

    def loss_warning(self, *, over: bool = False) -> str | None:
        """One sentence for a warning, once, if a loss was left out although no gradient was.

        It waits for a few more records, unless the fit is `over`, because a gradient may be reported after its loss.
        """
        if self._left_out is None or (not over and self.step <= self._left_out[0] + NEWS_STEPS):
            return None
        (step, replica, weight), self._left_out = self._left_out, None
        if self.nonfinite:
            return None  # there was a warning of its gradient
        what = f"the loss of replica {replica} at step {step} is NaN or infinite although its gradients are finite"
        if weight:
            what = (
                f"the weight of replica {replica} at step {step} is below 0 or not finite, and its gradients have none"
            )
        return (
            f"{what}; they are applied, and the loss is left out of the record; result.ledger counts such losses, and "
            "Trainer(on_nonfinite='raise') ends the fit at the first"
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

    def rest(self, steps: int = 0) -> list[Record]:
        """Records of all remaining steps, after the last report: of so many at least."""
        found: list[Record] = []
        while self.step < steps or (self._open and self.step <= max(self._open)):
            found.append(self._close())
        return found

    def _is_complete(self) -> bool:
        step = self.step
        if not self._drops and not self._portions:
            units = self._open.get(step)
            before = 0 if self.records else self._before
            return units is not None and len(units) + before == self._row
        if self._drops and step not in self._counted:
            return False
        return self._is_full(step) or (
            len(self._open) >= MAX_AHEAD and sum(map(self._is_full, self._open)) >= MAX_AHEAD
        )

    def _is_full(self, step: int) -> bool:
        """Whether a decision has been made, and every member that it counts has reported."""
        reported = self._open.get(step, {})
        if self._portions:
            return len(reported) == self._row
        counted = self._counted.get(step)
        return counted is not None and counted <= reported.keys()

    def _close(self) -> Record:
        step = self.step
        units = self._open.pop(step, {})
        used = self._counted.pop(step, units.keys() if not self._drops else ())
        reported = ((place, unit) for place, unit in units.items() if len(unit.values))
        kept = sorted((unit for place, unit in reported if place in used), key=lambda u: u.item.sequence)
        for unit in tuple(units.values())[-1:]:  # each has every slot
            found = unit.values.items() if isinstance(unit.values, dict) else enumerate(unit.values)
            self._shapes.update((slot, value.shape) for slot, value in found)
        coefficients = self._coefficients.pop(step, {})
        for unit in kept if coefficients else ():
            unit.coefficient = coefficients[unit.replica] * self._coded_microbatches
        if self._leaves_out:
            kept = self._finite(step, kept)
        if len(kept) < len(coefficients):
            kept = []  # without one of its replicas a code decodes nothing
        weight = self._weight(kept)
        record: Record = {
            "step": step,
            "epoch": self._epoch(step, units),
            "loss": float(self._total(kept, 0)) / weight if weight else math.nan,
            "replicas": len({u.replica for u in kept}) if weight else 0,  # a mean over nothing has no terms
        }
        if self._metrics.slots:
            record["aux"] = jax.tree_util.tree_unflatten(self._metrics.tree, self._aux(kept, weight))
        if self._aligned:
            self._partial = {k: u for k, u in self._partial.items() if u.step > step}
        self.records.append(record)
        return record

    def _epoch(self, step: int, units: Mapping[int, _Unit]) -> int:
        """The epoch of a step. Where epochs end early it is that of the newest item in it."""
        if self._ends_early and units:
            return max(unit.item.epoch for unit in units.values())
        return step // self._clocks_per_epoch

    def _finite(self, step: int, units: Sequence[_Unit]) -> list[_Unit]:
        """The reports whose loss and weight are finite. Counts the others."""
        finite: list[_Unit] = []
        for unit in units:
            weight = not math.isfinite(self._weight([unit]))
            if np.isfinite(unit.values[0]) and not weight:
                finite.append(unit)
                continue
            if not self.nonfinite_losses:
                self._left_out = step, unit.replica, weight
            self.nonfinite_losses[unit.replica] += 1
        return finite

    def _weight(self, units: Sequence[_Unit]) -> float:
        """The divisor for the sums of these reports: their weight, or their number of microbatches."""
        slot = self._metrics.weight
        if slot is not None:
            return float(self._total(units, slot))
        return self._coded_microbatches * bool(units) or float(len(units) * self._microbatches)

    def _total(self, units: Sequence[_Unit], slot: int) -> np.ndarray:
        """The sum of a slot over reports, added in their order and in 64 bits."""
        values: list[Any] = [v if c is None else v * c for v, c in ((u.values[slot], u.coefficient) for u in units)]
        values = values or [np.zeros(self._shapes.get(slot, ()))]
        wide = np.result_type(values[0].dtype, np.float64) if values[0].dtype.kind in "fc" else values[0].dtype
        with unheard():
            return np.sum(values, axis=0, dtype=wide)

    def _aux(self, units: Sequence[_Unit], weight: float) -> list[np.ndarray]:
        metrics = self._metrics
        leaves: list[np.ndarray] = []
        for slot, name, is_sum in zip(metrics.slots, metrics.dtypes, metrics.summed, strict=True):
            total, dtype = self._total(units, slot), np.dtype(name)
            if self._coded_microbatches and dtype.kind in "biu":
                total = np.rint(total).astype(np.int64)  # a decoded count is whole but for rounding errors
            if not is_sum:
                leaves.append(np.asarray(total / (weight or math.nan), dtype))
            elif dtype.kind in "iu" and np.any(total != total.astype(dtype)):
                leaves.append(total)  # the sum exceeds the range of the leaf's dtype
            else:
                leaves.append(total if dtype.kind == "b" else np.asarray(total, dtype))
        return leaves
