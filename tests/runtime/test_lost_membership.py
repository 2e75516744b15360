"""Messages of membership are lost, ten times each, in each of three ways; see `test_lost_requests`.

The request or its answer is lost on a connection that works, or the connection is cut while one of them is under way.
Members ask again until they see what they asked for. The connection of a member that is cut is the end of that member,
which is told so, and another that does the same has the same outcome.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from flowml.errors import ClusterError
from flowml_runtime import service, wire
from flowml_runtime.membership import member
from flowml_runtime.membership.coordinator import CoordinatorHost
from flowml_runtime.membership.member import Membership, passing_name
from flowml_runtime.transport.grpc_endpoint import GrpcEndpoint
from tests.conftest import wait_until

TIMES = 10
TOKEN = "t"
CPU = wire.DeviceInfo(name="cpu:0", platform="cpu", memory_bytes=1, cores=1.0)
SILENT_S = 30.0
"""So long no member is lost because a test is slow."""
Way = Literal["request lost", "reply lost", "cut"]
Asked = Callable[[wire.Wire], bool]


class Peer:
    """A member. A spare takes the place that it is asked to take."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ended: list[str] = []
        self.endpoint = GrpcEndpoint(passing_name(), TOKEN)
        self.membership: Any = Membership(
            self.endpoint,
            world.host.address,
            lambda *_: None,
            lambda *_: None,
            on_end=self.ended.append,
            on_replace=self._become,
        )
        take = self.membership._on_message
        self.membership._on_message = lambda peer, message, arrays: world.pass_on(
            lambda: take(peer, message, arrays), message, self.endpoint.name
        )
        self._once = threading.Lock()
        world.stack.callback(self.endpoint.close)
        world.stack.callback(self.membership.leave)

    def _become(self, asked: wire.Replace) -> None:
        if self._once.acquire(blocking=False):
            service.start("spare", lambda: self._take(asked), lambda _: None)

    def _take(self, asked: wire.Replace) -> None:
        wait_until(lambda: self.membership._own or self.ended, "it has joined")
        if not self.ended:
            self.membership.become(asked, (CPU,), python=False)

    @property
    def lives(self) -> dict[str, int]:
        return {m.worker: m.incarnation for m in self.membership.members}

    @property
    def leaving(self) -> list[str]:
        return [m.worker for m in self.membership.members if m.leaving]


class World:
    """A coordinator, a driver and worker:0. Loses the n-th message that is asked for, or cuts its connection."""

    def __init__(self, stack: ExitStack, timeout_s: float) -> None:
        self.stack = stack
        self.host: Any = CoordinatorHost(
            "127.0.0.1:0", TOKEN, heartbeat_s=0.05, timeout_s=timeout_s, works=lambda _: False
        )
        stack.callback(self.host.close)
        self.asked: Asked = lambda _: False
        self.seen = self.nth = 0
        self.cut = False
        self._lock = threading.Lock()
        take = self.host._endpoint._on_message
        self.host._endpoint._on_message = lambda peer, message, arrays: self.pass_on(
            lambda: take(peer, message, arrays), message, peer
        )
        self.driver, self.worker = Peer(self), Peer(self)
        self.driver.membership.join("driver")
        self.worker.membership.join("worker:0", (CPU,))
        wait_until(lambda: "worker:0" in self.driver.lives, "the driver sees it")

    def lose(self, asked: Asked, nth: int, *, cut: bool) -> None:
        with self._lock:
            self.asked, self.seen, self.nth, self.cut = asked, 0, nth, cut

    def pass_on(self, take: Callable[[], None], message: wire.Wire, member: str) -> None:
        with self._lock:
            is_asked = self.asked(message)
            self.seen += is_asked
            lost = is_asked and self.seen == self.nth
        if not lost:
            take()
        elif self.cut:
            self.host._endpoint.lose(member, "connection closed")


def joins(world: World) -> Any:
    new = Peer(world)
    name = new.membership.join("worker:1", (CPU,), timeout_s=20.0)
    all_of, shown = (world.driver, world.worker, new), {"driver", "worker:0", name}
    wait_until(lambda: all(p.lives.keys() >= shown for p in all_of) or any(p.ended for p in all_of), "all see it")
    check(world, *all_of)
    return name, sorted(new.lives)


def beats(world: World) -> Any:
    wait_until(lambda: world.seen >= 4 or world.worker.ended or world.driver.ended, "some have come")
    check(world)
    return sorted(world.driver.lives)


def leaves(world: World) -> Any:
    world.worker.membership.leave()
    world.worker.endpoint.close()
    wait_until(lambda: "worker:0" not in world.driver.lives or world.driver.ended, "the driver sees it")
    check(world, world.driver)
    return sorted(world.driver.lives)


def gives_notice(world: World) -> Any:
    world.driver.membership.give_notice("worker:0")
    shown = [world.driver, world.worker]
    wait_until(lambda: all(p.leaving == ["worker:0"] for p in shown) or any(p.ended for p in shown), "both see it")
    check(world)
    wait_until(lambda: not world.driver.membership._notices, "it is not said again")
    return world.driver.leaving


