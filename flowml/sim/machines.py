"""Models machines: how long one step of a replica computes.

A model is a frozen value. `seconds(seed, worker, step)` is a pure function, so the time of a step does not depend on
when the simulator asks for it, and two policies that are compared with one seed meet the same machines. `draw` does the
same for arrays of workers and steps. `worker` is the number of the replica.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from flowml.errors import SimulationError, one_line
from flowml.sim import checks
from flowml.sim.draws import Counters, Floats, normal, uniform
from flowml.sim.recording import Recording
from flowml.sim.traces import read_compute_times

_TIME = 0
"""The streams of a compute time: this one and the next."""

_STRAGGLERS = 16
"""First stream of the innermost `Straggler`. Each one around it uses the next `_STREAMS`."""

LONGEST_S = 1e290
"""A bound on the time of a step, so that the sum of many is a number too."""

_WHO, _WHEN, _PHASE, _STREAMS = 0, 1, 2, 3


class ComputeModel(ABC):
    """How long one step of a replica computes, in seconds."""

    @abstractmethod
    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        """The seconds of each worker and step, float64. The arrays of int64 broadcast against each other."""

    def seconds(self, seed: int, worker: int, step: int) -> float:
        """The seconds of one step of one worker. Equal to the element of `draw` to the bit."""
        return float(self.draw(seed, worker, step))

    def check(self, workers: int) -> None:
        """Raise SimulationError if a cluster of so many workers does not fit this model."""
        return

    def drawn(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        """Like `draw`. Raises SimulationError if a time that the model draws is none."""
        with np.errstate(all="ignore"):  # the error below says more
            times = self.draw(seed, workers, steps)
        if not np.all((times >= 0) & (times < LONGEST_S)):
            wrong = times[~((times >= 0) & (times < LONGEST_S))].flat[0]
            raise SimulationError(
                f"{one_line(repr(self))} draws a step of {wrong:g} s; give a model of times from 0 to {LONGEST_S:g} s"
            )
        return times


@dataclass(frozen=True)
class Constant(ComputeModel):
    """Every step takes `s` seconds."""

    s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "s", checks.number("Constant", "s", self.s))

    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        return np.full(np.broadcast_shapes(np.shape(workers), np.shape(steps)), self.s)


@dataclass(frozen=True)
class ShiftedExponential(ComputeModel):
    """`shift_s` seconds plus an exponential time with mean `mean_s`. The mean of the whole is `shift_s + mean_s`."""

    shift_s: float
    mean_s: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift_s", checks.number("ShiftedExponential", "shift_s", self.shift_s))
        object.__setattr__(self, "mean_s", checks.number("ShiftedExponential", "mean_s", self.mean_s))

    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        return self.shift_s - self.mean_s * np.log(uniform(seed, workers, steps, _TIME))


@dataclass(frozen=True)
class LogNormal(ComputeModel):
    """A time whose logarithm is normal with standard deviation `sigma`.

    `mean_s` is the mean of the time itself; the median is `mean_s * exp(-sigma**2 / 2)`.
    """

    mean_s: float
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean_s", checks.number("LogNormal", "mean_s", self.mean_s, open_at_least=True))
        object.__setattr__(self, "sigma", checks.number("LogNormal", "sigma", self.sigma))
        if math.exp(math.log(self.mean_s) - self.sigma * self.sigma / 2) == 0:
            raise SimulationError(
                f"LogNormal: sigma={self.sigma:g} makes no sense: half of all steps would take less than the smallest "
                f"number of seconds above 0; give a smaller sigma, such as 0.5"
            )

    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        middle = math.log(self.mean_s) - self.sigma**2 / 2
        return np.exp(middle + self.sigma * normal(seed, workers, steps, _TIME))


@dataclass(frozen=True)
class Pareto(ComputeModel):
    """At least `scale_s` seconds; a step takes longer than t with probability `(scale_s / t)**alpha`.

    The mean is `scale_s * alpha / (alpha - 1)`. It is infinite for `alpha <= 1`, which is allowed: then the mean of a
    simulation has no limit and grows with its length, so compare medians. The variance is infinite for `alpha <= 2`.
    """

    scale_s: float
    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_s", checks.number("Pareto", "scale_s", self.scale_s, open_at_least=True))
        object.__setattr__(self, "alpha", checks.number("Pareto", "alpha", self.alpha, open_at_least=True))

    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        return self.scale_s * uniform(seed, workers, steps, _TIME) ** (-1 / self.alpha)


@dataclass(frozen=True)
class Empirical(ComputeModel):
    """Each step takes one of the measured `samples_s`, each with the same probability."""

    samples_s: Sequence[float]
    _sorted: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = checks.sequence("Empirical", "samples_s", self.samples_s, "measured times")
        samples = tuple(checks.number("Empirical", f"samples_s[{i}]", s) for i, s in enumerate(given))
        if not samples:
            raise SimulationError("Empirical: samples_s is empty; give at least one measured time")
        object.__setattr__(self, "samples_s", samples)
        object.__setattr__(self, "_sorted", np.sort(np.asarray(samples)))

    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        at = uniform(seed, workers, steps, _TIME) * len(self._sorted)
        return self._sorted[at.astype(np.int64)]


@dataclass(frozen=True)
class Recorded(ComputeModel):
    """Times of a recorded run.

    A worker beyond the recorded ones takes the times of a recorded one (its number modulo theirs). After its last
    recorded step a worker starts again with its first.

    Args:
        trace: the path of a trace that flowml wrote (JSON) or of a recorded job (CSV or Parquet), a `Recording`, or the
            times as `trace[worker][step]`; a mapping has the number of a worker as its key.

    Attributes:
        times_s: the seconds of each worker and step.

    Raises:
        SimulationError: for times that make no sense.
        TraceError: if a file is damaged or cut short.
    """

    trace: str | PathLike[str] | Recording | Sequence[Sequence[float]] | Mapping[int, Sequence[float]] = field(
        repr=False, compare=False
    )
    times_s: tuple[tuple[float, ...], ...] = field(init=False)
    _flat: Floats = field(init=False, repr=False, compare=False)
    _starts: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    _lengths: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.trace
        if isinstance(given, str | PathLike):
            given = read_compute_times(given)
        elif isinstance(given, Recording):
            given = given.compute_times()
        elif isinstance(given, Mapping):
            if sorted(given) != list(range(len(given))):
                raise SimulationError(f"Recorded: the workers {sorted(given)} are not numbered from 0 without a gap")
            given = [given[worker] for worker in range(len(given))]
        given = checks.sequence("Recorded", "trace", given, "the times of each worker")
        each = [
            checks.sequence("Recorded", f"trace[{w}]", row, "the times of its steps") for w, row in enumerate(given)
        ]
        rows = tuple(
            tuple(checks.number("Recorded", f"trace[{w}][{s}]", time) for s, time in enumerate(row))
            for w, row in enumerate(each)
        )
        empty = [w for w, row in enumerate(rows) if not row]
        if empty or not rows:
            where = f"worker {empty[0]}" if empty else "any worker"
            raise SimulationError(f"Recorded: there is no time of {where}; give each at least one recorded step")
        lengths = [len(row) for row in rows]
        object.__setattr__(self, "times_s", rows)
        object.__setattr__(self, "_flat", np.concatenate([np.asarray(row) for row in rows]))
        object.__setattr__(self, "_starts", np.asarray([0, *accumulate(lengths)][:-1]))
        object.__setattr__(self, "_lengths", np.asarray(lengths))

    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        rows = np.asarray(workers) % len(self._lengths)
        return self._flat[self._starts[rows] + np.asarray(steps) % self._lengths[rows]]


@dataclass(frozen=True)
class Straggler(ComputeModel):
    """Some workers take `factor` times as long as `base`.

    Persistent stragglers are slow in each step. Transient ones (`probability` below 1) are slow in some steps, or in
    bursts of `burst_steps` steps. All else is as in `base`, to the bit.

    Args:
        base: the model of a worker that is not slow. Another `Straggler` is allowed.
        factor: at least 1.
        share: in (0, 1]; this share of the workers is slow. They are spread evenly over the numbers of the workers,
            from an offset that depends on the seed: of n successive workers n * share are slow, rounded up or down.
        workers: the numbers of the slow workers, instead of `share`. With neither all workers are, some of the time.
        probability: in (0, 1]; the probability that a straggler is slow in a step, or in a burst.
        burst_steps: how many successive steps are slow together.

    Raises:
        SimulationError: for values out of range, or if nothing says who is slow or how often.
    """

    base: ComputeModel
    factor: float
    share: float | None = None
    workers: Sequence[int] | None = None
    probability: float = 1.0
    burst_steps: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.base, ComputeModel):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(f"Straggler: base={self.base!r} is not a model; give one like Constant(0.1)")
        if self.share is not None and self.workers is not None:
            raise SimulationError("Straggler: share and workers both say who is slow; give one of them")
        object.__setattr__(self, "factor", checks.number("Straggler", "factor", self.factor, least=1))
        object.__setattr__(self, "probability", checks.share("Straggler", "probability", self.probability))
        object.__setattr__(self, "burst_steps", checks.count("Straggler", "burst_steps", self.burst_steps, least=1))
        if self.share is not None:
            object.__setattr__(self, "share", checks.share("Straggler", "share", self.share))
        elif self.workers is not None:
            object.__setattr__(self, "workers", _numbers_of_workers(self.workers))
        elif self.probability == 1:
            raise SimulationError(
                "Straggler: nothing says who is slow or how often; give share=0.1, workers=(3,) or probability=0.05"
            )

    def draw(self, seed: int, workers: Counters, steps: Counters) -> Floats:
        times = self.base.draw(seed, workers, steps)
        return np.where(self.is_slow(seed, workers, steps), times * self.factor, times)

    def check(self, workers: int) -> None:
        self.base.check(workers)
        beyond = [w for w in self.workers or () if w >= workers]
        if beyond:
            raise SimulationError(
                f"Straggler: workers names worker {beyond[0]}, and the cluster has workers 0 to {workers - 1}"
            )

    def is_slow(self, seed: int, workers: Counters, steps: Counters) -> NDArray[np.bool_]:
        """Whether this model (not `base`) slows each worker and step down."""
        stream, slow = self._stream(), self._who(seed, workers)
        if self.probability < 1:
            phase = (uniform(seed, workers, 0, stream + _PHASE) * self.burst_steps).astype(np.int64)
            burst = (np.asarray(steps) + phase) // self.burst_steps
            slow = slow & (uniform(seed, workers, burst, stream + _WHEN) < self.probability)
        return slow

    def _who(self, seed: int, workers: Counters) -> NDArray[np.bool_]:
        numbers = np.asarray(workers)
        if self.workers is not None:
            return np.isin(numbers, np.asarray(self.workers))
        if self.share is None:
            return np.ones(numbers.shape, np.bool_)
        offset = uniform(seed, 0, 0, self._stream() + _WHO)
        return np.floor((numbers + 1) * self.share + offset) > np.floor(numbers * self.share + offset)

    def _stream(self) -> int:
        base = self.base
        return base._stream() + _STREAMS if isinstance(base, Straggler) else _STRAGGLERS


def _numbers_of_workers(workers: object) -> tuple[int, ...]:
    if isinstance(workers, str) or not isinstance(workers, Sequence):
        raise SimulationError(f"Straggler: workers={workers!r} is not a sequence of numbers; give one like (0, 3)")
    found = tuple(checks.count("Straggler", f"workers[{i}]", w) for i, w in enumerate(workers))
    if not found:
        raise SimulationError("Straggler: workers is empty, so none is slow; leave the Straggler out")
    return found


class ComputeTimes:
    """The compute times of one simulation, drawn for all workers of a step together.

    A simulator asks for one time after another, and a single draw costs as much as the draws of some hundred workers.
    The last rows are kept; an older one is drawn again, with the same result.
    """

    KEPT = 64

    def __init__(self, model: ComputeModel, seed: int, workers: int, *, first: int = 0) -> None:
        """`workers` are those from the number `first` on."""
        if not isinstance(model, ComputeModel):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(f"ComputeTimes: model={model!r} is not a model; give one like Constant(0.1)")
        seed = checks.integer("ComputeTimes", "seed", seed)
        workers, first = (checks.count("ComputeTimes", *one) for one in (("workers", workers), ("first", first)))
        self._model = model
        self._seed = seed
        self._first = first
        self._workers = np.arange(first, first + workers)
        self._rows: dict[int, array[float]] = {}

    def seconds(self, worker: int, step: int) -> float:
        """`model.seconds(seed, worker, step)`."""
        row = self._rows.get(step)
        if row is None:
            if len(self._rows) == self.KEPT:
                del self._rows[next(iter(self._rows))]
            drawn = self._model.drawn(self._seed, self._workers, step)
            row = self._rows[step] = array("d", np.asarray(drawn, np.float64).tobytes())
        return row[worker - self._first]
