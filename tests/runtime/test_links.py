"""Links are measured over the endpoints in use, shared by the pairs that are alike, and remembered."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import pytest

import flowml as fm
from flowml.errors import ClusterError, DeadlineError, FlowmlError, WorkerLostError
from flowml.placement.links import ASSUMED, GRPC, SAME_PROCESS, SHARED_MEMORY, Link
from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.links import cache as remembered
from flowml_runtime.links.cache import FRESH_S, MAX_FIGURES, RememberedLinks, links_file
from flowml_runtime.links.prober import LEAST_BYTES, ROUND_TRIPS, Prober
from flowml_runtime.transport.endpoint import ThreadHub
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.conftest import wait_until
from tests.stalls import stop

TOKEN = "a token for tests"
WAYS = (SAME_PROCESS, SHARED_MEMORY, GRPC)
FOUND = Link(1e-4, 5e9, SHARED_MEMORY, measured=True)

Probers = Callable[..., list[Prober]]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def probers(way: str) -> Iterator[Probers]:
    """Makes probers whose peers know each other; those that are `deaf` take in nothing."""
    with ExitStack() as stack:

        def make(*names: str, deaf: str = "") -> list[Prober]:
            hub = ThreadHub()
            threads, shared = way == SAME_PROCESS, way == SHARED_MEMORY
            ends: list[Any] = [
                hub.endpoint(n) if threads else GrpcEndpoint(n, TOKEN, shared_memory=shared) for n in names
            ]
            made = [Prober(end) for end in ends]
            for end, prober in zip(ends, made, strict=True):
                stack.callback(end.close)
                stack.callback(prober.close)
                end.start(hears(prober) if end.name != deaf else lambda *_: None, lambda *_: None)
                end.know({other.name: other.address for other in ends if other is not end})
            return made

        yield make


def hears(prober: Prober) -> Callable[[str, Any, list[Any]], None]:
    return lambda peer, message, arrays: prober.on_message(peer, message)


def test_a_link_is_measured_by_the_way_that_it_is(probers: Probers, way: str, no_leaks: Any) -> None:
    a, _ = probers("a", "b")
    began = time.monotonic()
    link = a.measure("b")
    took_s = time.monotonic() - began
    assert (link.way, link.measured) == (way, True)
    assert 1e-7 < link.latency_s <= took_s / ROUND_TRIPS, "half of the round trips took twice as long or longer"
    assert link.bytes_per_s >= LEAST_BYTES / took_s


def test_a_peer_measures_a_link_of_its_own_when_asked(probers: Probers, way: str) -> None:
    a, _, _ = probers("a", "b", "c")
    assert a.ask("b", "c").way == way
    assert a.ask("b", "a").way == way  # the other end is the one that waits for the answer
    with pytest.raises(FlowmlError, match="b could not measure its link to nobody: cannot send to nobody"):
        a.ask("b", "nobody")
    with pytest.raises(WorkerLostError):
        a.measure("nobody")


def test_two_peers_may_measure_each_other_at_once(probers: Probers) -> None:
    a, b = probers("a", "b")
    found: list[Link] = []
    threads = [threading.Thread(target=lambda p=p, n=n: found.append(p.measure(n))) for p, n in ((a, "b"), (b, "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2


def test_one_link_at_a_time_and_closing_ends_the_wait() -> None:
    hub = ThreadHub()
    ends = [hub.endpoint(n) for n in "abc"]
    a, b = Prober(ends[0]), Prober(ends[1])
    ends[0].start(hears(a), lambda *_: None)
    ends[1].start(hears(b), lambda *_: None)
    arrived = threading.Event()
    ends[2].start(lambda *_: arrived.set(), lambda *_: None)  # never answers
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            a.ask("b", "c")
        except FlowmlError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    arrived.wait(10)
    with pytest.raises(FlowmlError, match="b could not measure its link to a: it measures another link at the moment"):
        a.ask("b", "a")
    b.close()
    a.close()
    thread.join()
    assert isinstance(failed[0], FlowmlError)
    with pytest.raises(DeadlineError):
        a.measure("b")
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    "probe",
    [
        wire.Probe(number=1, specs=(ArraySpec((wire.MAX_PROBE_BYTES + 1,), "uint8"),)),
        wire.Probe(number=1, peer="b", nbytes=2**40),
    ],
)
def test_a_probe_of_more_than_it_may_be_is_refused_before_its_payload(probe: wire.Probe) -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode(wire.encode(probe))


def test_what_was_measured_is_remembered_for_a_week(tmp_path: Path) -> None:
    path, clock = tmp_path / "flowml" / "links.json", [1000.0]
    kept = RememberedLinks(path, lambda: clock[0])
    assert kept.find("h", "h", SHARED_MEMORY) is None
    kept.remember("h", "h", FOUND)
    assert (path.stat().st_mode & 0o777, [p.name for p in path.parent.iterdir()]) == (0o600, ["links.json"])
    assert RememberedLinks(path, lambda: 1000 + FRESH_S - 1).find("h", "h", SHARED_MEMORY) == FOUND
    assert kept.find("h", "other", SHARED_MEMORY) is kept.find("h", "h", GRPC) is None
    for now_s in (1000 + FRESH_S, 999.0):  # stale, or the clock was set back
        clock[0] = now_s
        assert kept.find("h", "h", SHARED_MEMORY) is None


def test_what_another_machine_measured_is_not_this_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "links.json"
    RememberedLinks(path).remember("h", "h", FOUND)
    monkeypatch.setattr(remembered, "machine_id", lambda: "another, 8 x processor")
    other = RememberedLinks(path)
    assert other.find("h", "h", SHARED_MEMORY) is None
    other.remember("h", "h", FOUND)
    monkeypatch.undo()
    assert RememberedLinks(path).find("h", "h", SHARED_MEMORY) == FOUND  # both are there


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"not json",
        b'{"format": 2, "links": []}',
        b'{"format": 1, "links": [{"machine": 1}]}',
        b'{"format": 1, "links": [' + b" " * 2**21 + b"]}",
    ],
)
def test_a_damaged_file_counts_as_empty_and_is_replaced(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_bytes(damage)
    kept = RememberedLinks(path)
    assert kept.find("h", "h", SHARED_MEMORY) is None
    kept.remember("h", "h", FOUND)
    assert kept.find("h", "h", SHARED_MEMORY) == FOUND


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "flowml").write_text("a file where the folder should be")
    kept = RememberedLinks(tmp_path / "flowml" / "links.json")
    kept.remember("h", "h", FOUND)
    assert kept.find("h", "h", SHARED_MEMORY) is None


def test_of_too_many_the_oldest_are_forgotten(tmp_path: Path) -> None:
    path, clock = tmp_path / "links.json", [0.0]
    kept = RememberedLinks(path, lambda: clock[0])
    for i in range(MAX_FIGURES + 2):
        clock[0] = float(i)
        kept.remember(f"host {i}", "h", FOUND)
    assert len(json.loads(path.read_text())["links"]) == MAX_FIGURES
    assert kept.find("host 1", "h", SHARED_MEMORY) is None
    assert kept.find("host 2", "h", SHARED_MEMORY) == FOUND


def net(x: jax.Array) -> jax.Array:
    with fm.layer("a"):
        h = jnp.sin(x)
    with fm.layer("b"):
        return jnp.cos(h)


APART = {"a": "worker:0", "b": "worker:1"}
X = jnp.ones(3)


def crossing(cluster: fm.Cluster) -> Any:
    (link,) = fm.dataflow(net, cluster=cluster, placement=APART).plan(X).links
    return link


def test_a_cluster_measures_before_the_first_automatic_placement_and_the_next_one_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with no_leaks(), fm.Cluster.local(workers=2) as cluster:
        assumed = crossing(cluster)
        assert (assumed.way, assumed.measured) == (SHARED_MEMORY, False)
        assert assumed.latency_s == ASSUMED[SHARED_MEMORY].latency_s
        assert not links_file().exists()
        fm.dataflow(net).plan(X)
        first = cluster.links
        measured = crossing_of_another_shape(cluster)
        assert (measured.way, measured.measured) == (SHARED_MEMORY, True)
        assert first.between("worker:0", "driver").measured
        assert first.between("worker:0/cpu:0", "worker:0/cpu:1") == ASSUMED[SAME_PROCESS]
    kept = links_file().read_bytes()
    with fm.Cluster.local(workers=2, transport="grpc") as cluster:  # nothing is remembered of this way yet
        assert crossing(cluster).way == GRPC
        assert cluster.measure_links().between("worker:1", "worker:0").way == GRPC
    assert links_file().read_bytes() != kept
    with fm.Cluster.local(workers=2, links="remembered") as cluster:
        fm.dataflow(net).plan(X)
        assert cluster.links == first  # a second measurement would not give the same to the last bit
        os.kill(cluster.pids["worker:1"], 9)
        wait_until(lambda: len(cluster.devices) == 1, "the loss of worker:1 is known")
        assert cluster.measure_links().between("worker:0", "driver").measured


def crossing_of_another_shape(cluster: fm.Cluster) -> Any:
    (link,) = fm.dataflow(net, cluster=cluster, placement=APART).plan(jnp.ones(4)).links
    return link


def test_threads_hand_over_references_and_measure_nothing(threads_cluster: fm.Cluster) -> None:
    assert threads_cluster.measure_links() == threads_cluster.links
    link = crossing(threads_cluster)
    assert (link.way, link.bytes_per_s, link.measured) == (SAME_PROCESS, float("inf"), False)


def test_a_plan_says_by_which_way_its_edges_go(process_cluster: fm.Cluster, grpc_cluster: fm.Cluster) -> None:
    assert crossing(process_cluster).way == SHARED_MEMORY
    assert crossing(grpc_cluster).way == GRPC
    f = fm.dataflow(net, cluster=grpc_cluster, placement=APART)
    assert "gRPC" in f.plan(X).explain()
    assert jnp.allclose(f(X), net(X))


def test_links_and_transport_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match="links='never' is not a mode; use 'measure', 'remembered', 'assume'"):
        fm.Cluster.local(links="never")
    monkeypatch.setenv("FLOWML_LINKS", "no")
    with pytest.raises(ClusterError, match="FLOWML_LINKS='no' is not a mode"):
        fm.Cluster.connect("127.0.0.1:1", token=TOKEN)
    monkeypatch.delenv("FLOWML_LINKS")
    with pytest.raises(ClusterError, match="transport='udp' is unknown; give 'auto' or 'grpc'"):
        fm.Cluster.local(transport="udp")


@pytest.mark.parametrize("measure", [lambda c: c.measure_links(), lambda c: c.trace("unused.json").__enter__()])
def test_without_workers_it_is_said_why_nothing_can_be_measured(measure: Any) -> None:
    with fm.Cluster.local(workers=1) as cluster:
        os.kill(cluster.pids["worker:0"], 9)
        wait_until(lambda: cluster.devices == (), "the loss of worker:0 is known")
        with pytest.raises(
            fm.WorkerLostError, match=r"^worker:0 was lost \(.*, so no .* can be .*; start it again with cluster"
        ):
            measure(cluster)
    with pytest.raises(ClusterError, match="the cluster is closed; start another"):
        measure(cluster)


def test_measuring_a_stopped_worker_ends_and_names_it() -> None:
    """The reason depends on which of the two is asked: it waits for an answer, or is lost itself."""
    with fm.Cluster.local(workers=2) as cluster:
        cluster.measure_links()
        stop(cluster.pids["worker:1"])
        with pytest.warns(
            fm.FlowmlWarning, match=r"some links were not measured .*worker:1 (was lost: no heartbeat|did not answer)"
        ):
            cluster.measure_links()
