"""`flowml reproduce`: each claim runs at reduced size, and verdicts follow from findings."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flowml as fm
from flowml_tools.main import main
from flowml_tools.plots import Dots, DotsRow, Line, Plot, draw
from flowml_tools.reproduce import CLAIMS
from flowml_tools.reproduce.claims import Finding, Outcome, at_least, at_most, between, near, out_of_reach
from flowml_tools.reproduce.page import Run, markdown, text
from flowml_tools.reproduce.payoff import ROUNDS, Payoff, core_seconds, pays

EXPECTED = dict.fromkeys(CLAIMS, "reproduced") | dict.fromkeys(
    ("adam", "chaos", "coded_reduce", "decoupled", "streaming_diloco", "top_k"), "partly"
)
"""The verdicts at reduced size with seed 0, without findings that measure time on this machine. A change of one is a
change of what the project can show."""


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_at_reduced_size(name: str) -> None:
    claim = CLAIMS[name]
    outcome = claim.run(False, 0)
    counted = replace(outcome, findings=tuple(f for f in outcome.findings if not f.timed))
    assert counted.verdict == EXPECTED[name], text(name, Run(claim, outcome, 0))
    assert outcome.setting.endswith(".")
    if outcome.plot is not None:
        ET.fromstring(draw(outcome.plot))


def test_a_rate_below_which_filters_pay_is_the_median_of_rounds_and_can_miss_its_bound() -> None:
    rounds = Payoff(1.0, 1.0, 1.0, rates=(100e6, 130e6, 140e6, 150e6, 400e6), ours=(), plain=())
    found = pays("x", rounds)
    assert (found.ours, found.agrees, found.timed) == ("140 (115 to 275)", True, True)
    assert not pays("x", rounds, link=150e6).agrees


def test_the_work_of_a_filter_is_counted_without_the_time_of_others() -> None:
    """Rounds are seconds of a core, so a pause of the process is not among them."""
    value = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    seconds = core_seconds((fm.filters.sign().with_error_feedback(),), value)
    assert len(seconds) == ROUNDS
    assert all(s >= 0 for s in seconds)


def test_a_verdict_follows_from_the_findings() -> None:
    yes, no = Finding("a", "1", "1", agrees=True), Finding("b", "1", "3", agrees=False)
    verdicts = {
        (): "claimed, not reproduced",
        (yes,): "reproduced",
        (yes, no): "partly",
        (no,): "claimed, not reproduced",
    }
    for findings, verdict in verdicts.items():
        assert Outcome("It.", findings).verdict == verdict
    assert Outcome("It.", (yes, no)).reason == "b: 3, claimed 1"


def test_a_finding_agrees_within_its_bound_only() -> None:
    assert near("x", 10, 10.9, within=0.1).agrees
    assert not near("x", 10, 11.1, within=0.1).agrees
    assert not near("x", 10, 8.9, within=0.1).agrees
    assert not near("x", 10, float("nan"), within=0.1).agrees
    assert at_least("x", 2, 2).agrees
    assert not at_least("x", 2, 1.9).agrees
    assert at_most("x", 2, 2).agrees
    assert not at_most("x", 2, 2.1).agrees
    assert between("x", 1, 2, 1.5).agrees
    assert not between("x", 1, 2, 2.5).agrees
    assert not out_of_reach("x", "88 %", "there is one machine").agrees


def test_a_plot_has_every_finite_point() -> None:
    points = [(1.0, 2.0), (10.0, float("inf")), (100.0, 30.0), (0.0, 1.0)]
    plot = Plot("a < b", "x", "y", (Line("one", points), Line("none", [])), log_x=True, log_y=True)
    assert draw(plot).count("<circle") == 2
    assert ET.fromstring(draw(plot)).findtext("{http://www.w3.org/2000/svg}title") == "a < b"
    assert draw(replace(plot, log_x=False, log_y=False)).count("<circle") == 3


def test_names_of_lines_fit_and_a_covered_line_is_seen() -> None:
    def drawing(name: str, other: float) -> str:
        lines = Line(name, [(0.0, 1.0), (1.0, 2.0)]), Line("b", [(0.0, 1.0), (1.0, other)])
        return draw(Plot("t", "x", "y", lines))

    short, long = (ET.fromstring(drawing(name, 1.0)) for name in ("a", "a name of which the end would be cut off"))
    assert float(long.attrib["width"]) > float(short.attrib["width"])
    assert 'stroke-width="5"' in drawing("a", 2.0)
    assert 'stroke-width="5"' not in drawing("a", 1.0)


def test_the_nearest_claim_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "adams"]) != 0
    assert "there is no claim 'adams'; did you mean adam? there are adam, downpour" in capsys.readouterr().err


def test_ticks_of_columns_of_dots_do_not_meet() -> None:
    rows = (DotsRow("a", ((0.5, 2.5), (0.82, 0.98))), DotsRow("b", ((1.0,), (0.9,))))
    texts = ET.fromstring(draw(Dots("t", ("s", "accuracy"), rows))).iter("{http://www.w3.org/2000/svg}text")
    ticks = sorted(float(text.attrib["x"]) for text in texts if (text.text or "").replace(".", "").isdigit())
    assert min(b - a for a, b in itertools.pairwise(ticks)) > 30


def test_the_command_writes_a_page_and_its_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "backup", "--seed", "3", "--out", str(tmp_path / "docs")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("backup: ")
    assert "Seed 3." in printed
    page = (tmp_path / "docs" / "reproduce.md").read_text()
    assert "## backup" in page
    for target in re.findall(r"\]\((reproduce/[^)]+)\)", page):
        assert (tmp_path / "docs" / target).exists()


def test_claims_that_are_there_are_written_at_an_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(full: bool, seed: int) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setitem(CLAIMS, "chaos", replace(CLAIMS["chaos"], run=interrupted))  # type: ignore[arg-type]
    assert main(["reproduce", "coding", "chaos", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().out.endswith("reproduce.md\n")
    page = (tmp_path / "reproduce.md").read_text()
    assert "## coding" in page and "## chaos" not in page


def test_a_folder_that_cannot_be_made_is_refused_before_a_claim_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for folder, says in (("file", "is not a folder"), ("file/below", "cannot be made: Not a directory; give another")):
        assert main(["reproduce", "coding", "--out", str(tmp_path / folder)]) == 2
        captured = capsys.readouterr()
        assert says in captured.err and not captured.out


def test_a_list_has_each_claim_and_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(CLAIMS)
    assert all(line.endswith(claim.paper) for line, claim in zip(printed, CLAIMS.values(), strict=True))


@pytest.mark.parametrize("arguments", [[], ["no_such"], ["ssp", "--all"], ["ssp", "--list"]])
def test_a_wrong_call_says_which_claims_there_are(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 2
    assert "there are adam, " in capsys.readouterr().err


def test_the_page_of_the_documentation_has_every_claim() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "reproduce.md").read_text()
    assert re.findall(r"^## (\S+)$", page, re.MULTILINE) == list(CLAIMS)
    for claim in CLAIMS.values():
        assert claim.states in page


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    claim = CLAIMS["ssp"]
    run = Run(claim, Outcome("It.", (Finding("|x|", "1", "1", agrees=True),)), 0)
    assert "\\|x\\|" in markdown({"ssp": run}, full=False)
