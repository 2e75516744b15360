"""docs/proofs.md: the tests that it names exist, and each claim of a paper has a row in both of its tables."""

from __future__ import annotations

import re
from pathlib import Path

from flowml_tools.reproduce import CLAIMS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "proofs.md").read_text()


def test_the_tests_that_the_page_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 40
    missing = [(file, name) for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert missing == []


def test_each_claim_has_its_row_at_full_size() -> None:
    sizes = PAGE.partition("## Claims at full size")[2]
    assert re.findall(r"^\| (\w+) \|", sizes, re.MULTILINE)[1:] == list(CLAIMS)
