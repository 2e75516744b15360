"""What the driver feeds a stage is kept for each grant, and nothing that a later step needs is thrown away."""

from __future__ import annotations

from flowml_runtime.worker.training.examples import Fed


def given(*sequences: int, ahead: bool = False) -> Fed[int]:
    """Batches of one device, each with its place in the order of grants."""
    fed = Fed[int](ahead=ahead)
    for place, sequence in enumerate(sequences):
        fed.give("cpu:0", sequence, place)
    return fed


def take(fed: Fed[int], *sequences: int) -> list[int | None]:
    return [fed.take("cpu:0", sequence) for sequence in sequences]


def test_an_item_that_is_granted_again_before_its_step_has_two_batches() -> None:
    """If the newer took the place of the older, the first step would throw those between them away."""
    assert take(given(12, 14, 15, 12), 12, 14, 15, 12) == [0, 1, 2, 3]


def test_a_step_uses_its_batch_up() -> None:
    assert take(given(12), 12, 12) == [0, None]


def test_batches_of_steps_that_never_began_are_dropped() -> None:
    fed = given(12, 13, 14)
    assert take(fed, 13) == [1]
    assert not fed.has("cpu:0", 12)
    assert fed.has("cpu:0", 14)


def test_a_batch_of_a_skipped_step_serves_the_next_step_of_its_item() -> None:
    assert take(given(12, 12, 13, 12), 12, 13, 12) == [0, 2, 3]


def test_a_portion_of_the_next_batch_is_kept_while_steps_of_this_one_go_on() -> None:
    assert take(given(3, 8, 4, 5, ahead=True), 4, 5, 8) == [2, 3, 1]


def test_devices_are_fed_apart() -> None:
    fed = given(1)
    fed.give("cpu:1", 2, 7)
    assert (fed.take("cpu:1", 2), fed.take("cpu:0", 1), fed.take("cpu:1", 1)) == (7, 0, None)
