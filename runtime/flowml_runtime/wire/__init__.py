"""Defines the messages between peers, as frozen types that are validated when they are decoded.

One msgspec tagged union, `Wire`, contains all message types. A message is a small msgpack header. The arrays that it
announces in `specs` follow as raw bytes, so a decoder knows every length before it reads the payload, and nothing is
unpickled. The types hold ids and clocks only: no array, handle or socket.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from flowml.arrays import ArraySpec
from flowml.numbers import MOST
from flowml_runtime.wire.base import DEADLINE_S as DEADLINE_S
from flowml_runtime.wire.base import MAX_ARRAYS as MAX_ARRAYS
from flowml_runtime.wire.base import MAX_DEADLINE_S as MAX_DEADLINE_S
from flowml_runtime.wire.base import MAX_HEADER_BYTES as MAX_HEADER_BYTES
from flowml_runtime.wire.base import MAX_PAYLOAD_BYTES as MAX_PAYLOAD_BYTES
from flowml_runtime.wire.base import MAX_PROBE_BYTES as MAX_PROBE_BYTES
from flowml_runtime.wire.base import PROTOCOL as PROTOCOL
from flowml_runtime.wire.base import Count as Count
from flowml_runtime.wire.base import Message as Message
from flowml_runtime.wire.base import Name as Name
from flowml_runtime.wire.base import Part as Part
from flowml_runtime.wire.base import PlanMessage as PlanMessage
from flowml_runtime.wire.base import Specs as Specs
from flowml_runtime.wire.base import Text as Text
from flowml_runtime.wire.kept_fits import Claim as Claim
from flowml_runtime.wire.kept_fits import Claimed as Claimed
from flowml_runtime.wire.kept_fits import Completed as Completed
from flowml_runtime.wire.kept_fits import Recover as Recover
from flowml_runtime.wire.kept_fits import Recovered as Recovered
from flowml_runtime.wire.kept_fits import Released as Released
from flowml_runtime.wire.kept_fits import Version as Version
from flowml_runtime.wire.snapshot import AskWrote as AskWrote
from flowml_runtime.wire.snapshot import Buffers as Buffers
from flowml_runtime.wire.snapshot import Copied as Copied
from flowml_runtime.wire.snapshot import Copy as Copy
from flowml_runtime.wire.snapshot import Export as Export
from flowml_runtime.wire.snapshot import Exported as Exported
from flowml_runtime.wire.snapshot import Hold as Hold
from flowml_runtime.wire.snapshot import Paused as Paused
from flowml_runtime.wire.snapshot import Wrote as Wrote
from flowml_runtime.wire.training import Applied as Applied
from flowml_runtime.wire.training import Arrived as Arrived
from flowml_runtime.wire.training import Ask as Ask
from flowml_runtime.wire.training import Batch as Batch
from flowml_runtime.wire.training import Begin as Begin
from flowml_runtime.wire.training import Collective as Collective
from flowml_runtime.wire.training import Commit as Commit
from flowml_runtime.wire.training import Computed as Computed
from flowml_runtime.wire.training import Contribution as Contribution
from flowml_runtime.wire.training import Copies as Copies
from flowml_runtime.wire.training import Forwarded as Forwarded
from flowml_runtime.wire.training import Gossip as Gossip
from flowml_runtime.wire.training import Grant as Grant
from flowml_runtime.wire.training import Halt as Halt
from flowml_runtime.wire.training import Item as Item
from flowml_runtime.wire.training import LeaveOut as LeaveOut
from flowml_runtime.wire.training import LeftOut as LeftOut
from flowml_runtime.wire.training import ModelState as ModelState
from flowml_runtime.wire.training import NonFinite as NonFinite
from flowml_runtime.wire.training import OwnState as OwnState
from flowml_runtime.wire.training import Published as Published
from flowml_runtime.wire.training import Report as Report
from flowml_runtime.wire.training import Retired as Retired
from flowml_runtime.wire.training import Settled as Settled
from flowml_runtime.wire.training import Shared as Shared
from flowml_runtime.wire.training import SiteState as SiteState
from flowml_runtime.wire.training import Source as Source
from flowml_runtime.wire.training import StageState as StageState
from flowml_runtime.wire.training import Staleness as Staleness
from flowml_runtime.wire.training import StartTraining as StartTraining
from flowml_runtime.wire.training import Stopped as Stopped
from flowml_runtime.wire.training import StopTraining as StopTraining
from flowml_runtime.wire.training import StoreState as StoreState
from flowml_runtime.wire.training import StoreValue as StoreValue
from flowml_runtime.wire.training import Traffic as Traffic
from flowml_runtime.wire.training import TrainingMessage as TrainingMessage
from flowml_runtime.wire.training import Unsettled as Unsettled
from flowml_runtime.wire.training import Waiting as Waiting

# Membership.


class Hello(Message, frozen=True):
    """First message of every stream: the sender's name, its incarnation and its flowml version, and for whom the stream
    is meant."""

    peer: Name
    incarnation: Count
    protocol: Count
    version: Name
    to: Name
    """The name that the sender has for the receiver."""


class DeviceInfo(msgspec.Struct, frozen=True):
    name: Name  # "worker:1/cpu:0"
    platform: Name
    memory_bytes: Count
    cores: float


class Process(msgspec.Struct, frozen=True):
    """A process: the kernel and namespace of its number, and the number."""

    machine: Name
    pid: Count


class Join(Message, frozen=True):
    """A worker asks to join. `worker` is the name that it asks for; "" lets the coordinator choose."""

    worker: Annotated[str, msgspec.Meta(max_length=256)]
    address: Name
    incarnation: Count
    protocol: Count
    version: Name
    devices: tuple[DeviceInfo, ...]
    python: bool = False
    process: Process | None = None


class Welcome(Message, frozen=True):
    """The answer to a Join with that incarnation. A member whose coordinator has ended waits `away_s` for it to come
    back."""

    worker: Name
    heartbeat_s: float
    away_s: float = 0.0
    incarnation: Count = 0


class Refused(Message, frozen=True):
    reason: Text


class Heartbeat(Message, frozen=True):
    """A member lives. Its newest view is of `epoch`; the coordinator sends the newest of all if that is a later one."""

    worker: Name
    incarnation: Count
    epoch: Count = MOST


class Member(msgspec.Struct, frozen=True):
    worker: Name
    address: Name
    incarnation: Count
    devices: tuple[DeviceInfo, ...]
    python: bool = False
    leaving: bool = False
    """Whether it has given notice that it will leave."""


class Members(Message, frozen=True):
    """The coordinator's view, sent to all members when it changes. `lost` holds those that are lost since the view
    before, and the reasons. `gone` holds all workers that were lost, or have left, and in whose place is no other."""

    epoch: Count
    members: tuple[Member, ...]
    lost: tuple[tuple[Name, Text], ...] = ()
    gone: tuple[tuple[Name, Text], ...] = ()


class Leave(Message, frozen=True):
    worker: Name
    reason: Text = ""


class Notice(Message, frozen=True):
    """A worker is to leave soon, and hands over what it does. From itself, or from an observer."""

    worker: Name


class Exited(Message, frozen=True):
    """From the process that started a worker: the worker's process has ended."""

    worker: Name
    process: Process
    reason: Text


