"""Results that take long are waited for on a thread of their own, so that a step only starts its tasks."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowml_runtime.execution import results
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.results import Results


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane("results")
    yield lane
    lane.close()
    assert lane.join(30)


def test_a_short_wait_is_on_the_thread_of_the_step(lane: Lane) -> None:
    sent: list[int] = []
    of = Results(lane)
    of.send(0, [jnp.ones(3)], lambda _: sent.append(threading.get_ident()), lambda error: sent.append(-1))
    assert sent == [threading.get_ident()]
    assert not of.has(0)


def test_results_of_long_steps_leave_in_order_on_another_thread(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "SHORT_S", -1.0)  # every wait counts as long
    sent: list[tuple[int, bool, float]] = []
    done, of, me = threading.Event(), Results(lane), threading.get_ident()
    hold = threading.Event()
    assert lane.put(lambda: (hold.wait(30), None)[1], lambda error: None)
    square = jax.jit(lambda x: x @ x)
    for step in range(3):

        def send(arrays: object, step: int = step) -> None:
            (array,) = arrays  # type: ignore[misc]
            sent.append((step, threading.get_ident() != me, float(np.asarray(array)[0, 0])))
            if step == 2:
                done.set()

        of.send(step, [square(jnp.full((8, 8), step + 1.0))], send, lambda error: None)
        assert of.has(step)
    assert of.pending
    hold.set()
    assert done.wait(30)
    assert sent == [(0, True, 8.0), (1, True, 32.0), (2, True, 72.0)]


def test_a_result_that_cannot_be_sent_is_reported_and_not_awaited_any_more(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "SHORT_S", -1.0)
    failed: list[BaseException] = []
    of, told = Results(lane), threading.Event()

    def send(arrays: object) -> None:
        raise ValueError("no way")

    def report(error: BaseException) -> None:
        assert of.has(7)
        failed.append(error)
        told.set()

    of.send(7, [jnp.ones(3)], send, report)
    assert told.wait(30)
    assert [str(error) for error in failed] == ["no way"]
    last = threading.Event()
    assert lane.put(last.set, lambda error: None)
    assert last.wait(30)
    assert not of.pending
