"""Random cases: a seed determines policies, groups of layers, machines, network and faults of a run.

Policies are drawn knob by knob, and a composition that `Policy` refuses is drawn again. So what is drawn is sound, and
a new value of a knob is tested as soon as its row here has it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from flowml import sim
from flowml.errors import PolicyError
from flowml.policy import (
    UNBOUNDED,
    AllReduce,
    Completion,
    Deadline,
    Every,
    Fold,
    ParameterServer,
    Policy,
    Quorum,
    StalenessScaled,
    check_composition,
)
from flowml.sim import ComputeTimes
from flowml_runtime.sim.faults import NetworkFaults
from flowml_runtime.sim.heap import Clock
from flowml_tools.faults.layout import make
from flowml_tools.faults.world import World

LATE = ("drop", "drop", "fold", "requeue")


def _quorum(rng: random.Random) -> Completion | None:
    kinds: tuple[Callable[[], Completion | None], ...] = (
        lambda: None,
        lambda: None,
        lambda: Quorum(rng.choice([0.3, 0.5, 0.75, 1.0]), late=rng.choice(LATE)),
        lambda: Quorum(rng.choice([0.3, 0.5, 0.75]), late=rng.choice(LATE)),
        lambda: Quorum(rng.randint(1, 3), late=rng.choice(LATE)),
        lambda: Quorum(rng.choice([0.5, 0.75]), late=Fold(0.5)),
        lambda: Quorum(rng.choice([0.3, 0.6]), of="samples", late=rng.choice(LATE)),
        lambda: Deadline(rng.choice([0.5, 0.75]), rng.choice(["adaptive", 0.3]), late=rng.choice(LATE)),
        lambda: Deadline(1.0, limit_s=rng.choice([0.5, 2.0]), late=rng.choice(LATE)),
    )
    return rng.choice(kinds)()


def policy(rng: random.Random) -> Policy:
    """A random sound policy."""
    while True:
        try:
            return Policy(
                topology=AllReduce() if rng.random() < 0.25 else ParameterServer(),
                staleness=rng.choice([0, 0, 0, 1, 2, 4, UNBOUNDED]),
                quorum=_quorum(rng),
                every=rng.choice([1, 1, 1, 2, 3, 5, Every(3, offset=1), Every(4, offset=2)]),
                apply=rng.choice(["mean", "mean", "sum", StalenessScaled()]),
            )
        except PolicyError:
            continue


def policies(rng: random.Random, replicas: int, stores: int) -> tuple[Policy, ...]:
    """A sound policy for each store. Some are equal, so that groups have several stores."""
    while True:
        pool = [policy(rng) for _ in range(rng.randint(1, 3))]
        chosen = tuple(rng.choice(pool) for _ in range(stores))
        try:
            check_composition({str(i): p for i, p in enumerate(chosen)}, replicas)
        except PolicyError:
            continue
        return chosen


@dataclass(frozen=True)
class Case:
    """One run. `repr` of it is what a report shows."""

    seed: int
    policies: tuple[Policy, ...]
    replicas: int
    stages: int
    workers: int | None
    clocks: int
    items: int
    compute: sim.ComputeModel
    network: sim.Network
    faults: tuple[sim.Fault, ...]
    source: Literal["fed", "shipped"]
    twice: float
    """The share of messages that come again, of those that may."""
    lost: tuple[int, float] | None = None
    """The replica that is lost, and when."""
    interrupted_s: float | None = None
    """When the fit is ended, and another one begins on the same workers."""

    @staticmethod
    def of(seed: int) -> Case:
        """The case of a seed."""
        return Case.drawn(random.Random(seed), seed)

    @staticmethod
    def drawn(rng: random.Random, seed: int) -> Case:
        replicas, stages = rng.choice([2, 2, 3, 3, 4, 5]), rng.choice([1, 1, 2, 2, 3])
        chosen = policies(rng, replicas, rng.choice([1, 1, 2, 3, 3]))
        workers = replicas * stages
        shared = rng.choice([None, None, rng.randint(1, workers)])
        sums = any(p.collective for p in chosen)
        fate = rng.random()
        lost = interrupted = None
        spare = all(
            _needs(p.quorum, replicas) < replicas for p in chosen
        )  # a count that the living cannot meet ends a fit
        if fate < 0.15 and not sums and spare and shared is None:
            lost = rng.randrange(1, replicas), rng.uniform(0, 6)
        elif fate < 0.3 and not sums:
            interrupted = rng.uniform(0, 4)
        return Case(
            seed=seed,
            policies=chosen,
            replicas=replicas,
            stages=stages,
            workers=shared,
            clocks=rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 8, 24]),
            items=replicas * rng.randint(1, 3) + rng.randrange(2),
            compute=_compute(rng),
            network=sim.Network(rng.choice([0.0, 1e-3, 0.1]), rng.choice([1e9, 1e3, 200.0])),
            faults=_faults(rng, shared or workers),
            source=rng.choice(["fed", "shipped"]),
            twice=rng.choice([0.0, 0.0, 0.3]),
            lost=lost,
            interrupted_s=interrupted,
        )

    def world(self) -> World:
        """The run, ready to go."""
        clock = Clock()
        run = make(
            self.policies,
            replicas=self.replicas,
            stages=self.stages,
            clocks=self.clocks,
            items=self.items,
            seed=self.seed,
            twice=self.twice,
            source=self.source,
            homes_on=0 if self.lost else None,
            workers=self.workers,
            times=ComputeTimes(self.compute, self.seed, self.replicas * self.stages),
            network=self.network,
            under=NetworkFaults(clock, [f for f in self.faults if not isinstance(f, sim.Crash)], self.seed),
            clock=clock,
        )
        if self.lost is not None:
            run.lose(*self.lost)
        if self.interrupted_s is not None:
            run.interrupt(self.interrupted_s)
        return run

    def __str__(self) -> str:
        rules = "; ".join(p.describe() for p in self.policies)
        shared = "" if self.workers is None else f" on {self.workers} workers"
        lines = [
            f"{self.replicas} replicas of {self.stages} stages{shared}, {self.clocks} clocks, "
            f"{self.items} items an epoch, {self.source}",
            f"policies: {rules}",
            f"compute: {self.compute}; network: {self.network}",
        ]
        trouble: list[str] = [str(f) for f in self.faults]
        trouble += [f"{self.twice:.0%} of messages come again"] if self.twice else []
        trouble += [f"replica {self.lost[0]} is lost at {self.lost[1]:.2f} s"] if self.lost else []
        trouble += [f"the fit is ended at {self.interrupted_s:.2f} s"] if self.interrupted_s is not None else []
        return "\n".join([*lines, f"faults: {'; '.join(trouble) or 'none'}"])


def _needs(quorum: Completion, replicas: int) -> int:
    """The least number of living replicas that the quorum can be met with."""
    return quorum.need(replicas) if isinstance(quorum, Quorum) and quorum.counted else 1


def _compute(rng: random.Random) -> sim.ComputeModel:
    base = rng.choice(
        [
            sim.Constant(0.2),
            sim.ShiftedExponential(0.1, 0.3),
            sim.LogNormal(0.3, 0.6),
            sim.Pareto(0.1, 1.2),
        ]
    )
    stalls: Sequence[Callable[[], sim.ComputeModel]] = (
        lambda: base,
        lambda: sim.Straggler(base, factor=rng.choice([3, 20]), workers=(rng.randrange(4),)),
        lambda: sim.Straggler(base, factor=20, probability=0.1),
    )
    return rng.choice(stalls)()


def _faults(rng: random.Random, workers: int) -> tuple[sim.Fault, ...]:
    found: list[sim.Fault] = []
    if rng.random() < 0.5:
        lost, repeated = rng.choice([0.0, 0.2]), rng.choice([0.0, 0.3])
        delay = rng.choice([0.0, 0.05, 0.5])
        found.append(sim.Disorder(delay_s=delay, lost=lost, resend_s=0.3, repeated=repeated))
    if rng.random() < 0.25:
        start = rng.uniform(0, 3)
        parted = rng.sample(range(workers), rng.randint(1, max(1, workers // 2)))
        found.append(sim.Partition(parted, start, start + rng.choice([0.3, 2.0, 6.0])))
    return tuple(found)
