"""Random cases: a seed determines policies, groups of layers, machines, network and faults of a run.

The policies are those of `draws`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from flowml import sim
from flowml.policy import Deadline, Gossip, Policy, Quorum
from flowml.sim import AT_ONCE, ComputeTimes
from flowml_runtime.protocol.training.driver import Pause
from flowml_runtime.protocol.training.snapshot import Rhythm
from flowml_runtime.sim.faults import NetworkFaults
from flowml_runtime.sim.heap import Clock
from flowml_tools.faults.draws import apart, policies, quorums
from flowml_tools.faults.layout import make
from flowml_tools.faults.rarer import rarer
from flowml_tools.faults.world import STOP_AT_ONCE, World

MOST_STEPS = 72
"""The most steps of all stages of all replicas, so that no run takes as long as twenty others."""


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
    network: sim.NetworkModel
    faults: tuple[sim.Fault, ...]
    source: Literal["fed", "shipped"]
    twice: float
    """The share of messages that come again, of those that may."""
    lost: tuple[int, float] | None = None
    """The replica that is lost, and when."""
    crashed: tuple[int, float] | None = None
    """The worker that stops, and when. It ends the fit."""
    interrupted_s: float | None = None
    """When the fit is ended by its caller. Another one then begins on the same workers, where steps of the first may
    still run."""
    homes: sim.Homes = AT_ONCE
    rhythm: Rhythm | None = None
    """When snapshots are taken; None: never."""
    pauses: tuple[float, ...] = ()
    """When snapshots are asked for beside those."""
    pause: Pause = STOP_AT_ONCE
    """How they are asked for: with replicas that are to leave, after a push of theirs."""
    silent: bool = False
    """Whether a replica that is home to nothing is suspended while snapshots are taken of the others."""
    patience_s: float | None = None
    """How long replicas stand for a snapshot before it is withdrawn; None: until all have stopped."""
    sharded: bool = False
    """Whether each replica has items of its own, if it takes them at its own pace."""

    @property
    def _after_push(self) -> str:
        within, leaving = self.pause.pushed_within, self.pause.leaving
        who = f", replicas {', '.join(map(str, leaving))} leave" if leaving else ""
        return f" (after a push within {within} clocks{who})" if within else ""

    @property
    def crashes_home(self) -> bool:
        """Whether the worker that stops is the home of a layer."""
        if self.crashed is None:
            return False
        run = self.world()
        return run.worker(self.crashed[0]) in {name for homes in run.places.homes for name in homes}

    @staticmethod
    def of(seed: int) -> Case:
        """The case of a seed."""
        return Case.drawn(random.Random(seed), seed)

    @staticmethod
    def drawn(rng: random.Random, seed: int) -> Case:
        replicas, stages = rng.choice([2, 2, 3, 3, 4, 5, 6]), rng.choice([1, 1, 2, 2, 3])
        chosen = rarer(policies(rng, replicas, rng.choice([1, 1, 2, 3, 3])), replicas, seed)
        workers = replicas * stages
        shared = rng.choice([None, None, rng.randint(1, workers)])
        if any(p.shared for p in chosen):
            shared = 1
        lost = crashed = interrupted = None
        fate = rng.random()
        if fate < 0.15 and shared is None and all(_goes_on(p, replicas) for p in chosen):
            lost = rng.randrange(1, replicas), rng.uniform(0, 6)
        elif fate < 0.2:
            crashed = rng.randrange(shared or workers), rng.uniform(0, 6)
        elif fate < 0.3:
            interrupted = rng.uniform(0, 4)
        case = Case(
            seed=seed,
            policies=chosen,
            replicas=replicas,
            stages=stages,
            workers=shared,
            clocks=min(rng.choice([1, 2, 3, 4, 4, 5, 6, 8, 8, 16]), MOST_STEPS // workers),
            items=replicas * rng.randint(1, 3) + rng.randrange(2),
            compute=_compute(rng),
            network=sim.Network(rng.choice([0.0, 1e-3, 0.1]), rng.choice([1e9, 1e4, 1e3])),
            faults=_faults(rng, shared or workers),
            source=rng.choice(["fed", "shipped"]),
            twice=rng.choice([0.0, 0.0, 0.3]),
            lost=lost,
            crashed=crashed,
            interrupted_s=interrupted,
        )
        case = _sharded(_longer_after_a_loss(_with_own_parameters_apart(case)))
        case = _with_late_answers(_with_snapshots(_in_another_place(case, shared or workers)))
        return _with_slow_homes(_with_silence(case), shared or workers)

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
            homes_on=0 if self.lost or self.silent else None,
            workers=self.workers,
            times=ComputeTimes(self.compute, self.seed, self.replicas * self.stages),
            network=self.network,
            under=NetworkFaults(clock, [f for f in self.faults if not isinstance(f, sim.Crash)], self.seed),
            disturbed=bool(self.faults or self.twice),
            clock=clock,
            homes=self.homes,
            rhythm=self.rhythm,
            outlives=self.rhythm is not None,
            pauses=self.pauses,
            pause=self.pause,
            patience_s=self.patience_s,
            sharded=self.sharded,
        )
        if self.lost is not None:
            run.lose(*self.lost)
        if self.interrupted_s is not None:
            run.interrupt(self.interrupted_s)
        if self.crashed is not None:
            run.crash(*self.crashed)
        return run

    def __str__(self) -> str:
        rules = "; ".join(p.describe() for p in self.policies)
        shared = "" if self.workers is None else f" on {self.workers} workers"
        lines = [
            f"{self.replicas} replicas of {self.stages} stages{shared}, {self.clocks} clocks, "
            f"{self.items} items an epoch, {self.source}{', a shard for each replica' if self.sharded else ''}",
            f"policies: {rules}",
            f"compute: {self.compute}; network: {self.network}",
        ]
        lines[-1] += f"; {self.homes}" if self.homes != AT_ONCE else ""
        trouble: list[str] = [str(f) for f in self.faults]
        trouble += [f"{self.twice:.0%} of messages come again"] if self.twice else []
        trouble += [f"replica {self.lost[0]} is lost at {self.lost[1]:.2f} s"] if self.lost else []
        trouble += [f"worker {self.crashed[0]} stops at {self.crashed[1]:.2f} s"] if self.crashed else []
        also = f" and {self.rhythm.also}" if self.rhythm and self.rhythm.also else ""
        trouble += [f"snapshots every {self.rhythm.every}{also} clocks"] if self.rhythm else []
        trouble += (
            [f"snapshots are asked for at {', '.join(f'{at:.2f}' for at in self.pauses)} s{self._after_push}"]
            if self.pauses
            else []
        )
        trouble += [f"they are withdrawn after {self.patience_s:g} s"] if self.patience_s is not None else []
        trouble += [f"the fit is ended at {self.interrupted_s:.2f} s"] if self.interrupted_s is not None else []
        return "\n".join([*lines, f"faults: {'; '.join(trouble) or 'none'}"])


def _goes_on(policy: Policy, replicas: int) -> bool:
    """Whether a run goes on without one replica. It ends if sums or neighbours miss one, or if the living are too few
    for a count."""
    if policy.adds_up or policy.shared or isinstance(policy.remote, Gossip):
        return False
    quorum = policy.quorum
    if isinstance(quorum, Deadline):
        quorum = Quorum() if quorum.limit_s < math.inf else quorum.quorum
    return not (isinstance(quorum, Quorum) and quorum.counted) or quorum.need(replicas) < replicas


def _compute(rng: random.Random) -> sim.ComputeModel:
    base = rng.choice(
        [
            sim.Constant(0.2),
            sim.ShiftedExponential(0.1, 0.3),
            sim.LogNormal(0.3, 0.6),
            sim.Pareto(0.1, 2.0),  # with a heavier tail some steps take so long that the others ask 50,000 times
        ]
    )
    stalls: Sequence[Callable[[], sim.ComputeModel]] = (
        lambda: base,
        lambda: sim.Straggler(base, factor=rng.choice([3, 20]), workers=(rng.randrange(4),)),
        lambda: sim.Straggler(base, factor=20, probability=0.1),
    )
    return rng.choice(stalls)()


def _with_own_parameters_apart(case: Case) -> Case:
    """A few cases with layers of own parameters without common clocks, beside one whose late replicas skip clocks, and
    with a replica that is late. They are drawn from numbers of their own, as what follows."""
    rng = random.Random(f"apart {case.seed}")
    if rng.random() >= 0.04 or case.replicas < 3 or case.workers is not None:
        return case
    late = sim.Straggler(case.compute, factor=20, workers=tuple(range(case.stages)))
    most = MOST_STEPS // (case.replicas * case.stages)
    changes: dict[str, Any] = {"policies": apart(rng, case.replicas), "compute": late, "clocks": max(case.clocks, most)}
    return replace(case, **changes, lost=None)


def _longer_after_a_loss(case: Case) -> Case:
    """Half of the cases that lose a replica have so many clocks that it asks for the work of several at once, and tells
    their fates late."""
    rng = random.Random(f"longer {case.seed}")
    if case.lost is None or rng.random() >= 0.5:
        return case
    clocks = max(case.clocks, MOST_STEPS // (case.replicas * case.stages))
    return replace(case, clocks=clocks, source="shipped", lost=(case.lost[0], rng.uniform(0, 0.4 * clocks)))


def _sharded(case: Case) -> Case:
    """A fifth of the cases in which each replica has items of its own, drawn from numbers of their own."""
    return replace(case, sharded=random.Random(f"sharded {case.seed}").random() < 0.2)


def _with_snapshots(case: Case) -> Case:
    """A quarter of the cases with snapshots, drawn from numbers of their own."""
    rng = random.Random(f"snapshots {case.seed}")
    if rng.random() >= 0.25:
        return case
    pauses = tuple(sorted(rng.uniform(0, 6) for _ in range(rng.randrange(3))))
    rhythm = Rhythm(rng.choice([0, 1, 2, 3]), rng.choice([0, 0, 2]))
    changes: dict[str, Any] = {"twice": rng.choice([case.twice, 0.3])}
    if rng.random() < 0.4:
        changes["pause"] = Pause(rng.randint(1, 6), tuple(r for r in range(case.replicas) if rng.random() < 0.4))
    return replace(case, rhythm=rhythm, pauses=pauses, **changes)


def _with_late_answers(case: Case) -> Case:
    """Half of the cases with snapshots withdraw those that are held up, and in half of these a replica is suspended for
    a while, drawn from numbers of their own. A lost one is not: what it sent comes before it is known to be lost."""
    rng = random.Random(f"late answers {case.seed}")
    if case.rhythm is None or rng.random() < 0.5:
        return case
    faults, patience_s = case.faults, rng.choice([0.1, 0.5, 2.0])
    if case.workers is None and case.lost is None and rng.random() < 0.5:
        replica, start = rng.randrange(case.replicas), rng.uniform(0, 4)
        suspended = range(replica * case.stages, (replica + 1) * case.stages)
        faults = (*faults, sim.Partition(tuple(suspended), start, start + rng.choice([1.0, 3.0, 8.0])))
    return replace(case, faults=faults, patience_s=patience_s)


def _with_silence(case: Case) -> Case:
    """A few cases in which a replica is suspended while the others go on by a quorum, and are asked for snapshots."""
    rng = random.Random(f"silence {case.seed}")
    if rng.random() >= 0.08 or case.replicas < 3 or case.workers is not None:
        return case
    replicas, stages, start = min(case.replicas, 4), rng.choice([1, 1, 2]), rng.uniform(0, 3)
    replica = rng.randrange(1, replicas)
    workers = rng.choice([None, None, 2, 3]) if stages == 1 else None
    suspended = range(replica * stages, (replica + 1) * stages) if workers is None else [rng.randrange(1, workers)]
    faults = [f for f in case.faults if not isinstance(f, sim.Partition)]
    parted = sim.Partition(tuple(suspended), start, start + rng.choice([3.0, 8.0, 20.0]))
    pauses = tuple(sorted(rng.uniform(start, start + 8) for _ in range(4)))
    clocks, items = 2 * MOST_STEPS // (replicas * stages), replicas * rng.randint(1, 3) + rng.randrange(2)
    changes: dict[str, Any] = {"policies": quorums(rng, replicas), "replicas": replicas, "stages": stages}
    changes["workers"] = workers
    changes |= {"clocks": clocks, "items": items, "compute": sim.ShiftedExponential(0.1, rng.choice([0.02, 0.2]))}
    changes |= {"faults": (*faults, parted), "rhythm": Rhythm(rng.choice([0, 2, 3, 5])), "pauses": pauses}
    network = sim.Network(rng.choice([0.0, 1e-3, 0.1]), 1e9)
    ended: dict[str, Any] = {"lost": None, "crashed": None, "interrupted_s": None, "sharded": False}
    return replace(case, **changes, **ended, silent=True, patience_s=rng.choice([0.3, 0.8]), network=network)


def _with_slow_homes(case: Case, workers: int) -> Case:
    """A fifth of the cases with applies that take time, drawn from numbers of their own."""
    rng = random.Random(f"homes {case.seed}")
    if rng.random() >= 0.2:
        return case
    slow = rng.choice([{}, {rng.randrange(workers): 5.0}])
    return replace(case, homes=sim.Homes(rng.choice([0.0, 0.01, 0.3]), rng.choice([1e2, 1e3, math.inf]), slow))


def _in_another_place(case: Case, workers: int) -> Case:
    """A tenth of the cases with rarer machines, networks and times of faults. They are drawn from numbers of their
    own, so that the other cases stay as they are."""
    rng = random.Random(f"another place {case.seed}")
    if rng.random() >= 0.1:
        return case
    base = sim.Empirical([0.1, 0.2, 0.2, 0.9])
    compute = rng.choice(
        [
            case.compute,
            base,
            sim.Recorded([[0.1, 0.4, 0.2], [0.3]]),
            sim.Straggler(base, factor=5, share=0.3),
            sim.Straggler(base, factor=10, probability=0.2, burst_steps=3),
        ]
    )
    rates = {"uplink_bytes_per_s": rng.choice([1e4, None]), "downlink_bytes_per_s": rng.choice([1e4, None])}
    local = sim.Network(0.01, 1e5, **rates)
    regions = sim.Regions({("near", "far"): (0.2, 1e4), ("near", "near"): (0.01, 1e5), ("far", "far"): (0.01, 1e5)})
    up, lines, driver = rng.choice([None, 2e4]), rng.random() < 0.5, rng.choice([None, "far"])
    members = [rng.choice(["near", "far"]) for _ in range(workers)]
    sites = sim.Sites(regions, members, local, uplink_bytes_per_s=up, shared_lines=lines, driver=driver)
    start = rng.uniform(0, 2)
    window = {"start_s": start, "end_s": start + rng.choice([0.5, 3.0])}
    faults = [replace(f, **window) if isinstance(f, sim.Disorder) else f for f in case.faults]
    return replace(case, compute=compute, network=rng.choice([case.network, local, sites]), faults=tuple(faults))


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
