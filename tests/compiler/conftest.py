"""The compiler is tested without programs that an earlier test has compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import compiled_anew


@pytest.fixture(scope="module", autouse=True)
def _compiles() -> Iterator[None]:
    with compiled_anew():
        yield
