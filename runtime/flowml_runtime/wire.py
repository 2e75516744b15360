"""Defines the messages between peers, as frozen types that are validated when they are decoded.

One msgspec tagged union, `Wire`, contains all message types. A message is a small msgpack header. The arrays that it
announces in `specs` follow as raw bytes, so a decoder knows every length before it reads the payload, and nothing is
unpickled. The types hold ids and clocks only: no array, handle or socket.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from flowml.numbers import MOST
from flowml.plan import ArraySpec

PROTOCOL = 3
"""Version of these messages. Peers of another version are refused at their Hello."""

MAX_HEADER_BYTES = 16 * 2**20
MAX_ARRAYS = 65536
MAX_PAYLOAD_BYTES = 2**36
MAX_PROBE_BYTES = 16 * 2**20
DEADLINE_S = 300.0
"""How long a wait of one worker for another may last, unless the driver says otherwise."""
MAX_DEADLINE_S = 1e9
"""The longest deadline. The longest wait of a thread (`threading.TIMEOUT_MAX`) is not much longer."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=2**20)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Specs = Annotated[tuple[ArraySpec, ...], msgspec.Meta(max_length=MAX_ARRAYS)]


class _Wire(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of the wire messages. `specs` describes the arrays that follow the header, in order."""

    specs: Specs = ()


# Membership.


class Hello(_Wire, frozen=True):
    """First message of every stream: the sender's name, its incarnation and its flowml version."""

    peer: Name
    incarnation: Count
    protocol: Count
    version: Name


class DeviceInfo(msgspec.Struct, frozen=True):
    name: Name  # "worker:1/cpu:0"
    platform: Name
    memory_bytes: Count
    cores: float


class Join(_Wire, frozen=True):
    """A worker asks to join. `worker` is the name that it asks for; "" lets the coordinator choose."""

    worker: Annotated[str, msgspec.Meta(max_length=256)]
    address: Name
    incarnation: Count
    protocol: Count
    version: Name
    devices: tuple[DeviceInfo, ...]
    python: bool = False


class Welcome(_Wire, frozen=True):
    worker: Name
    heartbeat_s: float


class Refused(_Wire, frozen=True):
    reason: Text


class Heartbeat(_Wire, frozen=True):
    worker: Name
    incarnation: Count


class Member(msgspec.Struct, frozen=True):
    worker: Name
    address: Name
    incarnation: Count
    devices: tuple[DeviceInfo, ...]
    python: bool = False


class Members(_Wire, frozen=True):
    """The coordinator's view, sent to all members when it changes. `lost` holds lost workers and the reasons."""

    epoch: Count
    members: tuple[Member, ...]
    lost: tuple[tuple[Name, Text], ...] = ()


class Leave(_Wire, frozen=True):
    worker: Name
    reason: Text = ""


class Probe(_Wire, frozen=True):
    """A message that measures a link, answered by `Probed`. It may carry one array, of which only the time counts.

    With `peer`, the receiver measures its link to that peer with messages of up to `nbytes` and answers the figures.
    """

    number: Count
    peer: Annotated[str, msgspec.Meta(max_length=256)] = ""
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_PROBE_BYTES)] = 0


class Probed(_Wire, frozen=True):
    """The answer to Probe `number`. If the probe asked for a link, it holds the figures, or `error` says why not."""

    number: Count
    way: Annotated[str, msgspec.Meta(max_length=64)] = ""
    latency_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_DEADLINE_S)] = 0.0
    bytes_per_s: Annotated[float, msgspec.Meta(ge=0, le=1e15)] = 0.0
    error: Text = ""


class Contradicted(_Wire, frozen=True):
    """To the driver of a plan: large sends to `peer` were far slower than the plan's figure. The best had this rate."""

    peer: Name
    bytes_per_s: Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class PlanMessage(_Wire, frozen=True, kw_only=True):
    """Base of the messages about a loaded plan, or about the trace of that name."""

    plan_id: Name


class LoadPlan(PlanMessage, frozen=True):
    """A piece of a plan to load, as one uint8 array: first the plan itself (part ""), then its large parts, in order.

    The part has `nbytes` in all, and this piece begins at `start`. After the `last` piece the worker compiles
    everything, then answers Loaded. `deadline_s` limits each wait of the plan's steps.
    """

    peers: tuple[Name, ...] = ()
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_DEADLINE_S)] = DEADLINE_S
    part: Annotated[str, msgspec.Meta(max_length=256)] = ""
    start: Count = 0
    nbytes: Count = 0
    last: bool = True


class Loaded(PlanMessage, frozen=True):
    worker: Name


class Unload(PlanMessage, frozen=True):
    pass


