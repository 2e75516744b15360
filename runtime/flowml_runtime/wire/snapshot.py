"""Defines the messages of snapshots: replicas stop before a clock, and workers tell what lives between steps.

Hold      driver -> workers: replicas begin no clock from this one on
Paused    first stage of a replica -> driver: it has stopped
Export    driver -> workers: all replicas have stopped; tell what you keep
Exported  worker -> driver: where the machines here stand, and how many `Buffers` come
Buffers   worker -> driver, and driver -> worker at the beginning of a run that goes on
Copy      worker -> worker: keep this copy, and pass it on along the chain
Copied    the last worker of a chain -> driver: all of it have the copy
Wrote     worker -> driver: what it keeps is in a file, or follows, because it does not see the folder
AskWrote  driver -> worker: it has heard nothing of a folder for a while; say again what was said of it

Each Hold of a run has a larger number than those before it, and what is done because of one has its number too. So a
message that comes again, or late, is known as one that has been dealt with.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from flowml_runtime.wire.base import MAX_ARRAYS, Count, Name, Part, PlanMessage, Text
from flowml_runtime.wire.training import SiteState, StageState, StoreState, TrainingMessage, Waiting

Owner = Annotated[str, msgspec.Meta(max_length=1024)]


class Hold(TrainingMessage, frozen=True):
    """Replicas begin no clock from `clock` on, and do not retire, until a later Hold allows it. The largest clock
    that a message can carry lets them run to the end. With `replica` it is for that one only. With `within` a replica
    stops after its next push, if that is so many clocks away at most (`after_push`)."""

    clock: Count
    replica: Count | None = None
    number: Count = 0
    within: Count = 0


class Paused(TrainingMessage, frozen=True):
    """A replica has stopped as the Hold before the clock `hold` says. Its next clock is `clock`. `pushed` are pairs
    (store, clock) of its newest pushes that may wait at a home: to stores that apply on arrival, or that fold late ones
    in."""

    replica: Count
    hold: Count
    clock: Count
    pushed: tuple[tuple[Count, Count], ...] = ()
    number: Count = 0


class Export(TrainingMessage, frozen=True):
    """All replicas have stopped, with these next clocks. Once everything that they have sent is applied or waits here,
    tell what lives between steps. `pushed` are rows (replica, store, clock) as in `Paused`. `last`: the replicas have
    no more work, so what waits for others is applied. `whole`: tell the driver. `copied`: tell other workers, which
    have the snapshot of number `complete` already, if there is one. With a `folder` each worker writes what it keeps
    into a file there, and tells the driver only the names, and the state of the model. The driver has put `token`
    there."""

    clocks: tuple[Count, ...]
    pushed: tuple[tuple[Count, Count, Count], ...] = ()
    last: bool = False
    number: Count = 0
    whole: bool = True
    copied: bool = False
    complete: Count | None = None
    folder: Text = ""
    token: Annotated[str, msgspec.Meta(max_length=256)] = ""


class Exported(TrainingMessage, frozen=True):
    """Where the machines of a worker stand. So many messages with `buffers` come too, or copies of them are made."""

    stages: tuple[StageState, ...]
    stores: tuple[StoreState, ...]
    buffers: Count
    sites: tuple[SiteState, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    number: Count = 0


class Buffers(TrainingMessage, frozen=True):
    """The buffers of one owner, by name: see `worker.training.resident`. No owner: there are no more."""

    owner: Owner = ""
    names: Annotated[tuple[Owner, ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    number: Count = 0


class Copy(TrainingMessage, frozen=True):
    """A copy of the buffers of `owner` on `worker`, for snapshot `number`; `complete` is as in `Export`. The receiver
    passes it on to the first of `rest`, which has the others to come. `same`: they are those of the complete snapshot,
    and do not come again."""

    owner: Owner
    worker: Name
    names: Annotated[tuple[Owner, ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    rest: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    same: bool = False
    number: Count = 0
    complete: Count | None = None


class Copied(TrainingMessage, frozen=True):
    """All workers of its chain have the copy of the buffers of `owner` on `worker`."""

    owner: Owner
    worker: Name
    names: Annotated[tuple[Owner, ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    number: Count = 0


class Wrote(PlanMessage, frozen=True):
    """What a worker keeps of a snapshot, by name: where it is in the worker's file in the folder, or `error` says why
    it could not be written. Without `parts` the arrays follow, because the worker does not see the folder, and other
    such messages do until the `last`. `plan_id` is the token of the folder."""

    names: Annotated[tuple[Owner, ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    last: bool = True
    error: Text = ""


class AskWrote(PlanMessage, frozen=True):
    """The last `Wrote` of this folder has not come. A worker that still writes answers when it has written."""
