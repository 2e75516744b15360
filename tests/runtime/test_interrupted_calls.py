"""A Ctrl-C at any line between the numbering and the feeding of a step leaves nothing of that step behind."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest

from flowml_runtime.driver.session import Session
from flowml_runtime.driver.steps import Steps
from tests.network import Network
from tests.plans import chain

X = np.arange(4, dtype=np.float32)
LINES = 20
"""At least so many lines run between the call and its return."""

INTERRUPTED: frozenset[CodeType] = frozenset(
    f.__code__
    for f in (Session.submit, Session._feed, Steps.future, Steps.begin)  # pyright: ignore[reportPrivateUsage]
)


@contextmanager
def ctrl_c_before(line: int) -> Iterator[list[str]]:
    """Raise KeyboardInterrupt before line `line` of those that run, counted from 0. Gives what has run.

    Python counts the end of a `with` block as its first line once more, and handles no signal there: the lock is
    released in between.
    """
    ran: list[str] = []
    entered: set[tuple[FrameType, int]] = set()

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        here = frame, frame.f_lineno
        if event == "line" and not (source.startswith("with ") and here in entered):
            entered.add(here)
            ran.append(source)
            if len(ran) == line + 1:
                raise KeyboardInterrupt
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: on_line if frame.f_code in INTERRUPTED else None)
    try:
        yield ran
    finally:
        sys.settrace(before)


def test_ctrl_c_at_any_line_leaves_no_step_in_flight() -> None:
    with Network(in_flight=1) as network:
        handle = network.session.load(chain())
        line = 0
        while True:
            with ctrl_c_before(line) as ran:
                try:
                    future = network.session.submit(handle, [X])
                except KeyboardInterrupt:
                    future = None
            if future is not None:
                break
            where = f"Ctrl-C before {ran[-1]!r}"
            assert not len(handle.steps), where
            assert not network.held_values(), where
            assert not handle.order.locked(), where
            after = network.session.submit(handle, [X])  # waits for ever if the only place in flight is taken
            np.testing.assert_array_equal(after.result(timeout=30)[0], (X + 1) * 2, err_msg=where)
            line += 1
        assert line >= LINES
        np.testing.assert_array_equal(future.result(timeout=30)[0], (X + 1) * 2)


def test_ctrl_c_while_a_call_waits_for_room_leaves_the_calls_under_way() -> None:
    """What was interrupted had not begun, so no step is failed for it."""
    with Network(in_flight=1) as network:
        handle = network.session.load(chain())
        other = handle.steps.future(lambda fetched: fetched)
        step = handle.steps.begin(other)
        with ctrl_c_before_waiting(), pytest.raises(KeyboardInterrupt):
            network.session.submit(handle, [X])
        assert list(handle.steps._flying) == [step]  # pyright: ignore[reportPrivateUsage]
        assert not other.done()


@contextmanager
def ctrl_c_before_waiting() -> Iterator[None]:
    """Raise KeyboardInterrupt where a call begins to wait for the end of another one."""

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and "_room.wait" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
            raise KeyboardInterrupt
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: on_line if frame.f_code is Steps.begin.__code__ else None)
    try:
        yield
    finally:
        sys.settrace(before)
