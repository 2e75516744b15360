"""`flowml bench policies`: a short run of a few policies, and what it prints and draws."""

from __future__ import annotations

import statistics

import pytest

from flowml_tools.bench import policies, report
from flowml_tools.bench.rows import Row
from flowml_tools.plots import draw

FEW = ("synchronous()", "quorum(0.75)", "coded(1)", "diloco(8)")


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], Row]:
    return {row.group: row for row in policies.rows(1, steps=64, only=FEW, real=())}


def test_a_table_has_at_least_twelve_policies_by_the_calls_that_make_them() -> None:
    import flowml as fm

    listed = policies.compositions()
    assert len(listed) >= 12
    assert all(eval(f"fm.policies.{name}", {"fm": fm}) == policy for name, policy in listed.items())
    assert set(policies.REAL) <= set(listed)


def test_the_figures_are_those_that_the_policies_must_have(found: dict[tuple[str, ...], Row]) -> None:
    def of(name: str, what: str) -> float:
        return statistics.mean(found[name, what].ours.values)

    assert {name for name, _ in found} == set(FEW)
    assert of("synchronous()", "lost") == of("diloco(8)", "lost") == of("coded(1)", "lost") == 0
    assert 0.1 < of("quorum(0.75)", "lost") <= 0.25
    assert of("synchronous()", "idle") == pytest.approx(1 - (6 + 2 * 4) / (8 * 4), abs=0.1)  # the slow two set the pace
    assert of("quorum(0.75)", "idle") < 0.1
    assert of("diloco(8)", "bytes of hidden") == pytest.approx(of("synchronous()", "bytes of hidden") / 8, rel=0.15)
    assert of("synchronous()", "bytes of hidden") / of("synchronous()", "bytes of output") == pytest.approx(6.4)
    assert of("coded(1)", "accuracy") == pytest.approx(of("synchronous()", "accuracy"), abs=0.02)  # the same updates
    ends = {name: found[name, "loss"].ours.values[-1] for name in FEW}
    assert ends["quorum(0.75)"] < ends["coded(1)"] < ends["synchronous()"]


def test_a_run_repeats_to_the_bit(found: dict[tuple[str, ...], Row]) -> None:
    again = policies.rows(1, steps=64, only=["quorum(0.75)"], real=())
    assert [row.ours for row in again] == [found[row.group].ours for row in again]


def test_the_table_says_what_is_not_reached_and_the_plot_has_a_line_for_each(
    found: dict[tuple[str, ...], Row],
) -> None:
    text = policies.render("policies", list(found.values()))
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert ("synchronous()", "time") not in found
    assert "not reached" in lines["synchronous()"]
    assert ("diloco(8)", "time") in found
    assert "not reached" not in lines["diloco(8)"]
    drawing = draw(policies.plot(list(found.values())))
    assert all(f">{name}</text>" in drawing for name in FEW)


def test_a_share_of_nothing_has_no_ratio(found: dict[tuple[str, ...], Row]) -> None:
    lost = found["quorum(0.75)", "lost"]
    assert (lost.ratio, lost.json()["ratio"]) == (None, None)
    assert report({"policies": list(found.values())})


@pytest.mark.parametrize("kind", policies.KINDS)
def test_real_workers_take_the_virtual_time(kind: str) -> None:
    row = policies.on_workers(kind, "synchronous()", policies.compositions()["synchronous()"], 16)
    assert row.ratio == pytest.approx(1, abs=0.25)
    assert f"synchronous() on {kind}, pauses of 60 ms: a step took" in policies.render("policies", [*BARE, row])


BARE = policies.described("x", [policies.Fitted([(1.0, 0.1)], 0.9, dict.fromkeys(policies.LAYERS, 1.0), 0.0, 0.0)], {})
