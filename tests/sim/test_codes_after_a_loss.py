"""With a code, a run that has lost a replica decodes each batch once, from the work of those that live."""

from __future__ import annotations

import pytest

from flowml.policy import Coded, Policy
from flowml_tools.faults.campaign import check_rest
from flowml_tools.faults.checker import check
from flowml_tools.faults.layout import make

CODES = {
    "cyclic": (Coded(1, "cyclic"), 4),
    "fractional": (Coded(1, "fractional"), 4),
    "tree": (Coded(1, "tree", children=2, levels=2), 6),
}


@pytest.mark.parametrize("code", CODES)
def test_each_batch_is_decoded_once_after_a_loss(code: str) -> None:
    """The items of the lost replica went to others, and the items of one clock were then of several batches."""
    quorum, replicas = CODES[code]
    for seed in range(6):
        run = make([Policy(quorum=quorum)], replicas=replicas, stages=1, clocks=8, seed=seed, homes_on=0)
        run.lose(1 + seed % (replicas - 1), 0.5 + seed / 2)
        run.go()
        check_rest(run)
        assert check(run.history) == []
        summary = run.history.summary
        assert summary is not None
        assert summary.used == 8 * replicas, "all items of a clock that is over count"
