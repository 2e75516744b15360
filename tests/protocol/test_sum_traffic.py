"""A worker reports what it passes on of a sum, also if its own replicas have long finished."""

from __future__ import annotations

import pytest

from flowml import policies
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.history import Sent
from flowml_tools.faults.layout import make


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_bytes_of_a_sum_are_reported_by_workers_that_wait_for_its_slowest_replica(stages: int) -> None:
    run = make([policies.all_reduce()] * 3, replicas=4, stages=stages, clocks=2, speeds=(20, 1, 1, 1))
    run.go()
    check_rest(run)
    assert check(run.history) == []
    for store in range(3):
        sent = sum(f.nbytes for f in run.history.facts if isinstance(f, Sent) and f.store == store and not f.published)
        assert run.history.traffic[store][0] == sent > 0
