"""Measures what the kill of a process costs a fit that goes on, beside one that is started again.

Ours is `fit(on_loss="replace")`: a spare takes the worker's place, or the process is started again, and the fit goes on
from the newest snapshot in the driver's memory. The peer ends with the error of the loss, as most training does. It
then starts a new cluster in the same Python process, and goes on from its newest checkpoint. A new interpreter and JAX
would take a few seconds more. Both write checkpoints equally often, and train the same model on the same examples with
the same kills.

The gap after a kill is the longest time between two new steps soon after it. It includes that others notice the loss,
that a process starts and loads the plan, and that steps since the snapshot are done again. Goodput is the time of a fit
without kills divided by that of one with them. Delays make steps long beside what they compute.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from flowml_tools.bench import left_behind, lost, suspended
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.stragglers import loss, problem
from flowml_tools.bench.timing import interleave

SUMMARY = (
    "the kill of a worker, the coordinator or the driver: a fit that goes on against a restart from its checkpoint"
)
REPEATS = 5
REPLICAS, STEPS, KILLS = 4, 100, 3
PAUSE_S = 0.02
EVERY_STEPS = 10
"""Between two checkpoints."""
SOON = 12
"""How many new steps after a kill are looked at: the workers are a few ahead of the driver."""
VICTIMS = {"home": "worker:0", "worker": "worker:3"}
"""The two layers have their homes on the first two workers."""
LIMIT_S = 5.0

Start = Callable[[], Any]


class Kills:
    """A callback that kills a worker at some steps, once each, and notes when it sees each step first."""

    def __init__(self, victim: str, steps: Sequence[int]) -> None:
        self._victim = victim
        self._left = set(steps)
        self._kills: list[int] = []
        self._times: list[float] = []
        """When each step was seen first."""
        self.cluster: Any = None

    def __call__(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if step == len(self._times):
            self._times.append(time.perf_counter())
        if step in self._left:
            self._left.remove(step)
            self._kills.append(step)
            self.cluster.end_worker(self._victim)

    def seconds(self) -> float:
        """Since the first step. Programs were compiled before it."""
        return time.perf_counter() - self._times[0]

    def gaps(self) -> list[float]:
        """By kill the longest time between two new steps soon after it."""
        after = (self._times[step : step + SOON] for step in self._kills)
        return [max(b - a for a, b in pairwise(times)) for times in after]


class Fits:
    """Fits of one kind. `gaps` has what their kills cost, and `goodput` is measured fit by fit."""

    def __init__(self, start: Start, victim: str, steps: int, *, goes_on: bool) -> None:
        """`goes_on`: ours, not the peer."""
        self._start, self._victim, self._steps, self._goes_on = start, victim, steps, goes_on
        self.gaps: list[float] = []

    def goodput(self) -> float:
        """The time of a fit without kills divided by that of one with them."""
        whole, _ = self._timed(())
        killed, kills = self._timed([n * self._steps // (KILLS + 1) for n in range(1, KILLS + 1)])
        self.gaps += kills.gaps()
        return whole / killed

    def _timed(self, steps: Sequence[int]) -> tuple[float, Kills]:
        """The seconds of a fit from its first step to its result."""
        kills = Kills(self._victim, steps)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")  # each loss is a warning
            kills.cluster = stack.enter_context(self._start())
            while not self._is_done(kills, folder):
                kills.cluster.close()
                kills.cluster = stack.enter_context(self._start())
            return kills.seconds(), kills

    def _is_done(self, kills: Kills, folder: str) -> bool:
        """Train to the end, or to the loss of a worker that ends the fit."""
        import optax

        import flowml as fm

        params, train, _ = problem(0)
        delays = {f"worker:{i}": PAUSE_S for i in range(REPLICAS)}
        trainer = fm.Trainer(loss, optax.adam(0.01), cluster=kills.cluster, replicas=REPLICAS, delays=delays)
        try:
            trainer.fit(
                params,
                train,
                batch_size=64,
                steps=self._steps,
                callbacks=[kills],
                progress=False,
                checkpoint=fm.Checkpoint(folder, every_steps=EVERY_STEPS),
                resume="auto",
                on_loss="replace" if self._goes_on else "raise",
            )
        except fm.WorkerLostError:
            return False
        return True


def rows(repeats: int | None, steps: int = STEPS, start: Start | None = None) -> list[Row]:
    """`start` starts a cluster for all fits; without it also lost coordinators and drivers are measured."""
    import flowml as fm

    found: list[Row] = []
    count = repeats or REPEATS
    spare = start or (lambda: fm.Cluster.local(workers=REPLICAS, spares=1))
    again = start or (lambda: fm.Cluster.local(workers=REPLICAS))
    for what, victim in VICTIMS.items():
        fits = [
            Fits(spare, victim, steps, goes_on=True),
            Fits(again, victim, steps, goes_on=True),
            Fits(again, victim, steps, goes_on=False),
        ]
        shares = interleave(f"recovery, {what}", [each.goodput for each in fits], count, warm_up=0)
        peer = fits[-1].gaps, shares[-1]
        for how, ours, share in zip(("a spare", "started again"), fits, shares, strict=False):
            found += _compared(f"{what}, {how}", (ours.gaps, share), peer, steps)
    return found if start else [*found, *left_behind.rows(count), *lost.rows(count, steps), *suspended.rows(count)]


def _compared(
    what: str, ours: tuple[Sequence[float], Sample], peer: tuple[Sequence[float], Sample], steps: int
) -> list[Row]:
    """Each side: its gaps, and its goodput."""
    other = "restart from checkpoint"
    gaps, late = [Sample(tuple(x)) for x, _ in (ours, peer)], [Sample((_p95(x),)) for x, _ in (ours, peer)]
    goal = Goal("at most", LIMIT_S, of="value")
    name = f"kill of a {what}"
    often = f"{name} every {steps // (KILLS + 1)} steps of {1e3 * PAUSE_S:.0f} ms: goodput"
    return [
        Row(f"{name}: gap, median of {len(ours[0])}", "s", gaps[0], Peer(other, gaps[1])),
        Row(f"{name}: gap, 95th percentile", "s", late[0], Peer(other, late[1]), goal),
        Row(often, "share", ours[1], Peer(other, peer[1]), Goal("at least", 1.0)),
    ]


def _p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
