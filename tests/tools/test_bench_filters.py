"""`flowml bench filters`: one small size, and what it prints."""

from __future__ import annotations

from flowml_tools.bench import BENCHMARKS, filters


def test_each_filter_is_measured_both_ways() -> None:
    rows = filters.rows(1, sides=(32,))
    assert BENCHMARKS["filters"] is filters
    assert len(rows) == len(filters.CHAINS)
    assert all(row.peer.name == "NumPy" and row.ratio is not None and row.ratio > 0 for row in rows)
    found = {row.group[0]: row.group[2] for row in rows}
    assert found["quantise(8)"] == "3.9 x fewer"
    lines = filters.render("filters", rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert lines[1].split() == ["filter", "elements", "JAX", "NumPy", "bytes", "pays", "below"]
    assert all("MB/s" in line or "never" in line for line in lines[2:])
