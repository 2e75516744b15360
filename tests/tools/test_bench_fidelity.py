"""`flowml bench fidelity`: one small run on threads, and what it prints."""

from __future__ import annotations

import pytest

from flowml_tools.bench import fidelity
from flowml_tools.bench.fidelity_probe import Calibration
from flowml_tools.bench.rows import Peer, Row, Sample


def test_a_run_measures_costs_and_compares_times_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "PAUSE_S", 0.004)
    name = "DiLoCo, every 4"
    rows = fidelity.rows(None, only=[name], kinds=["threads"])
    costs, *cells = rows
    assert costs.group == ("calibration", "threads")
    assert 0 < costs.ours.median < 1
    models = list(fidelity.stragglers())
    assert [r.group for r in cells if r.group] == [
        ("threads", name, model, quantity) for model in models for quantity in ("step", "bytes")
    ]
    assert [r.ratio for r in cells if r.group[-1:] == ("bytes",)] == [1.0, 1.0, 1.0], "each replica pushes 6 times"
    times = {r.group[2]: r for r in cells if r.group[-1:] == ("step",)}
    slow, steady = times["one 5× slower"], times["constant"]
    assert slow.peer.sample is not None and steady.peer.sample is not None
    assert slow.ours.median >= 5 * 0.004 and slow.peer.sample.median >= 5 * 0.004
    assert slow.ours.median - steady.ours.median == pytest.approx(4 * 0.004, rel=0.5), "compute times are drawn"


def test_what_cannot_run_is_printed_as_not_available_and_a_missed_goal_as_missed() -> None:
    group = "threads", "synchronous", "constant"
    found = [
        Row("a", "s", Sample((0.012,)), Peer("real", Sample((0.010,))), group=(*group, "step")),
        Row("b", "bytes", Sample((300.0,)), Peer("real", Sample((300.0,))), group=(*group, "bytes")),
    ]
    text = fidelity.render("fidelity", [*found, *fidelity.summary(found)])
    line = next(line for line in text.splitlines() if line.startswith("  synchronous"))
    assert "10.0 →  12.0 ms +20.0 %, +0.0 %" in line
    assert line.count("not available") == 2
    assert "step times, median disagreement of 1: 20.0%, goal ≤ 10 %: MISSED" in text
    assert "bytes, median disagreement of 1: 0.0%, goal ≤ 10 %: met" in text


def test_policies_that_agree_under_each_model_are_counted() -> None:
    """Five of these eight are within 10 %; one has a single model that is not, and one was not measured with all."""
    models = list(fidelity.stragglers())

    def step(policy: str, model: str, apart: float) -> Row:
        return Row(
            "a", "s", Sample((1 + apart,)), Peer("real", Sample((1.0,))), group=("threads", policy, model, "step")
        )

    found = [step(f"policy {n}", model, 0.05 * (-1) ** n) for n in range(5) for model in models]
    found += [step("odd", model, 0.3 if model == models[-1] else 0.0) for model in models]
    found += [step("far", model, -0.2) for model in models] + [step("unmeasured", models[0], 0.0)]
    counted = [row for row in fidelity.summary(found) if row.name.startswith("policies")]
    assert [(row.name[-5:], row.ours.median, row.met) for row in counted] == [(", of 7"[-5:], 5 / 7, True)]
    assert "of 7: 71.4%, goal ≥ 71 %: met" in fidelity.render("fidelity", counted)
    (fewer,) = (row for row in fidelity.summary(found[3:]) if row.name.startswith("policies"))
    assert not fewer.met


def test_a_calibration_says_what_it_has_found() -> None:
    text = str(Calibration(steps_s=(1e-3, 2e-3, 4e-3), latency_s=5e-4, bytes_per_s=float("inf"), apply_s=1e-3))
    assert text == (
        "a step computes 2.00 ms, a message takes 0.50 ms and moves arrays by reference, an apply takes 1.00 ms"
    )