class Value(PlanMessage, frozen=True):
    """Arrays for a Recv. The key in the rendezvous is (plan, step, kind, index, microbatch, device).

    `kind` is "edge" (index: message of the plan), "feed" (driver to device; index 0; one for each step and device,
    even if empty, because it starts the step) or "fetch" (device to driver; index: device number in the plan;
    `slots`: which outputs these are).
    """

    step: Count
    kind: Literal["edge", "feed", "fetch"]
    index: Count
    device: Name
    microbatch: Count = 0
    slots: tuple[Count, ...] = ()


class Taken(PlanMessage, frozen=True):
    """Consumer to producer of an edge, on `device`: the consumer has taken this step's value of message `index`.

    It is sent only for edges of large values, whose producer may be only a few steps ahead.
    """

    step: Count
    index: Count
    device: Name


FaultKind = Literal["error", "deadline", "cancelled", "lost", "diverged"]
"""Which error a fault becomes for the caller."""


class StepFailed(PlanMessage, frozen=True):
    """A step cannot finish. Worker to driver: the cause. Driver to workers: they stop waiting for the step."""

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
    """A worker to the driver of a plan: its connection to another worker of that plan has ended permanently."""

    worker: Name
    peer: Name
    reason: Text


class Trace(PlanMessage, frozen=True):
    """Start recording what the worker's devices do; with `on` false, stop and answer the recording as `Traced`."""

    on: bool


class Traced(PlanMessage, frozen=True):
    """The answer to Trace. The spans follow, encoded, as one uint8 array; `now_ns` is the worker's `clock`."""

    worker: Name
    clock: Text
    now_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


# Training. A clock is a step of one replica; a store homes the parameters of one layer group.


class Item(msgspec.Struct, frozen=True):
    """A work item: `size` examples from `start` in the order of epoch `epoch`. `sequence` is never reused."""

    sequence: Count
    epoch: Count
    start: Count
    size: Count


class TrainingMessage(PlanMessage, frozen=True, kw_only=True):
    """Base of the messages of a run. `cause` is the sender's number of the event that caused this message.

    With the sender's name it identifies the event that a trace links to this one (`protocol.training.story`).
    """

    run: Count
    cause: Count = 0


class StartTraining(TrainingMessage, frozen=True):
    """Begin a fit with a loaded training plan. Store values and the source follow in separate messages.

    `run` is the number of the fit's first step among all steps of the plan, so it is unique for each fit.
    `source` is "shipped" (arrays follow in `Source`) or "fed" (the driver sends each Batch). `delays` are artificial:
    (worker, seconds added to each of its steps). Replicas compare their copies every `check_replicas` steps and at the
    end; 0: never. `on_nonfinite` says how gradients with NaN or infinity are treated.
    """

    total_clocks: Count
    seed: Count
    shuffle: bool
    examples: Count
    source: Literal["shipped", "fed"]
    delays: tuple[tuple[Name, float], ...] = ()
    check_replicas: Count = 0
    on_nonfinite: Literal["refuse", "raise", "apply"] = "refuse"


class Source(TrainingMessage, frozen=True):
    """Whole leaves of an array source for the stages on this worker; `slots` are the batch leaves."""

    slots: tuple[Count, ...]


class Batch(TrainingMessage, frozen=True):
    """The leaves of one fed work item for one device, which may read none of them.

    `variant` is the loaded plan whose programs run on a batch of this shape; "" is the plan of the fit.
    """

    device: Name
    sequence: Count
    slots: tuple[Count, ...]
    variant: Annotated[str, msgspec.Meta(max_length=256)] = ""


class StoreValue(TrainingMessage, frozen=True):
    """A store's parameters and optimizer state. The driver sends it to the homes. At the end every home sends one back,
    and that of the first home holds the values."""

    store: Count
    version: Count


class OwnState(TrainingMessage, frozen=True):
    """The optimizer state for a store whose parameters replicas update themselves: the first one of all replicas here,
    or, to the driver, the last one of `replica`."""

    store: Count
    replica: Count = 0


class Gossip(TrainingMessage, frozen=True):
    """The parameters of a store that replica `source` had before the step of `clock`, for its neighbour `replica`."""

    store: Count
    replica: Count
    source: Count
    clock: Count


class Ask(TrainingMessage, frozen=True):
    """A replica asks for work ahead of time: an item for each of `clocks`. It did not begin the `returned` items."""

    replica: Count
    clocks: tuple[Count, ...]
    returned: tuple[Item, ...] = ()


class Grant(TrainingMessage, frozen=True):
    """The answer to Ask: (clock, item). A clock without an item gets no work."""

    replica: Count
    items: tuple[tuple[Count, Item], ...]
    exhausted: bool = False


