"""The hand-over type between the compiler and the runtime.

A `Plan` is everything the workers need and nothing more: XLA executables as serialised StableHLO, one
static instruction list a device, and the table of messages that cross between devices. It imports no
JAX, so the sans-IO protocol, the renderers and a command line without an accelerator can all read one.
Plans are msgspec structs: validated when decoded, never pickled.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np

from flowml.envelope import seal, unseal
from flowml.errors import FlowmlError, PlanError, named

if TYPE_CHECKING:
    from os import PathLike

FORMAT = 2
"""Version of the serialised form. A plan of another format is refused with both numbers in the error."""

DRIVER = "driver"
"""The name under which the process that calls `f(x)` or `fit()` appears as an end of a transfer."""

Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Setting = tuple[
    Annotated[str, msgspec.Meta(max_length=64)], bool | int | Annotated[str, msgspec.Meta(max_length=64)] | None
]
"""A setting of JAX: its name and value."""
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=64)]
"""NumPy's own bound on the rank; without one, multiplying a hostile shape's dimensions would take hours."""


class ArraySpec(msgspec.Struct, frozen=True):
    """Shape and element type of one array.

    `dtype` is a NumPy or ml_dtypes name (`"float32"`, `"bfloat16"`), or `"key<fry>"` for a typed PRNG key
    whose buffer then is that of its uint32 key data (`shape` stays the key array's own).
    """

    shape: Shape
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    weak_type: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes of the array's buffer as it crosses a wire."""
        return math.prod(self.shape) * _item_bytes(self.dtype)


KEY_WORDS: Mapping[str, int] = {"fry": 2, "rbg": 4, "urbg": 4}
"""uint32 words of key data for one key of each PRNG implementation, by the short name in its dtype."""


@functools.lru_cache(maxsize=256)
def _item_bytes(dtype: str) -> int:
    if dtype.startswith("key<"):
        return 4 * KEY_WORDS[dtype[4:-1]]
    if dtype == "float0":
        return 1
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype)).itemsize


class Transfer(msgspec.Struct, frozen=True):
    """One value that crosses from one device to another, once a step (and microbatch)."""

    source: str
    destination: str
    shape: Shape
    dtype: str
    nbytes: Dimension
    layer: str = ""


class Message(msgspec.Struct, frozen=True):
    """All the values that one task sends to one device: a Send and its Recv. `transfers` fixes their order."""

    source: str
    destination: str
    transfers: tuple[Transfer, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.transfers)

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination} ({named([t.layer or 'value' for t in self.transfers])})"


class PlanLink(msgspec.Struct, frozen=True):
    """The link that the estimate took for messages from one device to another; `way` is "" where it is not known.

    `bytes_per_s` is infinite where arrays are handed over by reference.
    """

    source: str
    destination: str
    latency_s: float
    bytes_per_s: float
    way: str = ""
    measured: bool = False

    def seconds(self, nbytes: float) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


class Task(msgspec.Struct, frozen=True):
    """A run of nodes compiled to one XLA executable (`kind="xla"`), or one Python callback (`"python"`).

    `executable` keys `Plan.executables`; equal tasks share one. `donate` are the positions of arguments
    whose buffers the executable may overwrite.
    """

    name: str
    kind: str
    executable: str
    inputs: tuple[ArraySpec, ...]
    outputs: tuple[ArraySpec, ...]
    donate: tuple[Index, ...] = ()
    layers: tuple[str, ...] = ()
    nodes: int = 0
    flops: float = 0.0
    nbytes: float = 0.0
    seconds: float = 0.0


# Instructions. Buffers are small integers local to one device's program; `message`, `task`, `layer` and
# `slot` index the plan's tables; `microbatch` distinguishes the repeats of one step.


