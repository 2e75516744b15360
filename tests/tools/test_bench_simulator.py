"""The benchmark of the simulator: its rows, with machine code beside Python where that compiles."""

from __future__ import annotations

import pytest

from flowml_tools.bench import simulator
from flowml_tools.bench.rows import Row
from flowml_tools.bench.table import render


def test_a_small_run_has_a_row_for_each_goal() -> None:
    rows = simulator.rows(1, workers=12, steps=4, machines=16, few_steps=4, jobs=1, compiles=False)
    assert [row.unit for row in rows] == ["s", "bytes", "s", "1/s", "s", "1/s"]
    assert all(row.goal and row.peer.sample is None for row in rows)
    assert "12 workers × 4 steps, quorum(0.75)" in render("simulator", rows)


def test_machine_code_stands_beside_python(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {False: (3.0, 600), True: (2.0, 600)}
    monkeypatch.setattr(simulator, "measure", lambda *_, compiled: taken[compiled])
    monkeypatch.setattr(simulator, "_each", lambda *_: list[Row]())
    seconds, rate, *_ = simulator.rows(1, compiles=True)
    assert (seconds.ours.median, seconds.ratio, seconds.peer.name) == (2.0, 2 / 3, "Python")
    assert (rate.ours.median, rate.ratio) == (300.0, 1.5)
