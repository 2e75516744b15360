"""Lists the instructions of every device, one on each line. Devices with the same list share one listing."""

from __future__ import annotations

from collections.abc import Sequence

from flowml.instructions import Feed, Fetch, Instruction, Push, Read, Recv, Run, Send
from flowml.plan import Message, Plan, Program
from flowml.render.scene import input_names, spec_text
from flowml.render.units import bytes_text, clip, flops_text, listed, plural, seconds_text

_NAME = 48
"""The longest name in a row; longer ones are cut."""


def device_lists(plan: Plan) -> list[str]:
    """One block for each distinct program, headed by the devices that run it."""
    blocks: dict[tuple[str, ...], list[Program]] = {}
    for program in plan.programs:
        key = tuple(_line(plan, i, _ordinal(plan, program)) for i in program.instructions)
        blocks.setdefault(key, []).append(program)
    return [_block(plan, programs) for programs in blocks.values()]


def _block(plan: Plan, programs: Sequence[Program]) -> str:
    first = programs[0]
    head = clip(first.device, _NAME)
    if first.constants:
        specs = tuple(spec_text(plan.constants[c].spec) for _, c in first.constants)
        head += f"  (holds {plural(len(specs), 'constant')}: {listed(specs)})"
    if len(programs) > 1:
        others = listed(tuple(clip(p.device, _NAME) for p in programs[1:]), 7)
        head += f"\n  the same list, with its own peers, on {others}"
    lines = [_line(plan, i, {}) for i in first.instructions]
    width = len(str(len(lines)))
    return "\n".join([head, *(f"  {str(i).rjust(width)}  {line}" for i, line in enumerate(lines))])


def _ordinal(plan: Plan, program: Program) -> dict[str, str]:
    """The stage of each peer, so that the lists of two replicas compare equal."""
    for replica in plan.training.replicas if plan.training else ():
        if program.device in replica:
            return {device: f"stage {stage}" for stage, device in enumerate(replica)}
    return {}


def _line(plan: Plan, step: Instruction, peers: dict[str, str]) -> str:
    if isinstance(step, Feed):
        names = tuple(clip(n, _NAME) for n in input_names(plan, step.slots))
        return _row("feed", listed(names, 4), step.microbatch, plan)
    if isinstance(step, Read):
        name = plan.training.stores[step.store].name if plan.training else str(step.store)
        return _row("read", f"{clip(name, _NAME)} ({plural(len(step.leaves), 'leaf', 'leaves')})", None, plan)
    if isinstance(step, Recv):
        message = plan.messages[step.message]
        return _row("recv", f"← {_peer(message.source, peers)}  {_values(message)}", step.microbatch, plan)
    if isinstance(step, Send):
        message = plan.messages[step.message]
        return _row("send", f"→ {_peer(message.destination, peers)}  {_values(message)}", step.microbatch, plan)
    if isinstance(step, Run):
        task = plan.tasks[step.task]
        effort = f"  {flops_text(task.flops)}" + (f", {seconds_text(task.seconds)}" if task.seconds else "")
        return _row("run", clip(task.name, _NAME) + effort, step.microbatch, plan)
    if isinstance(step, Push):
        return _row("push", _push(plan, step.store, step.part), None, plan)
    if isinstance(step, Fetch):
        return _row("fetch", "output " + listed(tuple(map(str, step.slots)), 8), step.microbatch, plan)
    return _row("free", plural(len(step.buffers), "buffer"), None, plan)


def _row(verb: str, text: str, microbatch: int | None, plan: Plan) -> str:
    repeated = plan.training is not None and plan.training.microbatches > 1
    return f"{verb.ljust(5)}  {text}" + (f"  [{microbatch}]" if repeated and microbatch is not None else "")


def _peer(device: str, peers: dict[str, str]) -> str:
    return peers.get(device, clip(device, _NAME))


def _values(message: Message) -> str:
    layers = tuple(dict.fromkeys(clip(t.layer or "value", _NAME) for t in message.transfers))
    return f"{listed(layers)}  {bytes_text(message.nbytes)}"


def _push(plan: Plan, index: int, part: int) -> str:
    if plan.training is None:
        return f"store {index}"
    store = plan.training.stores[index]
    what = "factors" if store.parts[part].factors else "gradient"
    where = "the sum of all replicas" if store.collective else "its home"
    return f"{clip(store.name, _NAME)} → {where}  {what}, {bytes_text(store.part_bytes(store.parts[part]))}"
