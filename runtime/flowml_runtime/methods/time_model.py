"""Predicts how long a fit on replicas that share memory takes, from fits of a few steps (CHAOS).

A step of one of p replicas takes as long as alone, and a while more for each of the others, which use the same memory
and the same locks. So two probes say how long a step takes for any p, as long as the locks are not always held:

    step(p) = alone + contention · (p - 1)

Viebke et al., *CHAOS: A Parallelization Scheme for Training Convolutional Neural Networks on Intel Xeon Phi*, 2017,
predict epochs on up to 240 threads in the same way, with an error of 11 to 15 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from flowml.arguments import number
from flowml.numbers import whole_number
from flowml_runtime.driver.training.result import TrainingResult


@dataclass(frozen=True)
class TimeModel:
    """How long fits take.

    Attributes:
        alone_s: seconds of a step of one replica.
        contention_s: seconds that each other replica adds to a step.
        examples: the examples of a step of one replica, as far as known; steps of others take another time.

    Raises:
        TypeError: for examples that are no whole number.
        ValueError: for a step that takes no time or has no examples, or a contention below 0.
    """

    alone_s: float
    contention_s: float
    examples: int | None = None

    def __post_init__(self) -> None:
        number("alone_s", self.alone_s, above=True)
        number("contention_s", self.contention_s)
        if self.examples is not None:
            whole_number("examples", self.examples, least=1)

    @staticmethod
    def of(probes: Mapping[int, TrainingResult]) -> TimeModel:
        """The model of two or more probes, by their numbers of replicas. Ten steps of each are enough: the first one,
        which compiles, does not count. If steps of more replicas took less time, the contention is 0.

        The replicas of all probes have steps of as many examples, so `batch_size` is that times their number.

        Raises:
            TypeError: for what is no mapping from numbers of replicas to results of fits.
            ValueError: for fewer than two numbers of replicas, a number that is not that of the fit or that changed in
                it, a probe of fewer than three steps or steps without time, or probes that differ in the examples of a
                step.
        """
        if not isinstance(probes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"TimeModel.of: {type(probes).__name__} is no mapping; give {{1: result, 2: result}}, by the number of "
                "replicas"
            )
        if len(probes) < 2:
            raise ValueError(f"TimeModel.of: {len(probes)} probe; give fits of two numbers of replicas, as 1 and 2")
        steps = {replicas: _step_s(replicas, result) for replicas, result in probes.items()}
        examples = {p: result.ledger.item_size for p, result in probes.items()}
        if len(set(examples.values())) > 1:
            told = " and ".join(f"{n} with replicas={p}" for p, n in examples.items())
            raise ValueError(
                f"TimeModel.of: the examples of a replica's step are {told}, so the times do not compare; give fit a "
                f"batch_size of {next(iter(examples.values()))} times the number of replicas"
            )
        fitted = statistics.linear_regression([p - 1 for p in steps], list(steps.values()))
        size = next(iter(examples.values()))
        if fitted.slope < 0:
            return TimeModel(statistics.fmean(steps.values()), 0.0, size)
        if fitted.intercept <= 0:
            raise ValueError(
                f"TimeModel.of: probes of {' and '.join(map(str, steps))} replicas say that a step of one takes "
                f"{fitted.intercept:.3g} s, because the locks are always held or the times vary; give a probe of 1 "
                "replica, or more steps"
            )
        return TimeModel(fitted.intercept, fitted.slope, size)

    def step_s(self, replicas: int) -> float:
        """Seconds of a step of one of so many replicas."""
        return self.alone_s + self.contention_s * (whole_number("replicas", replicas, least=1) - 1)

    def seconds(self, items: int, replicas: int) -> float:
        """Seconds of a fit of so many work items, each one step of one replica: epochs · examples / step size. The
        replicas share them evenly, so for fewer items than replicas it is a part of a step.

        Raises TypeError or ValueError for what is no whole number of at least 1.
        """
        return whole_number("items", items, least=1) * self.step_s(replicas) / replicas

    def error(self, result: TrainingResult, replicas: int) -> float:
        """By what share the prediction differs from a fit; below 0 if the fit took longer.

        Raises:
            TypeError: for what is no result of a fit.
            ValueError: for another number of replicas than the fit has, or one that changed in it; for steps of other
                examples than those of the probes; for a fit that goes on from a checkpoint, or in which no item counts.
        """
        _check_probe("error", replicas, result)
        size, items = result.ledger.item_size, result.ledger.used + result.ledger.folded
        if self.examples not in (None, size):
            raise ValueError(
                f"TimeModel.error: a step of a replica has {size} examples, and {self.examples} in the probes; give "
                f"the fit batch_size={self.examples * replicas}, or make the model of probes with {size}"
            )
        if result.resumed_at:
            raise ValueError(
                f"TimeModel.error: the fit goes on from step {result.resumed_at}, and its items are those of the whole "
                "fit; give the result of a fit without resume="
            )
        if not items or not result.seconds > 0:
            raise ValueError(
                f"TimeModel.error: the fit has used {items} items in {result.seconds:g} s, which is nothing to compare "
                "with; give a fit of some steps"
            )
        return self.seconds(items, replicas) / result.seconds - 1


def _step_s(replicas: int, result: TrainingResult) -> float:
    """The median time in which each of the replicas does one step."""
    _check_probe("of", replicas, result)
    ends = [record["seconds"] for record in result.history]
    if len(ends) < 3:
        raise ValueError(f"TimeModel.of: the probe of {replicas} replicas has {len(ends)} steps; give it 10")
    found = statistics.median(b - a for a, b in pairwise(ends))
    if not found > 0:
        raise ValueError(
            f"TimeModel.of: the steps of the probe of {replicas} replicas took {found:g} s; give a fit whose steps "
            "take some time"
        )
    return found


def _check_probe(method: str, replicas: int, result: object) -> None:
    """Raise TypeError or ValueError unless it is a fit that had so many replicas from its begin to its end."""
    whole_number("replicas", replicas, least=1)
    if not isinstance(result, TrainingResult):
        raise TypeError(f"TimeModel: a {type(result).__name__} is no result of a fit; give what Trainer.fit returns")
    if result.losses or result.changes:
        raise ValueError(
            f"TimeModel.{method}: the fit of {replicas} replicas lost or changed workers while it ran, so its steps "
            "are of different numbers of replicas; give one that kept all of them"
        )
    training = result.plan.training
    had = replicas if training is None else len(training.replicas)
    if had != replicas:
        raise ValueError(f"TimeModel.{method}: replicas={replicas}, and the fit has {had}; give {had} for this result")
