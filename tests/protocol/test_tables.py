"""The life of all that a machine keeps is a table: complete, followed by the machine, and drawn in docs/protocol.md.

FLOWML_REWRITE=1 python -m pytest tests/protocol/test_tables.py      draws it anew
"""

from __future__ import annotations

import itertools
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import pytest

from flowml.policy import Policy, Quorum
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.rendezvous import Cancelled
from flowml_runtime.protocol.training.replica import Replica
from flowml_runtime.protocol.training.stage import (
    OVER,
    RUNNING,
    STEPS,
    UNDECIDED,
    WAITING,
    BeginReceived,
    Change,
    Start,
    State,
    Step,
    StepFinished,
)
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Committed, Terms
from tests.protocol.lives import KEPT, Kept, Life, Table

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "protocol.md"
STATES: tuple[State, ...] = get_args(State)
CHANGES: tuple[Change, ...] = get_args(Change)


def diagram(table: Mapping[tuple[str, str], str], first: Iterable[str]) -> str:
    """The table as a diagram in mermaid's language. What changes nothing is left out."""
    arrows = {(state, after): [] for (state, _), after in table.items() if after != state}
    for (state, change), after in table.items():
        if after != state:
            arrows[state, after].append(change)
    states = list(dict.fromkeys([*first, *(s for arrow in arrows for s in arrow)]))
    names = {state: re.sub(r"\W+", "_", state) for state in states}
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f'    state "{state}" as {names[state]}' for state in states if names[state] != state]
    lines += [f"    [*] --> {names[state]}" for state in first]
    lines += [f"    {names[a]} --> {names[b]}: {', '.join(changes)}" for (a, b), changes in arrows.items()]
    lines += [f"    {names[state]} --> [*]" for state in states if all(state != before for before, _ in arrows)]
    return "\n".join([*lines, "```"])


def shown() -> dict[str, str]:
    """The parts of the page that are generated."""
    tables = {name: diagram(kept.table, [kept.first]) for name, kept in KEPT.items()}
    step = diagram(STEPS, ("queued", "queued, used", "skipped"))
    return {"stage.STEPS": step, **tables, "quorum_drop.txt": scenario("quorum_drop.txt")}


def scenario(name: str) -> str:
    return f"```\n{(ROOT / 'tests' / 'scenarios' / name).read_text()}```"


def test_the_page_shows_what_is() -> None:
    text = PAGE.read_text()
    drawn = text
    for name, block in shown().items():
        pattern = rf"(<!-- generated: {re.escape(name)} -->\n).*?(<!-- end -->)"
        drawn, found = re.subn(pattern, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", drawn, flags=re.DOTALL)
        assert found == 1, f"docs/protocol.md has no place for {name}"
    if os.environ.get("FLOWML_REWRITE"):
        PAGE.write_text(drawn)
    else:
        assert text == drawn, "docs/protocol.md is out of date; FLOWML_REWRITE=1 writes it anew"


def test_every_state_is_reached_and_those_that_are_over_lead_nowhere() -> None:
    assert {"queued", "queued, used", "skipped", *STEPS.values()} == set(STATES)
    assert {state for state, _ in STEPS} == set(STATES) - OVER
    assert WAITING | RUNNING | OVER | {"finished"} == set(STATES)
    assert {s for s in STATES if (s, "include") in STEPS} == UNDECIDED
    assert {s for s, change in STEPS if change == "start"} == WAITING
    assert {s for s, change in STEPS if change == "finish"} == RUNNING


@pytest.mark.parametrize(("state", "change"), list(itertools.product(STATES, CHANGES)))
def test_what_the_table_lacks_is_refused(state: State, change: Change) -> None:
    step = Step(0, wire.Item(sequence=0, epoch=0, start=0, size=8), False, state)
    if (state, change) in STEPS:
        step.take(change)
        assert step.state == STEPS[state, change]
    else:
        with pytest.raises(ProtocolError, match="cannot"):
            step.take(change)


@pytest.mark.parametrize("fate", ["include", "exclude"])
@pytest.mark.parametrize("decided", ["before it begins", "before it starts", "while it runs", "after it has finished"])
def test_the_machine_follows_the_table_whenever_the_commit_comes(fate: str, decided: str) -> None:
    """A stage that follows: one step runs, so that the next waits in line; the commit of that comes at any time."""
    machine = Replica(Terms(4, 2, 1, (StoreTerms((1,), Policy(quorum=Quorum(3))),), 9), 0, 1)
    items = [wire.Item(sequence=n, epoch=0, start=8 * n, size=8) for n in range(2)]
    machine.step(BeginReceived(0, items[0]))
    machine.step(Committed(0))

    def commit_if(now: str) -> None:
        if decided == now:
            machine.step(Committed(1, () if fate == "include" else (0,)))

    commit_if("before it begins")
    machine.step(BeginReceived(1, items[1]))
    commit_if("before it starts")
    started = Start(1, items[1], False) in machine.step(StepFinished(0))
    assert started == (fate == "include" or decided in ("while it runs", "after it has finished"))
    commit_if("while it runs")
    assert machine.should_abandon(1) == (fate == "exclude" and decided == "while it runs")
    if started:
        machine.step(StepFinished(1))
    commit_if("after it has finished")
    machine.validate()
    assert machine.committed == 1


def ways(table: Table, first: str) -> dict[str, tuple[str, ...]]:
    """For each state the shortest changes that lead there."""
    found, edge = {first: ()}, deque([first])
    while edge:
        state = edge.popleft()
        for (before, change), after in table.items():
            if before == state and after not in found:
                found[after] = (*found[state], change)
                edge.append(after)
    return found


def living(life: Life, way: Iterable[str]) -> Life:
    for change in way:
        life.take(change)
        life.validate()
    return life


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_every_change_in_every_state_is_as_the_table_says(kept: Kept) -> None:
    found = ways(kept.table, kept.first)
    assert set(found) == {s for s, _ in kept.table} | set(kept.table.values()), "a state is out of reach"
    changes = dict.fromkeys(change for _, change in kept.table)
    for make, (state, way), change in itertools.product(kept.make, found.items(), changes):
        life = living(make(), way)
        assert life.state() == state, f"{way} leads to {life.state()!r}"
        after = kept.table.get((state, change))
        if after is None:
            with pytest.raises((ProtocolError, Cancelled)):
                life.take(change)
            continue
        life.take(change)
        life.validate()
        assert life.state() == after, f"{change!r} in state {state!r}"
