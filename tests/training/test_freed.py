"""What a fit has used is freed when it ends, and between its runs, without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest

import flowml as fm
from tests.training.test_checkpoints import POLICIES, case
from tests.training.test_elastic import fit

KINDS = ("flowml.", "flowml_runtime.driver.", "flowml_runtime.worker.training.")
"""Modules of plans, fits and runs. A worker that ends has cycles, and is a process elsewhere."""


@contextmanager
def nothing_in_cycles() -> Iterator[None]:
    """Whatever is made here and is not needed any more is free at the end, but for small things of JAX."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        left = {
            type(one).__qualname__
            for one in gc.garbage
            if isinstance(one, jax.Array) or str(type(one).__module__).startswith(KINDS)
        }
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left, "these objects are in cycles"


@pytest.mark.filterwarnings("ignore:mlp_loss is not convex", "ignore:.*all replicas are in one site")
@pytest.mark.parametrize("name", POLICIES)
def test_a_fit_leaves_nothing(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    one = case(threads_cluster, tmp_path, POLICIES[name])
    one.fit()
    with nothing_in_cycles():
        one.fit(checkpoint=one.checkpoint())


@pytest.mark.filterwarnings("ignore:worker.+ was lost")
def test_the_runs_of_a_fit_leave_nothing(threads: fm.Cluster) -> None:
    """A worker is lost, comes back, and leaves."""

    def changing() -> fm.TrainingResult:
        at = {
            20: lambda: threads.end_worker("worker:3"),
            40: lambda: threads.start_worker("worker:3"),
            120: lambda: threads.end_worker("worker:2", notice=True),
        }
        return fit(threads, dict[int, Any](at), policies=fm.policies.diloco(4))

    changing()
    with nothing_in_cycles():
        found = changing()
    assert (len(found.losses), len(found.changes)) == (1, 2)
