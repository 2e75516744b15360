"""Defines `Plan`, which the compiler makes and the runtime runs.

A `Plan` holds exactly what the workers need: XLA executables as serialised StableHLO, one static instruction
list for each device, and the table of messages that cross between devices. This module imports no JAX, so the
sans-IO protocol, the renderers and a command line without an accelerator can read plans. Plans are msgspec
structs: they are validated when decoded and never pickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from flowml.arrays import ArraySpec, Dimension, Index, Shape
from flowml.captured import Captured, OwnCall, from_plan, to_plan
from flowml.envelope import seal, unseal
from flowml.errors import FlowmlError, PlanError, PolicyError, named
from flowml.home import Applies, Buffer, Coupled, Coupling, Local, Reduction, Site
from flowml.instructions import Instruction, Run
from flowml.policy import Code, Policy, Speculate, kinds
from flowml.policy.filtering import pushed_size

if TYPE_CHECKING:
    from os import PathLike

FORMAT = 7
"""Version of the serialised form. A plan of another format is refused with both numbers in the error."""

DRIVER = "driver"
"""The name of the process that calls `f(x)` or `fit()` as the source or destination of a transfer."""

Setting = tuple[
    Annotated[str, msgspec.Meta(max_length=64)], bool | int | Annotated[str, msgspec.Meta(max_length=64)] | None
]
"""A setting of JAX: its name and value."""


class Transfer(msgspec.Struct, frozen=True):
    """One value of layer `layer` that crosses from one device to another, once for each step (and microbatch)."""

    source: str
    destination: str
    shape: Shape
    dtype: str
    nbytes: Dimension
    layer: str = ""


class Message(msgspec.Struct, frozen=True):
    """All values that one task sends to one device, as a Send and its Recv, in the order of `transfers`."""

    source: str
    destination: str
    transfers: tuple[Transfer, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.transfers)

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination} ({named([t.layer or 'value' for t in self.transfers])})"


class PlanLink(msgspec.Struct, frozen=True):
    """The link that the estimate assumes for messages from one device to another.

    `way` is the transport, or "" if unknown. `bytes_per_s` is infinite where arrays are passed by reference.
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
    """Nodes compiled to one XLA executable (`kind="xla"`), or one Python callback (`kind="python"`).

    `executable` is a key of `Plan.executables`; equal tasks share an executable. `donate` lists the positions of
    arguments whose buffers the executable may overwrite.
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
    own: OwnCall = OwnCall()


# Instructions. Buffers are small integers local to one device's program; `message`, `task`, `layer` and
# `slot` index the plan's tables; `microbatch` distinguishes the repeats of one step.


class Program(msgspec.Struct, frozen=True):
    """The instructions of one device for one step, in order.

    `constants` are pairs (buffer, index into Plan.constants) that stay on the device between steps.
    """

    device: str
    instructions: tuple[Instruction, ...]
    constants: tuple[tuple[Index, Index], ...] = ()


class Constant(msgspec.Struct, frozen=True):
    """An array that a function closes over: its bytes, or what names those of a large one."""

    spec: ArraySpec
    data: bytes = b""
    captured: Captured | None = None


class Output(msgspec.Struct, frozen=True):
    """The source of one leaf of the result: a fetch slot, a slot of what is kept on device `device`, an argument
    returned unchanged, or a constant. With `stays` the caller gets a handle of a value on a device."""

    spec: ArraySpec
    kind: str  # "fetch" | "keep" | "input" | "constant"
    index: Index
    stays: bool = False
    device: str = ""
    name: str = ""


class Part(msgspec.Struct, frozen=True):
    """The share of a store's contribution that one stage computes. `leaves` are positions within the store.

    `payload` lists the arrays that are sent. With `factors` they are not gradients but the operands of outer
    products, one set for each microbatch, and the home forms the products. `accumulate` is the index of the task that
    adds two payloads (None for factors, and where nothing is added).

    With a `reduction` the replicas add up their contributions, and each home gets the sum. Task `pack` then
    concatenates several gradients into one array. Task `finish` turns a step's weighted sums into means before they
    are pushed.
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

    @property
    def filtered(self) -> tuple[int, ...]:
        """The arrays of the payload that filters act on: all but weights, which are scalars among factors."""
        if self.factors:
            return tuple(i for i, spec in enumerate(self.payload) if spec.shape)
        return tuple(range(len(self.leaves)))


