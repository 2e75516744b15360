"""Large recorded values print in one line, and a file that is not there is not called damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

import flowml as fm


def test_a_recording_prints_its_size_and_not_its_operations() -> None:
    job = fm.sim.Recording(
        [
            fm.sim.Operation(step, worker=w, replica=w, stage=0, kind="forward", start_s=0.0, end_s=1.0)
            for step in range(3)
            for w in range(2)
        ]
    )
    assert repr(job) == "<Recording of 6 operations: 3 steps, 2 workers>"


def test_regions_print_their_names() -> None:
    table = fm.sim.Regions({("Oregon", "Tokyo"): (0.05, 1e8), ("Oregon", "Virginia"): (0.03, 1e8)})
    assert repr(table) == "<Regions: Oregon, Tokyo, Virginia>"


@pytest.mark.parametrize("name", ["job.parquet", "job.csv", "job.json"])
def test_a_missing_trace_is_not_called_damaged(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(fm.TraceError, match=f"{name} cannot be read: No such file or directory"):
        fm.sim.Recorded(tmp_path / name)