def exits(world: World) -> Any:
    """The process of the worker has ended: its heartbeats too, which is noticed if nobody says so."""
    process = world.host._machine._roster.processes["worker:0"]
    world.worker.membership._stop()
    told = wire.Exited(worker="worker:0", process=process, reason="killed")
    world.driver.endpoint.send("coordinator", told)
    wait_until(lambda: "worker:0" not in world.driver.lives or world.driver.ended, "the driver sees it")
    check(world, world.driver)
    return sorted(world.driver.lives)


def replaced(world: World) -> Any:
    Peer(world).membership.join("spare-a")
    life = world.driver.lives.get("worker:0", 0)
    world.worker.endpoint.close()
    wait_until(lambda: "worker:0" not in world.driver.lives or world.driver.ended, "the driver knows of the loss")
    world.driver.membership.replace("worker:0")
    until = [world.driver.lives.get("worker:0", life)]

    def there() -> bool:
        spares = [name for name in world.driver.lives if name.startswith("spare")]
        until[0] = world.driver.lives.get("worker:0", life)
        if world.cut and world.seen >= world.nth and not spares and until[0] <= life and not world.driver.ended:
            Peer(world).membership.join("spare-b")  # the first one is lost
        return until[0] > life or bool(world.driver.ended)

    wait_until(there, "another has its place")
    check(world, world.driver)
    return sorted(world.driver.lives)


def check(world: World, *of: Peer) -> None:
    """Raise the error that these members have been told."""
    for peer in of or (world.driver, world.worker):
        if peer.ended:
            raise ClusterError(peer.ended[0])


@dataclass(frozen=True)
class Method:
    """A request, its answer, and a call that needs both. So many of them may be lost in turn."""

    request: Asked
    reply: Asked | None
    do: Callable[[World], Any]
    timeout_s: float = SILENT_S


def of(kind: type[wire.Wire]) -> Asked:
    return lambda message: isinstance(message, kind)


def asks_spare(message: wire.Wire) -> bool:
    return isinstance(message, wire.Replace) and message.after > 0


METHODS = {
    "join": Method(of(wire.Join), of(wire.Welcome), joins),
    "join and see": Method(of(wire.Join), of(wire.Members), joins),
    "heartbeat": Method(of(wire.Heartbeat), None, beats),
    "leave": Method(of(wire.Leave), None, leaves),
    "notice": Method(of(wire.Notice), of(wire.Members), gives_notice),
    "exited": Method(of(wire.Exited), of(wire.Members), exits, timeout_s=0.6),
    "replace": Method(lambda m: isinstance(m, wire.Replace) and not m.after, asks_spare, replaced),
    "take a place": Method(lambda m: isinstance(m, wire.Join) and m.worker == "worker:0", of(wire.Welcome), replaced),
}
CELLS = [
    (name, way)
    for name, method in METHODS.items()
    for way in ("request lost", "reply lost", "cut")
    if way != "reply lost" or method.reply
]


@pytest.mark.parametrize(("name", "way"), CELLS, ids=lambda value: value.replace(" ", "-"))
def test_a_lost_message_of_membership_changes_nothing(
    seed: int, name: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, rng = METHODS[name], random.Random(f"{seed} {name} {way}")
    monkeypatch.setattr(member, "LONGEST_PAUSE_S", 0.05)
    with ExitStack() as stack:
        world = World(stack, method.timeout_s)
        world.lose(of(wire.Heartbeat) if name == "heartbeat" else method.request, 0, cut=False)
        expected = method.do(world)
        assert world.seen, "the call needs it"
    for _ in range(TIMES):
        asked = [method.request] if way == "request lost" else [method.reply] if way == "reply lost" else None
        chosen = rng.choice([kind for kind in asked or [method.request, method.reply] if kind is not None])
        with ExitStack() as stack:
            world = World(stack, method.timeout_s)
            world.lose(chosen, rng.randint(1, 3) if name == "heartbeat" else 1, cut=way == "cut")
            try:
                found = method.do(world)
            except ClusterError as error:
                assert way == "cut", error
                world.lose(chosen, 0, cut=False)
                again = World(stack, method.timeout_s)
                again.lose(chosen, 0, cut=False)
                found = method.do(again)
            assert found == expected


def test_a_late_answer_to_an_earlier_question_is_none_to_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spare has asked to join twice, and hears the second answer while it asks for a place: it takes the place."""
    with ExitStack() as stack:
        world = World(stack, SILENT_S)
        spare = Peer(world)
        spare._once.acquire()  # it is asked below
        spare.membership.join("spare-a")
        world.worker.endpoint.close()
        wait_until(lambda: "worker:0" not in world.driver.lives, "it is lost")
        late, asked = wire.Welcome(worker="spare-a", heartbeat_s=0.05, incarnation=spare.endpoint.incarnation), []
        send = spare.endpoint.send

        def after_the_late_one(peer: str, message: wire.Wire, *more: Any) -> None:
            if isinstance(message, wire.Join) and not asked:
                asked.append(message)
                spare.membership._on_message("coordinator", late, [])
            send(peer, message, *more)

        monkeypatch.setattr(spare.endpoint, "send", after_the_late_one)
        place = wire.Replace(worker="worker:0", after=world.worker.endpoint.incarnation)
        assert spare.membership.become(place, (CPU,), python=False) == "worker:0"
