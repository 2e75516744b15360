"""Compares simulated training with real training: step times and bytes of many policies under slow machines.

Four replicas train on real workers (threads, then processes), with artificial delays that a model draws by worker and
step. The same `Trainer`, with the same delays, trains on a simulated cluster whose costs were measured on this machine
before (`fidelity_probe`). A cell compares the mean time of a step after the first ones, and the bytes between workers.

The replicas share the cores of one machine, which no model knows. So the delays are long beside what a step computes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from flowml.errors import FlowmlError
from flowml_tools.bench.fidelity_probe import calibrate, step_times
from flowml_tools.bench.rows import Goal, Peer, Row, Sample
from flowml_tools.bench.timing import tell

SUMMARY = "simulated against real training: step times and bytes of many policies under slow machines"
REPEATS = 1
REPLICAS, STEPS, FIRST, BATCH = 4, 20, 4, 64
"""The steps before the FIRST one are not measured: they start threads and fill caches."""
PAUSE_S = 0.06
GOAL = Goal("at most", 0.10, of="value")
ENOUGH = 5
"""So many policies at least agree within the goal under each model of slow machines."""
KINDS = ("threads", "processes")


@dataclass(frozen=True)
class Composition:
    """A way to keep replicas in step. `make` gives its policy from `fm.policies`.

    `work` gives a policy with the same work in each step, which leaves no replica out; None: synchronous(). A replica
    computes `shares` of the batch, under a code several: so many times the examples and microbatches of a synchronous
    one.
    """

    name: str
    make: Callable[[Any], Any]
    microbatches: int = 1
    work: Callable[[Any], Any] | None = None
    shares: int = 1


def compositions() -> list[Composition]:
    import flowml as fm

    top_k = fm.filters.top_k(0.05).with_error_feedback()

    def filtered(p: Any) -> Any:
        return p.synchronous(filters=(top_k,))

    def local(p: Any) -> Any:
        return p.local_sgd(4)

    return [
        Composition("synchronous", lambda p: p.synchronous()),
        Composition("backup workers, 3 of 4", lambda p: p.backup_workers(3)),
        Composition("SSP, staleness 3", lambda p: p.asynchronous(3)),
        Composition("Downpour, push and pull 4", lambda p: p.downpour(4, 4), work=local),
        Composition("DropCompute", lambda p: p.drop_compute(1.5 * PAUSE_S), microbatches=4),
        Composition("adaptive deadline, 0.75", lambda p: p.deadline(0.75)),
        Composition("local SGD, every 4", local, work=local),
        Composition("DiLoCo, every 4", lambda p: p.diloco(4), work=local),
        Composition("streaming DiLoCo, every 4", lambda p: p.diloco(4, fragments=2, delay=1, alpha=0.5), work=local),
        Composition("D-PSGD on a ring", lambda p: p.gossip("ring"), work=local),
        Composition("two sites, significance", lambda p: p.gaia(0.01, sites=2), work=local),
        Composition("gradient coding, 1 straggler", lambda p: p.coded(1), shares=2),
        Composition("top-k with error feedback", filtered, work=filtered),
        Composition("4-bit deltas, every 4", lambda p: p.diloco(4, filters=(fm.filters.quantise(4),)), work=local),
    ]


def stragglers() -> Mapping[str, Any]:
    """The delays of each replica and step, by name."""
    import flowml as fm

    steady = fm.sim.Constant(PAUSE_S)
    return {
        "constant": steady,
        "exponential": fm.sim.ShiftedExponential(PAUSE_S / 2, PAUSE_S / 2),
        "one 5× slower": fm.sim.Straggler(steady, factor=5, workers=(REPLICAS - 1,)),
    }


@dataclass(frozen=True)
class Measured:
    step_s: float
    nbytes: int


def rows(repeats: int | None, only: Sequence[str] = (), kinds: Sequence[str] = KINDS) -> list[Row]:
    """`only` names compositions; by default all are measured."""
    import flowml as fm

    found: list[Row] = []
    makers = {"threads": fm.Cluster.threads, "processes": fm.Cluster.local}
    chosen = [c for c in compositions() if not only or c.name in only]
    for kind in kinds:
        with makers[kind](workers=REPLICAS) as cluster:
            drawn = stragglers()["exponential"]
            synchronous = partial(fit, cluster, fm.Policy(), drawn)
            synchronous()  # what happens only once, such as the start of threads
            calibration = calibrate(cluster, synchronous, drawn)
            costs = f"{kind}: {calibration}"
            found.append(Row(costs, "s", Sample(calibration.steps_s), Peer("no peer"), group=("calibration", kind)))
            for number, composition in enumerate(chosen):
                tell(f"fidelity: {kind}, {composition.name}, {number + 1} of {len(chosen)}")
                now = calibrate(cluster, synchronous, drawn)  # other programs on this machine come and go
                simulated = now.cluster(REPLICAS, _share_times(cluster, composition, drawn))
                for model, delays in stragglers().items():
                    group = kind, composition.name, model
                    found += _compared(group, cluster, simulated, composition, delays, repeats)
    return [*found, *summary(found)]


def recorded(composition: Composition) -> tuple[Any, int, int]:
    """The policy, the microbatches and the batch of a fit whose steps do the work of a composition, and whose replicas
    all count."""
    import flowml as fm

    policy, shares = composition.work(fm.policies) if composition.work else fm.Policy(), composition.shares
    return policy, composition.microbatches * shares, BATCH * shares


def _share_times(cluster: Any, composition: Composition, delays: Any) -> tuple[float, ...]:
    """The compute times of a replica's share of the batch, in steps that do the work of a composition."""
    policy, microbatches, batch = recorded(composition)
    work = partial(fit, cluster, policy, delays, microbatches, batch)
    return tuple(seconds / composition.shares for seconds in step_times(cluster, work, delays))


