"""`flowml bench policies`: short runs of a few policies, what they print and draw, and how they end early."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from functools import partial
from pathlib import Path

import pytest

from flowml.errors import FlowmlError
from flowml_tools.bench import _take_all, policies, report
from flowml_tools.bench.policies import Budget
from flowml_tools.bench.policy_entries import LEFT_OUT, Entry, chosen, entries, parsed
from flowml_tools.bench.policy_fits import SIZES, Fits, Fitted
from flowml_tools.bench.rows import Part, Row
from flowml_tools.command import CommandError
from flowml_tools.plots import draw

FEW = ("synchronous()", "coded(1)", "quorum(0.75)", "diloco(8)")


@pytest.fixture(scope="module")
def found() -> list[Part]:
    return list(policies.parts(2, names=FEW, kind="simulated", steps=48))


def cells(parts: list[Part]) -> dict[tuple[str, ...], Row]:
    return {row.group: row for part in parts for row in part.rows}


def test_every_named_policy_has_a_row_or_a_reason() -> None:
    import flowml as fm

    functions = {call.partition("(")[0] for call in entries()}
    assert functions | set(LEFT_OUT) == set(dir(fm.policies))
    assert not functions & set(LEFT_OUT)
    assert all(LEFT_OUT.values())


def test_a_name_is_the_call_that_makes_the_policy() -> None:
    import flowml as fm

    for name, entry in entries().items():
        if isinstance(entry.policies, fm.Policy) and "…" not in name:
            assert eval(f"fm.policies.{name}", {"fm": fm}) == entry.policies, name


def test_the_figures_are_those_that_the_policies_must_have(found: list[Part]) -> None:
    rows = cells(found)

    def of(name: str, what: str) -> float:
        return statistics.mean(rows[name, what].ours.values)

    assert {name for name, _ in rows} == set(FEW)
    assert of("synchronous()", "lost") == of("diloco(8)", "lost") == of("coded(1)", "lost") == 0
    assert 0.05 < of("quorum(0.75)", "lost") <= 1 / 6
    assert of("synchronous()", "waits") == pytest.approx(1 - (5 + 4) / (6 * 4), abs=0.05)  # the slow one sets the pace
    assert of("quorum(0.75)", "waits") < 0.3  # for the slowest of five alike
    assert of("diloco(8)", "bytes of hidden") == pytest.approx(of("synchronous()", "bytes of hidden") / 8, rel=0.2)
    assert of("synchronous()", "bytes of hidden") / of("synchronous()", "bytes of output") == pytest.approx(6.4)
    assert rows["coded(1)", "accuracy"].ours == rows["synchronous()", "accuracy"].ours  # the same updates
    assert of("quorum(0.75)", "step") < of("coded(1)", "step") < of("synchronous()", "step")
    assert of("coded(1)", "step") > 0.016  # its replicas compute twice as much, and pause as much longer


def test_a_simulated_run_repeats_to_the_bit(found: list[Part]) -> None:
    again = policies.rows(2, names=["quorum(0.75)"], kind="simulated", steps=48)
    assert again
    assert [row.ours for row in again] == [cells(found)[row.group].ours for row in again]


def test_each_line_is_printed_in_turn_under_its_head(found: list[Part]) -> None:
    head, *lines, end = found
    assert [part.text.split("  ")[1] for part in lines] == list(FEW)
    at = head.text.splitlines()[-1].index("accuracy")
    assert all(part.text[at - 2 : at] == "  " and part.text[at].isdigit() for part in lines)
    assert "mean of 2 seeds" in head.text
    assert end.text == ""
    assert end.left_out == {}


def test_a_loss_that_is_not_reached_says_so_in_the_table_and_in_the_plot(found: list[Part]) -> None:
    lines = {part.text.split("  ")[1]: part.text for part in found[1:-1]}
    reached = cells(found)
    assert ("diloco(8)", "time") in reached
    assert "not reached" not in lines["diloco(8)"]
    short = list(policies.parts(1, names=["every(4)"], kind="simulated", steps=12))
    assert "not reached" in short[1].text
    rows = [row for part in [*found, *short] for row in part.rows]
    drawing = draw(policies.plot(rows))
    assert all(f">{name}</text>" in drawing for name in ("synchronous()", "diloco(8)", "every(4)"))
    assert "not reached" in drawing


def test_some_seeds_that_reach_the_loss_are_counted() -> None:
    def fitted(loss: float) -> Fitted:
        return Fitted([(1.0, loss)], 0.9, dict.fromkeys(SIZES, 1.0), 0.0, 0.0, 0.01)

    rows = policies.described("x", [fitted(0.1), fitted(9.0), fitted(9.0)])
    assert policies.line("x", rows)[1] == "1.00 s, 1 of 3"
    assert policies.line("x", policies.described("x", [fitted(9.0)]))[1] == "not reached"


def test_the_report_has_rows_and_what_was_left_out(found: list[Part]) -> None:
    rows = list(cells(found).values())
    content = json.loads(report({"policies": rows}, {"policies": {"x": "failed: y"}}))
    assert content["left out"] == {"policies": {"x": "failed: y"}}
    lost = next(row for row in content["benchmarks"]["policies"] if row["group"] == ["quorum(0.75)", "lost"])
    assert lost["peer"]["name"] == "synchronous()"
    assert lost["ratio"] is None  # a share of nothing


def test_names_are_calls_or_functions_and_a_wrong_one_is_told() -> None:
    assert parsed("quorum(0.75),diloco(8, fragments=2, delay=2, alpha=0.5), choco([fm.filters.quantise(4)])") == [
        "quorum(0.75)",
        "diloco(8, fragments=2, delay=2, alpha=0.5)",
        "choco([fm.filters.quantise(4)])",
    ]
    assert list(chosen(["diloco", "quorum"])) == [
        "quorum(0.75)",
        "diloco(8)",
        "diloco(8, fragments=2, delay=2, alpha=0.5)",
    ]
    for wrong, says in (
        ("qurum", "did you mean quorum?"),
        ("quorum(0.5)", "no row 'quorum(0.5)'; of quorum there is quorum(0.75)"),
        ("", "there are synchronous, all_reduce, "),
        ("hogwild", "devices of one worker"),
        ("hogwild()", "devices of one worker"),
        ("diloco(8", "of diloco there is diloco(8), diloco(8, fragments=2"),
    ):
        with pytest.raises(CommandError) as error:
            chosen([wrong])
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_policies_without_time_are_listed_and_none_runs_long_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    budget = Budget(10.0, began=100.0)
    assert budget.allows(first=True)
    budget.took[True].append(4.0)
    now[0] += 4
    assert budget.allows(first=False)  # as long as a first one, as far as is known
    budget.took[False].append(1.0)
    now[0] += 4
    assert budget.allows(first=False)
    assert not budget.allows(first=True)


def test_what_there_was_no_time_for_is_listed() -> None:
    head, end = policies.parts(3, names=FEW, kind="simulated", seconds=1e-9)
    assert head.text.startswith("policies: ")
    assert end.text == f"  {', '.join(FEW)}: not run: the time of 1e-09 s was over"
    assert set(end.left_out) == set(FEW)


class Rounds:
    """The order of fits in place of the fits themselves, and a clock on which each takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, list[tuple[str, int]]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        rounds, known = self, chosen(FEW)

        class Counted:
            def __init__(self, cluster: object, entry: Entry, steps: int) -> None:
                self._name = next(name for name, one in known.items() if one is entry)

            def fit(self, seed: int) -> Fitted:
                rounds.now += 1.0
                rounds.order.append((self._name, seed))
                rounds.after()
                return Fitted([(1.0, 0.1), (2.0, 0.1)], 0.9, dict.fromkeys(SIZES, 1.0), 0.0, 0.0, 0.01)

        monkeypatch.setattr(policies, "Fits", Counted)
        monkeypatch.setattr(policies, "Budget", partial(Budget, began=0.0))
        monkeypatch.setattr(policies, "chosen", lambda names: known)

    def after(self) -> None:
        """Called after each fit."""


