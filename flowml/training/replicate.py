"""Repeats one replica's programs on the devices of the others. Tasks are shared; only names and numbers change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from flowml.instructions import Recv, Send
from flowml.plan import Message, Program, StoreSpec


@dataclass(frozen=True)
class Template:
    """The programs and messages of the first replica, and its devices, one for each stage."""

    programs: tuple[Program, ...]
    messages: tuple[Message, ...]
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Replicated:
    programs: tuple[Program, ...]
    messages: tuple[Message, ...]
    replicas: tuple[tuple[str, ...], ...]


def replicate(template: Template, blocks: Sequence[Mapping[str, str]]) -> Replicated:
    """Repeat the template for each block (template device -> device). Programs are in the order of replicas."""
    programs: list[Program] = []
    messages: list[Message] = []
    talking = [any(isinstance(i, Send | Recv) for i in program.instructions) for program in template.programs]
    for block in blocks:
        first = len(messages)
        messages.extend(_message(m, block) for m in template.messages)
        pairs = zip(template.programs, talking, strict=True)
        programs.extend(_program(p, block, first if talks else None) for p, talks in pairs)
    return Replicated(
        tuple(programs), tuple(messages), tuple(tuple(b[stage] for stage in template.stages) for b in blocks)
    )


def housed(whole: Replicated, stores: Sequence[StoreSpec]) -> Replicated:
    """With an empty program for each device that only holds stores."""
    there = {program.device for program in whole.programs}
    homes = dict.fromkeys(home for store in stores for home in store.copies if home not in there)
    return replace(whole, programs=(*whole.programs, *(Program(home, ()) for home in homes)))


def _message(message: Message, block: Mapping[str, str]) -> Message:
    source, destination = block[message.source], block[message.destination]
    moved = tuple(msgspec.structs.replace(t, source=source, destination=destination) for t in message.transfers)
    return Message(source, destination, moved)


def _program(program: Program, block: Mapping[str, str], first: int | None) -> Program:
    """A program without messages, `first` is None, shares its instructions with that of the template: there may be very
    many replicas."""
    instructions = program.instructions
    if first is not None:
        instructions = tuple(
            msgspec.structs.replace(i, message=i.message + first) if isinstance(i, Send | Recv) else i
            for i in instructions
        )
    return Program(block[program.device], instructions, program.constants)
