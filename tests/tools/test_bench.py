"""`flowml bench`: the arithmetic of its rows and tables, its peers, and one small real run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

import flowml as fm
from flowml_tools.bench import BENCHMARKS, foreign_environment, report
from flowml_tools.bench.peers import framework, peer
from flowml_tools.bench.pipeline import MICROBATCHES, bound
from flowml_tools.bench.rows import BenchError, Goal, Peer, Row, Sample
from flowml_tools.bench.table import render
from flowml_tools.bench.timing import interleave
from flowml_tools.bench.training import Losses
from flowml_tools.bench.transport import CARRIED, EDGE_BYTES, KEPT, edge
from tests.conftest import wait_until

CORES = sorted(os.sched_getaffinity(0))


def test_a_sample_has_a_median_and_an_interquartile_range() -> None:
    sample = Sample((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (sample.median, sample.quartiles, sample.spread) == (3.0, (2.0, 4.0), 2.0)
    assert Sample((7.0,)).spread == 0.0
    with pytest.raises(ValueError, match="at least one"):
        Sample(())


def row(ours: float, peer: float | None, goal: Goal | None) -> Row:
    sample = None if peer is None else Sample((peer,))
    return Row("a step", "s", Sample((ours,)), Peer("jax.jit", sample), goal)


@pytest.mark.parametrize(
    ("ours", "peer", "goal", "met"),
    [
        (1.02, 1.0, Goal("at most", 1.02), True),
        (1.03, 1.0, Goal("at most", 1.02), False),
        (6.0, 1.0, Goal("at least", 6.0), True),
        (5.9, 1.0, Goal("at least", 6.0), False),
        (3.0, 1.0, Goal("at most", 2.0, "difference"), True),
        (3.5, 1.0, Goal("at most", 2.0, "difference"), False),
        (3.0, None, Goal("at most", 2.0, "difference"), None),
        (3.0, None, Goal("at most", 1.0), None),
        (3.0, 1.0, None, None),
    ],
)
def test_a_goal_bounds_the_ratio_or_the_difference(
    ours: float, peer: float | None, goal: Goal | None, met: bool | None
) -> None:
    found = row(ours, peer, goal)
    assert found.met is met
    assert found.ratio == (None if peer is None else ours / peer)
    assert found.difference == (None if peer is None else ours - peer)


def test_a_table_says_what_is_met_missed_and_not_measured() -> None:
    rows = [
        row(13.5e-6, 7e-6, Goal("at most", 20e-6, "difference")),
        Row("edge", "bytes/s", Sample((1e9, 2e9, 3e9)), Peer("memcpy", Sample((8e9,))), Goal("at least", 0.7)),
        row(2.5e-3, None, Goal("at most", 1 / 3)),
        Row("held", "bytes", Sample((2**20 * 150.0,)), Peer("bare", Sample((2**20 * 200.0,)))),
    ]
    heading, _, *lines = render("example", rows).splitlines()
    assert heading == "example (median ± interquartile range)"
    assert [" ".join(line.split()) for line in lines] == [
        "a step 13.5 ± 0 µs jax.jit 7.00 ± 0 µs +6.50 µs ≤ +20.0 µs met",
        "edge 2.00 ± 1.0 GB/s memcpy 8.00 ± 0 GB/s 0.250× ≥ 0.700× MISSED",
        "a step 2.50 ± 0 ms jax.jit – – ≤ 0.333×",
        "held 150 ± 0 MiB bare 200 ± 0 MiB 0.750× –",
    ]


def test_the_report_has_every_measurement_and_the_machine() -> None:
    content = json.loads(report({"example": [row(3.0, 2.0, Goal("at most", 1.02)), row(3.0, None, None)]}))
    assert content["machine"]["usable cores"] == len(CORES)
    assert content["versions"]["flowml"] == fm.__version__
    first, second = content["benchmarks"]["example"]
    assert first["ours"] == {"median": 3.0, "quartiles": [3.0, 3.0], "samples": [3.0]}
    assert (first["ratio"], first["difference"], first["met"]) == (1.5, 1.0, False)
    assert first["goal"] == {"of": "ratio", "sense": "at most", "limit": 1.02}
    assert second["peer"] == {"name": "jax.jit", "measured": False}
    assert (second["ratio"], second["goal"], second["met"]) == (None, None, None)


def test_measurements_take_turns_after_a_warm_up() -> None:
    order: list[str] = []

    def probe(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave("example", [lambda: probe("ours"), lambda: probe("peer")], repeats=2, warm_up=1)
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert samples == [Sample((4.0, 5.0)), Sample((3.0, 6.0))]


def test_an_edge_is_what_a_crossing_step_takes_longer() -> None:
    assert edge(Sample((3.0, 5.0)), Sample((1.0, 1.0, 9.0))) == Sample((EDGE_BYTES / 2.0, EDGE_BYTES / 4.0))
    with pytest.raises(BenchError, match="noise"):
        edge(Sample((3.0, 1.0)), Sample((1.0,)))


def test_the_two_programs_of_an_edge_differ_in_the_edge(threads_cluster: fm.Cluster) -> None:
    from flowml_tools.bench.functions import carried, kept

    x, length = np.float32(2), 1000
    crossing = fm.dataflow(carried, cluster=threads_cluster, placement=CARRIED, static_argnums=1)
    staying = fm.dataflow(kept, cluster=threads_cluster, placement=KEPT, static_argnums=1)
    assert [t.nbytes for t in crossing.plan(x, length).transfers] == [4 * length]
    plan = staying.plan(x, length)
    assert [t.nbytes for t in plan.transfers] == [4]
    [worker] = [p for p in plan.partitions if p.device.startswith("worker:0")]
    assert len(worker.tasks) == 2  # as one task, XLA would not make the array
    assert float(crossing(x, length)) == float(staying(x, length)) == 2.0


def test_a_step_of_products_keeps_its_size() -> None:
    from flowml_tools.bench.functions import example, several_products

    result = np.asarray(jax.jit(several_products)(example(16)))
    assert np.array_equal(np.sort(result, axis=None), np.sort(example(16), axis=None))


def test_a_peer_that_ends_is_told_with_its_last_words(no_leaks) -> None:
    with no_leaks(), peer("tcp-source", "1", cores=CORES) as process:
        with pytest.raises(BenchError, match="tcp-source ended: ConnectionRefusedError"):
            process.read()
        with pytest.raises(BenchError, match="tcp-source ended"):
            process.ask("send")


def test_a_node_of_the_ring_hands_on_and_ends_with_its_link(no_leaks) -> None:
    (ours, theirs), (onwards, arrives) = socket.socketpair(), socket.socketpair()
    ends = (theirs.fileno(), onwards.fileno())
    with no_leaks(), ours, arrives, peer("ring", *map(str, ends), cores=CORES[:1], pass_fds=ends) as process:
        theirs.close()
        onwards.close()
        arrives.settimeout(30)
        ours.sendall(b"hello")
        assert arrives.recv(5, socket.MSG_WAITALL) == b"hello"
        ours.close()
        assert arrives.recv(1) == b""
        with pytest.raises(BenchError, match="ring ended: it said nothing"):
            process.read()


@pytest.fixture(autouse=True)
def peers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the peers' environment would be; what this machine may have of them is not for tests."""
    folder = tmp_path / "cache" / "peers"
    monkeypatch.setenv(foreign_environment.VARIABLE, str(folder))
    return folder


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is all that pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def empty_wheel(folder: Path, package: str, version: str) -> None:
    name = f"{package.replace('-', '_')}-{version}"
    info = f"{name}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_peers_environment_is_made_once_and_its_failures_are_told(flowml, wheels, peers_folder, no_leaks) -> None:
    for package, version in foreign_environment.VERSIONS.items():
        empty_wheel(wheels, package, version)
    first = flowml("bench", "--make-peers", check=True)
    assert first.stdout == f"ray, tensorflow-cpu: installed in {peers_folder}\n"
    assert "peers: Installing collected packages: " in first.stderr
    again = flowml("bench", "--make-peers", check=True)
    assert (again.stdout, again.stderr) == (first.stdout, "")
    with no_leaks(), ExitStack() as stack:
        process, why = framework(stack, "ray", "Ray", 4, [CORES[:1], CORES[-1:]])
    assert process is None
    assert why.startswith("ray: ray ended: ")  # for want of NumPy, or of namespaces