class StoreSpec(msgspec.Struct, frozen=True):
    """Where a layer's parameters are stored and how its replicas are kept in step.

    `buffers` are the parameters, then the optimizer state.

    `home`, `homes` and `readers` are devices. If every replica keeps a copy, `homes` holds one device for each
    replica, and `home` is the first of them; else `homes` is empty. `readers` are in the order of replicas, with equal
    numbers for each replica, and each reads its replica's copy.
    With `local` the readers update parameters of their own, and the one part is what they send of these.
    With `sites` only the leader of each site takes part. The others get its values.
    If the store is `coupled`, its home and those of other stores exchange values before each update.
    """

    name: str
    buffers: tuple[Buffer, ...]
    home: str
    readers: tuple[str, ...]
    parts: tuple[Part, ...]
    policy: Policy
    applies: Applies
    homes: tuple[str, ...] = ()
    local: Local | None = None
    sites: tuple[Site, ...] = ()
    coupled: Coupled | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(b.name for b in self.buffers if b.kind == "parameter")

    @property
    def leaves(self) -> tuple[int, ...]:
        """The positions of the parameters in the flattened parameters."""
        return tuple(b.index for b in self.buffers if b.kind == "parameter")

    @property
    def specs(self) -> tuple[ArraySpec, ...]:
        return tuple(b.spec for b in self.buffers if b.kind == "parameter")

    @property
    def state(self) -> tuple[int, ...]:
        """The positions of the optimizer state in the flattened state of all optimizers."""
        return tuple(b.index for b in self.buffers if b.kind == "state")

    @property
    def state_specs(self) -> tuple[ArraySpec, ...]:
        return tuple(b.spec for b in self.buffers if b.kind == "state")

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.specs)

    @property
    def copies(self) -> tuple[str, ...]:
        """The devices that hold a copy of the store."""
        return self.homes or (self.home,)

    @property
    def collective(self) -> bool:
        """Whether replicas add up their contributions and each applies the sum to its own copy."""
        return bool(self.homes)

    @property
    def every(self) -> int:
        """The number of steps between pushes."""
        return self.policy.every.push

    @property
    def decided(self) -> bool:
        """Whether the leader decides for each clock which contributions are applied."""
        return self.policy.clocked and not self.homes

    def read_from(self, homes: Container[str]) -> tuple[str, ...]:
        """The readers of the copies on these devices."""
        share = len(self.readers) // len(self.copies)
        mine = [i for i, home in enumerate(self.copies) if home in homes]
        return tuple(reader for i in mine for reader in self.readers[i * share : (i + 1) * share])

    def site_of(self, replica: int) -> Site | None:
        """The site of a replica; None if the store has no sites."""
        return next((site for site in self.sites if replica in site.replicas), None)

    def leader_of(self, replica: int) -> int:
        """The replica that stands for `replica` towards others: itself, if it is in no site."""
        site = self.site_of(replica)
        return site.replicas[0] if site else replica

    @property
    def relayed(self) -> bool:
        """Whether the leader of each site gathers contributions, decides, and passes values on."""
        return bool(self.sites) and self.policy.site_quorum is not None

    @property
    def sites_decide(self) -> bool:
        """Whether what a leader decides about a step is final in its site; see `Policy.sites_decide`."""
        return self.relayed and self.policy.sites_decide

    def sums_in(self, replica: int) -> Site | None:
        """The site of a replica, if it adds up gradients with others there, or has parameters of its own."""
        site = self.site_of(replica) if not self.relayed or self.sites_decide else None
        own = self.local is not None or self.sites_decide
        return site if site is not None and (len(site.replicas) > 1 or own) else None

    @property
    def leaders(self) -> tuple[int, ...]:
        """The leader of each site; () if the store has none."""
        return tuple(site.replicas[0] for site in self.sites)

    def read_by(self, replica: int, replicas: int) -> tuple[str, ...]:
        """The readers of one of so many replicas."""
        share = len(self.readers) // replicas
        return self.readers[replica * share : (replica + 1) * share]

    @property
    def push_bytes(self) -> int:
        """Size of one contribution from one replica in bytes, or the largest possible if it varies."""
        return sum(map(self.part_bytes, self.parts))

    def part_bytes(self, part: Part) -> int:
        """Size of a part as it is sent, or the largest possible if it varies."""
        return pushed_size(self.policy, part.payload, part.filtered)[0]


class StateLeaf(msgspec.Struct, frozen=True):
    """A leaf of the model's state: the stage on which it stays, and the slots in which a microbatch takes it and leaves
    its new value."""

    name: str
    spec: ArraySpec
    stage: Index
    feed: Index
    fetch: Index


