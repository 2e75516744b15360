"""Machine models: their means and quantiles against closed forms, and draws that depend on no order of calls.

The seeds are fixed, so a test that passes once passes always. Tolerances are stated in standard errors of the estimate:
5 of them, which a correct model exceeds with a probability below 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowml as fm
from flowml.sim.draws import normal, uniform

N = 200_000
ERRORS = 5.0

Quantile = Callable[[float], float]


def log_normal(mean: float, sigma: float) -> Quantile:
    return lambda p: mean * math.exp(sigma * NormalDist().inv_cdf(p) - sigma**2 / 2)


MODELS: dict[str, tuple[fm.sim.ComputeModel, Quantile, float, float]] = {
    "exponential": (fm.sim.ShiftedExponential(1.0, 0.1), lambda p: 1 - 0.1 * math.log(1 - p), 1.1, 0.1),
    "exponential alone": (fm.sim.ShiftedExponential(0, 2), lambda p: -2 * math.log(1 - p), 2.0, 2.0),
    "log-normal": (fm.sim.LogNormal(0.1, 0.3), log_normal(0.1, 0.3), 0.1, 0.1 * math.sqrt(math.exp(0.09) - 1)),
    "log-normal wide": (fm.sim.LogNormal(3, 1), log_normal(3, 1), 3.0, 3 * math.sqrt(math.e - 1)),
    "pareto": (fm.sim.Pareto(0.5, 3), lambda p: 0.5 * (1 - p) ** (-1 / 3), 0.75, 0.5 * math.sqrt(3 / 4)),
    "pareto without mean": (fm.sim.Pareto(0.5, 0.8), lambda p: 0.5 * (1 - p) ** (-1 / 0.8), math.inf, math.inf),
    "empirical": (fm.sim.Empirical([3, 1, 2, 4]), lambda p: float(math.ceil(4 * p)), 2.5, math.sqrt(1.25)),
}


def sample(model: fm.sim.ComputeModel, seed: int = 0) -> np.ndarray:
    return model.draw(seed, np.arange(N // 100)[:, None], np.arange(100)).ravel()


@pytest.mark.parametrize("name", MODELS)
def test_means_agree_with_the_closed_form(name: str) -> None:
    model, _, mean, deviation = MODELS[name]
    if math.isfinite(mean):
        assert abs(sample(model).mean() - mean) < ERRORS * deviation / math.sqrt(N)


@pytest.mark.parametrize("name", MODELS)
def test_quantiles_agree_with_the_closed_form(name: str) -> None:
    """The share of times up to the p-quantile is p. This holds for a distribution without a mean, too."""
    model, quantile, _, _ = MODELS[name]
    times = sample(model)
    for p in (0.01, 0.2, 0.5, 0.75, 0.95, 0.999):
        level = math.ceil(4 * p) / 4 if name == "empirical" else p
        tolerance = ERRORS * math.sqrt(level * (1 - level) / N)
        assert abs(np.mean(times <= quantile(p)) - level) <= tolerance, (name, p)


def test_the_slowest_of_thirty_costs_what_order_statistics_say() -> None:
    """1 + Exp(0.1) on 30 machines: the slowest takes 1 + 0.1 H(30) on average, the 23rd 1 + 0.1 (H(30) - H(7))."""
    times = np.sort(fm.sim.ShiftedExponential(1, 0.1).draw(3, np.arange(30), np.arange(20_000)[:, None]), axis=1)
    harmonic = [0.0, *np.cumsum(1 / np.arange(1, 31))]
    for rank, expected in ((30, 1 + 0.1 * harmonic[30]), (23, 1 + 0.1 * (harmonic[30] - harmonic[7]))):
        own = times[:, rank - 1]
        assert abs(own.mean() - expected) < ERRORS * own.std() / math.sqrt(len(own))


@given(
    name=st.sampled_from(sorted(MODELS)),
    seed=st.integers(-(2**70), 2**70),
    worker=st.integers(0, 2**40),
    step=st.integers(0, 2**40),
    before=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_a_draw_depends_only_on_its_counters(name: str, seed: int, worker: int, step: int, before: int) -> None:
    model = fm.sim.Straggler(MODELS[name][0], 3.0, share=0.3, probability=0.5, burst_steps=2)
    one = model.seconds(seed, worker, step)
    row = model.draw(seed, worker + np.arange(-before, 20), step) if worker >= before else None
    column = model.draw(seed, worker, step + np.arange(17))
    assert column[0] == one
    assert row is None or row[before] == one


def test_streams_seeds_workers_and_steps_are_independent() -> None:
    """No correlation of neighbours is larger than chance allows."""
    base = uniform(0, np.arange(300)[:, None], np.arange(300), 0)
    others = {
        "seed": uniform(1, np.arange(300)[:, None], np.arange(300), 0),
        "stream": uniform(0, np.arange(300)[:, None], np.arange(300), 1),
        "worker": uniform(0, np.arange(1, 301)[:, None], np.arange(300), 0),
        "step": uniform(0, np.arange(300)[:, None], np.arange(1, 301), 0),
        "transposed": base.T,
    }
    for what, other in others.items():
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < ERRORS / 300, what
    assert base.min() > 0
    assert base.max() < 1
    assert len(np.unique(base)) == base.size
    z = normal(0, np.arange(300)[:, None], np.arange(300), 0)
    assert abs(z.mean()) < ERRORS / 300
    assert abs(z.std() - 1) < ERRORS / 300


@given(share=st.floats(0.001, 1), workers=st.integers(1, 500), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_a_share_of_the_workers_is_slow_rounded_up_or_down(share: float, workers: int, seed: int) -> None:
    model = fm.sim.Straggler(fm.sim.Constant(1), 5, share=share)
    slow = int((model.draw(seed, np.arange(workers), 7) == 5).sum())
    assert math.floor(share * workers - 1e-9) <= slow <= math.ceil(share * workers + 1e-9)


def test_a_share_falls_on_each_worker_with_equal_probability() -> None:
    """Over many seeds each of 10 workers is a straggler in the given share of them."""
    model = fm.sim.Straggler(fm.sim.Constant(1), 5, share=0.25)
    slow = np.array([model.draw(seed, np.arange(10), 0) == 5 for seed in range(4000)])
    assert np.abs(slow.mean(axis=0) - 0.25).max() < ERRORS * math.sqrt(0.25 * 0.75 / 4000)


def test_persistent_stragglers_are_slow_in_each_step_and_leave_the_others_alone() -> None:
    base = fm.sim.LogNormal(0.1, 0.3)
    workers, steps = np.arange(8)[:, None], np.arange(50)
    ratio = fm.sim.Straggler(base, 4, workers=(1, 6)).draw(0, workers, steps) / base.draw(0, workers, steps)
    assert (ratio[[1, 6]] == 4).all()
    assert (np.delete(ratio, [1, 6], axis=0) == 1).all()


def test_transient_stragglers_are_slow_as_often_as_stated_and_in_bursts_of_the_stated_length() -> None:
    model = fm.sim.Straggler(fm.sim.Constant(1), 2, probability=0.2, burst_steps=5)
    slow = model.draw(0, np.arange(2000)[:, None], np.arange(100)) == 2
    assert abs(slow.mean() - 0.2) < ERRORS * math.sqrt(0.16 / (2000 * 20))
    edges = np.flatnonzero(slow[0, 1:] != slow[0, :-1])
    assert len(set(edges % 5)) <= 1, "a worker's bursts begin and end on its own rhythm of 5 steps"
    assert len({int(np.flatnonzero(row[1:] != row[:-1])[0]) % 5 for row in slow if row.any() and not row.all()}) == 5


def test_stragglers_around_stragglers_are_chosen_independently() -> None:
    inner = fm.sim.Straggler(fm.sim.Constant(1), 2, probability=0.5)
    times = fm.sim.Straggler(inner, 3, probability=0.5).draw(0, np.arange(200)[:, None], np.arange(200))
    assert sorted(set(times.ravel())) == [1, 2, 3, 6]
    assert abs((times == 6).mean() - 0.25) < ERRORS * math.sqrt(0.25 * 0.75) / 200


def test_recorded_times_come_back_and_start_again() -> None:
    model = fm.sim.Recorded([[0.1, 0.2, 0.3], [1.0]])
    assert [model.seconds(0, 0, s) for s in range(4)] == [0.1, 0.2, 0.3, 0.1]
    assert [model.seconds(9, 1, s) for s in range(3)] == [1.0] * 3
    assert model.seconds(0, 2, 1) == 0.2, "the third worker takes the times of the first"
    assert fm.sim.Recorded({1: [1.0], 0: [0.1, 0.2, 0.3]}) == model


def test_times_drawn_a_row_at_a_time_are_those_of_the_model() -> None:
    model = fm.sim.Straggler(fm.sim.LogNormal(0.1, 0.3), 2, share=0.5)
    times = fm.sim.ComputeTimes(model, 4, workers=7)
    for step in (0, 3, *range(200), 0, 3):
        assert times.seconds(step % 7, step) == model.seconds(4, step % 7, step)


NONSENSE: dict[str, tuple[Callable[[], object], str]] = {
    "negative": (lambda: fm.sim.Constant(-1), r"Constant: s=-1 makes no sense; give a finite number of at least 0"),
    "nan": (lambda: fm.sim.Constant(math.nan), "s=nan makes no sense"),
    "infinite": (lambda: fm.sim.ShiftedExponential(1, math.inf), "mean_s=inf"),
    "negative shift": (lambda: fm.sim.ShiftedExponential(-0.1, 1), "shift_s=-0.1"),
    "no mean": (lambda: fm.sim.LogNormal(0, 1), "mean_s=0 makes no sense; give a finite number above 0"),
    "negative sigma": (lambda: fm.sim.LogNormal(1, -1), "sigma=-1"),
    "scale": (lambda: fm.sim.Pareto(0, 2), "scale_s=0"),
    "alpha": (lambda: fm.sim.Pareto(1, 0), "alpha=0"),
    "text": (lambda: fm.sim.Constant("1"), "s='1' is of type str; give a number"),  # type: ignore[arg-type]
    "bool": (lambda: fm.sim.Constant(True), "s=True is of type bool"),
    "no samples": (lambda: fm.sim.Empirical([]), "samples_s is empty"),
    "bad sample": (lambda: fm.sim.Empirical([1, -2]), r"samples_s\[1\]=-2"),
    "no records": (lambda: fm.sim.Recorded([]), "there is no time of any worker"),
    "no record of one": (lambda: fm.sim.Recorded([[1.0], []]), "there is no time of worker 1"),
    "bad record": (lambda: fm.sim.Recorded([[1.0, math.nan]]), r"trace\[0\]\[1\]=nan"),
    "gap": (lambda: fm.sim.Recorded({0: [1.0], 2: [1.0]}), "not numbered from 0 without a gap"),
    "share 0": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2, share=0), "share=0 makes no sense"),
    "share 1.5": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2, share=1.5), r"a share lies in \(0, 1\]"),
    "two answers": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2, share=0.5, workers=(1,)), "give one of them"),
    "no answer": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2), "nothing says who is slow or how often"),
    "none": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2, workers=()), "leave the Straggler out"),
    "worker": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2, workers=(-1,)), r"workers\[0\]=-1"),
    "one number": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2, workers=3), r"give one like \(0, 3\)"),  # type: ignore[arg-type]
    "faster": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 0.5, share=0.5), "factor=0.5"),
    "burst": (lambda: fm.sim.Straggler(fm.sim.Constant(1), 2, probability=0.5, burst_steps=0), "burst_steps=0"),
    "base": (lambda: fm.sim.Straggler(0.1, 2, share=0.5), "base=0.1 is not a model"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_model_that_makes_no_sense_says_why_in_one_line(name: str) -> None:
    make, text = NONSENSE[name]
    with pytest.raises(fm.SimulationError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)