def test_without_the_peers_environment_their_rows_name_the_command() -> None:
    with ExitStack() as stack:
        found = framework(stack, "ray", "Ray", 4, [CORES[:1], CORES[-1:]])
    assert found == (None, "ray: not installed (flowml bench --make-peers)")


def test_a_peers_environment_that_cannot_be_installed_leaves_nothing(flowml, wheels, peers_folder) -> None:
    (peers_folder / "lib").mkdir(parents=True)
    (peers_folder / foreign_environment.STAMP).touch()  # what a kill leaves is begun anew
    assert not foreign_environment.complete()
    done = flowml("bench", "--make-peers")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "flowml: error: no environment for the peers, as pip failed: No matching distribution found for ray==2.60.0; "
        "see to that and run `flowml bench --make-peers` again"
    )
    assert not peers_folder.exists()


def test_ctrl_c_leaves_no_half_made_peers_environment(start_flowml, wheels, peers_folder) -> None:
    process = start_flowml("bench", "--make-peers")
    wait_until((peers_folder / "bin").exists, "the environment is begun", 60)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert not peers_folder.exists()
    wait_until(lambda: not any(p.is_running() for p in started), "what the command started is gone")


def test_the_peers_environment_takes_no_folder_from_others(flowml, peers_folder) -> None:
    peers_folder.mkdir(parents=True)
    (peers_folder / "thesis.txt").write_text("all there is of it")
    done = flowml("bench", "--make-peers")
    assert done.returncode == 2
    assert done.stderr.endswith("holds something else; $FLOWML_PEERS names another folder for the peers\n")
    assert (peers_folder / "thesis.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_framework_that_stands_still_ends_with_the_one_who_measures(peers_folder, number: int) -> None:
    """What stands in for a framework is a shell that answers; it is sealed off, stopped and left behind as Ray is."""
    (peers_folder / "bin").mkdir(parents=True)
    program = peers_folder / "bin" / "python"
    program.write_text("#!/bin/sh\nsleep 1000 & echo ready; while read order; do echo 1; done\n")
    program.chmod(0o755)
    (peers_folder / foreign_environment.STAMP).write_text(
        "".join(f"{package}=={version}\n" for package, version in foreign_environment.VERSIONS.items())
    )
    code = """
import time
from flowml_tools.bench.peers import foreign
with foreign("ray", "4", "0", "0", cores=[0]):
    print("stands still", flush=True)
    while True:
        time.sleep(0.1)  # not for ever: a signal that comes just before would not end it
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout is not None
        assert it.stderr is not None
        if it.stdout.readline() != "stands still\n":
            said = it.stderr.read()
            assert "unshare: " in said, said
            pytest.skip("this system does not let its user make namespaces")
        started = psutil.Process(it.pid).children(recursive=True)
        wait_until(lambda: [p for p in started if p.status() == psutil.STATUS_STOPPED], "it stands still")
        it.send_signal(number)
    wait_until(lambda: not [p for p in started if p.is_running()], "nothing is left")


def test_ways_that_compute_something_else_are_not_compared() -> None:
    losses = Losses()
    losses.check("flowml", 2.5)
    losses.check("jax.jit", 2.5001)
    with pytest.raises(BenchError, match=r"flowml has loss 2\.500000, but JAX \+ gloo 2\.600000"):
        losses.check("JAX + gloo", 2.6)


def test_the_bound_of_a_pipeline_is_that_of_its_longest_stage() -> None:
    assert MICROBATCHES == 8
    assert bound([(8.0, 0.5)]) == 8.5  # one stage is never idle
    assert bound([(8.0, 0.5), (4.0, 1.0)]) == 10.0


def test_the_model_trains_alike_on_replicas_and_by_jit(threads_cluster: fm.Cluster) -> None:
    from flowml_tools.bench import transformer

    params, batch = transformer.init_params(blocks=2), transformer.batch(0)[:2]
    trainer = fm.Trainer(transformer.loss, transformer.optimizer(), cluster=threads_cluster, replicas=2)
    result = trainer.fit(params, batch, batch_size=2, steps=2, shuffle=False)
    step, state = jax.jit(transformer.step), transformer.optimizer().init(params)
    for record in result.history:
        params, state, expected = step(params, state, batch)
        assert record["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_stage_alone_runs_the_tasks_of_its_plan(tmp_path: Path, threads_cluster: fm.Cluster, no_leaks) -> None:
    from flowml_tools.bench import transformer

    trainer = fm.Trainer(
        transformer.loss,
        transformer.optimizer(),
        cluster=threads_cluster,
        placement=fm.Pipeline(stages=2),
        microbatches=2,
    )
    trainer.plan(transformer.init_params(blocks=2), transformer.batch(0)[:4]).save(tmp_path / "plan")
    with no_leaks(), peer("stage", str(tmp_path / "plan"), "1", cores=CORES[:1]) as process:
        assert process.read() == "ready"
        work, update = map(float, process.ask("step").split())
    assert work > 0
    assert update > 0


def test_an_unknown_name_is_one_line_with_those_that_exist(flowml) -> None:
    done = flowml("bench", "dispatch", "speed")
    assert done.returncode == 2
    assert done.stderr == f"flowml: error: there is no benchmark 'speed'; there are {', '.join(BENCHMARKS)}\n"


def test_a_small_run_of_dispatch(flowml, tmp_path: Path, no_leaks) -> None:
    with no_leaks():
        done = flowml("bench", "dispatch", "--repeats", "3", "--json", "out.json", check=True)
    assert done.stdout.startswith("dispatch (median ± interquartile range)\n")
    assert "jax.jit" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["benchmarks"]["dispatch"]
    assert len(rows) == len(done.stdout.splitlines()) - 2
    for found in rows:
        assert len(found["ours"]["samples"]) == 3
        assert found["peer"]["measured"] == (found["ratio"] is not None)
    assert [r["peer"]["name"] for r in rows[:3]] == ["jax.jit", "jax.jit", "ring of unix sockets"]


def test_ctrl_c_ends_workers_and_peers(start_flowml) -> None:
    process = start_flowml("bench", "transport", "--repeats", "100000")
    assert any(line.startswith("transport: 64 MiB") for line in process.stderr)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 5  # the zygote and its two workers, both ends of the TCP stream
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    wait_until(lambda: not any(p.is_running() for p in started), "what the command started is gone")
