"""What the page on policies shows of examples/policies.py is what it prints."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks, normal, run


def test_three_mixes_of_rules_on_digits_print_what_the_page_shows(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pairs = pairwise(blocks(ROOT / "docs" / "policies.md"))
    [(command, shown)] = [(a.text.split(), b.text) for a, b in pairs if "examples/policies.py" in a.text]
    output = run([sys.executable, str(ROOT / command[1]), *command[2:]], tmp_path)
    assert normal(output) == normal(shown)
    assert "worker:3 (replica 3) was late at 60 of 60 steps" in output
