"""Random fits whose workers leave, are lost and come back keep every promise."""

from __future__ import annotations

from dataclasses import replace

from flowml_tools.faults.members import MembersCase


def test_random_fits_keep_their_promises() -> None:
    wrong = {case: said for case in map(MembersCase.of, range(12)) if (said := case.run())}
    assert wrong == {}


def test_a_contribution_that_waits_for_others_is_not_applied_before_the_values_are_there() -> None:
    case = MembersCase.of(112)
    churn = replace(case.churn, notice_s=1.0)
    assert replace(case, policy="softsync", replicas=5, steps=60, churn=churn, how={"on_loss": "shrink"}).run() == ""