class Begin(TrainingMessage, frozen=True):
    """The replica's first stage tells the others to begin `clock` with `item` and to abandon any earlier clock."""

    replica: Count
    clock: Count
    item: Item
    last: bool = False


class Contribution(TrainingMessage, frozen=True):
    """Part of what one replica sends for one store at one clock. `weight` is the number of summed microbatch gradients.

    `empty` says that the replica contributes nothing at this clock, so that the home does not wait for it.
    """

    store: Count
    part: Count
    replica: Count
    incarnation: Count
    clock: Count
    base_version: Count
    weight: Count
    empty: bool = False


class Arrived(TrainingMessage, frozen=True):
    """Home to the leader of the store's group: `replica`'s contribution to `store` at `clock` is complete.

    `weight` is the number of microbatch gradients in it.
    """

    store: Count
    replica: Count
    clock: Count
    weight: Count = 1


class Commit(TrainingMessage, frozen=True):
    """The decision of a group for `clock`: it is complete with the work of all replicas except `excluded`.

    `coefficients` maps replicas to the coefficients of their contributions, if weights do not determine them. `folded`
    are late contributions to earlier clocks that are included now, as (replica, clock).
    """

    clock: Count
    excluded: tuple[Count, ...] = ()
    group: Count = 0
    coefficients: tuple[tuple[Count, float], ...] = ()
    folded: tuple[tuple[Count, Count], ...] = ()


class CutShort(TrainingMessage, frozen=True):
    """From a group's leader: stages that still run `clock` stop after their current microbatch and push what they
    have."""

    group: Count
    clock: Count


class Published(TrainingMessage, frozen=True):
    """A store's new version, pushed to its readers. It includes what every active replica sent before `floor`.

    Without `specs` only the floor changed.
    """

    store: Count
    version: Count
    floor: Count


class Applied(TrainingMessage, frozen=True):
    """Home to the stages of `replica`, which read their own writes: `version` includes its contribution of `clock`."""

    store: Count
    replica: Count
    clock: Count
    version: Count


class Collective(TrainingMessage, frozen=True):
    """A chunk of a bucket that the replicas of a group reduce together; `specs` describes one array.

    `clock` is the clock of the gradients, `piece` the part of the bucket, and `take` the step of the receiver's
    schedule that uses the chunk.
    """

    group: Count
    bucket: Count
    clock: Count
    piece: Count
    take: Count


class Settled(TrainingMessage, frozen=True):
    """The fate of work items, for the ledger: (item, fate). Each grant of an item is settled exactly once.

    `missing` are the groups of stores for which these items do not count, although they count for others.
    """

    replica: Count
    fates: tuple[tuple[Item, Literal["used", "dropped", "folded", "requeued"]], ...]
    missing: tuple[Count, ...] = ()


class Report(TrainingMessage, frozen=True):
    """Loss (slot 0) and aux leaves of one replica's step, summed over its microbatches, sent by the stage that computes
    them."""

    replica: Count
    clock: Count
    item: Item
    slots: tuple[Count, ...]
    seconds: float


class NonFinite(TrainingMessage, frozen=True):
    """Contributions to `store` at `clock` held NaN or infinity and were left out: those of these replicas. Where the
    contributions of all replicas are summed, the sum was left out, and these of the sender's replicas caused it."""

    store: Count
    clock: Count
    replicas: tuple[Count, ...]


class Traffic(TrainingMessage, frozen=True):
    """What this worker sent for each store in the run, counted when it is sent.

    `stores`: (store, contributions pushed, their bytes, bytes of those that crossed to another worker,
    bytes of published parameters that crossed).
    """

    worker: Name
    stores: tuple[tuple[Count, Count, Count, Count, Count], ...]


class Retired(TrainingMessage, frozen=True):
    """This stage of a replica pushes nothing more. From stage 0 it means that the replica has no more work.

    Each stage sends it to the driver and to the homes that apply its contributions on arrival, on the link that carried
    the contributions. Stage 0 sends it to the other stages and to the leader of the decision too.
    """

    replica: Count
    stage: Count = 0


class StopTraining(TrainingMessage, frozen=True):
    """End the run."""


# fmt: off
Wire = (
    Hello | Join | Welcome | Refused | Heartbeat | Members | Leave | Probe | Probed | Contradicted | LoadPlan
    | Loaded | Unload | Value | Taken | StepFailed | StepCheck | Failed | Unreachable | Trace | Traced
    | StartTraining | Source | Batch | StoreValue | OwnState | Gossip | Ask | Grant | Begin | Contribution | Arrived
    | Commit | CutShort | Published | Applied | Collective | Settled | Report | NonFinite | Traffic | Retired
    | StopTraining
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
