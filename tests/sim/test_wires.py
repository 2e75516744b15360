"""Messages in virtual time: latency, rates, shared links, order."""

from __future__ import annotations

import pytest

from flowml.sim import Network
from flowml_runtime.sim.heap import Clock
from flowml_runtime.sim.network import Wires

NAMES = {f"worker:{i}": i for i in range(4)}


class Case:
    def __init__(self, network: Network, tamper: object = None) -> None:
        self.clock = Clock()
        self.wires = Wires(self.clock, network, NAMES, tamper)  # pyright: ignore[reportArgumentType]
        self.arrived: list[tuple[float, str]] = []

    def send(self, a: int, b: int, nbytes: int, what: str) -> None:
        self.wires.send(f"worker:{a}", f"worker:{b}", nbytes, self._arrive, f"worker:{a}", what)

    def _arrive(self, peer: str, what: str) -> None:
        self.arrived.append((round(self.clock.now, 9), what))

    def run(self) -> list[tuple[float, str]]:
        self.clock.run(1000)
        return self.arrived


def test_a_message_takes_latency_and_bytes_over_rate_and_one_without_arrays_only_latency() -> None:
    case = Case(Network(latency_s=0.5, bytes_per_s=100))
    case.send(0, 1, 200, "arrays")
    case.send(0, 2, 0, "none")
    case.send(3, 3, 200, "itself")
    assert case.run() == [(0.0, "itself"), (0.5, "none"), (2.5, "arrays")]


def test_a_pair_keeps_the_order_and_its_link_sends_one_after_the_other() -> None:
    case = Case(Network(latency_s=0.5, bytes_per_s=100))
    for nbytes, what in ((200, "a"), (100, "b"), (0, "c")):
        case.send(0, 1, nbytes, what)
    assert case.run() == [(2.5, "a"), (3.5, "b"), (3.5, "c")]


def test_an_uplink_is_shared_by_all_that_a_worker_sends() -> None:
    case = Case(Network(latency_s=0.5, bytes_per_s=1e30, uplink_bytes_per_s=100))
    case.send(0, 1, 100, "a")
    case.send(0, 2, 100, "b")
    case.send(3, 2, 100, "of another")
    assert sorted(case.run()) == [(1.5, "a"), (1.5, "of another"), (2.5, "b")]


def test_many_senders_meet_at_the_downlink_of_one_receiver_in_the_order_of_arrival() -> None:
    case = Case(Network(latency_s=0.5, bytes_per_s=1e30, uplink_bytes_per_s=100, downlink_bytes_per_s=100))
    case.send(1, 2, 300, "delays the next of worker 1")
    case.send(1, 0, 100, "begins last and arrives last")
    case.send(1, 0, 0, "follows it")
    case.send(2, 0, 100, "a")
    case.send(3, 0, 100, "b")
    assert sorted(case.run()) == [
        (1.5, "a"),
        (2.5, "b"),
        (3.5, "delays the next of worker 1"),
        (4.5, "begins last and arrives last"),
        (4.5, "follows it"),
    ]


def test_a_delayed_message_delays_all_that_follow_it_on_its_connection() -> None:
    class Late:
        def delays(self, source: str, to: str, message: object) -> tuple[float, ...]:
            return (3.0,) if message == "a" else (0.0,)

    for network in (Network(0.5, 100), Network(0.5, 100, downlink_bytes_per_s=100)):
        case = Case(network, Late())
        for what in ("a", "b"):
            case.send(0, 1, 100, what)
        case.send(2, 1, 0, "of another")
        first, *rest = case.run()
        assert first == (0.5, "of another")
        assert [what for _, what in rest] == ["a", "b"]
        assert rest[0][0] == 4.5


def test_time_does_not_go_back() -> None:
    clock = Clock()
    clock.after(2.0, 0, lambda: None)
    clock.run(10)
    with pytest.raises(ValueError, match=r"scheduled at 2\.0 s"):
        clock.at(1.0, 0, lambda: None)
    with pytest.raises(ValueError, match="no NaN"):
        clock.after(float("nan"), 0, lambda: None)
    assert clock.events == 1


def test_the_trace_hash_covers_times_and_labels() -> None:
    def hashed(*events: tuple[float, int]) -> str:
        clock = Clock()
        for when, label in events:
            clock.at(when, label, lambda: None)
        clock.run(10)
        return clock.trace_hash

    assert hashed((1, 5), (2, 6)) == hashed((2, 6), (1, 5))
    different = {hashed((1, 5), (2, 6)), hashed((1, 6), (2, 5)), hashed((1, 5), (3, 6)), hashed((1, 5)), hashed()}
    assert len(different) == 5
    assert hashed((1, 5), (1, 6)) == hashed((1, 6), (1, 5)) != hashed((1, 5), (1, 5))
    assert hashed((1, 5)) != hashed((1, 5), (1, 6), (1, 6))


def test_what_waits_for_a_link_is_counted_in_bytes_and_nothing_waits_within_a_worker() -> None:
    case = Case(Network(latency_s=0.5, bytes_per_s=100))
    case.send(0, 1, 300, "a")
    case.send(3, 3, 300, "itself")
    assert case.wires.waiting("worker:0", "worker:1") == 300
    assert case.wires.waiting("worker:3", "worker:3") == 0
    case.run()
    assert case.wires.waiting("worker:0", "worker:1") == 0
