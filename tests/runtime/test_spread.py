"""A worker compiles on every core, and computes on its own."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import flowml as fm
from flowml_runtime.environment.machine import share_cores
from flowml_runtime.environment.spread import Spread, threads
from tests.conftest import compiled_anew


def test_a_pinned_worker_generates_code_on_every_core_and_computes_on_its_own() -> None:
    everywhere = os.sched_getaffinity(0)
    with compiled_anew(), fm.Cluster.local(workers=2) as cluster:
        fm.dataflow(lambda x: x * 2 + 1, cluster=cluster, placement=fm.Pipeline(1))(np.ones((4, 4), np.float32))
        compiled = next(pid for pid in cluster.pids.values() if _allowed_on(pid, everywhere) >= len(everywhere))
        share = dict(zip(cluster.pids.values(), share_cores(tuple(sorted(everywhere)), 2), strict=True))[compiled]
        assert _computing(compiled) == {share}


def test_threads_go_back_to_their_cores_after_a_compilation_that_fails() -> None:
    own = os.sched_getaffinity(0)
    spread = Spread((min(own),), threads())
    for _ in range(2):
        with pytest.raises(ValueError, match="no such operation"), spread.first():
            assert os.sched_getaffinity(0) == {min(own)}
            raise ValueError("no such operation")
        assert os.sched_getaffinity(0) == own
    with spread.first():  # as where an executable comes from a cache
        pass
    over = threading.Event()
    with spread.first():
        assert os.sched_getaffinity(0) == {min(own)}
        made = threading.Thread(target=over.wait, args=(60,))
        made.start()
    with spread.first():
        assert os.sched_getaffinity(0) == own, "the threads are there"
    over.set()
    made.join(60)


def _allowed_on(pid: int, everywhere: set[int]) -> int:
    return sum(_cores(thread.id) == everywhere for thread in psutil.Process(pid).threads())


def _computing(pid: int) -> set[tuple[int, ...]]:
    """The cores of the threads with which XLA computes."""
    found = psutil.Process(pid).threads()
    return {tuple(sorted(_cores(t.id))) for t in found if _name(pid, t.id) == "tf_XLAEigen"}


def _cores(thread: int) -> set[int]:
    try:
        return os.sched_getaffinity(thread)
    except OSError:  # it has ended
        return set()


def _name(pid: int, thread: int) -> str:
    try:
        return Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
    except OSError:
        return ""