def test_each_seed_is_done_with_all_policies_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(monkeypatch)
    _, *lines, end = policies.parts(2, names=FEW, kind="simulated")
    assert rounds.order == [(name, seed) for seed in range(2) for name in FEW]
    assert [part.text.split("  ")[1] for part in lines] == list(FEW)
    assert (end.text, end.left_out) == ("", {})


@pytest.mark.parametrize("seconds", [5.0, 6.0, 9.0])
def test_a_table_that_is_cut_short_has_all_policies_and_fewer_seeds(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    rounds = Rounds(monkeypatch)
    _, *lines, end = policies.parts(3, names=FEW, kind="simulated", seconds=seconds)
    assert rounds.order == [(name, seed) for seed in range(3) for name in FEW][: int(seconds)]
    assert [part.text.split("  ")[1] for part in lines] == list(FEW)
    seeds = {part.rows[0].group[0]: len(part.rows[0].ours.values) for part in lines}
    assert seeds == {name: sum(fitted == name for fitted, _ in rounds.order) for name in FEW}
    reason = f"the time of {seconds:g} s was over after"
    assert {name: f"{reason} {done} of 3 seeds" for name, done in seeds.items() if done < 3} == end.left_out


def test_an_interrupt_in_the_second_round_keeps_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, taken = Rounds(monkeypatch), list[Part]()

    def interrupt() -> None:
        if len(rounds.order) == len(FEW) + 2:
            raise KeyboardInterrupt

    rounds.after = interrupt
    with pytest.raises(KeyboardInterrupt):
        _take_all(policies.parts(3, names=FEW, kind="simulated"), taken.append)
    assert [part.text.split("  ")[1] for part in taken[1:-1]] == list(FEW)
    assert taken[-1].left_out == {name: f"interrupted after {2 if name == FEW[0] else 1} of 3 seeds" for name in FEW}


def test_a_policy_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Fits.fit

    def failing(self: Fits, seed: int) -> Fitted:
        if failed:
            failed.pop()
            raise FlowmlError("a reason")
        return fit(self, seed)

    failed = [True]
    monkeypatch.setattr(Fits, "fit", failing)
    parts = list(policies.parts(1, names=["synchronous", "quorum"], kind="simulated", steps=12))
    assert [part.text.split("  ")[1] for part in parts[1:-1]] == ["quorum(0.75)"]
    assert parts[-1].text == "  synchronous(): failed: a reason"


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_real_replicas_pause_as_the_simulated_ones_do(kind: policies.Kind) -> None:
    rows = {row.group[1]: row.ours for row in policies.rows(1, names=["synchronous()"], kind=kind, steps=16)}
    virtual = {r.group[1]: r.ours for r in policies.rows(1, names=["synchronous()"], kind="simulated", steps=16)}
    assert rows["accuracy"].median == pytest.approx(virtual["accuracy"].median, abs=0.02)
    assert rows["step"].median > 0.9 * virtual["step"].median
    assert rows["bytes of hidden"] == virtual["bytes of hidden"]
    assert 0 <= rows["waits"].median <= 1


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_the_lines_that_are_there_are_kept_at_an_interrupt(
    start_flowml, tmp_path: Path, no_leaks, kind: str, stop: signal.Signals, status: int
) -> None:
    with no_leaks():
        options = ("--repeats", "1", "--json", "out.json", "--plots", ".", "--cluster", kind)
        process = start_flowml("bench", "policies", *options)
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[3].startswith("  synchronous()"), lines
        os.killpg(process.pid, stop)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "average_once(): not run: interrupted" in out
    assert "Traceback" not in err
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["benchmarks"]["policies"][0]["group"] == ["synchronous()", "time"]
    assert content["left out"]["policies"]["average_once()"] == "not run: interrupted"
    assert "synchronous()" in (tmp_path / "policies.svg").read_text()


def test_an_interrupt_while_a_line_is_printed_says_what_was_not_run() -> None:
    """It comes to the printer, and nothing was said of the others."""
    taken: list[Part] = []

    def take(part: Part) -> None:
        taken.append(part)
        if len(taken) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _take_all(policies.parts(1, names=["synchronous", "quorum"], kind="simulated", steps=12), take)
    assert taken[-1].left_out == {"quorum(0.75)": "not run: interrupted"}


def test_an_option_of_another_benchmark_is_refused(flowml) -> None:
    done = flowml("bench", "dispatch", "--time", "5")
    assert done.returncode == 2
    assert done.stderr == "flowml: error: --time is an option of `policies` alone; give it with that benchmark\n"
