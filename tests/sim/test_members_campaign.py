"""Random fits whose workers leave, are lost and come back keep every promise."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flowml_tools.faults.members import MembersCase
from tests.sim.test_churn import SPOT


def test_random_fits_keep_their_promises() -> None:
    wrong = {case: said for case in map(MembersCase.of, range(12)) if (said := case.run())}
    assert wrong == {}


@pytest.mark.skipif(not SPOT.exists(), reason="the recorded spot machines are not here")
def test_fits_on_recorded_spot_machines_keep_their_promises() -> None:
    """Wu et al., Can't be late, NSDI 2024: as `flowml faults --spot` does with any number of seeds."""
    cases = [MembersCase.spot(seed, file) for file in sorted(SPOT.glob("*.json")) for seed in range(8)]
    assert {change[2] for case in cases for change in case.churn.changes} == {False, True}
    assert {"replicate" in case.how for case in cases} == {False, True}
    assert {case: said for case in cases if (said := case.run())} == {}


def test_the_command_repeats_a_fit_on_spot_machines(tmp_path: Path) -> None:
    file = tmp_path / "spot.json"
    file.write_text('{"metadata": {"gap_seconds": 300}, "data": [6, 5, 3, 6, 1, 6]}')
    command = [sys.executable, "-m", "flowml_tools.main", "faults", "--spot", str(file), "--seeds", "3"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith("3 fits in ")
    assert told.stdout.endswith("none broke a promise\n")


def test_a_contribution_that_waits_for_others_is_not_applied_before_the_values_are_there() -> None:
    case = MembersCase.of(112)
    churn = replace(case.churn, notice_s=1.0)
    assert replace(case, policy="softsync", replicas=5, steps=60, churn=churn, how={"on_loss": "shrink"}).run() == ""
