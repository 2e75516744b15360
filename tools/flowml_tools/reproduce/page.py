"""Writes the results of a run as text for a terminal, and as a page of the documentation with its plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flowml_tools.plots import draw
from flowml_tools.reproduce.claims import Claim, Finding, Outcome

INTRODUCTION = """\
# The claims of the papers, beside ours

This page is written by `flowml reproduce --all --out docs`{full}. Each claim has a setting, a seed, and findings: a
number of ours beside that of the paper, with the bound within which they agree. Where a paper says in words what
has to be measured, as "hides stragglers", the bound is ours. Rates, thresholds and kinds of stragglers that a paper
does not give were chosen after first runs, so that there is an effect to see. The verdict follows from the findings:
*reproduced* if all agree, *partly* if some do, and *claimed, not reproduced* if none does. A figure that one machine
cannot have is listed as not measured, and never agrees.

Seconds are virtual seconds of a [simulated cluster](simulation.md) unless a setting says otherwise.
`flowml reproduce NAME` runs one claim in seconds, `--full` runs it at the size of the paper where this machine can, and
`--seed N` with other random numbers.
"""


@dataclass(frozen=True)
class Run:
    """A claim and what one run of it has found."""

    claim: Claim
    outcome: Outcome
    seed: int


def text(name: str, run: Run) -> str:
    """The result of one claim for a terminal."""
    claim, outcome = run.claim, run.outcome
    lines = [
        f"{name}: {outcome.verdict}",
        f"  paper    {claim.paper}; {claim.where}",
        f"  claim    {claim.states}",
        f"  setting  {outcome.setting} Seed {run.seed}.",
    ]
    width = max(len(f.what) for f in outcome.findings)
    for finding in outcome.findings:
        mark = "agrees" if finding.agrees else "DIFFERS"
        lines.append(f"  {mark:<8} {finding.what:<{width}}  {finding.ours}  (claimed {finding.claimed})")
    return "\n".join(lines)


def write(folder: Path, runs: Mapping[str, Run], *, full: bool) -> Path:
    """Write `reproduce.md` and a plot for each claim that has one. Returns the path of the page."""
    plots = folder / "reproduce"
    for name, run in runs.items():
        if run.outcome.plot is not None:
            plots.mkdir(parents=True, exist_ok=True)
            (plots / f"{name}.svg").write_text(draw(run.outcome.plot))
    page = folder / "reproduce.md"
    page.write_text(markdown(runs, full=full))
    return page


def markdown(runs: Mapping[str, Run], *, full: bool) -> str:
    rows = "\n".join(
        f"| [{name}](#{name}) | {_cell(run.claim.states)} | {run.outcome.verdict} |" for name, run in runs.items()
    )
    table = f"| name | claim | verdict |\n|---|---|---|\n{rows}\n"
    introduction = INTRODUCTION.format(full=" with `--full`" if full else "")
    return "\n".join([introduction, table, *(_section(name, run) for name, run in runs.items())])


def _section(name: str, run: Run) -> str:
    claim, outcome = run.claim, run.outcome
    rows = "\n".join(map(_row, outcome.findings))
    parts = [
        f"## {name}\n",
        f"{claim.paper}; {claim.where}.\n",
        f"**Claim.** {claim.states}\n",
        f"**Setting.** {outcome.setting} Seed {run.seed}.\n",
        f"| finding | claimed | ours | |\n|---|---|---|---|\n{rows}\n",
        f"**Verdict: {outcome.verdict}.**{' ' + outcome.reason + '.' if outcome.reason else ''}\n",
    ]
    if outcome.plot is not None:
        parts.append(f"![{outcome.plot.title}](reproduce/{name}.svg)\n")
    return "\n".join(parts)


def _row(finding: Finding) -> str:
    cells = (finding.what, finding.claimed, finding.ours, "agrees" if finding.agrees else "differs")
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
