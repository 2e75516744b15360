"""Trains one real model with many policies beside a slow machine: time to a loss, accuracy, bytes, waits, lost work.

Replicas are threads or worker processes of this machine, or simulated ones (`policy_fits`). All policies have the same
optimizer and the same number of steps, for none of which they were tuned (`policy_entries`). The loss is that of the
training examples, where the replicas compute it: some have parameters of their own. The accuracy is that of the result
on examples that were held back.

Each seed is done with all policies before the next, so that a table that is cut short has all policies and fewer seeds.
A policy's line is printed when its last seed is done. Seeds for which there is no time are not begun: how long a fit
takes is judged by those before, so the benchmark ends about one fit after its time at the latest. The lines of those
that have fewer seeds follow then, or at an interrupt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flowml.errors import FlowmlError
from flowml_tools.bench.policy_entries import BATCH, LEFT_OUT, PAUSE_S, REPLICAS, Entry, chosen
from flowml_tools.bench.policy_fits import FACTOR, SIZES, SPREAD, TARGET, Fits, Fitted, start
from flowml_tools.bench.rows import Part, Peer, Row, Sample
from flowml_tools.bench.timing import tell
from flowml_tools.command import count
from flowml_tools.plots import Dots, DotsRow

SUMMARY = "one model, many policies beside a slow machine: time to a loss, accuracy, bytes, waits, lost work"
SEEDS, STEPS = 3, 60
FULL_SEEDS, FULL_STEPS = 5, 180
Kind = Literal["threads", "processes", "simulated"]
KINDS: tuple[Kind, ...] = ("threads", "processes", "simulated")
"""What the replicas are."""
PEER = "synchronous()"
NOTE_LENGTH = 200
COLUMNS = (
    {"": 0, f"to loss {TARGET:g}": 20, "accuracy": 12, "step": 8}
    | {f"{s}/step": 11 for s in SIZES}
    | {
        "waits": 5,
        "lost": 4,
    }
)
"""The head of the table, with the width of each column but the first."""


@dataclass
class Budget:
    """How much time is left, and what a fit costs: the first of a policy compiles its step."""

    seconds: float = float("inf")
    began: float = field(default_factory=time.monotonic)
    took: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def allows(self, *, first: bool) -> bool:
        known = self.took[first] or self.took[not first] or [0.0]
        return time.monotonic() - self.began + statistics.mean(known) <= self.seconds

    def fit(self, fits: Fits, seed: int, *, first: bool) -> Fitted:
        began = time.monotonic()
        fitted = fits.fit(seed)
        self.took[first].append(time.monotonic() - began)
        return fitted


def rows(repeats: int | None, **settings: Any) -> list[Row]:
    """The rows of all parts."""
    return [row for part in parts(repeats, **settings) for row in part.rows]


def parts(
    repeats: int | None,
    *,
    names: Sequence[str] = (),
    kind: Kind = "threads",
    full: bool = False,
    seconds: float | None = None,
    steps: int | None = None,
) -> Iterator[Part]:
    """The head of the table, a line for each policy, and what there is to say of those without one.

    Args:
        repeats: the number of seeds.
        names: the policies; see `chosen`.
        full: more seeds and steps.
        seconds: no seed is begun that would not end by then.
    """
    budget = Budget() if seconds is None else Budget(seconds)
    known = chosen(names)
    seeds, steps = repeats or (FULL_SEEDS if full else SEEDS), steps or (FULL_STEPS if full else STEPS)
    width = max(map(len, known))
    yield Part(f"{_title(kind, seeds, steps)}\n{_padded(tuple(COLUMNS), width)}")
    table = _Table(known, seeds, steps, budget)
    try:
        with start(kind) as cluster:
            for seed in range(seeds):
                for name in known:
                    table.fit(cluster, name, seed)
                    if seed == seeds - 1:
                        yield from table.lines(name, width)
    except (KeyboardInterrupt, SystemExit):
        for name in known:
            yield from table.lines(name, width)
        yield table.end("interrupted", named=bool(names))
        raise
    yield table.end(f"the time of {budget.seconds:g} s was over", named=bool(names))


class _Table:
    """What is known of each policy so far."""

    def __init__(self, known: Mapping[str, Entry], seeds: int, steps: int, budget: Budget) -> None:
        self._known, self._seeds, self._steps, self._budget = known, seeds, steps, budget
        self._fits: dict[str, Fits] = {}
        """The policies that have begun."""
        self._found: dict[str, list[Fitted]] = {name: [] for name in known}
        self._failed: dict[str, str] = {}
        self._told: set[str] = set()
        """The policies whose lines were printed."""
        self._plain: tuple[Row, ...] = ()
        """The rows of synchronous training."""

    def fit(self, cluster: Any, name: str, seed: int) -> None:
        """Fit a policy with a seed, if there is time."""
        first = name not in self._fits
        if name in self._failed or not self._budget.allows(first=first):
            return
        number = list(self._known).index(name) + 1
        tell(f"policies: {name}, {number} of {len(self._known)}, seed {seed + 1} of {self._seeds}")
        try:
            if first:
                self._fits[name] = Fits(cluster, self._known[name], self._steps)
            self._found[name].append(self._budget.fit(self._fits[name], seed, first=first))
        except FlowmlError as error:
            self._failed[name] = _clipped(str(error))

    def lines(self, name: str, width: int) -> Iterator[Part]:
        """The line of a policy that has a fit, once."""
        if name in self._told or not self._found[name]:
            return
        self._told.add(name)
        found = tuple(described(name, self._found[name], self._plain))
        self._plain = self._plain or (found if name == PEER else ())
        yield Part(_padded(line(name, found), width), found)

    def end(self, reason: str, *, named: bool) -> Part:
        """What there is to say after the table. `reason` is why policies were not run; `named`: they were chosen."""
        left = {name: f"failed: {error}" for name, error in self._failed.items()}
        for name, found in self._found.items():
            done = len(found)
            if done < self._seeds and name not in left:
                left[name] = f"{reason} after {done} of {count(self._seeds, 'seed')}" if done else f"not run: {reason}"
        left |= {} if named else LEFT_OUT
        said = {name: dict.fromkeys(n for fitted in found for n in fitted.notes) for name, found in self._found.items()}
        notes = [f"{name}: {_clipped(note)}" for name, found in said.items() for note in found]
        lines = [*notes, *_grouped(left)]
        return Part("\n".join(f"  {line}" for line in lines), left_out=left)


def _clipped(text: str) -> str:
    from flowml.render.units import clip

    return clip(text, NOTE_LENGTH)


def _grouped(left: Mapping[str, str]) -> list[str]:
    """One line for each reason, with the names that share it."""
    reasons = list(dict.fromkeys(left.values()))
    return [f"{', '.join(name for name in left if left[name] == why)}: {why}" for why in reasons]


def _title(kind: Kind, seeds: int, steps: int) -> str:
    where = "simulated machines, virtual seconds" if kind == "simulated" else f"{kind} of this machine"
    pause, slow = (f"{scale * PAUSE_S * 1e3:g} ms" for scale in (1, FACTOR))
    return (
        f"policies: digits on {REPLICAS} replicas, {where}; mean of {count(seeds, 'seed')} ± standard deviation\n"
        f"  a step pauses {pause}, at one replica {slow} (log-normal, σ {SPREAD:g}); {steps} steps of {BATCH} examples"
    )


def described(name: str, fits: Sequence[Fitted], plain: Sequence[Row] = ()) -> list[Row]:
    """The rows of one policy, beside those of synchronous training."""
    peers = {row.group[1]: Peer(PEER, row.ours) for row in plain}

    def row(what: str, unit: Any, values: Sequence[float]) -> Row:
        peer = peers.get(what, Peer("no peer"))
        return Row(f"{name}: {what}", unit, Sample(tuple(values)), peer, group=(name, what))

    def each(what: str, unit: Any, value: Callable[[Fitted], float]) -> Row:
        return row(what, unit, list(map(value, fits)))

    reached = [fit.reached_s for fit in fits if fit.reached_s is not None]
    seconds, losses = zip(*fits[0].losses, strict=True)
    curve = Row(f"{name}: loss", "s", Sample(seconds), Peer("loss", Sample(losses)), group=(name, "loss"))
    return [
        *([row("time", "s", reached)] if reached else []),
        each("accuracy", "share", lambda fit: fit.accuracy),
        each("step", "s", lambda fit: fit.step_s),
        *(each(f"bytes of {layer}", "bytes", lambda fit, layer=layer: fit.nbytes[layer]) for layer in SIZES),
        each("waits", "share", lambda fit: fit.waits),
        each("lost", "share", lambda fit: fit.lost),
        curve,
    ]


def line(name: str, found: Sequence[Row]) -> tuple[str, ...]:
    """The cells of a policy's line."""
    cells = {row.group[1]: row.ours for row in found}
    step = f"{statistics.mean(cells['step'].values) * 1e3:.1f} ms"
    sizes = (f"{statistics.mean(cells[f'bytes of {layer}'].values) / 1024:.1f} KiB" for layer in SIZES)
    shares = (f"{max(0.0, statistics.mean(cells[what].values)):.0%}" for what in ("waits", "lost"))
    reached, seeds = cells.get("time"), len(cells["accuracy"].values)
    time_s = "not reached"
    if reached:
        few = f", {len(reached.values)} of {seeds}" if len(reached.values) < seeds else ""
        time_s = f"{_spread(reached, 1, 2)} s{few}"
    return name, time_s, f"{_spread(cells['accuracy'], 100, 1)} %", step, *sizes, *shares


def _padded(cells: Sequence[str], width: int) -> str:
    widths = (width, *list(COLUMNS.values())[1:])
    return ("  " + "  ".join(cell.ljust(wide) for cell, wide in zip(cells, widths, strict=True))).rstrip()


def _spread(sample: Sample, scale: float, digits: int) -> str:
    values = [scale * value for value in sample.values]
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def plot(found: Sequence[Row]) -> Dots:
    """The time to the loss and the accuracy of each policy, a dot for each seed, the soonest first."""
    cells = {row.group: row.ours for row in found}
    names = dict.fromkeys(row.group[0] for row in found)
    times = {name: cells[name, "time"].values for name in names if (name, "time") in cells}
    order = sorted(names, key=lambda name: statistics.mean(times.get(name, (float("inf"),))))
    rows = [DotsRow(name, (times.get(name, ()), cells[name, "accuracy"].values)) for name in order]
    columns = (f"seconds to loss {TARGET:g}", "accuracy")
    return Dots(f"Digits on {REPLICAS} replicas, one {FACTOR} times as slow", columns, tuple(rows), "not reached")
