"""How long replicas stand for a snapshot before it is withdrawn."""

from __future__ import annotations

from flowml_runtime.driver.training.patience import Patience


def test_it_is_a_second_or_some_steps_and_doubles_until_one_is_taken() -> None:
    patience = Patience()
    assert patience.until(0.01, 10.0, 1) == 11.0
    assert patience.until(0.01, 10.5, 1) == 11.0, "from when they stand"
    patience.withdrawn()
    assert patience.until(2.0, 20.0, 1) == 20.0 + 2 * 6.0
    patience.withdrawn()
    assert patience.until(0.01, 40.0, 1) == 44.0
    patience.taken(40.25)
    assert patience.until(0.01, 50.0, 1) == 51.0


def test_it_begins_anew_with_each_message_of_the_snapshot() -> None:
    patience = Patience()
    assert patience.until(0.01, 10.0, 1) == 11.0
    assert patience.until(0.01, 10.9, 3) == 11.9


def test_a_snapshot_that_takes_long_is_waited_for() -> None:
    patience = Patience()
    for at in (0.0, 0.9, 1.8):
        patience.until(0.01, at, 1 + int(10 * at))
    patience.taken(2.5)
    assert patience.until(0.01, 10.0, 1) == 15.0
