"""Traces: what every device did when, on one time axis; sends that go on while their device computes."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.tracing import Answer, offset
from flowml_runtime.execution.recorder import Recorder, clock_id, decode
from tests.training.reference import BATCH, data, mlp, mlp_loss

LENGTH = 2**23
"""32 MiB of float32: the copy takes a few milliseconds."""


def spans(path: Path) -> list[dict[str, Any]]:
    """The events that last, with the name of their lane."""
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [{**e, "lane": lanes[e["pid"], e["tid"]]} for e in events if e["ph"] in "Xi"]


def overlap(a: dict[str, Any], b: dict[str, Any]) -> float:
    """For how many microseconds two spans go on at once."""
    return max(0.0, min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"]))


def busy(x: Any) -> jax.Array:
    with fm.layer("work"):
        for _ in range(60):
            x = jnp.tanh(x @ x)
        return x


def send_then_compute(x: Any) -> tuple[jax.Array, jax.Array]:
    """`make` leaves for the other device; `work`, which waits for an answer from there, computes on meanwhile."""
    with fm.layer("make"):
        y = jnp.arange(LENGTH, dtype=jnp.float32) + x[0, 0]
    with fm.layer("ask"):
        z = x * 2
    with fm.layer("take"):
        return y[:4] * 3, busy(z)


PLACES = {"make": "worker:0", "ask": "worker:1", "work": "worker:0", "take": "worker:1"}


@pytest.fixture(params=["process_cluster", "grpc_cluster"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue(request.param)


def test_a_large_send_goes_on_while_its_device_computes(cluster: fm.Cluster, tmp_path: Path) -> None:
    program = fm.dataflow(send_then_compute, cluster=cluster, placement=PLACES)
    x = np.full((256, 256), 0.01, np.float32)
    expected = program(x)
    with cluster.trace(tmp_path / "t.json"):
        results = [program(x) for _ in range(8)]
    for a, b in zip(results[-1], expected, strict=True):
        np.testing.assert_array_equal(a, b)
    found = spans(tmp_path / "t.json")
    sends = [s for s in found if s["lane"] == "worker:0/cpu:0 send"]
    runs = [s for s in found if s["lane"] == "worker:0/cpu:0" and s["cat"] in ("run", "receive", "fetch")]
    assert len(sends) == 8
    way = "shared memory" if cluster.links.between("worker:0", "worker:1").way != "gRPC" else "gRPC"
    assert {s["args"]["way"] for s in sends} == {way}
    assert {s["args"]["bytes"] for s in sends} == {LENGTH * 4}
    assert any(overlap(s, r) > 0 for s in sends for r in runs), "one that the device waits for overlaps with nothing"


def test_a_trace_holds_every_instruction_of_every_device_and_step_in_order(
    process_cluster: fm.Cluster, tmp_path: Path
) -> None:
    def fn(x: Any) -> jax.Array:
        with fm.layer("a"):
            y = x + 1
        with fm.layer("b"):
            return y * 2

    program = fm.dataflow(fn, cluster=process_cluster, placement={"a": "worker:0", "b": "worker:1"})
    program(np.ones(4, np.float32))
    with process_cluster.trace(tmp_path / "t.json"):
        for _ in range(3):
            program(np.ones(4, np.float32))
    program(np.ones(4, np.float32))
    found = spans(tmp_path / "t.json")
    first = [s for s in found if s["lane"] == "worker:0/cpu:0"]
    second = [s for s in found if s["lane"] == "worker:1/cpu:0"]
    assert [s["cat"] for s in first] == ["feed", "run", "send"] * 3
    assert [s["cat"] for s in second] == ["feed", "receive", "run", "fetch"] * 3
    assert {s["args"]["way"] for s in first if s["cat"] == "send"} == {"shared memory"}
    assert [s["args"]["step"] for s in first] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    for sent, received in zip(first[2::3], second[1::4], strict=True):
        assert received["ts"] + received["dur"] >= sent["ts"], "one time axis"
    for own in (first, second):
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(own))


def test_values_arrive_before_they_are_asked_for(process_cluster: fm.Cluster, tmp_path: Path) -> None:
    """A pipeline's microbatches are pushed: most wait for their Recv, and not the other way round."""
    trainer = fm.Trainer(
        mlp_loss, optax.sgd(0.1), cluster=process_cluster, placement=fm.Pipeline(2), microbatches=8, schedule="gpipe"
    )
    trainer.fit(mlp(), data(), batch_size=BATCH, steps=2)
    with process_cluster.trace(tmp_path / "t.json"):
        trainer.fit(mlp(), data(), batch_size=BATCH, steps=4)
    found = spans(tmp_path / "t.json")
    assert {"run", "send", "receive", "read", "push", "apply", "arrived"} <= {s["cat"] for s in found}
    received = [s for s in found if s["cat"] == "receive"]
    assert len(received) == len([s for s in found if s["cat"] == "arrived"])


def test_a_trace_of_threads_and_of_a_failing_block(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    program = fm.dataflow(lambda x: x + 1, cluster=threads_cluster)
    program(1.0)
    with pytest.raises(ZeroDivisionError), threads_cluster.trace(tmp_path / "t.json"):
        program.submit(1.0).result()
        _ = 1 / 0
    assert [s["cat"] for s in spans(tmp_path / "t.json")] == ["feed", "run", "fetch"]


def test_a_trace_holds_calls_that_were_made_without_the_executor(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """A call of one task of this process goes the short way, and goes the long one while it is recorded."""
    program = fm.dataflow(lambda x: x * 3, cluster=threads_cluster)
    x = jnp.float32(1)
    for _ in range(3):
        program(x)
    with threads_cluster.trace(tmp_path / "t.json"):
        for _ in range(3):
            program(x)
    assert [s["cat"] for s in spans(tmp_path / "t.json")] == ["feed", "run", "fetch"] * 3


def test_what_is_under_way_when_recording_stops_ends_there() -> None:
    """A caller has its result before the worker's thread is back from sending it."""
    recorder = Recorder()
    recorder.start()
    with pytest.raises(ZeroDivisionError), recorder.record("lane", "run", "fails", 0):
        _ = 1 / 0
    with recorder.record("lane", "run", "before", 1):
        pass
    with recorder.record("lane", "fetch", "sends", 1):
        found = decode(recorder.stop())
    assert [(s.name, s.ended_ns > s.began_ns) for s in found] == [("before", True), ("sends", True)]
    recorder.start()
    assert decode(recorder.stop()) == []


def test_another_machines_clock_is_set_by_the_middle_of_the_round_trip() -> None:
    there = Answer("another", now_ns=5_000, received_ns=1_400, spans=())
    assert offset(1_000, there) == 1_200 - 5_000
    assert offset(1_000, dataclasses.replace(there, clock="")) == 1_200 - 5_000, "not known to be ours"
    assert offset(1_000, dataclasses.replace(there, clock=clock_id())) == 0
