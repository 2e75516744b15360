"""A consumer that stops makes its producer stop, and so its caller: nothing piles up, and nothing is stuck for it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.errors import DeadlineError
from flowml.instructions import Feed, Fetch, Free, Recv, Run, Send
from flowml.plan import ArraySpec, Message, Plan, Transfer
from flowml_runtime import wire
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.execution import window as windows
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.window import IN_FLIGHT, WINDOW_BYTES, Windows, window
from tests.conftest import wait_until
from tests.network import DirectEndpoint, Network
from tests.plans import W0, W1, Gate, PlanBuilder, fetched, through_gate

SCALAR = ArraySpec((), "float32")
LARGE = ArraySpec((WINDOW_BYTES // 3 // 4,), "float32")
"""Three of them fit into a window."""

PIECE = 16 * 2**20
SOAK_S = float(os.environ.get("FLOWML_SOAK_S", "0"))
"""How long the test of memory goes on at least, e.g. FLOWML_SOAK_S=600 with PYTEST_ARGS="-k credits --timeout=900"."""


def edge(nbytes: int) -> Message:
    return Message(W0, W1, (Transfer(W0, W1, (nbytes // 4,), "float32", nbytes),))


def held_up(name: str) -> Plan:
    """x -> a large array of x on worker 0; on worker 1, once the gate is open, its first element."""
    build = PlanBuilder("held_up")
    spread = build.xla("spread", lambda x: (x + np.zeros(LARGE.shape, np.float32),), [SCALAR], [LARGE])

    def first(x: Any) -> list[Any]:
        return [through_gate(name, x)[0]]

    wait = build.python("wait", first, [LARGE], [SCALAR])
    message = build.message(W0, W1, LARGE)
    build.program(W0, Feed((0,), (0,)), Run(spread, (0,), (1,)), Send(message, (1,)), Free((0, 1)))
    build.program(W1, Recv(message, (0,)), Run(wait, (0,), (1,)), Fetch((0,), (1,)), Free((0, 1)))
    return build.build([SCALAR], [fetched(SCALAR)])


def sent_edges(network: Network) -> list[int]:
    endpoint = network.workers[0].endpoint
    assert isinstance(endpoint, DirectEndpoint)
    return [m.step for _, m in endpoint.sent if isinstance(m, wire.Value) and m.kind == "edge"]


def producer(network: Network, handle: LoadedPlan) -> Windows:
    return network.workers[0]._plans[handle.plan_id].windows[W0]  # pyright: ignore[reportPrivateUsage]


def test_small_values_need_no_window_and_large_ones_at_least_one_step() -> None:
    assert window(edge(4)) == 0
    assert window(edge(WINDOW_BYTES // IN_FLIGHT)) == 0
    assert window(edge(WINDOW_BYTES // 3)) == 3
    assert window(edge(WINDOW_BYTES * 10)) == 1


@contextmanager
def stuck(name: str, steps: int) -> Generator[tuple[Network, Gate, LoadedPlan, list[Future[list[Any]]]]]:
    """So many steps under way: the consumer has taken the first and is stuck with it, the producer waits for room."""
    gate = Gate(name)
    with Network() as network:
        handle = network.session.load(held_up(name))
        futures = [network.session.submit(handle, [np.float32(n)]) for n in range(steps)]
        assert gate.entered.acquire(timeout=30)
        wait_until(lambda: producer(network, handle).waiting, "the producer waits for room")
        yield network, gate, handle, futures


def test_a_producer_stops_where_its_consumer_does_and_goes_on_with_it() -> None:
    with stuck("slow consumer", 8) as (network, gate, _, futures):
        assert sent_edges(network) == [0, 1, 2, 3]
        gate.opened.set()
        assert [float(f.result(timeout=30)[0]) for f in futures] == list(range(8))
        assert network.held_values() == 0


def test_a_step_that_is_given_up_gives_its_room_back() -> None:
    with stuck("given up", 6) as (network, gate, handle, futures):
        for step in (4, 2):  # one whose sender waits, one that was sent
            over = wire.StepFailed(
                plan_id=handle.plan_id, step=step, worker="driver", node="", kind="cancelled", error=""
            )
            for worker in network.workers:
                worker.on_message("driver", over, [])
        wait_until(lambda: 5 in sent_edges(network), "the last step is sent")
        assert sent_edges(network) == [0, 1, 2, 3, 5]
        gate.opened.set()
        for n in (0, 1, 3, 5):
            assert float(futures[n].result(timeout=30)[0]) == n
        network.session.close()


def test_a_consumer_that_never_goes_on_is_named_at_the_deadline() -> None:
    gate = Gate("for ever")
    with Network() as network:
        handle = network.load(held_up("for ever"), deadline_s=1.0)
        futures = [network.session.submit(handle, [np.float32(n)]) for n in range(6)]
        assert gate.entered.acquire(timeout=30)
        with pytest.raises(DeadlineError, match=r"worker:1/cpu:0 to take earlier values of worker:0/cpu:0 -> worker:1"):
            futures[4].result(timeout=30)
        gate.opened.set()
        assert float(futures[0].result(timeout=30)[0]) == 0


def test_closing_wakes_a_producer_that_waits() -> None:
    with stuck("closed", 6) as (network, gate, handle, futures):
        network.session.unload(handle)
        assert futures[5].exception(timeout=30) is not None
        gate.opened.set()


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 3))
def test_no_more_than_the_window_is_ever_untaken(order: list[int], room: int) -> None:
    """Whatever is taken or given up in whatever order, a sender enters exactly when there is room."""
    message = edge(WINDOW_BYTES // room)
    table = Windows([message])
    inside: set[int] = set()
    step = 10
    for chosen in order:
        claim = table.enter(0, step)
        if len(inside) < room:
            assert claim is None
            inside.add(step)
        else:
            assert claim is not None
            assert not claim.done
        if inside and chosen % 3:
            gone = sorted(inside)[chosen % len(inside)]
            (table.leave if chosen % 2 else table.cancel)(*((0, gone) if chosen % 2 else (gone,)))
            inside.discard(gone)
            assert claim is None or claim.done
        step += 1


def test_memory_stays_within_the_credits_when_the_consumer_is_slow() -> None:
    """A producer many times faster than its consumer, in real processes: neither of them grows with the steps."""
    import jax
    import jax.numpy as jnp

    length = PIECE // 4

    def fn(x: jax.Array) -> jax.Array:
        with fm.layer("make"):
            y = x + jnp.zeros(length)
        with fm.layer("slow"):
            for _ in range(12):
                y = jnp.cos(y)
            return y[0] + 0 * y.sum()

    def small(x: jax.Array) -> jax.Array:
        with fm.layer("make"):
            y = x + jnp.zeros(8)
        with fm.layer("slow"):
            return jnp.cos(y).sum()

    placement = {"make": "worker:0", "slow": "worker:1"}
    with fm.Cluster.local(workers=2) as cluster:
        fm.dataflow(small, cluster=cluster, placement=placement)(jnp.float32(0))
        processes = [psutil.Process(p.pid) for p in psutil.Process().children(recursive=True)]
        before = sum(_own_bytes(p) for p in processes)
        program = fm.dataflow(fn, cluster=cluster, placement=placement)
        end = time.monotonic() + SOAK_S
        peak = [before]
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                peak[0] = max(peak[0], sum(_own_bytes(p) for p in processes))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            results = [float(f.result(timeout=100)) for f in [program.submit(jnp.float32(n)) for n in range(24)]]
            while time.monotonic() < end:
                for future in [program.submit(jnp.float32(n)) for n in range(24)]:
                    future.result(timeout=100)
        finally:
            over.set()
            watcher.join()
        expected = [float(jax.jit(fn)(jnp.float32(n))) for n in (0, 23)]
        np.testing.assert_allclose([results[0], results[23]], expected, rtol=1e-5)
    grown, room = peak[0] - before, window(edge(PIECE))
    print(f"{before / 2**20:.0f} MiB before, at most {grown / 2**20:.0f} MiB more, room for {room} values of 16 MiB")
    # Beside what waits: the producer has one value on its way out and one that XLA makes, the consumer one in use and
    # one that XLA works on, and one slot is idle.
    allowed = (room + 5) * PIECE * 1.1
    assert grown < allowed, f"{grown / 2**20:.0f} MiB for {room} room of 16 MiB"
    assert allowed < windows.IN_FLIGHT * PIECE / 2  # else the test could not fail


def _own_bytes(process: psutil.Process) -> int:
    """Anonymous and shared memory; half of what two map. Not files: that share moves as others open libraries."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