class Replace(Message, frozen=True):
    """Have another worker in the place of a lost one. A driver asks the coordinator. The coordinator asks a spare
    worker, which joins under that name with an incarnation later than `after`, or a launcher, which starts one."""

    worker: Name
    after: Count = 0


class Probe(Message, frozen=True):
    """A message that measures a link, answered by `Probed`. It may carry one array, of which only the time counts.

    With `peer`, the receiver measures its link to that peer with messages of up to `nbytes` and answers the figures.
    """

    number: Count
    peer: Annotated[str, msgspec.Meta(max_length=256)] = ""
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROBE_BYTES)] = 0


class Probed(Message, frozen=True):
    """The answer to Probe `number`. If the probe asked for a link, it holds the figures, or `error` says why not."""

    number: Count
    way: Annotated[str, msgspec.Meta(max_length=64)] = ""
    latency_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_S)] = 0.0
    bytes_per_s: Annotated[float, msgspec.Meta(ge=0, le=1e15)] = 0.0
    error: Text = ""


class Contradicted(Message, frozen=True):
    """To the driver of a plan: large sends to `peer` were far slower than the plan's figure. The best had this rate."""

    peer: Name
    bytes_per_s: Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class LoadPlan(PlanMessage, frozen=True):
    """A piece of a plan to load, as one uint8 array: first the plan itself (part ""), then its large parts, in order.

    The part has `nbytes` in all, and this piece begins at `start`. After the `last` piece the worker compiles
    everything, then answers Loaded. `deadline_s` limits each wait of the plan's steps. The first piece says which
    constants are kept values: (device, constant of the plan, name). `rehearse`: each task is run once.
    """

    peers: tuple[Name, ...] = ()
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_DEADLINE_S)] = DEADLINE_S
    held: Annotated[tuple[tuple[Name, Count, Count], ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    part: Annotated[str, msgspec.Meta(max_length=256)] = ""
    start: Count = 0
    nbytes: Count = 0
    last: bool = True
    rehearse: bool = False


class Loaded(PlanMessage, frozen=True):
    worker: Name


class Unload(PlanMessage, frozen=True):
    pass


class Value(PlanMessage, frozen=True):
    """Arrays for a Recv. The key in the rendezvous is (plan, step, kind, index, microbatch, device).

    `kind` is "edge" (index: message of the plan), "feed" (driver to device; index 0; one for each step and device,
    even if empty, because it starts the step) or "fetch" (device to driver; index: device number in the plan;
    `slots`: which outputs these are).

    A feed may name inputs that the worker keeps: `names` then has an entry for each input, 0 for those that follow as
    arrays. The step keeps its outputs under the names `keep` + slot; 0 if it keeps none.
    """

    step: Count
    kind: Literal["edge", "feed", "fetch"]
    index: Count
    device: Name
    microbatch: Count = 0
    slots: tuple[Count, ...] = ()
    names: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    keep: Count = 0


class Bring(Message, frozen=True):
    """Driver to worker: keep these arrays on `device` under `names`. No step overwrites those that are `lent`."""

    device: Name
    names: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_ARRAYS)]
    lent: bool = False


