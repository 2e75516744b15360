"""Which replicas of a fit were late, how often, and what it cost: as values, and in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median_high

from flowml_runtime.protocol.training.summary import Tally

MOST_LINES = 5
"""The most replicas that the text names."""
LEAST = 0.01
"""The text names no replica that only made others wait, and cost a smaller share of the fit."""
SLOW = 0.75
"""A replica without clocks is slow if it does less than this share of the middle replica's work items."""


@dataclass(frozen=True)
class Straggler:
    """A replica that was late.

    Attributes:
        replica: its number.
        workers: the workers that run its stages.
        late: the number of steps at which it was late: it arrived after the decision, or clearly after the middle
            replica (see `flowml.policy.waits`), or other replicas waited at their bound of staleness for it.
        left_out: at how many of these steps some layer's decision did not include it.
        behind_s: how many seconds it arrived after the middle replica, or how long the one waited that waited longest:
            the mean over the steps at which it did arrive late; NaN if there is none.
        cost_s: how much shorter the fit would have been if it had not been late, in seconds: the time that others
            waited for it.
        items: the fates of its work items.
    """

    replica: int
    workers: tuple[str, ...]
    late: int
    left_out: int
    behind_s: float
    cost_s: float
    items: Tally

    @property
    def name(self) -> str:
        if len(self.workers) == 1:
            return f"{self.workers[0]} (replica {self.replica})"
        return f"replica {self.replica} ({', '.join(self.workers)})"


@dataclass(frozen=True)
class Stragglers(Sequence[Straggler]):
    """The replicas of a fit that were late, those that cost most first. `print` says it in words.

    Attributes:
        steps: the number of steps at which replicas were compared.
        seconds: how long the fit took.
        late: the replicas.
        usual: the number of work items that the middle replica did, if replicas share no clocks; else None.
    """

    steps: int = 0
    seconds: float = 0.0
    late: tuple[Straggler, ...] = ()
    usual: int | None = None

    @property
    def cost_s(self) -> float:
        """The seconds that all of them cost together."""
        return sum(straggler.cost_s for straggler in self.late)

    def __len__(self) -> int:
        return len(self.late)

    def __iter__(self) -> Iterator[Straggler]:
        return iter(self.late)

    def __getitem__(self, index: int) -> Straggler:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.late[index]

    def __str__(self) -> str:
        if not self.late:
            return f"No replica was late in {_steps(self.steps)}."
        told = [s for s in self.late if s.cost_s >= LEAST * self.seconds or s.left_out or not s.late][:MOST_LINES]
        lines = [self._line(straggler) for straggler in told]
        rest = [straggler for straggler in self.late if straggler not in told]
        if rest:
            who = f"{len(rest)} {'more ' if lines else ''}replica{' was' if len(rest) == 1 else 's were'}"
            lines.append(
                f"{who} late at up to {_steps(max(s.late for s in rest))}: others waited "
                f"{_seconds(sum(s.cost_s for s in rest))} in all."
            )
        return "\n".join(lines)

    def _line(self, straggler: Straggler) -> str:
        if not straggler.late:
            return (
                f"{straggler.name} did {done(straggler.items)} work items, where the middle replica did {self.usual}; "
                "no other waited for it."
            )
        behind = ""
        if not math.isnan(straggler.behind_s):
            behind = f", by {_seconds(straggler.behind_s)} on average"
        costs: list[str] = []
        if straggler.cost_s > 0:
            share = f" ({straggler.cost_s / self.seconds:.0%} of the fit)" if self.seconds > 0 else ""
            costs.append(f"others waited {_seconds(straggler.cost_s)} for it{share}")
        if straggler.left_out:
            costs.append(f"it was left out of {straggler.left_out}")
        items = straggler.items
        fates = [(items.dropped, "dropped"), (items.folded, "folded in later"), (items.requeued, "requeued")]
        costs += [f"{n} of its work items {'was' if n == 1 else 'were'} {fate}" for n, fate in fates if n]
        cost = ", ".join(costs) or "no other waited for it"
        return f"{straggler.name} was late at {straggler.late} of {_steps(self.steps)}{behind}: {cost}."


def done(items: Tally) -> int:
    """The number of work items that a replica has worked on."""
    return items.used + items.dropped + items.folded + items.requeued


def slow(replicas: Sequence[Tally]) -> tuple[frozenset[int], int]:
    """The replicas that did clearly fewer work items than the middle one, and how many that one did."""
    usual = median_high(map(done, replicas))
    return frozenset(r for r, items in enumerate(replicas) if done(items) < SLOW * usual), usual


def _steps(number: int) -> str:
    return f"{number} step{'' if number == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"
