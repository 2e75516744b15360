"""`flowml simulate --spot`: what a fit would reach on machines that a cloud takes back and returns.

Three ways to train on them are simulated, without arithmetic, on the machines of one record:

    synchronous restart   at each change the fit starts again on the machines that are there, from the newest snapshot
    elastic               machines that leave give notice, those that come join, and no step is done twice
    decoupled             the same with local steps (`decoupled_diloco`), so that no machine waits for a slow one

*Goodput* is the examples in steps that count, by second of the whole time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from flowml.errors import FlowmlWarning, SimulationError, WorkerLostError
from flowml.policy import Policy
from flowml.policy.named import decoupled_diloco
from flowml.sim import Churn
from flowml.sim.churn import Counts, recorded_counts
from flowml_runtime.sim.cluster import SimulatedCluster
from flowml_runtime.trainer import Trainer
from flowml_tools.command import count

INTERVALS = 48
"""How many intervals of a record are replayed."""
GAP_S, NOTICE_S, RESTART_S = 30.0, 5.0, 10.0
START_S, PAUSE_S = 5.0, 0.1
"""Of a machine that comes up, beside the others; and of a fit that takes it in, as measured on real workers."""
ROUND = 32


class _Over(Exception):  # no error: the time is over
    pass


@dataclass(frozen=True)
class Spot:
    """A record of spot machines, and how it is replayed."""

    path: str
    gap_s: float = GAP_S
    notice_s: float = NOTICE_S
    restart_s: float = RESTART_S
    counts: Counts | None = field(default=None, kw_only=True)
    """What the numbers of the record count; None: the available machines, and `doubt` says if that looks wrong."""

    def __post_init__(self) -> None:
        """Raises SimulationError for times that make no sense."""
        for name, least in (("gap", 0.0), ("notice", -1.0), ("restart", -1.0)):
            seconds = getattr(self, f"{name}_s")
            if not least < seconds < math.inf or seconds < 0:
                raise SimulationError(
                    f"--spot: {name.upper()}_S={seconds:g}; give seconds {'above 0' if least == 0 else 'of at least 0'}"
                )
        if self.notice_s > self.gap_s:
            raise SimulationError(
                f"--spot: NOTICE_S={self.notice_s:g} is longer than the interval GAP_S={self.gap_s:g}, after which a "
                "machine may be gone; give less notice or longer intervals"
            )

    def churn(self, workers: int) -> Churn:
        """The machines of the first intervals. Raises FlowmlError for a record that makes no sense."""
        most = max(recorded_counts(self.path))
        if most > workers:
            raise SimulationError(
                f"--spot: {self.path} counts up to {most} machines, and the cluster has "
                f"{count(workers, 'worker')}; give "
                f"--workers {most} or more, or a record of fewer machines"
            )
        counts = self.counts or "available"
        whole = Churn.from_spot(
            self.path, counts=counts, workers=workers, gap_s=self.gap_s, start_s=START_S, pause_s=PAUSE_S
        )
        first = 0.0 if whole.up(0.0, workers) else _next_up(whole, 0.0, workers)
        if first == math.inf:
            other = "preempted" if self.counts != "preempted" else "available"
            raise SimulationError(
                f"--spot: {self.path} has no machine in any interval; give another record, or {self.path},{other} "
                f"if it counts {other} machines"
            )
        return whole.window(first, first + self.seconds)

    def doubt(self, workers: int) -> str:
        """A warning if nobody is up most of the time, and the record may count the others; "" if not."""
        if self.counts is not None:
            return ""
        churn = self.churn(workers)
        empty = sum(not churn.up(interval * self.gap_s, workers) for interval in range(INTERVALS))
        if 2 * empty <= INTERVALS:
            return ""
        return (
            f"--spot: no machine is up in {empty} of the {INTERVALS} intervals that are replayed of {self.path}; if it "
            f"counts preempted machines, add ,preempted to --spot, and if not, add ,available"
        )

    @property
    def seconds(self) -> float:
        return INTERVALS * self.gap_s

    def compared(self, trainer: Trainer, params: Any, batch: Any, state: Any, cluster: SimulatedCluster) -> str:
        """The three ways side by side, in words."""
        workers = cluster.models.workers
        churn = self.churn(workers)
        restarted = replace(churn, start_s=0.0, pause_s=self.restart_s)
        noticed = replace(churn, notice_s=self.notice_s)
        ways: Mapping[str, tuple[Any, Churn | None]] = {
            "all machines": (Policy(), None),
            "synchronous restart": (Policy(), restarted),
            "elastic": (Policy(), noticed),
            "decoupled": (decoupled_diloco(ROUND, 0.75), noticed),
        }
        lines = [f"on spot machines: {len(churn.changes)} changes of up to {workers} workers in {self.seconds:g} s"]
        most = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FlowmlWarning)
            for name, (policy, faults) in ways.items():
                examples = self._reached(trainer, params, batch, state, cluster, policy, faults)
                most = most or examples or 1.0
                lines.append(f"  {name:<20}{examples / self.seconds:10.4g} examples/s{examples / most:7.0%}")
        return "\n".join(lines)

    def _reached(
        self,
        trainer: Trainer,
        params: Any,
        batch: Any,
        state: Any,
        cluster: SimulatedCluster,
        policy: Any,
        churn: Churn | None,
    ) -> float:
        """The examples of the steps in the time. A fit that ends with its last machine is started again on the next."""
        workers, source = cluster.models.workers, jax.tree_util.tree_map(_zeros, batch)
        size = int(jax.tree_util.tree_leaves(batch)[0].shape[0])
        steps = self._steps(cluster)
        begun, reached = 0.0, 0.0
        while begun < self.seconds:
            counts: dict[int, int] = {}
            left = self.seconds - begun

            def count(record: Mapping[str, Any], counts: dict[int, int] = counts, left: float = left) -> None:
                if record["seconds"] > left:
                    raise _Over
                counts[record["step"]] = record["replicas"]

            faults = () if churn is None else (churn.window(begun, self.seconds),)
            simulated = cluster.without_arithmetic(faults=faults)
            fit = trainer.with_policies(policy, simulated).fit
            about: dict[str, Any] = {
                "batch_size": size,
                "steps": steps,
                "state": state,
                "callbacks": [count],
                "progress": False,
            }
            try:
                fit(params, source, replicas="elastic", **about)
                begun = self.seconds
            except _Over:
                begun = self.seconds
            except WorkerLostError:
                assert churn is not None
                begun = _next_up(churn, begun + simulated.session.now(), workers, self.restart_s)
            reached += sum(counts.values()) * size / trainer.spec.replicas
        return reached

    def _steps(self, cluster: SimulatedCluster) -> int:
        """More than there are in the time."""
        models = cluster.models
        drawn = models.compute.drawn(models.seed, np.arange(models.workers), np.arange(64)[:, None])
        return int(2 * self.seconds / max(float(drawn.min(axis=1).mean()), 1e-6)) + ROUND


def _next_up(churn: Churn, after_s: float, workers: int, start_s: float = 0.0) -> float:
    """When a machine, of none, has been up for so long."""
    times = (time_s + start_s for time_s, _, up in churn.changes if up and time_s >= after_s)
    return next((time_s for time_s in times if churn.up(time_s, workers)), math.inf)


def _zeros(leaf: Any) -> np.ndarray:
    return np.zeros(leaf.shape, leaf.dtype)
