"""`auto` cuts only for a gain beyond the estimate's error, and goes back to one device when measurement says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowml as fm
from flowml.compiler import compile_function
from flowml.placement.auto import ERROR
from flowml.placement.links import Link, Links
from flowml_runtime.dataflow import Dataflow
from flowml_runtime.driver.trial import TIMED_CALLS, WARMING_CALLS, Trial

CALLS = WARMING_CALLS + TIMED_CALLS
TWO = ["worker:0", "worker:1"]
X = jnp.ones((64, 64))


def branches(shares: tuple[int, int]) -> Any:
    """Two layers that do not depend on each other, of so many products each."""

    def fn(x: jax.Array) -> tuple[jax.Array, ...]:
        results: list[jax.Array] = []
        for number, share in enumerate(shares):
            with fm.layer(f"branch{number}"):
                y = x + number
                for _ in range(share):
                    y = jnp.tanh(y @ x)
                results.append(y)
        return tuple(results)

    return fn


@pytest.mark.parametrize(("shares", "cut"), [((50, 50), True), ((70, 30), True), ((85, 15), False), ((99, 1), False)])
def test_auto_cuts_only_for_a_gain_beyond_the_error_of_the_estimate(shares: tuple[int, int], cut: bool) -> None:
    links = Links(default=Link(1e-7, 1e12))
    plan = compile_function(branches(shares), (X,), {}, devices=TWO, links=links).plan
    one, two = plan.choices
    assert two.step_seconds < one.step_seconds
    assert (two.step_seconds < (1 - ERROR) * one.step_seconds) == cut
    assert two.chosen == cut
    if not cut:
        assert plan.devices == ("worker:0/cpu:0",)
        assert two.note.endswith("within the estimate's error of 20%")
        assert "no pipeline here is expected to gain more than the estimate's error of 20%" in plan.notes[0]
        assert "within the estimate's error" in plan.explain()


def test_a_longer_pipeline_has_to_gain_as_much_over_a_shorter_one() -> None:
    def fn(x: jax.Array) -> list[jax.Array]:
        return [branch for share in ((40, 40), (20, 1)) for branch in branches(share)(x)]

    names = [f"worker:{i}" for i in range(4)]
    plan = compile_function(fn, (X,), {}, devices=names, links=Links(default=Link(1e-7, 1e12))).plan
    chosen = next(c for c in plan.choices if c.chosen)
    shorter = plan.choices[: plan.choices.index(chosen)]
    assert all(chosen.step_seconds < (1 - ERROR) * c.step_seconds for c in shorter[:1])
    assert all(c.step_seconds >= (1 - ERROR) * chosen.step_seconds for c in plan.choices)


def test_a_pipeline_that_keeps_its_promise_is_kept() -> None:
    trial = Trial(1.0)
    for seconds in (9.0, 9.0, *[0.9] * TIMED_CALLS):
        assert not trial.over
        trial.took(seconds, on_one_device=False)
    assert trial.over and not trial.on_one_device


@pytest.mark.parametrize(("alone_s", "back"), [(1.9, True), (2.1, False)])
def test_the_faster_is_kept_where_it_does_not(alone_s: float, back: bool) -> None:
    trial = Trial(1.0)
    for _ in range(CALLS):
        trial.took(2.0, on_one_device=False)
    assert trial.on_one_device and not trial.over
    trial.took(0.0, on_one_device=False)  # begun before the decision
    for _ in range(CALLS):
        assert not trial.over
        trial.took(alone_s, on_one_device=True)
    assert trial.over and trial.on_one_device is back
    trial.took(0.0, on_one_device=not back)
    assert trial.on_one_device is back


def clock(durations: Iterator[float]) -> Any:
    """A clock that lets each call take the next of the durations."""
    now, running = 0.0, False

    def now_s() -> float:
        nonlocal now, running
        now += next(durations) if running else 0.0
        running = not running
        return now

    return now_s


@pytest.fixture(scope="module")
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=2) as cluster:
        yield cluster


@pytest.mark.parametrize(("alone_s", "devices"), [(5.0, 1), (20.0, 2)])
def test_a_dataflow_goes_back_to_one_device_when_that_is_faster(
    cluster: fm.Cluster, alone_s: float, devices: int
) -> None:
    fn = branches((50, 50))
    durations = iter([*[10.0] * CALLS, *[alone_s] * CALLS])
    f = Dataflow(
        fn, cluster=cluster, placement="auto", static_argnums=None, static_argnames=None, now_s=clock(durations)
    )
    expected = fn(X)
    used: list[int] = []
    for _ in range(2 * CALLS + 2):
        used.append(len(f.plan(X).devices))
        np.testing.assert_allclose(f(X)[1], expected[1], rtol=1e-5)
    assert used == [2] * CALLS + [1] * CALLS + [devices] * 2
    assert next(durations, None) is None  # and no call is timed any more


@pytest.mark.parametrize(
    "placement", [fm.AutoPlacement("throughput"), fm.Pipeline(2), {"branch0": "worker:0", "*": "worker:1"}]
)
def test_what_was_asked_for_is_not_tried(cluster: fm.Cluster, placement: Any) -> None:
    def never() -> float:
        raise AssertionError("timed")

    f = Dataflow(
        branches((50, 50)), cluster=cluster, placement=placement, static_argnums=None, static_argnames=None, now_s=never
    )
    f(X)
    assert len(f.plan(X).devices) == 2
