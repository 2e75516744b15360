"""Says which stage of a replica may cut a step short between two microbatches, so that all stages leave out the same.

One stage decides before its first instruction of each microbatch. It then skips the instructions of this and later
microbatches, and what it would have sent for them goes out without arrays. A stage that receives such a message leaves
out the microbatch too. So the decision travels on the edges that exist, in their order, and what has begun is finished.

That is sound if a stage knows the fate of a microbatch before it adds the microbatch to a sum of gradients. A stage
knows it after the first message of the microbatch from a stage that knew it. There is always a stage whose decisions
are known in time: the one that makes the weight of a microbatch, because each sum contains the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowml.instructions import Instruction, Recv, Run, Send, until_last_message
from flowml.ir.verify import VerifierError
from flowml.plan import Program, Training
from flowml.policy import cutting


def cuts(training: Training) -> bool:
    """Whether replicas may stop between two microbatches. The rule is the same in all stores."""
    return bool(training.stores) and cutting(training.stores[0].policy.quorum) is not None


def ends(code: Sequence[Instruction]) -> Mapping[int, int]:
    """The positions of the tasks with which a stage has computed a microbatch, and the microbatch.

    Tasks after the last message of the stage do not count, because they make only what is reported.
    """
    last: dict[int, int] = {}
    for n, i in enumerate(until_last_message(code)):
        if isinstance(i, Run) and i.role == "compute":
            last[i.microbatch] = n
    return {n: microbatch for microbatch, n in last.items()}


def deciding_stage(training: Training, programs: Sequence[Program]) -> int:
    """The first stage whose decisions all stages know in time."""
    own = {p.device: p.instructions for p in programs}
    stages = [own[device] for device in training.replicas[0]]
    for stage in range(len(stages)):
        known = _known(stages, stage)
        if all(found.get(m, n) < n for found, code in zip(known, stages, strict=True) for n, m in _added(code)):
            return stage
    raise VerifierError(f"after lower: no stage of {training.replicas[0]} can say which microbatches are left out")


def _added(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """The positions at which a microbatch is added to a sum, and the microbatch."""
    return [(n, i.microbatch) for n, i in enumerate(code) if isinstance(i, Run) and i.role == "add"]


def _known(stages: Sequence[Sequence[Instruction]], decider: int) -> Sequence[Mapping[int, int]]:
    """For each stage and microbatch, the position after which the stage knows its fate, if there is one."""
    known: list[dict[int, int]] = [{} for _ in stages]
    known[decider] = {getattr(i, "microbatch", 0): -1 for i in stages[decider]}
    told: set[tuple[int, int]] = set()
    before = -1
    while len(told) > before:
        before = len(told)
        for found, code in zip(known, stages, strict=True):
            for n, i in enumerate(code):
                if isinstance(i, Send) and found.get(i.microbatch, n) < n:
                    told.add((i.message, i.microbatch))
                elif isinstance(i, Recv) and (i.message, i.microbatch) in told:
                    found.setdefault(i.microbatch, n)
    return known
