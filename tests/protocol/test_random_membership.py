"""The membership machine under random joins, beats, losses and ticks, and restarts of the coordinator from its log."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flowml_runtime import wire
from flowml_runtime.protocol.membership import (
    Action,
    Append,
    ConnectionLost,
    Event,
    ProcessExited,
    Received,
    Send,
    Tick,
)
from flowml_runtime.protocol.roster import Record, Roster
from tests.protocol.test_membership import cluster, join, logged, restarted, views

SMALL = st.integers(0, 5)


class Membership(RuleBasedStateMachine):
    """Random joins, beats, losses and ticks, against a plain account of who should be in."""

    @initialize()
    def begin(self) -> None:
        self.machine = cluster(max_members=4)
        self.clock = 0.0
        self.view: dict[str, wire.Members] = {}
        self.lives: dict[str, int] = {}
        self.left: set[str] = set()
        self.log: list[Record] = []
        self.away: set[str] = set()
        """Members that have not joined the newest coordinator."""

    def take(self, event: Event) -> list[Action]:
        before = {m.worker: m for m in self.machine.members}
        actions = self.machine.step(event)
        kinds = [type(a) for a in actions]
        assert Append not in kinds[kinds.count(Append) :], "what is told is on disk"
        self.log += logged(actions)
        told = views(actions)
        after = {m.worker: m for m in self.machine.members}
        if before != after:
            self.away = {n for n in self.away if after.get(n) == before.get(n)}
            assert set(told) == set(after) - self.away
            for view in told.values():
                assert {n for n, _ in view.lost} == {n for n in before if after.get(n) != before[n]}
        self.away -= set(told)
        self.view = {n: told.get(n, self.view.get(n)) for n in after if n not in self.away}  # type: ignore[assignment]
        return actions

    @rule(name=st.sampled_from(["", "worker:0", "worker:1", "driver", "x"]), life=SMALL, port=SMALL)
    def joins(self, name: str, life: int, port: int) -> None:
        actions = self.take(Received(f"joining-{port}", join(name, life, f"h:{port}")))
        for action in actions:
            if isinstance(action, Send) and isinstance(action.message, wire.Welcome):
                worker = action.message.worker
                if not worker.startswith("worker"):
                    continue
                latest = self.lives.get(worker, -1)
                assert life > latest or (life == latest and worker not in self.left)
                self.lives[worker] = life
                self.left.discard(worker)

    @rule(port=SMALL)
    def offers(self, port: int) -> None:
        self.take(Received(f"joining-{port}", join("spare-a", 0, f"h:{port}")))

    @rule(worker=st.sampled_from(["worker:0", "worker:1"]), takes=st.booleans())
    def is_missed(self, worker: str, takes: bool) -> None:
        for action in self.take(Received("driver", wire.Replace(worker=worker))):
            if isinstance(action, Send) and takes:
                at = next(m.address for m in self.machine.members if m.worker == action.peer)
                life = action.message.after + 1  # type: ignore[union-attr]
                self.take(Received(action.peer, join(worker, life, at)))
                assert {m.worker: m.incarnation for m in self.machine.members}[worker] == life
                assert action.peer not in {m.worker for m in self.machine.members}
                self.lives[worker] = life
                self.left.discard(worker)

    @rule(index=st.integers(0, 3), how=st.sampled_from([ConnectionLost, ProcessExited]))
    def loses(self, index: int, how: type[ConnectionLost] | type[ProcessExited]) -> None:
        members = self.machine.members
        if members:
            worker = members[index % len(members)].worker
            self.take(how(worker, "lost"))
            assert worker not in {m.worker for m in self.machine.members}
            self.left.add(worker)

    @rule(beating=st.sets(st.integers(0, 3)), passed_s=st.floats(0, 0.5))
    def ticks(self, beating: set[int], passed_s: float) -> None:
        beaten: set[str] = set()
        for index, member in enumerate(self.machine.members):
            if index in beating:
                self.take(Received(member.worker, wire.Heartbeat(worker=member.worker, incarnation=member.incarnation)))
                beaten.add(member.worker)
        before = {m.worker for m in self.machine.members}
        self.clock += passed_s
        self.take(Tick(self.clock))
        after = {m.worker for m in self.machine.members}
        assert beaten <= after
        self.left |= before - after

    @rule(compacted=st.booleans())
    def restarts(self, compacted: bool) -> None:
        if compacted:
            self.log = [Roster(self.log).whole()]
        self.machine, known = restarted(self.machine, self.log, self.clock)
        assert known == []
        self.away = {m.worker for m in self.machine.members}
        self.view = {}

    @invariant()
    def holds(self) -> None:
        self.machine.validate()
        assert Roster(self.log).whole() == self.machine._roster.whole()  # pyright: ignore
        for view in self.view.values():
            assert view.members == self.machine.members


Membership.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestMembership = Membership.TestCase