def _compared(
    group: tuple[str, ...],
    cluster: Any,
    model: Any,
    composition: Composition,
    delays: Any,
    repeats: int | None,
) -> list[Row]:
    """The rows of one composition under one model; none if the composition cannot run."""
    import flowml as fm

    try:
        policy = composition.make(fm.policies)
        simulated = fit(model, policy, delays, composition.microbatches)
        real = [fit(cluster, policy, delays, composition.microbatches) for _ in range(repeats or REPEATS)]
    except (AttributeError, FlowmlError) as error:
        tell(f"fidelity: {', '.join(group)} is not available: {error}")
        return []
    name = ", ".join(group)
    times, sizes = Sample(tuple(r.step_s for r in real)), Sample(tuple(float(r.nbytes) for r in real))
    return [
        Row(f"{name}: step", "s", Sample((simulated.step_s,)), Peer("real", times), group=(*group, "step")),
        Row(
            f"{name}: bytes", "bytes", Sample((float(simulated.nbytes),)), Peer("real", sizes), group=(*group, "bytes")
        ),
    ]


def fit(cluster: Any, policy: Any, delays: Any, microbatches: int = 1, batch: int = BATCH) -> Measured:
    """Train four replicas."""
    trainer, params, source = prepared(cluster, policy, delays, microbatches)
    result = trainer.fit(params, source, batch_size=batch, steps=STEPS, progress=False)
    ends = [record["seconds"] for record in result.history]
    nbytes = sum(t["pushed_wire_bytes"] + t["published_wire_bytes"] for t in result.traffic.values())
    return Measured((ends[-1] - ends[FIRST - 1]) / (len(ends) - FIRST), nbytes)


