"""Workers of one machine share what they compile: each program is compiled once, and loaded by the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import flowml as fm
from flowml.plan import Plan
from flowml_runtime.execution.programs import ExecutableCache, load_programs
from flowml_runtime.execution.turns import Turns

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@contextmanager
def cached_in(folder: Path | None) -> Iterator[None]:
    """This process uses the compilation cache in a folder, or none."""
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore

    def use(place: object) -> None:
        jax.config.update("jax_compilation_cache_dir", place)
        compilation_cache.reset_cache()

    use(None if folder is None else str(folder))
    try:
        yield
    finally:
        use(before)


def several_programs() -> Plan:
    """One device with four different tasks."""

    def function(x: jax.Array) -> jax.Array:
        for i in range(4):
            with fm.layer(f"l{i}"), fm.device(f"worker:{i % 2}"):
                x = jnp.sin(x) * (i + 2)
        return x

    return fm.compile(function, jax.ShapeDtypeStruct((5,), "float32"), devices=["worker:0", "worker:1"])


def test_two_workers_compile_each_program_once(tmp_path: Path) -> None:
    plan, events = several_programs(), list[str]()
    devices = {"worker:0/cpu:0": jax.local_devices()[0], "worker:1/cpu:0": jax.local_devices()[0]}

    def listen(event: str, **_: object) -> None:
        if event in (HIT, MISS):
            events.append(event)

    def load() -> None:
        load_programs(plan, devices, ExecutableCache(Turns(tmp_path)), python=False)

    with cached_in(tmp_path):
        jax.monitoring.register_event_listener(listen)
        try:
            workers = [threading.Thread(target=load) for _ in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            jax.monitoring.unregister_event_listener(listen)
    assert events.count(MISS) == events.count(HIT) == len(plan.executables) == 4


def test_a_worker_makes_what_is_free_while_another_has_a_turn(tmp_path: Path) -> None:
    order, begun, go_on = list[str](), threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(60)
        order.append("first made a")
        return "a"

    first = threading.Thread(target=Turns(tmp_path).make_all, args=({"a": slow}, str))
    first.start()
    assert begun.wait(60)

    def free() -> str:
        order.append("second made b")
        go_on.set()
        return "b"

    makes = {"a": lambda: (order.append("second got a"), "a")[1], "b": free}
    assert Turns(tmp_path).make_all(makes, str) == {"a": "a", "b": "b"}
    first.join()
    assert order == ["second made b", "first made a", "second got a"]


def test_a_folder_keeps_the_newest_up_to_its_bound(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}-cache").write_bytes(b"x" * 10)
        os.utime(tmp_path / f"{number}-cache", (number, number))
    Turns(tmp_path, most_bytes=25).make_all({"a": lambda: "a"}, str)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2-cache", "3-cache", "a.turn"]


@pytest.mark.parametrize("configured", [False, True])
def test_workers_use_the_cache_of_the_user_or_one_of_their_own(tmp_path: Path, configured: bool) -> None:
    users = tmp_path / "users"
    with cached_in(users if configured else None), fm.Cluster.local(workers=1) as cluster:
        assert fm.dataflow(lambda x: x + 1, cluster=cluster)(np.float32(1)) == 2
        (folder,) = shared_folders(cluster)
        own = [p for p in folder.iterdir() if p.name.endswith("-cache")]
        assert bool(own) is not configured
        assert folder.stat().st_mode & 0o777 & folder.parent.stat().st_mode == 0o700
    assert not folder.exists()
    assert users.exists() is configured


def shared_folders(cluster: fm.Cluster) -> set[Path]:
    """The folders with turns that the workers of a cluster share."""
    logs = {Path(f"/proc/{pid}/fd/2").resolve().parent for pid in cluster.pids.values()}
    return {log / "compiled" for log in logs}


def test_a_cache_that_is_set_after_the_start_is_told(process_cluster: fm.Cluster, tmp_path: Path) -> None:
    def program() -> jax.Array:
        return fm.dataflow(lambda x: x + 1, cluster=process_cluster)(jnp.ones(3))

    with cached_in(tmp_path), pytest.warns(fm.FlowmlWarning, match="which they keep; set it before the cluster starts"):
        program()
    with cached_in(tmp_path):
        program()  # it is told once, and warnings are errors
