"""The compositions on the pages of methods, and in the table of policies, can be pasted: they make the policy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flowml as fm

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted((DOCS / "methods").glob("*.md"))
WRITTEN = re.compile(r"^- `(fm\.policies\..*?)` is `(.*?)`", re.MULTILINE)
ROW = re.compile(r"^\| `(fm\.policies\..*?)` \| `(.*?)`", re.MULTILINE)


def pairs(pattern: re.Pattern[str], page: Path) -> list[tuple[str, str]]:
    return pattern.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_composition_on_a_page_makes_the_policy_of_the_name(page: Path) -> None:
    for call, composition in pairs(WRITTEN, page):
        assert eval(composition, {"fm": fm}) == eval(call, {"fm": fm}), (call, composition)
        assert "inf" not in composition.split("(")


def test_every_public_name_is_on_some_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for module in ("policies", "methods"):
        names = getattr(fm, module).__all__
        assert [name for name in names if f"- `fm.{module}.{name}`: " not in text] == []


def test_pages_have_compositions() -> None:
    assert sum(len(pairs(WRITTEN, page)) for page in PAGES) > 30


def test_the_table_of_policies_says_two_ways_to_write_each() -> None:
    page = DOCS / "policies.md"
    rows = pairs(ROW, page)
    for call, composition in rows:
        assert eval(composition, {"fm": fm}) == eval(call, {"fm": fm}), (call, composition)
    named = {call.removeprefix("fm.policies.").partition("(")[0] for call, _ in rows}
    assert named == set(fm.policies.__all__) - {"adam_auto", "ensemble_compression"}
    assert all(f"fm.policies.{name}(" in page.read_text() for name in fm.policies.__all__)