class BringPiece(Message, frozen=True):
    """Driver to worker: bytes from `start` on of an array to keep on `device` under `name`. No step overwrites it."""

    device: Name
    name: Count
    whole: ArraySpec
    start: Count = 0


class Recall(Message, frozen=True):
    """Driver to worker: send the kept values `names`, once they are made. Answered by Recalled `number`."""

    number: Count
    names: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_ARRAYS)]


class Recalled(Message, frozen=True):
    """The values of Recall `number`, or why one of them does not exist."""

    number: Count
    error: Text = ""


class Write(Message, frozen=True):
    """Driver to worker: write the kept values `names`, once they are made, to the new file `file` in `folder`. The
    driver has put `token` there, so that a worker that sees another disk can say so. Answered by Written `number`."""

    number: Count
    names: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_ARRAYS)]
    folder: Text
    file: Name
    token: Name


class Written(Message, frozen=True):
    """Where the values of Write `number` are in the file. Without `parts` the worker does not see the folder."""

    number: Count
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=MAX_ARRAYS)] = ()
    error: Text = ""


class ReadFile(Message, frozen=True):
    """Driver to worker: keep on `device` under `names` the arrays that are `parts` of the file `file` in `folder`.
    Those with another checksum are not what the driver means. Answered by FileRead `number`."""

    number: Count
    device: Name
    names: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_ARRAYS)]
    folder: Text
    file: Name
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=MAX_ARRAYS)]


