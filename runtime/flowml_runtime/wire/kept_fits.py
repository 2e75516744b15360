"""Defines the messages about fits that outlive their driver: workers keep the newest snapshot, and another driver goes
on from it.

Claim      driver -> worker: I train this fit; what do you keep of it?
Claimed    worker -> driver: what is kept, or which driver trains it
Completed  driver -> worker: a snapshot is complete; keep your part of it instead of that of the one before
Recover    driver -> worker: send what you keep
Recovered  worker -> driver
Released   driver -> worker: I do not train it any more

They are plan messages, and the name of the fit stands for that of a plan: a fit outlives its plans.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from flowml.numbers import MOST
from flowml_runtime.wire.base import MAX_ARRAYS, MAX_DEADLINE_S, Count, Name, PlanMessage
from flowml_runtime.wire.snapshot import Owner

Owners = Annotated[tuple[Owner, ...], msgspec.Meta(max_length=MAX_ARRAYS)]


class Version(msgspec.Struct, frozen=True):
    """A snapshot of which a worker keeps its part: the buffers of `owners`. If it knows that all parts exist, it keeps
    the content too, and `steps` are those before the snapshot."""

    key: Name
    owners: Owners
    complete: bool = False
    steps: Count = 0


class Claim(PlanMessage, frozen=True):
    """Answered by Claimed `number`. `lasts`: it outlives the driver. If no other driver comes, workers write what they
    keep into the `directory`, where `keep` snapshots stay; "": they do not."""

    number: Count
    lasts: bool = True
    directory: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    keep: Annotated[int, msgspec.Meta(ge=1, le=MOST)] = 1


class Claimed(PlanMessage, frozen=True):
    """The fit is that of the driver that has claimed it, or still that of the driver `owner`. If its driver is lost,
    the worker keeps its part for `orphan_s` seconds. Earlier drivers of it were `lost`."""

    number: Count
    owner: Annotated[str, msgspec.Meta(max_length=256)] = ""
    orphan_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_S)] = 0.0
    versions: Annotated[tuple[Version, ...], msgspec.Meta(max_length=16)] = ()
    lost: Annotated[tuple[Name, ...], msgspec.Meta(max_length=16)] = ()


class Completed(PlanMessage, frozen=True):
    """All workers have their parts of the snapshot `key`. The first array is its content, encoded. Those named `names`
    follow, which no worker keeps, and those named `fixed`, which are the same in all snapshots. They come once."""

    key: Name
    steps: Count
    names: Owners = ()
    fixed: Owners = ()


class Recover(PlanMessage, frozen=True):
    """Answered by Recovered `number`, with the buffers of `owner`, or the content and the arrays that follow it."""

    number: Count
    key: Name
    owner: Owner = ""


class Recovered(PlanMessage, frozen=True):
    """The arrays of Recover `number`, by name. `found` is false if they are not kept any more."""

    number: Count
    names: Owners = ()
    found: bool = True


class Released(PlanMessage, frozen=True):
    """The driver does not train the fit any more. If it is `over`, nothing of it is kept."""

    over: bool
