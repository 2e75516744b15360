"""Clusters of four workers that the tests of one module may end. Those of `tests/conftest.py` are for the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

import flowml as fm

WORKERS = 4


@pytest.fixture(scope="module")
def threads() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.threads(workers=WORKERS)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def processes() -> Iterator[fm.Cluster]:
    with closing(fm.Cluster.local(workers=WORKERS)) as cluster:
        yield cluster
