"""Signals whose exceptions Python could not raise are sent again."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType

import pytest

from flowml_runtime.interrupts import Terminated, heeding_interrupts

WAIT_S = 30


class Signalled:
    """Its finalizer gets a signal, whose exception Python cannot raise there."""

    def __init__(self, signum: int) -> None:
        self.signum = signum

    def __del__(self) -> None:
        signal.raise_signal(self.signum)


def terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)


@pytest.fixture
def handler() -> Generator[None]:
    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("handler")
def test_a_signal_in_a_finalizer_is_sent_again(signum: int) -> None:
    before = sys.unraisablehook
    with pytest.raises((KeyboardInterrupt, Terminated)) as raised, heeding_interrupts(), heeding_interrupts():
        Signalled(signum)
        threading.Event().wait(WAIT_S)
        pytest.fail("the signal was lost")
    assert raised.type is (KeyboardInterrupt if signum == signal.SIGINT else Terminated)
    assert sys.unraisablehook is before
    assert not [thread for thread in threading.enumerate() if thread.name == "interrupts"]


def test_one_that_comes_at_the_end_of_the_block_is_raised_there() -> None:
    with pytest.raises(KeyboardInterrupt), heeding_interrupts():
        Signalled(signal.SIGINT)


@pytest.mark.parametrize("times", [2, 20])
def test_several_are_raised_once(times: int) -> None:
    """A second one would end what the caller does after the block."""
    for _ in range(times):
        with pytest.raises(KeyboardInterrupt), heeding_interrupts():
            for _ in range(times):
                Signalled(signal.SIGINT)
            threading.Event().wait(WAIT_S)
    threading.Event().wait(0.1)  # in which a second one would come


def test_one_that_was_lost_is_not_sent_after_another_that_ended_the_block() -> None:
    with pytest.raises(KeyboardInterrupt), heeding_interrupts():
        Signalled(signal.SIGINT)
        raise KeyboardInterrupt
    threading.Event().wait(0.1)


def test_one_that_comes_before_an_error_is_raised_all_the_same() -> None:
    with pytest.raises(KeyboardInterrupt) as raised, heeding_interrupts():
        Signalled(signal.SIGINT)
        raise ValueError
    assert isinstance(raised.value.__context__, ValueError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_errors_of_finalizers_go_where_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Faulty:
        def __del__(self) -> None:
            raise SystemExit(3)

    with heeding_interrupts():
        Faulty()
    assert told == [SystemExit]


def test_other_threads_lose_no_signal() -> None:
    hooks: list[object] = []

    def inside() -> None:
        with heeding_interrupts():
            hooks.append(sys.unraisablehook)

    before = sys.unraisablehook
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join(WAIT_S)
    assert hooks == [before]
