"""The instructions of a program: what one device does in a step, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from flowml.arrays import Index


class Feed(msgspec.Struct, frozen=True, tag="feed"):
    """Take this step's values of `slots` from the feed, which the driver sends or a data source gives."""

    slots: tuple[Index, ...]
    buffers: tuple[Index, ...]
    microbatch: Index = 0


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Wait until this step may read store `store`, then bind its leaves `leaves` to `buffers`."""

    store: Index
    leaves: tuple[Index, ...]
    buffers: tuple[Index, ...]


class Recv(msgspec.Struct, frozen=True, tag="recv"):
    message: Index
    buffers: tuple[Index, ...]
    microbatch: Index = 0


class Run(msgspec.Struct, frozen=True, tag="run"):
    task: Index
    inputs: tuple[Index, ...]
    outputs: tuple[Index, ...]
    microbatch: Index = 0
    role: Literal["compute", "add", "finish"] = "compute"  # "add": to the sum over microbatches; "finish": that sum


class Send(msgspec.Struct, frozen=True, tag="send"):
    message: Index
    buffers: tuple[Index, ...]
    microbatch: Index = 0


class Push(msgspec.Struct, frozen=True, tag="push"):
    """Send part `part` of this step's contribution to the home of store `store`, as soon as the part is complete."""

    store: Index
    part: Index
    buffers: tuple[Index, ...]


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Send buffers to the driver as the output `slots` (in training, those of this microbatch)."""

    slots: tuple[Index, ...]
    buffers: tuple[Index, ...]
    microbatch: Index = 0


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Keep buffers on the device after the step, as the kept outputs `slots`.

    The last one of a program reports to the driver, as fetch slot `done`, that the device has all of its outputs. It
    does not if results of the same task are fetched next.
    """

    slots: tuple[Index, ...]
    buffers: tuple[Index, ...]
    done: Index | None = None


class Free(msgspec.Struct, frozen=True, tag="free"):
    buffers: tuple[Index, ...]


Instruction = Feed | Read | Recv | Run | Send | Push | Fetch | Keep | Free


def until_last_message(instructions: Sequence[Instruction]) -> Sequence[Instruction]:
    """The instructions up to the last one that sends; all if none does. Those after it make only what is reported."""
    last = max((n for n, i in enumerate(instructions) if isinstance(i, Push | Send)), default=len(instructions) - 1)
    return instructions[: last + 1]
