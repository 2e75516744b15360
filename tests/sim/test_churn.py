"""Machines that leave and return: what a record of spot machines becomes, and records that make no sense."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm

YARDSTICKS = Path(os.environ.get("FLOWML_YARDSTICKS", Path(__file__).resolve().parents[3] / "shared" / "yardsticks"))
SPOT = YARDSTICKS / "spot_traces"


def record(*data: int, gap: float = 300) -> dict[str, Any]:
    return {"metadata": {"gap_seconds": gap}, "data": list(data)}


def test_a_record_of_available_machines_becomes_changes() -> None:
    churn = fm.sim.Churn.from_spot(record(2, 2, 0, 1))
    assert [(c.time_s, c.up) for c in map(fm.sim.Change._make, churn.changes)] == [
        (600, False),
        (600, False),
        (900, True),
    ]
    assert churn.up(0, 2) == churn.up(599, 2) == (0, 1)
    assert churn.up(600, 2) == ()
    assert len(churn.up(900, 2)) == 1


def test_machines_that_are_absent_at_first_are_down_from_time_0() -> None:
    churn = fm.sim.Churn.from_spot(record(1, 3), workers=4)
    assert sum(time == 0 for time, _, _ in churn.changes) == 3
    assert [len(churn.up(t, 4)) for t in (0, 300)] == [1, 3]


def test_preempted_machines_are_the_others() -> None:
    churn = fm.sim.Churn.from_spot(record(0, 3, 1), counts="preempted", workers=4, gap_s=2)
    assert [len(churn.up(t, 4)) for t in (0, 2, 4)] == [4, 1, 3]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(0, 5), st.integers(0, 3))
def test_the_number_of_machines_is_that_of_the_record_at_each_time(data: list[int], seed: int, more: int) -> None:
    workers = max(data) + more
    if workers == 0:
        return
    churn = fm.sim.Churn.from_spot(record(*data), workers=workers, seed=seed)
    assert [len(churn.up(300 * i, workers)) for i in range(len(data))] == data
    assert churn == fm.sim.Churn.from_spot(record(*data), workers=workers, seed=seed)
    for start in range(0, len(data), 7):
        part = churn.window(300 * start, 300 * (start + 5))
        assert [len(part.up(300 * i, workers)) for i in range(min(5, len(data) - start))] == data[start : start + 5]


def test_the_seed_chooses_the_machines_and_each_is_chosen_as_often() -> None:
    chosen = [fm.sim.Churn.from_spot(record(8, 6), seed=seed).changes for seed in range(800)]
    counts = [sum(worker == w for changes in chosen for _, worker, _ in changes) for w in range(8)]
    assert sum(counts) == 1600
    assert max(abs(n - 200) for n in counts) < 5 * (800 * 0.25 * 0.75) ** 0.5


NONSENSE: dict[str, tuple[Callable[[], object], type[fm.FlowmlError], str]] = {
    "time": (lambda: fm.sim.Churn([(-1, 0, False)]), fm.SimulationError, r"changes\[0\] time_s=-1"),
    "worker": (lambda: fm.sim.Churn([(1, -1, False)]), fm.SimulationError, r"changes\[0\] worker=-1"),
    "up": (lambda: fm.sim.Churn([(1, 0, True)]), fm.SimulationError, "worker 0 is up already when it goes up at 1 s"),
    "down": (lambda: fm.sim.Churn([(1, 3, False), (2, 3, False)]), fm.SimulationError, "worker 3 is down already"),
    "window": (lambda: fm.sim.Churn([]).window(5, 3), fm.SimulationError, "end_s=3"),
    "few": (lambda: fm.sim.Churn.from_spot(record(5), workers=4), fm.SimulationError, "workers=4 is less than the 5"),
    "gap": (lambda: fm.sim.Churn.from_spot(record(5), gap_s=0), fm.SimulationError, "gap_s=0"),
    "counts": (lambda: fm.sim.Churn.from_spot(record(5), counts="lost"), fm.SimulationError, "counts='lost'"),  # type: ignore[arg-type]
    "source": (lambda: fm.sim.Churn.from_spot([1]), fm.SimulationError, "list is neither a path nor"),  # type: ignore[arg-type]
    "no data": (lambda: fm.sim.Churn.from_spot({"data": [1]}), fm.TraceError, "no metadata.gap_seconds or no data"),
    "empty": (lambda: fm.sim.Churn.from_spot(record()), fm.TraceError, "data has no number"),
    "negative": (lambda: fm.sim.Churn.from_spot(record(4, -1)), fm.TraceError, r"data\[1\]=-1"),
    "half": (lambda: fm.sim.Churn.from_spot(record(4, 0.5)), fm.TraceError, r"data\[1\]=0.5"),  # type: ignore[arg-type]
    "no gap": (lambda: fm.sim.Churn.from_spot(record(4, gap=0)), fm.TraceError, "metadata.gap_seconds=0"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_churn_that_makes_no_sense_says_why_in_one_line(name: str) -> None:
    make, kind, text = NONSENSE[name]
    with pytest.raises(kind, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [fm.sim.Churn.from_spot, fm.sim.Regions.read, fm.sim.Recording.read, fm.sim.Recorded])
def test_a_file_that_is_not_there_is_named_with_its_folder(read: Callable[[Path], object], tmp_path: Path) -> None:
    file = tmp_path / "none.csv"
    with pytest.raises(fm.TraceError, match=f"^{file} cannot be read: No such file or directory; give the path"):
        read(file)


def test_a_record_that_is_cut_short_names_the_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "spot.json"
    file.write_text(json.dumps(record(4, 3, 2), indent=1))
    assert fm.sim.Churn.from_spot(file) == fm.sim.Churn.from_spot(record(4, 3, 2))
    text = file.read_text()
    for length in range(len(text)):
        file.write_text(text[:length])
        with pytest.raises(fm.TraceError, match=r"spot.json, line \d+, column \d+: .* so copy or download it again"):
            fm.sim.Churn.from_spot(file)


@pytest.mark.skipif(not SPOT.exists(), reason="the recorded spot machines are not here")
@pytest.mark.parametrize(
    ("name", "counts", "workers"),
    [("aws-16-node-us-west-2a_v100", "available", 16), ("aws-4-node-us-east-1f_v100", "preempted", 4)],
)
def test_the_recorded_spot_machines_load(name: str, counts: Any, workers: int) -> None:
    """Wu et al., Can't be late, NSDI 2024: V100 machines of AWS, counted every 5 minutes for about two weeks."""
    data = json.loads((SPOT / f"{name}.json").read_text())["data"]
    churn = fm.sim.Churn.from_spot(SPOT / f"{name}.json", counts=counts)
    assert max(worker for _, worker, _ in churn.changes) == workers - 1
    for i in range(0, len(data), 97):
        up = len(churn.up(300 * i, workers))
        assert up == (data[i] if counts == "available" else workers - data[i])
