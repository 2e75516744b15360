"""Trains one real model with many policies beside slow machines: time to a loss, accuracy, bytes, idle time, lost work.

A network of two layers learns scikit-learn's digits on eight replicas, of which a quarter is four times as slow as the
others. The fits run under a virtual clock with arithmetic: losses and accuracies are computed, and times are those of
the models, so the table is the same on every machine. A few policies are trained on threads and on processes too, with
the drawn times as pauses, to show that their real times are the virtual ones.

All policies have the same optimizer and the same number of steps, for none of which they were tuned. The loss is that
of the training examples, as a mean over `WINDOW` steps. A replica of a code computes twice as many examples in a step,
so its steps take twice as long.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowml_tools.bench.rows import BenchError, Peer, Row, Sample
from flowml_tools.bench.stragglers import accuracy, loss
from flowml_tools.bench.timing import tell
from flowml_tools.plots import COLOURS, Line, Plot

if TYPE_CHECKING:
    import flowml as fm
    from flowml.sim import ComputeModel
    from flowml_runtime.driver.training.result import TrainingResult

SUMMARY = "one model, many policies beside slow machines: time to a loss, accuracy, bytes, idle time, lost work"
SEEDS = 3
REPLICAS, BATCH, STEPS = 8, 64, 240
TARGET, WINDOW = 0.4, 12
STEP_S, PAUSE_S = 0.1, 0.06
"""The mean seconds of a replica's step under the virtual clock, and of the pauses of real workers."""
REAL = ("synchronous()", "quorum(0.75)", "local_sgd(4)", "asynchronous()")
KINDS = ("threads", "processes")
"""The real workers."""
LAYERS = ("hidden", "output")


def compositions() -> dict[str, fm.Policy]:
    """The policies, by the calls of `fm.policies` that make them."""
    import flowml as fm

    p = fm.policies
    return {
        "synchronous()": p.synchronous(),
        "all_reduce()": p.all_reduce(),
        "coded(1)": p.coded(1),
        "speculate(2)": p.speculate(2),
        "deadline(0.75)": p.deadline(0.75),
        "quorum(0.75)": p.quorum(0.75),
        "compensate(0.75)": p.compensate(0.75),
        "qsgd(8)": p.qsgd(8),
        "deep_compression(0.05)": p.deep_compression(0.05),
        "double_buffer()": p.double_buffer(),
        "asynchronous(3)": p.asynchronous(3),
        "softsync(4)": p.softsync(4),
        "asynchronous()": p.asynchronous(),
        "local_sgd(4)": p.local_sgd(4),
        "gossip('ring')": p.gossip("ring"),
        "diloco(8)": p.diloco(8),
        "decoupled_diloco(8, 0.75)": p.decoupled_diloco(8, 0.75),
        "elastic_averaging(4, 0.1)": p.elastic_averaging(4, 0.1),
    }


def machines(mean_s: float) -> ComputeModel:
    import flowml as fm

    return fm.sim.Straggler(fm.sim.LogNormal(mean_s, sigma=0.2), factor=4, share=0.25)


