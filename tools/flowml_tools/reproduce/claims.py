"""What a claim of a paper is, and how a run decides on it.

A module states a `Claim`: who said what, and where. Its `run` measures, and returns an `Outcome` with findings. A
finding compares one number of ours with one of the paper, and its bound says when the two agree. The verdict follows
from the findings alone, so that no module can state it: all agree, some do, or none does. A figure that cannot be had
on one machine is a finding too, one that never agrees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flowml_tools.plots import Plot

Verdict = Literal["reproduced", "partly", "claimed, not reproduced"]


@dataclass(frozen=True)
class Finding:
    """One number beside that of the paper."""

    what: str
    claimed: str
    """What the paper states, and the bound within which ours agrees."""
    ours: str
    agrees: bool
    timed: bool = False
    """Whether it depends on the machine, because it measures time on it."""


@dataclass(frozen=True)
class Outcome:
    """What a run has found. `setting` says what was run, in one or two sentences."""

    setting: str
    findings: tuple[Finding, ...]
    plot: Plot | None = None

    @property
    def verdict(self) -> Verdict:
        agreed = sum(finding.agrees for finding in self.findings)
        if agreed == len(self.findings):
            return "reproduced" if agreed else "claimed, not reproduced"
        return "partly" if agreed else "claimed, not reproduced"

    @property
    def reason(self) -> str:
        """What does not agree, in words; empty if all does."""
        missed = [f for f in self.findings if not f.agrees]
        return "; ".join(f"{f.what}: {f.ours}, claimed {f.claimed}" for f in missed)


@dataclass(frozen=True)
class Claim:
    """What a paper claims. `run(full, seed)` measures it: in seconds, or at full size.

    Attributes:
        paper: authors, title, place and year.
        where: the figure, table or section that has it.
        states: the claim, in one sentence.
    """

    paper: str
    where: str
    states: str
    run: Callable[[bool, int], Outcome]


def near(what: str, claimed: float, ours: float, within: float, form: str = "{:.2f}") -> Finding:
    """Agrees if ours differs by at most `within` of the claimed number (0.25: by a quarter)."""
    bound = f"{form.format(claimed)} ± {within:.0%}"
    return Finding(what, bound, form.format(ours), abs(ours - claimed) <= within * abs(claimed))


def at_most(what: str, claimed: float, ours: float, form: str = "{:.2f}") -> Finding:
    """Agrees if ours is at most the claimed number."""
    return Finding(what, f"at most {form.format(claimed)}", form.format(ours), ours <= claimed)


def at_least(what: str, claimed: float, ours: float, form: str = "{:.2f}") -> Finding:
    """Agrees if ours is at least the claimed number."""
    return Finding(what, f"at least {form.format(claimed)}", form.format(ours), ours >= claimed)


def between(what: str, low: float, high: float, ours: float, form: str = "{:.2f}") -> Finding:
    """Agrees if ours lies between two claimed numbers."""
    return Finding(what, f"{form.format(low)} to {form.format(high)}", form.format(ours), low <= ours <= high)


def holds(what: str, claimed: str, ours: str, agrees: bool) -> Finding:
    """A statement that is true or false."""
    return Finding(what, claimed, ours, agrees)


def out_of_reach(what: str, claimed: str, why: str) -> Finding:
    """A figure that this machine cannot have. It never agrees."""
    return Finding(what, claimed, f"not measured: {why}", agrees=False)
