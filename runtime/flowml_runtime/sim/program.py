"""The program of a stage as the simulator runs it: the plan's instructions, and the share of time of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowml.instructions import Instruction, Push, Read, Recv, Run, Send, until_last_message
from flowml.plan import Plan, Training
from flowml.policy.filters import sent_size
from flowml.training.cuts import ends
from flowml_runtime.protocol.training.accounts import NO_ENTRIES

At = tuple[int, int]
"""(replica, stage)"""


@dataclass(frozen=True)
class Edge:
    """A message of the plan: the stage that receives it, and its bytes."""

    to: At
    nbytes: int


@dataclass(frozen=True)
class StageProgram:
    """The instructions of one stage. `shares` has for each instruction its share of the compute time of a step."""

    device: str
    instructions: tuple[Instruction, ...]
    shares: tuple[float, ...]
    edges: Mapping[int, Edge]

    @property
    def paced(self) -> frozenset[int]:
        """The positions of the tasks that share the artificial delay of a step, as on a real worker (`Pace`)."""
        return frozenset(n for n, i in enumerate(until_last_message(self.instructions)) if isinstance(i, Run))

    @property
    def ends(self) -> Mapping[int, int]:
        """As `cuts.ends`."""
        return ends(self.instructions)

    @property
    def receives(self) -> bool:
        """Whether it waits for values of other stages."""
        return any(isinstance(i, Recv) for i in self.instructions)

    def matter(self, computes: bool, delayed: bool) -> tuple[int, ...]:
        """The positions of the instructions that matter: without arithmetic, those that take time, wait, send or end a
        microbatch."""
        if computes:
            return tuple(range(len(self.instructions)))
        kinds = Read, Recv, Send, Push
        pairs, ends = enumerate(zip(self.instructions, self.shares, strict=True)), self.ends
        paced = self.paced if delayed else ()
        return tuple(n for n, (i, share) in pairs if share or isinstance(i, kinds) or n in ends or n in paced)


@dataclass(frozen=True)
class Sizes:
    """The bytes of each store's value, of a version that its home publishes, and of what its filters make of a value,
    or the most possible, of each part of a contribution to it, and of what its home shares in each round of a coupling.
    `whole` are the bytes of each part without filters."""

    stores: tuple[int, ...]
    published: tuple[int, ...]
    told: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[int, ...], ...]
    whole: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(training: Training) -> Sizes:
        return Sizes(
            tuple(s.nbytes for s in training.stores),
            tuple(sent_size(s.policy.pull_filters, s.specs, range(len(s.specs)))[0] for s in training.stores),
            tuple(sent_size(s.policy.filters, s.specs, range(len(s.specs)))[0] for s in training.stores),
            tuple(tuple(map(s.part_bytes, s.parts)) for s in training.stores),
            tuple(tuple(x.nbytes for x in s.coupled.shares) if s.coupled else () for s in training.stores),
            tuple(tuple(part.nbytes for part in s.parts) for s in training.stores),
        )


def programs(plan: Plan, training: Training) -> dict[At, StageProgram]:
    """The programs of all stages of a plan.

    The compute time of a step is that of all tasks of a replica, over all of its stages, in proportion to the plan's
    estimates.
    """
    at = {device: (r, s) for r, devices in enumerate(training.replicas) for s, device in enumerate(devices)}
    own = {p.device: p for p in plan.programs}
    edges = {n: Edge(at[m.destination], m.nbytes) for n, m in enumerate(plan.messages)}
    found: dict[At, StageProgram] = {}
    shares: dict[int, tuple[float, ...]] = {}
    for devices in (training.replicas[replica] for replica in training.live):
        for stage, device in enumerate(devices):
            instructions = own[device].instructions
            if stage not in shares:
                shares |= _shares(plan, [own[d].instructions for d in devices])
            sent = {i.message: edges[i.message] for i in instructions if isinstance(i, Send)} if edges else None
            found[at[device]] = StageProgram(device, instructions, shares[stage], sent or NO_ENTRIES)
    return found


def _shares(plan: Plan, stages: Sequence[Sequence[Instruction]]) -> dict[int, tuple[float, ...]]:
    """For each stage of a replica, the share of each instruction; all of them together are 1.

    Tasks after the last push and send of a stage have no share: they make only what is reported, such as the loss.
    """
    counted = [until_last_message(stage) for stage in stages]
    seconds = [[plan.tasks[i.task].seconds if isinstance(i, Run) else 0.0 for i in row] for row in counted]
    total = sum(map(sum, seconds))
    if total <= 0:  # no estimate: all tasks take the same time
        seconds = [[float(isinstance(i, Run)) for i in row] for row in counted]
        total = sum(map(sum, seconds)) or 1.0
    padded = [row + [0.0] * (len(stage) - len(row)) for row, stage in zip(seconds, stages, strict=True)]
    return {s: tuple(x / total for x in row) for s, row in enumerate(padded)}