class Training(msgspec.Struct, frozen=True):
    """What a training plan adds: replicas (each a tuple of devices, one for each stage), stores and data slots.

    Feed slots below `batch_leaves` are leaves of a microbatch. The next one is the uint32 triple
    (seed, item, microbatch) if the loss takes a key, and the one after it the coefficient of the microbatch if there is
    a code; `state` says which the others are. Fetch slot 0 is the loss, and the next ones are the leaves of `aux`. See
    `training.pieces`, `training.cuts` and `training.state`. `untrained` are the leaves of the parameters that are none.
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
    code: Code | None = None
    cuts_at: Index = 0
    state: tuple[StateLeaf, ...] = ()
    couplings: tuple[Coupling, ...] = ()
    untrained: tuple[tuple[str, ArraySpec], ...] = ()
    lost: tuple[Index, ...] = ()
    """The replicas that take no part, because they are lost (`training.without`). Those of `replicas` keep numbers."""

    @property
    def live(self) -> tuple[int, ...]:
        """The replicas that take part."""
        return tuple(r for r in range(len(self.replicas)) if r not in self.lost)

    @property
    def speculation(self) -> Speculate | None:
        """How the batch is cut into portions, if it is."""
        quorum = self.stores[0].policy.quorum if self.stores else None
        return quorum if isinstance(quorum, Speculate) else None

    @property
    def items(self) -> int:
        """The number of work items in a global batch: one for each replica, or its portions."""
        return len(self.replicas) * (self.speculation.portions if self.speculation else 1)


class Partition(msgspec.Struct, frozen=True):
    """The work of one device in one step: its tasks, floating point operations, and bytes read and written."""

    device: str
    tasks: tuple[Task, ...]
    flops: float
    bytes: float


class Estimate(msgspec.Struct, frozen=True):
    """What the cost model expects of one step, in seconds and bytes.

    `peak_bytes` is the most memory in use at once, by device.
    """

    step_seconds: float
    peak_bytes: dict[str, int]
    transfer_bytes: int
    single_device_seconds: float


class Choice(msgspec.Struct, frozen=True):
    """One alternative that placement compared, with its estimated cost."""

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
    """The result of compiling a function for a set of devices. It can be saved, drawn and inspected."""

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
    donated: tuple[Index, ...] = ()
    """The inputs that a call takes away from its caller, if they stay on a device."""
    settings: tuple[Setting, ...] = ()
    """JAX's settings when the function was traced. A worker uses them for all work on this plan."""
    ordered: bool = False
    """Whether its effects are ordered: a call of it begins after the last such call has ended."""

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Every value that crosses between two devices, once each."""
        return tuple(t for m in self.messages for t in m.transfers)

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The work of each device, in the order of `devices`."""
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
        """Text that says which placement was chosen, what it was compared with, and why."""
        from flowml.render.text import explain

        return explain(self)

    def render(self, path: str | PathLike[str]) -> Path:
        """Draw the plan and write it to `path`. Its suffix chooses svg, dot, txt or html. Returns the path."""
        from flowml.render import render

        return render(self, path)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan, executables included, to one file. Of large closed-over arrays it holds digests."""
        Path(path).write_bytes(self.encode())

    def encode(self) -> bytes:
        """The plan as MessagePack, preceded by its format number and a checksum."""
        return seal(msgspec.msgpack.encode(self, enc_hook=to_plan), FORMAT)

    @staticmethod
    def decode(data: bytes, origin: str = "plan") -> Plan:
        """Read a plan from bytes made by `encode`. Raises PlanError if they are damaged or not a plan.

        `origin` names the bytes in the error.
        """
        body = unseal(data, FORMAT, origin)
        try:
            return _decoder.decode(body)
        except (msgspec.DecodeError, PolicyError) as error:
            raise PlanError(f"{origin} is not valid: {error}; write it again with plan.save()") from None

    @staticmethod
    def load(path: str | PathLike[str]) -> Plan:
        """Read a plan written by `save`.

        Raises PlanError if the file cannot be read, is damaged or of another format; FileNotFoundError if it does not
        exist.
        """
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise  # callers distinguish a missing file from one that cannot be read
        except OSError as error:
            raise PlanError(
                f"{path} cannot be read as a plan: {error.strerror}; give a file from plan.save()"
            ) from None
        return Plan.decode(data, str(path))


def fingerprint(executable: bytes) -> str:
    """The key of an executable in `Plan.executables`."""
    return hashlib.sha256(executable).hexdigest()[:32]


_decoder = msgspec.msgpack.Decoder(Plan, dec_hook=partial(kinds.read, hook=from_plan))
"""Made at import, in one thread: msgspec crashes if two threads resolve a type for the first time at once."""