class Feed(msgspec.Struct, frozen=True, tag="feed"):
    """Take this step's values of the `slots` from the feed (sent by the driver, or read from the data source)."""

    slots: tuple[Index, ...]
    buffers: tuple[Index, ...]
    microbatch: Index = 0


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Wait until the gate lets this step read store `store`; then bind leaves `leaves` of it to `buffers`."""

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


class Send(msgspec.Struct, frozen=True, tag="send"):
    message: Index
    buffers: tuple[Index, ...]
    microbatch: Index = 0


class Push(msgspec.Struct, frozen=True, tag="push"):
    """Hand part `part` of this step's contribution for store `store` to its home, as soon as it is complete."""

    store: Index
    part: Index
    buffers: tuple[Index, ...]


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Send buffers to the driver as the output `slots` (of this microbatch, when training)."""

    slots: tuple[Index, ...]
    buffers: tuple[Index, ...]
    microbatch: Index = 0


class Free(msgspec.Struct, frozen=True, tag="free"):
    buffers: tuple[Index, ...]


Instruction = Feed | Read | Recv | Run | Send | Push | Fetch | Free


class Program(msgspec.Struct, frozen=True):
    """What one device does in one step, in order. `constants` are (buffer, index into Plan.constants), resident."""

    device: str
    instructions: tuple[Instruction, ...]
    constants: tuple[tuple[Index, Index], ...] = ()


class Constant(msgspec.Struct, frozen=True):
    spec: ArraySpec
    data: bytes


class Output(msgspec.Struct, frozen=True):
    """Where one leaf of the result comes from: a fetch slot, an argument handed through, or a constant."""

    spec: ArraySpec
    kind: str  # "fetch" | "input" | "constant"
    index: Index


class Reduction(msgspec.Struct, frozen=True):
    """How the workers of a stage add a part up among themselves: by which schedule, a rank each.

    `schedule` is "doubling", "direct", "ring", "hierarchical" or "tree" (with `fanout`). `workers` in the order of
    ranks; `hosts` numbers the machine of each.
    """

    schedule: Annotated[str, msgspec.Meta(max_length=32)]
    workers: tuple[str, ...]
    hosts: tuple[Index, ...]
    fanout: Index = 0


class Part(msgspec.Struct, frozen=True):
    """The share of a store's contribution that one stage computes: `leaves` (positions within the store).

    `payload` lists the arrays sent for it; with `factors` these are the operands of the outer products
    that the home forms, a set a microbatch, instead of the gradients themselves. `accumulate` indexes the
    task that adds two payloads (None for factors, and where nothing is ever added).

    With a `reduction` the contributions of all replicas are added up on the way: each home gets their sum. Several
    gradients are then one after the other in one array, which task `pack` makes of them. Task `finish` makes means of a
    step's weighted sums before they are pushed.
    """

    stage: Index
    leaves: tuple[Index, ...]
    payload: tuple[ArraySpec, ...]
    factors: bool = False
    accumulate: Index | None = None
    reduction: Reduction | None = None
    pack: Index | None = None
    finish: Index | None = None

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.payload)


class StoreSpec(msgspec.Struct, frozen=True):
    """Where a layer's parameters live and how they are kept in step.

    `leaves` are positions in the flattened parameters, `state` positions in the flattened optimizer
    state; `home`, `homes` and `readers` are devices. `homes` is empty, or one for each replica where every replica
    keeps a copy (`home` is then the first); the readers of a replica, of equal number and in order of replicas, read
    that of their own. `apply` indexes Plan.tasks: its arguments are the
    parameters, the state, the float32 coefficients (one a contribution), then `arity` contributions, each
    the payloads of all parts in order; its results are the new parameters and the new state. Fewer
    contributions are made up to `arity` with zeros, whose coefficient is 0.
    """

    name: str
    paths: tuple[str, ...]
    leaves: tuple[Index, ...]
    state: tuple[Index, ...]
    specs: tuple[ArraySpec, ...]
    state_specs: tuple[ArraySpec, ...]
    home: str
    readers: tuple[str, ...]
    parts: tuple[Part, ...]
    policy: str
    staleness: float
    every: Annotated[int, msgspec.Meta(ge=1)]
    clocked: bool
    need: Annotated[int, msgspec.Meta(ge=1)]
    apply_mode: str
    apply: Index
    arity: Annotated[int, msgspec.Meta(ge=1)]
    homes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.specs)

    @property
    def copies(self) -> tuple[str, ...]:
        """The devices that hold it."""
        return self.homes or (self.home,)

    @property
    def collective(self) -> bool:
        """Whether replicas add up what they contribute, and each applies the sum to a copy of its own."""
        return bool(self.homes)

    @property
    def decided(self) -> bool:
        """Whether somebody has to decide, clock by clock, whose contributions are applied."""
        return self.clocked and not self.homes

    def read_from(self, homes: Container[str]) -> tuple[str, ...]:
        """The readers of the copies on these devices."""
        share = len(self.readers) // len(self.copies)
        mine = [i for i, home in enumerate(self.copies) if home in homes]
        return tuple(reader for i in mine for reader in self.readers[i * share : (i + 1) * share])

    @property
    def gradient_bytes(self) -> int:
        """Bytes that pushing the plain gradient would take."""
        return self.nbytes

    @property
    def push_bytes(self) -> int:
        """Bytes of one contribution from one replica."""
        return sum(p.nbytes for p in self.parts)


class Training(msgspec.Struct, frozen=True):
    """What a training plan adds: replicas (each a tuple of devices, one a stage), stores and data slots.

    Feed slots below `batch_leaves` are leaves of a microbatch; slot `batch_leaves` is the uint32 pair
    (seed, item) when the loss takes a key. Fetch slot 0 is the loss, the rest the leaves of `aux`.
    """

    replicas: tuple[tuple[str, ...], ...]
    stores: tuple[StoreSpec, ...]
    microbatches: Annotated[int, msgspec.Meta(ge=1)]
    item_size: Annotated[int, msgspec.Meta(ge=1)]
    batch_leaves: Index
    batch_specs: tuple[ArraySpec, ...]
    batch_paths: tuple[str, ...]
    takes_rng: bool
    schedule: str
    aux_leaves: Index = 0


class Partition(msgspec.Struct, frozen=True):
    """The share of the work of one device, per step: names of its tasks, floating point operations, bytes touched."""

    device: str
    tasks: tuple[Task, ...]
    flops: float
    bytes: float


class Estimate(msgspec.Struct, frozen=True):
    """What the cost model expects of one step. Seconds and bytes."""

    step_seconds: float
    peak_bytes: dict[str, int]
    transfer_bytes: int
    single_device_seconds: float


class Choice(msgspec.Struct, frozen=True):
    """One alternative that placement weighed, and what it would cost."""

    name: str
    step_seconds: float
    peak_bytes: int
    note: str = ""
    chosen: bool = False


class NodeView(msgspec.Struct, frozen=True):
    """One node of the placed graph, kept for drawing and explaining."""

    id: Index
    op: str
    layer: str
    device: str
    inputs: tuple[int, ...]
    task: str = ""


class Plan(msgspec.Struct, frozen=True):
    """The serialisable result of compiling a function for a set of devices."""

    name: str
    devices: tuple[str, ...]
    programs: tuple[Program, ...]
    tasks: tuple[Task, ...]
    messages: tuple[Message, ...]
    executables: dict[str, bytes]
    inputs: tuple[ArraySpec, ...]
    input_names: tuple[str, ...]
    outputs: tuple[Output, ...]
    constants: tuple[Constant, ...]
    estimate: Estimate
    choices: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()
    nodes: tuple[NodeView, ...] = ()
    training: Training | None = None
    platforms: tuple[str, ...] = ("cpu",)
    links: tuple[PlanLink, ...] = ()
    settings: tuple[Setting, ...] = ()
    """JAX's settings under which the function was traced; they hold on a worker for what it does for this plan."""

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Every value that crosses between two devices, once each."""
        return tuple(t for m in self.messages for t in m.transfers)

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The share of each device, in the order of `devices`."""
        return tuple(self._partition(p) for p in self.programs)

    def _partition(self, program: Program) -> Partition:
        runs = [i.task for i in program.instructions if isinstance(i, Run)]
        tasks = tuple(self.tasks[i] for i in dict.fromkeys(runs))
        every = [self.tasks[i] for i in runs]
        return Partition(program.device, tasks, sum(t.flops for t in every), sum(t.nbytes for t in every))

    def program(self, device: str) -> Program:
        for program in self.programs:
            if program.device == device:
                return program
        raise FlowmlError(f"plan {self.name!r} has no program for device {device!r}; it has {', '.join(self.devices)}")

    def explain(self) -> str:
        """Text: what was chosen, what it was weighed against, and why."""
        from flowml.render.text import explain

        return explain(self)

    def render(self, path: str | PathLike[str]) -> Path:
        """Draw the plan into `path`; its suffix chooses svg, dot, txt or html. Returns the path written."""
        from flowml.render import render

        return render(self, path)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan, executables included, to one file."""
        Path(path).write_bytes(self.encode())

    def encode(self) -> bytes:
        """The plan as MessagePack, with its format and a checksum in front."""
        return seal(msgspec.msgpack.encode(self), FORMAT)

    @staticmethod
    def decode(data: bytes, origin: str = "plan") -> Plan:
        """The plan that `encode` made these bytes of. Raises PlanError if they are not what it made."""
        body = unseal(data, FORMAT, origin)
        try:
            return _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise PlanError(f"{origin} is not valid: {error}; write it again with plan.save()") from None

    @staticmethod
    def load(path: str | PathLike[str]) -> Plan:
        """Read a plan written by `save`.

        Raises PlanError if it cannot be read, is damaged or of another format; FileNotFoundError if it is not there.
        """
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise  # callers tell "not there yet" from "cannot be read"
        except OSError as error:
            raise PlanError(
                f"{path} cannot be read as a plan: {error.strerror}; give a file from plan.save()"
            ) from None
        return Plan.decode(data, str(path))


def fingerprint(executable: bytes) -> str:
    """The key of an executable in `Plan.executables`."""
    return hashlib.sha256(executable).hexdigest()[:32]


_decoder = msgspec.msgpack.Decoder(Plan)
"""Made here, where one thread imports: msgspec crashes if two threads resolve a type for the first time at once."""
