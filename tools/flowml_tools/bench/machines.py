"""Measures the training state machines alone: their events and actions over a whole run of many replicas.

There are no processes, threads or arrays. A queue passes messages between machines in the order of sending, and steps
take no time. The measurement is the processor time of the decisions, in seconds. It must not grow faster than the
number of messages, so that a simulator can have thousands of workers.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from flowml.policy import Policy, Quorum
from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver
from flowml_runtime.protocol.training.ledger import Work
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.protocol.training.worker import TrainingWorker
from flowml_tools.bench.rows import BenchError, Goal, Peer, Row, Sample
from flowml_tools.bench.timing import tell

SUMMARY = "decisions of 1,000 replicas over 100 clocks; the training machines alone"
REPEATS = 3
REPLICAS, CLOCKS = 1000, 100
GOAL = Goal("at most", 10.0, of="value")
DRIVER = "driver"
IDS: dict[str, Any] = {"plan_id": "bench", "run": 0}


def rows(repeats: int | None) -> list[Row]:
    count = repeats or REPEATS
    cases = {"every replica": Quorum(1.0), "quorum(0.75)": Quorum(0.75)}
    found: list[Row] = []
    for name, quorum in cases.items():
        times: list[float] = []
        for number in range(count):
            tell(f"machines: {name}, {number + 1} of {count}")
            began = time.process_time()
            Run(REPLICAS, CLOCKS, Policy(quorum=quorum)).go()
            times.append(time.process_time() - began)
        title = f"{REPLICAS} replicas × {CLOCKS} clocks, {name}"
        found.append(Row(title, "s", Sample(tuple(times)), Peer("no peer"), GOAL))
    return found


class Run:
    """A driver and one worker per replica. All replicas share one store, whose home is the first worker."""

    def __init__(self, replicas: int, clocks: int, policy: Policy) -> None:
        names = tuple(f"worker:{r}" for r in range(replicas))
        terms = Terms(replicas, 1, 1, (StoreTerms((0,), policy),), clocks)
        places = Places(tuple((n,) for n in names), (names[:1],), ({names[0]: names},))
        ids: dict[str, Any] = {**IDS, "seed": 0, "shuffle": False, "examples": 1, "source": "shipped"}
        start = wire.StartTraining(**ids, total_clocks=clocks)
        work = Work(replicas, replicas * clocks, item_size=1, total_clocks=clocks, aligned=True)
        self._driver = driver.TrainingDriver(start, terms, work, places)
        self._workers = {n: TrainingWorker(n, DRIVER, terms.lasting(0), places) for n in names}
        self._queue: deque[tuple[str, actions.Event]] = deque()
        self._handles = 0

    def go(self) -> int:
        """Run to the end. Returns the number of events."""
        events = 1
        self._carry_out_driver(self._driver.step(driver.Begin()))
        while self._queue:
            to, event = self._queue.popleft()
            events += 1
            if to != DRIVER:
                self._carry_out(to, self._workers[to].step(event))
            elif isinstance(event, actions.Received):
                self._carry_out_driver(self._driver.step(event))
        if not self._driver.over:
            raise BenchError("the machines stopped before the end of the run")
        return events

    def _send(self, source: str, to: tuple[str, ...], message: Any, *, arrays: bool = False) -> None:
        for name in to:
            self._handles += arrays
            self._queue.append((name, actions.Received(source, message, self._handles if arrays else None)))

    def _carry_out_driver(self, wanted: list[driver.Action]) -> None:
        for action in wanted:
            match action:
                case actions.Send(to, message):
                    self._send(DRIVER, to, message)
                case driver.SendStore(store, to):
                    self._send(DRIVER, to, wire.StoreValue(**IDS, store=store, version=0), arrays=True)
                case driver.Fail():
                    raise BenchError(f"the run failed: {action.reason}")
                case _:
                    pass  # there are no data and no history

    def _carry_out(self, me: str, wanted: list[actions.Action]) -> None:
        for action in wanted:
            match action:
                case actions.Send(to, message):
                    self._send(me, to, message)
                case actions.Leave(to, message):
                    self._send(me, to, message)
                case actions.Start(_, replica, stage, clock, _, cause):
                    push = self._workers[me].contribution(action, 0, 0, base_version=0, weight=1)
                    self._send(me, push.to, push.message, arrays=True)
                    self._queue.append((me, actions.StepFinished(0, replica, stage, clock, cause)))
                case actions.Publish(store, version, floor, value, to, cause):
                    news = wire.Published(**IDS, cause=cause, store=store, version=version, floor=floor)
                    self._send(me, to, news, arrays=value)
                case actions.Return(store, version):
                    self._send(me, (DRIVER,), wire.StoreValue(**IDS, store=store, version=version))
                case actions.Fail(_, error):
                    raise BenchError(f"{me} failed: {error}")
                case _:
                    pass  # there are no values
