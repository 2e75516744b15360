"""Each file in tests/scenarios is a rule of the training protocol, told by the real machines.

FLOWML_REWRITE=1 python -m pytest tests/protocol/test_scenarios.py      write down what they say now
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.protocol.scenarios import Scenario

FILES = sorted((Path(__file__).parent.parent / "scenarios").glob("*.txt"))


def play(text: str) -> str:
    """The text with what its commands lead to now."""
    scenario = Scenario()
    blocks: list[str] = []
    for block in text.rstrip("\n").split("\n\n"):
        commands = block.split("\n----")[0]
        lines = [line for line in commands.split("\n") if not line.startswith("#")]
        told = [said for line in lines for said in scenario.do(line)]
        if lines:
            scenario.validate()
        blocks.append("\n".join([commands, *(["----", *told] if told else [])]))
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_machines_tell_what_is_written(path: Path) -> None:
    written = path.read_text()
    told = play(written)
    if os.environ.get("FLOWML_REWRITE"):
        path.write_text(told)
    else:
        assert told == written, f"what {path.name} tells has changed; FLOWML_REWRITE=1 writes it down"


def test_there_is_a_scenario_for_every_rule() -> None:
    assert len(FILES) >= 12
