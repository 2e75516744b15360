"""Which replicas of a fit were late, how often, and what it cost: as values, and in words."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_high

from flowml.errors import named
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
            replica (see `flowml.policy.waits`), or other replicas waited at their bound of staleness for it, or it
            computed clearly less than its share of the portions of the batch.
        left_out: at how many of these steps some layer's decision did not include it.
        behind_s: how many seconds it arrived after the middle replica, or how long the one waited that waited longest:
            the mean over the steps at which it did arrive late; NaN if there is none.
        cost_s: an estimate of how many seconds shorter the fit would have been if the replica had been as fast as the
            middle one (`Stragglers`).
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
class SlowHome:
    """A worker that was slow as the home of layers.

    Attributes:
        worker: its name.
        layers: those that have their home there.
        seconds: how long it worked for them: on applies and on versions to publish.
        usual_s: how long the middle home would have taken for as many applies of as many bytes.
        cost_s: an estimate of how many seconds shorter the fit would have been with such a home.
    """

    worker: str
    layers: tuple[str, ...]
    seconds: float
    usual_s: float
    cost_s: float


@dataclass(frozen=True)
class Stragglers(Sequence[Straggler]):
    """The replicas of a fit that were late, those that cost most first. `print` says it in words.

    What a replica cost is estimated from what the fit has recorded; nothing is run again.

    * Where a home decides each clock, it is the time from the last arrival that was not late to the decision.
    * A replica that a decision leaves out delays it if steps vary, because the fastest three of four good replicas are
      faster than three of three. What one more good replica would have saved is estimated from the last two arrivals of
      each clock. It is charged to a replica as far as that is left out more often than all are on average.
    * Where replicas add up gradients or average parameters among themselves, the fit is modelled with and without what
      made them late, from the durations of their steps less their waits. The times of messages are left out of both.
      So it is with a policy whose decisions overlap (`delay=`), and where sites send what a home decides.
      In a pipeline the waits of earlier stages count as work, so the cost is at most this much too small.
    * Where layers have several rules, and not all of them may leave replicas out, no home knows what the others wait
      for. The fit is modelled in the same way, with quorums, deadlines and bounds of staleness. In simulated fits of 21
      mixes the cost was within 15% of the truth (20% if steps varied) or, if more, 5% of the fit. A rule not modelled
      (samples, microbatches, codes, consensus, sites that decide alone) makes the costs of such a fit `rough`. Where
      messages take a good part of a step, which the model leaves out, the cost was up to a third too much, and with two
      rules that drop twice the truth. A replica that is only far from its home is called late too.
    * Where replicas take work items when they are free, it is what the fit took longer than its items take at the pace
      of the middle replica.
    * With portions and copies, it is what a batch took longer than the good replicas needed for their shares.

    So the cost of one slow replica is within a tenth of what a second fit without it would save, if the times of steps
    do not vary, and within a sixth if they do. A replica that is only 1.5 times as slow is harder to
    tell from chance: the estimate was up to 2.3 times the saving. The cost of a replica that decisions leave out is
    estimated more roughly: in 24 simulated fits it was 0.7 to 1.8 times the saving, 1.2 times in the middle. The
    cost is shared among several by how far they are behind.

    A worker may also be slow as the home of layers. Homes measure how long they work for a layer. What a home took
    longer than the middle one would have taken for the same work is its cost, as far as replicas waited for it. It is
    up to a fifth too small where homes are few and of different sizes. With one home there is nothing to compare.

    Attributes:
        steps: the number of steps at which replicas were compared.
        seconds: how long the fit took.
        late: the replicas.
        usual: the number of work items that the middle replica did, if replicas share no clocks; else None.
        homes: the workers that were slow as homes.
        rough: whether layers have several rules that are not modelled together. The cost is then that of the rule that
            waited longest at each step, which may be far from the truth.
        worked_s: by replica, how many seconds the steps that it has reported took, less its waits for others and for
            homes. A step that it gave up is not in it.
    """

    steps: int = 0
    seconds: float = 0.0
    late: tuple[Straggler, ...] = ()
    usual: int | None = None
    homes: tuple[SlowHome, ...] = ()
    rough: bool = False
    worked_s: tuple[float, ...] = field(default=(), repr=False)

    @property
    def cost_s(self) -> float:
        """The seconds that all of them cost together, the homes included."""
        return sum(straggler.cost_s for straggler in (*self.late, *self.homes))

    def __len__(self) -> int:
        return len(self.late)

    def __iter__(self) -> Iterator[Straggler]:
        return iter(self.late)

    def __getitem__(self, index: int) -> Straggler:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.late[index]

    def __str__(self) -> str:
        homes = [self._home(home) for home in self.homes if home.cost_s >= LEAST * self.seconds][:MOST_LINES]
        if not self.late:
            return "\n".join([f"No replica was late in {_steps(self.steps)}.", *homes])
        told = [s for s in self.late if s.cost_s >= LEAST * self.seconds or s.left_out or not s.late][:MOST_LINES]
        lines = [self._line(straggler) for straggler in told]
        rest = [straggler for straggler in self.late if straggler not in told]
        if rest:
            who = f"{len(rest)} {'more ' if lines else ''}replica{' was' if len(rest) == 1 else 's were'}"
            lines.append(
                f"{who} late at up to {_steps(max(s.late for s in rest))}: others waited "
                f"{_seconds(sum(s.cost_s for s in rest))} in all."
            )
        if self.rough:
            lines.append("Layers wait by rules that are not modelled together, so these costs are rough.")
        return "\n".join([*lines, *homes])

    def _home(self, home: SlowHome) -> str:
        share = f" ({home.cost_s / self.seconds:.0%} of the fit)" if self.seconds > 0 else ""
        return (
            f"{home.worker} was slow as the home of {named(home.layers)}: it took {_seconds(home.seconds)} where the "
            f"middle home takes {_seconds(home.usual_s)}: others waited {_seconds(home.cost_s)} for it{share}."
        )

    def _line(self, straggler: Straggler) -> str:
        if not straggler.late and self.usual is not None:
            cost = f"; the fit was {_seconds(straggler.cost_s)} longer for it" if straggler.cost_s > 0 else ""
            return (
                f"{straggler.name} did {done(straggler.items)} work items, where the middle replica did {self.usual}; "
                f"no other waited for it{cost}."
            )
        behind = ""
        if not math.isnan(straggler.behind_s):
            behind = f", by {_seconds(straggler.behind_s)} on average"
        costs: list[str] = []
        if straggler.cost_s > 0:
            share = f" ({straggler.cost_s / self.seconds:.0%} of the fit)" if self.seconds > 0 else ""
            costs.append(f"others waited {_seconds(straggler.cost_s)} for it{share}")
        if straggler.items.copied:
            costs.append(f"others computed {_many(straggler.items.copied, 'portion')} that it had begun")
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


def free_costs(
    items: Sequence[int], active: Sequence[float], seconds: float, late: Collection[int]
) -> tuple[int, dict[int, float]]:
    """How many work items the middle replica did, and what each slow or late one cost, if they take items when they
    are free.

    Without them the fit takes as long as its items take at the pace of the middle replica. The rest is shared by how
    much longer they were active than they would have been at that pace.

    Args:
        items: how many work items each replica did.
        active: how many seconds each had work and did not wait for others.
        seconds: how long the fit took.
        late: the replicas that others waited for.
    """
    usual = median_high(items)
    paces = sorted(a / n for n, a in zip(items, active, strict=True) if n)
    if not paces:
        return usual, {}
    pace = paces[(len(paces) - 1) // 2]
    longer = {r: max(a - pace * n, 0.0) for r, (n, a) in enumerate(zip(items, active, strict=True))}
    found = {r: s for r, s in longer.items() if r in late or items[r] < SLOW * usual or s > (1 - SLOW) * seconds}
    total, lost = sum(found.values()), max(seconds - pace * sum(items) / len(items), 0.0)
    return usual, {r: lost * s / total if total else 0.0 for r, s in found.items()}


def _steps(number: int) -> str:
    return _many(number, "step")


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"
