"""Whether results equal those of jit is tested with programs that are compiled on both sides."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import compiled_anew


@pytest.fixture(scope="module", autouse=True)
def _compiles() -> Iterator[None]:
    with compiled_anew():
        yield
