"""Values out of range are refused in every knob; NumPy's numbers are numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flowml.errors import PolicyError
from flowml.policy import Every, Policy, Quorum, Tree, check_composition
from flowml.policy import named as policies

NAN = float("nan")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quorum(0),
        lambda: Quorum(-1),
        lambda: Quorum(0.0),
        lambda: Quorum(1.5),
        lambda: Quorum(-0.5),
        lambda: Quorum(NAN),
        lambda: Quorum(float("inf")),
        lambda: Quorum(True),
        lambda: Quorum(np.float32(1.5)),
        lambda: Quorum("all"),  # pyright: ignore[reportArgumentType]
        lambda: Every(0),
        lambda: Every(-2),
        lambda: Every(2.0),  # pyright: ignore[reportArgumentType]
        lambda: Every(True),
        lambda: policies.every(0),
        lambda: policies.softsync(0),
        lambda: policies.softsync(NAN),
        lambda: policies.softsync("2"),  # pyright: ignore[reportArgumentType]
        lambda: policies.softsync(float("inf")),
        lambda: policies.deep_compression(1),
        lambda: policies.deep_compression(2),
        lambda: policies.skeleton(2),
        lambda: policies.skeleton(1.5),
        lambda: policies.backup_workers(0.5),  # pyright: ignore[reportArgumentType]
        lambda: policies.ensemble_compression(None, None, 1, 1, None),
        lambda: policies.deadline(2.0),
        lambda: policies.deadline(0.5, grace=-1),
        lambda: policies.backup_workers(0),
        lambda: policies.asynchronous(staleness=-1),
        lambda: policies.asynchronous(staleness=NAN),
        lambda: policies.asynchronous(staleness=1.5),
        lambda: policies.asynchronous(staleness=True),
        lambda: Policy(staleness=-float("inf")),
        lambda: Tree(0),
        lambda: Tree(2.0),  # pyright: ignore[reportArgumentType]
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(PolicyError):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    assert Quorum(np.int64(3)) == Quorum(3)
    assert Quorum(np.int64(3)).counted
    assert Quorum(np.float64(0.75)) == Quorum(0.75)
    assert not Quorum(np.float32(1.0)).counted
    assert policies.every(np.int32(4)) == policies.every(4)  # pyright: ignore[reportArgumentType]
    assert policies.asynchronous(np.int8(3)) == policies.asynchronous(3)
    assert Tree(np.int64(2)) == Tree(2)  # pyright: ignore[reportArgumentType]


def test_a_quorum_of_more_replicas_than_there_are_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"'fc': Quorum\(9\) asks for more replicas than there are \(2\)"):
        check_composition({"conv": Policy(), "fc": policies.quorum(9)}, replicas=2)
    check_composition({"fc": policies.quorum(2)}, replicas=2)


@pytest.mark.parametrize("members", [1, 2, 1000])
def test_a_small_share_is_at_least_one_replica(members: int) -> None:
    assert Quorum(1e-12).need(members) == 1