def rows(repeats: int | None, steps: int = STEPS, only: Sequence[str] = (), real: Sequence[str] = REAL) -> list[Row]:
    """The rows of each policy. `repeats` is the number of seeds; `real` names those that real workers train too."""
    chosen = {name: policy for name, policy in compositions().items() if not only or name in only}
    plain: dict[str, Row] = {}
    found: list[Row] = []
    for name, policy in chosen.items():
        tell(f"policies: {name}")
        fits = [simulated(name, policy, seed, steps) for seed in range(repeats or SEEDS)]
        for row in described(name, fits, plain):
            plain.setdefault(row.group[1], row)
            found.append(row)
    for kind in KINDS:
        for name in real:
            if name in chosen:
                tell(f"policies: {name} on {kind}")
                found.append(on_workers(kind, name, chosen[name], steps // 4))
    return found


@dataclass(frozen=True)
class Fitted:
    """What one fit has shown. `losses` has (seconds, mean loss of the last steps) for each step."""

    losses: Sequence[tuple[float, float]]
    accuracy: float
    nbytes: dict[str, float]
    idle: float
    lost: float

    @property
    def reached_s(self) -> float | None:
        return next((seconds for seconds, mean in self.losses if mean <= TARGET), None)


def simulated(name: str, policy: fm.Policy, seed: int, steps: int) -> Fitted:
    """One fit under the virtual clock."""
    import numpy as np

    import flowml as fm

    load = 2 if name.startswith("coded") else 1
    compute = machines(STEP_S)
    cluster = fm.SimulatedCluster(REPLICAS, compute, fm.sim.Network(1e-3, 1e8), seed=seed)
    result, test = trained(cluster, policy, seed, steps)
    each = load * compute.draw(seed, np.arange(REPLICAS)[:, None], np.arange(steps)).mean(axis=1)
    ledger, seconds = result.ledger, result.virtual_seconds or 0.0
    begun = [t.used + t.dropped + t.folded for t in ledger.replicas]
    computed = float(np.dot(each, begun)) * ledger.item_size * REPLICAS / BATCH
    granted = sum(begun) * ledger.item_size
    return Fitted(
        means(result),
        accuracy(result.params, test),
        {layer: sent(result, layer) / steps for layer in LAYERS},
        max(0.0, 1 - computed / (REPLICAS * seconds)),
        1 - ledger.examples / granted,
    )


def trained(cluster: Any, policy: Any, seed: int, steps: int, delays: Any = None) -> tuple[TrainingResult, Any]:
    """A fit of the digits, and the examples that were held back."""
    import optax

    import flowml as fm

    params, train, test = digits(seed)
    trainer = fm.Trainer(loss, optax.sgd(0.2), cluster=cluster, replicas=REPLICAS, policies=policy, delays=delays)
    return trainer.fit(params, train, batch_size=BATCH, steps=steps, seed=seed, progress=False), test


def digits(seed: int) -> tuple[Any, Any, Any]:
    """Parameters, and examples to train and to test."""
    import numpy as np

    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
    except ImportError:
        raise BenchError("needs scikit-learn; pip install 'flowml[examples]'") from None
    data: Any = load_digits()
    rng, order = np.random.default_rng(seed), np.random.default_rng(0).permutation(len(data.target))
    x, label = (data.data[order] / 16).astype(np.float32), data.target[order].astype(np.int32)
    params = {"hidden": rng.normal(size=(64, 32)) / 8, "output": rng.normal(size=(32, 10)) / 6}
    train, test = ({"x": x[part], "label": label[part]} for part in (slice(1440), slice(1440, None)))
    return {k: v.astype(np.float32) for k, v in params.items()}, train, test


def means(result: TrainingResult) -> list[tuple[float, float]]:
    """The mean loss of the last `WINDOW` steps at the end of each, from the first with as many."""
    import numpy as np

    losses = np.array([record["loss"] for record in result.history])
    ends = [record["seconds"] for record in result.history][WINDOW - 1 :]
    return list(zip(ends, np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid").tolist(), strict=True))


def sent(result: TrainingResult, layer: str) -> float:
    """The bytes of a layer that all replicas and homes have sent. A sum of several layers is divided by their sizes."""
    sizes = {"hidden": 64 * 32, "output": 32 * 10}
    total = 0.0
    for names, traffic in result.traffic.items():
        layers = names.split("+")
        if layer in layers:
            share = sizes[layer] / sum(sizes[name] for name in layers)
            total += share * (traffic["pushed_wire_bytes"] + traffic["published_wire_bytes"])
    return total


def described(name: str, fits: Sequence[Fitted], plain: dict[str, Row]) -> list[Row]:
    """The rows of one policy, beside those of synchronous training."""

    def row(what: str, unit: Any, value: Callable[[Fitted], float]) -> Row:
        beside = Peer("synchronous()", plain[what].ours) if what in plain else Peer("no peer")
        return Row(f"{name}: {what}", unit, Sample(tuple(map(value, fits))), beside, group=(name, what))

    reached = all(fit.reached_s is not None for fit in fits)
    times = [row("time", "s", lambda fit: fit.reached_s or 0.0)] if reached else []
    seconds, losses = zip(*fits[0].losses, strict=True)
    curve = Row(f"{name}: loss", "s", Sample(seconds), Peer("loss", Sample(losses)), group=(name, "loss"))
    return [
        *times,
        row("accuracy", "share", lambda fit: fit.accuracy),
        *(row(f"bytes of {layer}", "bytes", lambda fit, layer=layer: fit.nbytes[layer]) for layer in LAYERS),
        row("idle", "share", lambda fit: fit.idle),
        row("lost", "share", lambda fit: fit.lost),
        curve,
    ]


def on_workers(kind: str, name: str, policy: fm.Policy, steps: int) -> Row:
    """The seconds of a step on workers of a kind that pause as the model says, beside those of the simulation of such
    pauses."""
    import flowml as fm

    pauses, quick = machines(PAUSE_S), fm.sim.Constant(1e-4)
    start = {"threads": fm.Cluster.threads, "processes": fm.Cluster.local}[kind]
    with start(workers=REPLICAS) as cluster:
        real, _ = trained(cluster, policy, 0, steps, pauses)
    with fm.SimulatedCluster(REPLICAS, quick, fm.sim.Network(1e-4, 1e9)) as cluster:
        virtual, _ = trained(cluster, policy, 0, steps, pauses)
    times = [Sample((step_s(result),)) for result in (virtual, real)]
    return Row(f"{name}: seconds a step on {kind}", "s", times[0], Peer(kind, times[1]), group=(name, kind))


def step_s(result: TrainingResult) -> float:
    """The mean seconds of a step after the first ones, which start threads and fill caches."""
    ends = [record["seconds"] for record in result.history]
    first = len(ends) // 8
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


def render(benchmark: str, found: Sequence[Row]) -> str:
    """One line for each policy, and one for each that real workers have trained."""
    cells = {row.group: row for row in found}
    names = list(dict.fromkeys(row.group[0] for row in found))
    head = ("", f"to loss {TARGET:g}", "accuracy", *(f"{layer}/step" for layer in LAYERS), "idle", "lost")
    lines = [head, *(_line(name, cells) for name in names if (name, "accuracy") in cells)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    seeds = len(next(row for row in found if row.group[1] == "accuracy").ours.values)
    title = (
        f"{benchmark}: digits, {REPLICAS} replicas, a quarter 4 times as slow; virtual seconds and computed losses; "
        f"mean of {seeds} seeds ± standard deviation"
    )
    table = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    real = [row for row in found if row.group[1] in KINDS]
    return "\n".join([title, *(f"  {line}".rstrip() for line in table), *map(_beside, real)])


def _line(name: str, cells: dict[tuple[str, ...], Row]) -> tuple[str, ...]:
    time = cells.get((name, "time"))
    reached = f"{_spread(time.ours, 1, 1)} s" if time else "not reached"
    sizes = (f"{cells[name, f'bytes of {layer}'].ours.median / 1024:.1f} KiB" for layer in LAYERS)
    shares = (f"{statistics.mean(cells[name, what].ours.values):.0%}" for what in ("idle", "lost"))
    return name, reached, f"{_spread(cells[name, 'accuracy'].ours, 100, 1)} %", *sizes, *shares


def _spread(sample: Sample, scale: float, digits: int) -> str:
    values = [scale * value for value in sample.values]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _beside(row: Row) -> str:
    real = row.peer.sample
    assert real is not None
    off = row.ours.median / real.median - 1
    return (
        f"  {row.group[0]} on {row.group[1]}, pauses of {PAUSE_S * 1e3:g} ms: a step took {real.median * 1e3:.1f} ms, "
        f"simulated {row.ours.median * 1e3:.1f} ms, {off:+.1%}"
    )


def plot(found: Sequence[Row]) -> Plot:
    """The loss of each policy over virtual time, of the first seed."""
    curves = [row for row in found if row.group[1:] == ("loss",)]
    lines: list[Line] = []
    for row in curves:
        assert row.peer.sample is not None
        points = list(zip(row.ours.values, row.peer.sample.values, strict=True))[:: WINDOW // 2]
        lines.append(Line(row.group[0], points, dashed=len(lines) >= len(COLOURS)))
    return Plot("Loss of the digits beside slow machines", "virtual seconds", "loss", tuple(lines), log_y=True)
