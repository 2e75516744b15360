"""The campaign draws every knob of policies, machines, networks and faults, or says why it does not."""

from __future__ import annotations

from flowml_tools.faults.cases import Case
from flowml_tools.faults.knobs import NEVER, drawn, every_knob


def test_every_knob_is_drawn_or_has_a_reason() -> None:
    knobs, found = every_knob(), drawn(map(Case.of, range(1500)))
    assert {"Policy.filters", "Deadline.grace=adaptive", "TopK.share", "Disorder.lost", "Sites.shared_lines"} <= knobs
    assert found <= knobs
    assert sorted(knobs - found - NEVER.keys()) == []
    assert sorted(NEVER.keys() - (knobs - found)) == [], "these are drawn, or are no knobs"