class FileRead(Message, frozen=True):
    """ReadFile `number` is done: whether its arrays are kept. Else the worker does not see that file."""

    number: Count
    kept: bool


class Drop(Message, frozen=True):
    """Driver to worker: the kept values `names` are not needed any more."""

    names: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_ARRAYS)]


class Taken(PlanMessage, frozen=True):
    """Consumer to producer of an edge, on `device`: the consumer has taken this step's value of message `index`.

    It is sent only for edges of large values, whose producer may be only a few steps ahead.
    """

    step: Count
    index: Count
    device: Name


FaultKind = Literal["error", "deadline", "cancelled", "lost", "diverged", "nonfinite"]
"""Which error a fault becomes for the caller."""


class StepFailed(PlanMessage, frozen=True):
    """A step cannot finish. Worker to driver: the cause. Driver to workers: they stop waiting for the step.

    From the driver, `worker` is the lost worker that is the cause, or the driver.
    """

    step: Count
    worker: Name
    node: Text
    kind: FaultKind
    error: Text
    traceback: Text = ""


class StepCheck(PlanMessage, frozen=True):
    """Driver to worker, about a step of which it has heard nothing for long: is it still under way on `device`?

    The worker answers StepFailed if it is not; every result was sent before. For a training plan `step` is the run and
    `device` the worker, which repeats its last StepFailed of that run.
    """

    step: Count
    device: Name


class Failed(PlanMessage, frozen=True):
    """Something outside a step failed on a worker (loading, training). It ends the work of that plan."""

    worker: Name
    node: Text
    error: Text
    traceback: Text = ""


class Unreachable(PlanMessage, frozen=True):
    """A worker to the driver of a plan: its connection to another worker of that plan has ended permanently.

    The driver sends it back, and the worker answers with `heard`, because one that hears nobody may be what is lost.
    """

    worker: Name
    peer: Name
    reason: Text
    heard: bool = False


class Trace(PlanMessage, frozen=True):
    """Start recording what the worker's devices do; with `on` false, stop and answer the recording as `Traced`."""

    on: bool


class Traced(PlanMessage, frozen=True):
    """The answer to Trace. The spans follow, encoded, as one uint8 array; `now_ns` is the worker's `clock`."""

    worker: Name
    clock: Text
    now_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


# fmt: off
Wire = (
    Hello | Join | Welcome | Refused | Heartbeat | Members | Leave | Notice | Exited | Replace | Probe | Probed
    | Contradicted | LoadPlan | Loaded | Unload | Value | Bring | BringPiece | Recall | Recalled | Write | Written
    | ReadFile | FileRead | Drop | Taken | StepFailed | StepCheck | Failed | Unreachable | Trace | Traced
    | StartTraining | Source | Batch | StoreValue | OwnState | ModelState | Gossip | Ask | Grant | Begin | Contribution
    | Arrived | Commit | Computed | Halt | Published | Applied | Collective | Shared | Settled | Report | NonFinite
    | Staleness | LeaveOut | LeftOut | Forwarded | Traffic | Retired | StopTraining | Hold | Paused | Export | Exported
    | Buffers | Copy | Copied | Wrote | AskWrote | Claim | Claimed | Completed | Recover | Recovered | Released
)
# fmt: on

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Wire)


def encode(message: Wire) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Wire:
    """Raises msgspec.DecodeError (ValidationError) for anything that is not a well-formed message."""
    if len(data) > MAX_HEADER_BYTES:
        raise msgspec.ValidationError(f"header of {len(data)} bytes exceeds {MAX_HEADER_BYTES}")
    message = _decoder.decode(data)
    limit = MAX_PROBE_BYTES if isinstance(message, Probe) else MAX_PAYLOAD_BYTES
    if sum(s.nbytes for s in message.specs) > limit:
        raise msgspec.ValidationError(f"payload exceeds {limit} bytes")
    return message
