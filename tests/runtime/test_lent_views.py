"""Views of arrays that other threads read: no later computation writes to their memory, donated or not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowml.plan import ArraySpec
from flowml_runtime.execution.lane import Lane
from flowml_runtime.transport.arrays import aligned_empty
from flowml_runtime.transport.buffers import BufferPool
from flowml_runtime.transport.slots import SlotPool, SlotViews
from flowml_runtime.wire import Published
from flowml_runtime.worker.training.publisher import Publisher
from tests.runtime.test_lent_arrays import switching_every

SIDE = 256
SPECS = (ArraySpec((SIDE, SIDE), "float32"),)
WAIT_S = 60.0


def compiled(donate: tuple[int, ...]) -> Callable[..., Any]:
    """Adds two matrices, as a task is compiled: it may overwrite what is donated."""
    struct = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
    return jax.jit(lambda a, b: a + b, donate_argnums=donate).lower(struct, struct).compile()


@pytest.mark.parametrize("donate", [(), (0,)], ids=["as compiled", "donated"])
def test_a_slow_reader_sees_what_was_published_while_applies_go_on(donate: tuple[int, ...]) -> None:
    """Each version holds its number. The reader's thread serialises each while the next ones are made.

    Homes do not donate; even if they did, the view that is lent keeps XLA from writing to its memory.
    """
    apply, one = compiled(donate), np.ones((SIDE, SIDE), np.float32)
    received: list[tuple[int, bytes]] = []
    failed: list[BaseException] = []

    def send(_reader: str, message: Published, arrays: Any, timeout_s: float | None) -> None:
        if timeout_s is not None:
            raise TimeoutError  # it never takes anything in at once
        rows = b"".join(row.tobytes() for row in arrays[0])  # threads change places between any two rows
        received.append((message.version, rows))

    over = threading.Event()
    publisher = Publisher("home", send, failed.append)
    with switching_every(1e-6):
        params = jnp.zeros((SIDE, SIDE), jnp.float32)
        for version in range(1, 1001):
            params = apply(params, one)
            message = Published(plan_id="p", run=0, cause=0, store=0, version=version, floor=version, specs=SPECS)
            publisher.publish("slow", message, [np.asarray(params)])
        publisher.after_all(over.set)
        assert over.wait(WAIT_S)
    publisher.close()
    assert not failed
    assert received[-1][0] == 1000
    assert [v for v, _ in received] == sorted({v for v, _ in received})
    for version, rows in received:
        assert rows == np.full((SIDE, SIDE), version, np.float32).tobytes()


def test_versions_that_a_reader_cannot_take_are_replaced_by_the_newest() -> None:
    """One store's value, another's clocks: while the reader takes nothing, one version of each waits."""
    taking, sent = threading.Event(), list[tuple[int, int, int, int]]()

    def send(_reader: str, message: Published, arrays: Any, timeout_s: float | None) -> None:
        if not taking.is_set():
            if timeout_s is not None:
                raise TimeoutError
            assert taking.wait(WAIT_S)
        sent.append((message.store, message.version, message.floor, len(arrays)))

    failed: list[BaseException] = []
    publisher, over = Publisher("home", send, failed.append), threading.Event()
    value = [np.zeros((SIDE, SIDE), np.float32)]
    for version in range(1, 101):
        for store in (0, 1):
            message = Published(plan_id="p", run=0, cause=0, store=store, version=version, floor=version, specs=SPECS)
            publisher.publish("slow", message, value)
        only_floor = Published(plan_id="p", run=0, cause=0, store=1, version=version, floor=version + 1)
        publisher.publish("slow", only_floor, ())
    publisher.after_all(over.set)
    taking.set()
    assert over.wait(WAIT_S)
    publisher.close()
    assert not failed
    assert len(sent) <= 4  # the ones that the lane had taken, and the newest of each store
    assert (0, 100, 100, 1) in sent
    assert (1, 100, 101, 1) in sent


def test_memory_of_a_pool_or_a_slot_is_not_used_again_before_a_task_has_read_it() -> None:
    """A task runs after its call returns. What it was given goes back to its pool when the task is done with it."""
    apply, one = compiled(()), np.ones((SIDE, SIDE), np.float32)
    nbytes = one.nbytes
    pool, slots, returned = BufferPool(least_bytes=1), SlotPool(), list[int]()
    views = SlotViews(returned.append)
    results: list[tuple[int, Any]] = []
    with switching_every(1e-6):
        for number in range(300):
            memory = pool.take(nbytes).view(np.float32).reshape(SIDE, SIDE)
            memory[...] = number
            results.append((number, apply(memory, one)))
            while returned:
                slots.give_back(returned.pop())
            slot, fd = slots.take(nbytes)
            if fd >= 0:
                views.map(slot.number, fd)
            slot.data[:nbytes].view(np.float32)[:] = number
            lease = views.lease(slot.number)[:nbytes].view(np.float32).reshape(SIDE, SIDE)
            results.append((number, apply(lease, one)))
            del memory, lease
    for number, result in results:
        np.testing.assert_array_equal(np.asarray(result), np.full((SIDE, SIDE), number + 1, np.float32))
    slots.close()


def test_a_donated_argument_is_not_overwritten_while_it_is_lent() -> None:
    apply, one = compiled((0,)), np.ones((SIDE, SIDE), np.float32)
    theirs = aligned_empty(one.nbytes).view(np.float32).reshape(SIDE, SIDE)
    theirs[...] = 5
    np.testing.assert_array_equal(np.asarray(apply(theirs, one)), 6 * one)
    np.testing.assert_array_equal(theirs, 5 * one)
    ours = jnp.full((SIDE, SIDE), 7, jnp.float32)
    view = np.asarray(ours)
    np.testing.assert_array_equal(np.asarray(apply(ours, one)), 8 * one)
    np.testing.assert_array_equal(view, 7 * one)


def test_a_lane_keeps_order_reports_failures_and_drops_what_waits_when_closed() -> None:
    lane, done, failed, gate = Lane("lane"), list[int](), list[BaseException](), threading.Event()

    def job(number: int) -> None:
        if number == 3:
            raise ValueError(number)
        done.append(number)

    for number in range(6):
        assert lane.put(lambda n=number: job(n), failed.append)
    lane.flush()
    assert done == [0, 1, 2, 4, 5]
    assert [type(e) for e in failed] == [ValueError]
    lane.put(lambda: done.append(6) if gate.wait(WAIT_S) else None, failed.append)
    lane.put(lambda: done.append(7), failed.append)
    lane.close()
    assert not lane.put(lambda: done.append(8), failed.append)
    gate.set()
    assert lane.join(WAIT_S)
    assert done == [0, 1, 2, 4, 5, 6]


def test_a_lane_that_ends_in_order_does_all_that_was_put() -> None:
    lane, done, gate = Lane("lane"), list[int](), threading.Event()
    for number in range(4):
        lane.put(lambda n=number: done.append(n) if gate.wait(WAIT_S) else None, lambda _: None)
    lane.close(drop=False)
    gate.set()
    assert lane.join(WAIT_S)
    assert done == [0, 1, 2, 3]
