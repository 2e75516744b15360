"""Clusters of processes start in time or say why not, and close promptly in whatever state their workers are."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

import flowml as fm
from flowml.errors import ClusterError
from flowml_runtime.launch.capacity import DESCRIPTORS, OWN_DESCRIPTORS, Room, check_room, room
from tests.stalls import stop

PLENTY = Room(cores=64, memory_bytes=2**40, descriptors=None, threads=None)


def test_closing_does_not_wait_for_a_worker_that_is_stopped() -> None:
    cluster = fm.Cluster.local(workers=2)
    fm.dataflow(lambda x: x + 1, cluster=cluster, placement={"*": "worker:1"})(np.ones(3, np.float32))
    pids = list(cluster.pids.values())
    stop(cluster.pids["worker:1"])
    began = time.monotonic()
    cluster.close()
    assert time.monotonic() - began < 4.0  # not the time that a worker has to end by itself
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_start_that_takes_too_long_ends_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"start_timeout_s="):
        fm.Cluster.local(workers=64, start_timeout_s=1.3)
    assert time.monotonic() - began < 8.0


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (Room(64, 2**30, None, None), "1000 workers need at least 11.7 GiB of memory, and there is 1.0 GiB free; "),
        (Room(64, 2**40, 1000, None), "1000 workers need at least 2024 open files, and there are 1000 left; "),
        (Room(64, 2**40, None, 4096), "1000 workers need at least 20000 threads, and there may be 4096; "),
        (Room(2, 2**40, None, None), "1000 workers need at least 20 s to start, and there are 10 s on 2 cores; "),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers_and_what_would(there: Room, said: str) -> None:
    with pytest.raises(ClusterError) as caught:
        check_room(1000, 10.0, there)
    text = str(caught.value)
    assert text.startswith(said)
    fits = int(text.removeprefix(said + "start at most ").split(",")[0])
    check_room(fits, 10.0, there)
    with pytest.raises(ClusterError):
        check_room(fits + 1, 10.0, there)


def test_a_machine_with_nothing_left_is_not_told_to_start_fewer() -> None:
    with pytest.raises(ClusterError, match="start them on another machine"):
        check_room(1, 10.0, Room(1, 2**20, None, None))


def test_the_figures_of_this_machine_are_those_of_a_worker() -> None:
    before = room()
    assert before.memory_bytes > 2**28
    with fm.Cluster.local(workers=4):
        after = room()
    assert before.descriptors is not None
    assert after.descriptors is not None
    assert before.descriptors - after.descriptors >= 4 * DESCRIPTORS
    assert before.descriptors - after.descriptors <= 4 * DESCRIPTORS + OWN_DESCRIPTORS
    check_room(1000, 120.0, PLENTY)


def test_a_cluster_of_too_many_workers_is_refused_before_anything_starts() -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"100000 workers need at least"):
        fm.Cluster.local(workers=100_000)
    assert time.monotonic() - began < 2.0