def prepared(cluster: Any, policy: Any, delays: Any, microbatches: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The trainer of four replicas, the parameters, and the examples. The model is small, so that the cores of this
    machine are idle for most of the time."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowml as fm

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((jnp.tanh(batch["x"] @ params["hidden"]) @ params["output"] - batch["y"]) ** 2)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(640, 64)).astype(np.float32)
    source = {"x": x, "y": np.tanh(x @ rng.normal(size=(64, 16)).astype(np.float32))}
    shapes = {"hidden": (64, 256), "output": (256, 16)}
    params = {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    settings: dict[str, Any] = {"policies": policy, "delays": delays, "microbatches": microbatches}
    return fm.Trainer(loss, optax.sgd(0.05), cluster=cluster, replicas=REPLICAS, **settings), params, source


def summary(found: Sequence[Row]) -> list[Row]:
    """The median and the largest disagreement of all step times, and of all bytes, and the share of the policies whose
    step times agree under every model."""
    result: list[Row] = []
    for quantity, title in (("step", "step times"), ("bytes", "bytes")):
        apart = [disagreement(row) for row in found if row.group[-1:] == (quantity,)]
        if apart:
            middle, most = Sample((statistics.median(apart),)), Sample((max(apart),))
            result.append(Row(f"{title}, median disagreement of {len(apart)}", "share", middle, Peer("no peer"), GOAL))
            result.append(Row(f"{title}, largest disagreement", "share", most, Peer("no peer")))
    worst: dict[tuple[str, ...], list[float]] = {}
    for row in found:
        if row.group[-1:] == ("step",):
            worst.setdefault(row.group[:2], []).append(disagreement(row))
    whole = [max(apart) for apart in worst.values() if len(apart) == len(stragglers())]
    if whole:
        close, goal = sum(apart <= GOAL.limit for apart in whole), Goal("at least", ENOUGH / len(whole), of="value")
        name = f"policies whose step times agree within {GOAL.limit:.0%} under each model, of {len(whole)}"
        result.append(Row(name, "share", Sample((close / len(whole),)), Peer("no peer"), goal))
    return result


def disagreement(row: Row) -> float:
    """How far the simulated value is from the real one, as a share of that."""
    return 0.0 if row.ratio is None else abs(row.ratio - 1)


def render(benchmark: str, found: Sequence[Row]) -> str:
    """One line for each cluster and composition: for each model real -> simulated times, and how far both are off."""
    cells = {row.group: row for row in found}
    models = list(stragglers())
    head = ("", "", *(f"{name}: step, bytes" for name in models))
    lines: list[tuple[str, ...]] = [head]
    for kind in dict.fromkeys(row.group[0] for row in found if len(row.group) == 4):
        for composition in compositions():
            given = [
                (cells.get((kind, composition.name, m, "step")), cells.get((kind, composition.name, m, "bytes")))
                for m in models
            ]
            lines.append((composition.name, kind, *(_cell(step, size) for step, size in given)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    title = f"{benchmark}: {REPLICAS} replicas, {STEPS} steps, delays of {PAUSE_S * 1e3:g} ms; real → simulated"
    costs = [f"  {row.name}" for row in found if row.group[:1] == ("calibration",)]
    sums = [f"  {row.name}: {row.ours.median:.1%}{_verdict(row)}" for row in found if not row.group]
    return "\n".join([title, *costs, *(f"  {line}".rstrip() for line in padded), *sums])


def _verdict(row: Row) -> str:
    if row.goal is None:
        return ""
    sign = "≤" if row.goal.sense == "at most" else "≥"
    return f", goal {sign} {row.goal.limit * 100:.0f} %: {'met' if row.met else 'MISSED'}"


def _cell(step: Row | None, size: Row | None) -> str:
    if step is None or size is None or step.peer.sample is None:
        return "not available"
    times = f"{step.peer.sample.median * 1e3:5.1f} → {step.ours.median * 1e3:5.1f} ms"
    return f"{times} {_percent(step)}, {_percent(size)}"


def _percent(row: Row) -> str:
    return f"{((row.ratio or 1.0) - 1) * 100:+.1f} %"
