"""Estimates when each task runs, by simulating the plan's instruction lists with the estimated durations.

The rules are those of the executor: a device runs its list in order, a receive waits for its message, and a send does
not wait. Time is computed and never read from a clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flowml.instructions import Recv, Run, Send
from flowml.placement.links import Link
from flowml.plan import Plan, PlanLink, Program, Task

_FLOPS_PER_S = 2e10
_LEAST_S = 1e-6
_PRIOR = Link()


@dataclass(frozen=True)
class Bar:
    """One run of a task, in seconds from the start of the step."""

    device: str
    task: int
    microbatch: int
    start_s: float
    end_s: float


def timeline(plan: Plan, devices: Collection[str] | None = None) -> tuple[Bar, ...]:
    """The runs of one step on `devices` (all by default), in order of start. Tasks that cannot run are left out."""
    programs = [p for p in plan.programs if devices is None or p.device in devices]
    bars: list[Bar] = []
    arrivals: dict[tuple[int, int], float] = {}
    links = {(k.source, k.destination): k for k in plan.links}
    players = [_Player(plan, p, links) for p in programs]
    while any(player.play(bars, arrivals) for player in players):
        pass
    return tuple(sorted(bars, key=lambda b: (b.start_s, b.end_s, b.device)))


def duration_s(task: Task) -> float:
    """The estimated time of a task; if the plan has none, it is computed from the task's operations."""
    return max(task.seconds or task.flops / _FLOPS_PER_S, _LEAST_S)


@dataclass
class _Player:
    """The position of a device in its program, and its clock."""

    plan: Plan
    program: Program
    links: Mapping[tuple[str, str], PlanLink]
    position: int = 0
    now_s: float = 0.0

    def play(self, bars: list[Bar], arrivals: dict[tuple[int, int], float]) -> bool:
        """Run instructions until a message is missing. Returns whether any instruction ran."""
        began = self.position
        while self.position < len(self.program.instructions):
            match self.program.instructions[self.position]:
                case Recv(message=message, microbatch=m):
                    if (message, m) not in arrivals:
                        break
                    self.now_s = max(self.now_s, arrivals[message, m])
                case Send(message=message, microbatch=m):
                    arrivals[message, m] = self.now_s + self._flight_s(message)
                case Run(task=task, microbatch=m):
                    end_s = self.now_s + duration_s(self.plan.tasks[task])
                    bars.append(Bar(self.program.device, task, m, self.now_s, end_s))
                    self.now_s = end_s
                case _:
                    pass
            self.position += 1
        return self.position > began

    def _flight_s(self, number: int) -> float:
        message = self.plan.messages[number]
        return (self.links.get((message.source, message.destination)) or _PRIOR).seconds(message.nbytes)
