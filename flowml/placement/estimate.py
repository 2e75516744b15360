"""Estimates step time and peak memory by simulating the programs with the cost model, and finds deadlocks.

Each device runs its instruction list on a separate clock. A Recv waits for the arrival time of its message. If no
device can advance before all have finished, the plan would hang. That is a bug of the compiler, and raises an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowml.devices import Device
from flowml.errors import FlowmlError
from flowml.instructions import Feed, Free, Read, Recv, Run, Send
from flowml.placement.links import Links
from flowml.plan import ArraySpec, Estimate, Message, Program, StoreSpec, Task


@dataclass
class _Walker:
    program: Program
    device: Device
    position: int = 0
    clock_s: float = 0.0


def estimate(
    programs: Sequence[Program],
    tasks: Sequence[Task],
    messages: Sequence[Message],
    devices: Mapping[str, Device],
    links: Links,
    single_device_seconds: float,
    sizes: Mapping[str, Sequence[ArraySpec]],
    stores: Sequence[StoreSpec] = (),
) -> Estimate:
    """Estimated seconds, peak bytes and bytes moved of one step. Raises FlowmlError if the programs deadlock."""
    pairs = [(p, devices[p.device]) for p in programs]
    # programs of replicas may share their instructions, and then take the same time on like devices
    walkers = list({(id(p.instructions), device.dispatch_s): _Walker(p, device) for p, device in pairs}.values())
    arrived: dict[tuple[int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for walker in walkers:
            moved |= _advance(walker, tasks, messages, arrived, links)
    stuck = next((w for w in walkers if w.position < len(w.program.instructions)), None)
    if stuck is not None:
        raise FlowmlError(
            f"deadlock in the plan: {stuck.program.device} would wait for ever at "
            f"{stuck.program.instructions[stuck.position]}; this is a bug in flowml, please report it"
        )
    repeats = dict.fromkeys(range(len(messages)), 0)
    for program in programs if messages else ():
        for instruction in program.instructions:
            if isinstance(instruction, Send):
                repeats[instruction.message] += 1
    peaks: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
    """Of programs that have the same instructions, as those of replicas do."""
    for p in programs:
        if (alike := (id(p.instructions), p.constants)) not in peaks:
            peaks[alike] = peak_bytes(p, tasks, messages, sizes["inputs"], sizes["constants"], stores)
    return Estimate(
        step_seconds=max((w.clock_s for w in walkers), default=0.0),
        peak_bytes={p.device: peaks[id(p.instructions), p.constants] for p in programs},
        transfer_bytes=sum(messages[m].nbytes * n for m, n in repeats.items()),
        single_device_seconds=single_device_seconds,
    )


def _advance(
    walker: _Walker,
    tasks: Sequence[Task],
    messages: Sequence[Message],
    arrived: dict[tuple[int, int], float],
    links: Links,
) -> bool:
    start = walker.position
    code = walker.program.instructions
    while walker.position < len(code):
        instruction = code[walker.position]
        if isinstance(instruction, Run):
            walker.clock_s += tasks[instruction.task].seconds + walker.device.dispatch_s
        elif isinstance(instruction, Send):
            message = messages[instruction.message]
            seconds = links.between(message.source, message.destination).seconds(message.nbytes)
            arrived[instruction.message, instruction.microbatch] = walker.clock_s + seconds
        elif isinstance(instruction, Recv):
            key = (instruction.message, instruction.microbatch)
            if key not in arrived:
                break
            walker.clock_s = max(walker.clock_s, arrived[key])
        walker.position += 1
    return walker.position > start


def peak_bytes(
    program: Program,
    tasks: Sequence[Task],
    messages: Sequence[Message],
    inputs: Sequence[ArraySpec],
    constants: Sequence[ArraySpec],
    stores: Sequence[StoreSpec] = (),
) -> int:
    """The largest total size of a device's live buffers in bytes, over its instruction list."""
    sizes = {b: constants[c].nbytes for b, c in program.constants}
    live = peak = sum(sizes.values())
    for instruction in program.instructions:
        if isinstance(instruction, Free):
            live -= sum(sizes.pop(b) for b in instruction.buffers)
            continue
        new: list[tuple[int, int]] = []
        if isinstance(instruction, Run):
            new = list(zip(instruction.outputs, (s.nbytes for s in tasks[instruction.task].outputs), strict=True))
            donated = tasks[instruction.task].donate
            live -= sum(sizes.get(instruction.inputs[i], 0) for i in donated)
            sizes.update({instruction.inputs[i]: 0 for i in donated})
        elif isinstance(instruction, Recv):
            carried = messages[instruction.message].transfers
            new = list(zip(instruction.buffers, (t.nbytes for t in carried), strict=True))
        elif isinstance(instruction, Feed):
            new = [(b, inputs[s].nbytes) for b, s in zip(instruction.buffers, instruction.slots, strict=True)]
        elif isinstance(instruction, Read):
            specs = stores[instruction.store].specs
            new = [(b, specs[i].nbytes) for b, i in zip(instruction.buffers, instruction.leaves, strict=True)]
        sizes.update(new)
        live += sum(n for _, n in new)
        peak = max(peak, live)
    return peak
