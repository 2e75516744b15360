"""What a thread lends to another never changes: chunks of sums at every point where a peer's chunk can come in."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest

from flowml.plan import ArraySpec
from flowml_runtime import wire
from flowml_runtime.protocol.schedules import Schedule, direct, doubling, hierarchical, ring, tree
from flowml_runtime.transport.endpoint import ThreadHub
from flowml_runtime.worker.training.exchange import collectives
from flowml_runtime.worker.training.exchange.collectives import Group, GroupId

WAIT_S = 60.0
LOCKED_S = 0.05
"""A thread that takes longer than this is taken to wait for a lock that the traced thread holds."""


@contextmanager
def switching_every(seconds: float) -> Iterator[None]:
    """Python changes threads this often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_with_interruption(call: Callable[[], Any], path: str, line: int, interrupt: Callable[[], None]) -> int:
    """Run `call`; before line `line` of what it runs of a file, `interrupt` runs on another thread. Returns how
    many lines that were."""
    lines = 0
    thread = threading.Thread(target=interrupt)

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "line":
            if lines == line:
                thread.start()
                thread.join(LOCKED_S)
            lines += 1
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: on_line if frame.f_code.co_filename == path else None)
    try:
        call()
    finally:
        sys.settrace(before)
    if line >= lines:
        thread.start()
    thread.join(WAIT_S)
    return lines


def test_a_rank_sends_its_own_values_whenever_its_peers_come_in() -> None:
    """The peer's chunk is taken in before each line that an all-reduce of two ranks runs, one after the other."""
    own, others = np.full(64, 1, np.float32), np.full(64, 10, np.float32)
    spec = (ArraySpec((64,), "float32"),)
    (take,) = doubling(2).takes(0)
    chunk = wire.Collective(plan_id="p", run=0, group=0, bucket=0, clock=0, piece=0, take=take, specs=spec)

    def all_reduce(line: int) -> int:
        sent: list[np.ndarray[Any, Any]] = []
        futures: list[Any] = []
        group = Group(GroupId("p", 0), "a", "ab", lambda _peer, _message, arrays: sent.append(np.array(arrays[0])))

        def begin() -> None:
            futures.append(group.all_reduce(0, 0, [own], doubling(2)))

        lines = run_with_interruption(begin, collectives.__file__, line, lambda: group.on_message("b", chunk, [others]))
        [total] = futures[0].result(WAIT_S)
        group.close()
        np.testing.assert_array_equal(total, own + others, err_msg=f"the peer's chunk came before line {line}")
        np.testing.assert_array_equal(sent, [own], err_msg=f"the peer's chunk came before line {line}")
        return lines

    line, lines = 0, 21  # at least so many; how many they are is known once they have run
    while line < lines:
        lines = max(lines, all_reduce(line))
        line += 1


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "direct": direct,
    "ring": ring,
    "doubling": doubling,
    "tree": lambda ranks: tree(ranks, 2),
    "hierarchical": lambda ranks: hierarchical((0,) * (ranks - ranks // 2) + (1,) * (ranks // 2)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("size", "clocks"), [(64, 150), (200_000, 6)])
def test_sums_are_right_and_no_chunk_changes_after_it_was_sent(name: str, ranks: int, size: int, clocks: int) -> None:
    """Threads change places as often as Python can; `size` is below and above what a receiving thread adds itself."""
    schedule, hub = SCHEDULES[name](ranks), ThreadHub()
    names = [f"worker:{r}" for r in range(ranks)]
    lent: list[tuple[Any, bytes]] = []
    wrong: list[tuple[int, int, float]] = []

    def member(group: Group, rank: int) -> None:
        for clock in range(clocks):
            [total] = group.all_reduce(0, clock, [np.full(size, clock + 10.0**rank, np.float32)]).result(WAIT_S)
            expected = np.float32(ranks * clock + sum(10.0**r for r in range(ranks)))
            if not (total == expected).all():
                wrong.append((rank, clock, float(total[0])))

    def lending(send: Callable[..., None]) -> Callable[..., None]:
        def lend(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            lent.extend((a, a.tobytes()) for a in arrays)
            send(peer, message, arrays)

        return lend

    with ExitStack() as stack, switching_every(1e-6):
        groups: list[Group] = []
        for endpoint in [hub.endpoint(n) for n in names]:
            send = lending(endpoint.send)
            group = Group(GroupId("plan", 0), endpoint.name, names, send, pick=lambda *_: schedule)
            stack.callback(endpoint.close)
            stack.callback(group.close)
            endpoint.start(group.on_message, group.on_lost)
            groups.append(group)
        threads = [threading.Thread(target=member, args=(g, r)) for r, g in enumerate(groups)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(t.is_alive() for t in threads)
    assert not wrong
    assert len(lent) >= clocks * ranks
    assert all(array.tobytes() == bits for array, bits in lent)
