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

    Raises:
        ValueError: for a step that takes no time, or a contention below 0.
    """

    alone_s: float
    contention_s: float

    def __post_init__(self) -> None:
        number("alone_s", self.alone_s, above=True)
        number("contention_s", self.contention_s)

    @staticmethod
    def of(probes: Mapping[int, TrainingResult]) -> TimeModel:
        """The model of two or more probes, by their numbers of replicas. Ten steps of each are enough: the first one,
        which compiles, does not count. If steps of more replicas took less time, the contention is 0.

        Raises:
            TypeError: for what is no mapping from numbers of replicas to results of fits.
            ValueError: for fewer than two numbers of replicas, or a probe of fewer than three steps.
        """
        if not isinstance(probes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"TimeModel.of: {type(probes).__name__} is no mapping; give {{1: result, 2: result}}, by the number of "
                "replicas"
            )
        if len(probes) < 2:
            raise ValueError(f"TimeModel.of: {len(probes)} probe; give fits of two numbers of replicas, as 1 and 2")
        steps = {replicas: _step_s(replicas, result) for replicas, result in probes.items()}
        fitted = statistics.linear_regression([p - 1 for p in steps], list(steps.values()))
        if fitted.slope < 0:
            return TimeModel(statistics.fmean(steps.values()), 0.0)
        return TimeModel(fitted.intercept, fitted.slope)

    def step_s(self, replicas: int) -> float:
        """Seconds of a step of one of so many replicas."""
        return self.alone_s + self.contention_s * (whole_number("replicas", replicas, least=1) - 1)

    def seconds(self, items: int, replicas: int) -> float:
        """Seconds of a fit of so many work items, each one step of one replica: epochs · examples / step size."""
        return whole_number("items", items) * self.step_s(replicas) / replicas

    def error(self, result: TrainingResult, replicas: int) -> float:
        """By what share the prediction differs from a fit; below 0 if the fit took longer."""
        _check_result(result)
        return self.seconds(result.ledger.used + result.ledger.folded, replicas) / result.seconds - 1


def _step_s(replicas: int, result: TrainingResult) -> float:
    """The median time in which each of the replicas does one step."""
    whole_number("replicas", replicas, least=1)
    _check_result(result)
    ends = [record["seconds"] for record in result.history]
    if len(ends) < 3:
        raise ValueError(f"TimeModel.of: the probe of {replicas} replicas has {len(ends)} steps; give it 10")
    return statistics.median(b - a for a, b in pairwise(ends))


def _check_result(result: object) -> None:
    if not isinstance(result, TrainingResult):
        raise TypeError(f"TimeModel: a {type(result).__name__} is no result of a fit; give what Trainer.fit returns")
