"""A plan that the workers have loaded, as the driver calls it: where its inputs go, and where its outputs come from."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import not_
from typing import Any

from flowml.devices import worker_of
from flowml.instructions import Fetch, Keep
from flowml.plan import ArraySpec, Plan
from flowml_runtime import wire
from flowml_runtime.driver.call_io import Feeder, Restorer
from flowml_runtime.driver.captures import Captures
from flowml_runtime.driver.donation import Donation
from flowml_runtime.driver.holdings import bytes_on_devices
from flowml_runtime.driver.remote import Kind, Remote
from flowml_runtime.driver.steps import Steps
from flowml_runtime.execution.future import Future
from flowml_runtime.execution.inline import LocalStep
from flowml_runtime.execution.programs import Array, feed_slots

IN_FLIGHT_BYTES = 512 * 2**20
"""The most memory for inputs and results of the calls in flight. Two calls are allowed even if they need more."""


@dataclass(frozen=True)
class FeedPort:
    """The inputs that are sent to one device to start a step."""

    worker: str
    device: str
    slots: tuple[int, ...]
    specs: tuple[ArraySpec, ...]

    def feed(self, plan_id: str, step: int, buffers: Sequence[Any], keep: int) -> tuple[wire.Value, list[Array]]:
        """The message that starts a step, and its arrays. Inputs that are on the device are sent as their names."""
        arrays = [buffers[s] for s in self.slots]
        names: tuple[int, ...] = ()
        specs = self.specs
        if Remote in set(map(type, arrays)):
            names = tuple([a.number if type(a) is Remote else 0 for a in arrays])
            specs = tuple(compress(specs, map(not_, names)))
            arrays = list(compress(arrays, map(not_, names)))
        value = wire.Value(
            plan_id=plan_id,
            step=step,
            kind="feed",
            index=0,
            device=self.device,
            slots=self.slots,
            specs=specs,
            names=names,
            keep=keep,
        )
        return value, arrays


@dataclass(eq=False)
class LoadedPlan:
    """A plan that all of its workers have compiled. They wait for inputs."""

    plan_id: str
    plan: Plan
    workers: tuple[str, ...]
    ports: tuple[FeedPort, ...] = field(repr=False)
    sources: dict[int, str] = field(repr=False)
    """The device that sends each fetched output, or the report that it keeps its outputs."""
    steps: Steps = field(repr=False)
    prepare: Feeder = field(repr=False)
    restore: Restorer = field(repr=False)
    forget: Callable[[], None] = field(default=lambda: None, repr=False)
    """Makes the owner forget the plan. Called some time after it was unloaded to make room."""
    local: LocalStep | None = field(default=None, repr=False)
    """A direct way to run the plan in this process, if there is one; None after the plan is unloaded."""
    order: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held while a step is numbered and fed, so that every device gets the steps in the order of their numbers."""
    kinds: tuple[Kind, ...] = field(default=(), repr=False)
    """The outputs that stay on the devices, by slot."""
    kept_bytes: Mapping[str, int] = field(default_factory=dict[str, int], repr=False)
    """By device."""
    brought: tuple[int, ...] = field(default=(), repr=False)
    """The positions of the results that shall stay on a device and are constants."""
    overwrites: tuple[int, ...] = field(default=(), repr=False)
    """The inputs that a call takes away from its caller, if they stay on a device."""
    grown: tuple[Sequence[Kind], Mapping[str, int]] = field(default=((), {}), repr=False)
    """What the last call overwrote, and the bytes that it added; see `growth`."""
    unread: frozenset[int] = field(default=frozenset(), repr=False)
    """Those of them that no device is fed with."""
    maker: Hashable = field(default=None, repr=False)
    """The function, as the lineage of its results names it."""
    captures: Captures = field(default_factory=dict[tuple[str, int], Remote], repr=False)
    """The large arrays that the function closes over, on the devices that read them. They stay while this is loaded."""
    waits: bool = field(default=True, repr=False)
    """Whether a call waits for outputs that it fetches, or for its effects."""

    @property
    def direct(self) -> Callable[[Sequence[Any]], Sequence[Array]] | None:
        """The whole plan as a function of JAX arrays, if it is one task in this process and no trace is recorded."""
        return None if self.local is None or self.local.recorded else self.local.direct

    def growth(self, buffers: Sequence[Any]) -> Mapping[str, int]:
        """Bytes that a call adds to the values that stay, by device."""
        taken = [buffers[i].kind for i in self.overwrites if type(buffers[i]) is Remote]
        known, adds = self.grown
        if taken != known or not known:
            adds = dict(self.kept_bytes)
            for device, nbytes in bytes_on_devices(taken).items():
                adds[device] = adds.get(device, 0) - nbytes
            self.grown = taken, adds
        return adds

    def donate(self, call: str, buffers: Sequence[Any], future: Future[Any] | None = None) -> Donation | None:
        """The handles that a call was given to overwrite can no longer be used. `future` is that of the call."""
        taken = [buffers[i] for i in self.overwrites if type(buffers[i]) is Remote]
        if not taken:
            return None
        why = Donation(call, future)
        if self.unread:
            unread = [buffers[i] for i in self.unread if type(buffers[i]) is Remote]
            Remote.give_up_all(unread, why, told=False)
            taken = [buffers[i] for i in self.overwrites if i not in self.unread and type(buffers[i]) is Remote]
        Remote.give_up_all(taken, why, told=True)
        return why


def check_donations(handle: LoadedPlan, buffers: Sequence[Any]) -> str:
    """What is wrong if a call donates a value that it is given twice; "" if it does not."""
    if len(set(map(id, buffers))) == len(buffers):
        return ""
    times = Counter([id(b) for b in buffers if type(b) is Remote])
    for position in handle.overwrites:
        if times[id(buffers[position])] > 1:
            name = handle.plan.input_names[position] or position
            return (
                f"{handle.plan.name}: argument {name!r} is donated, and the same handle is another argument too; pass "
                "a copy, or do not donate it"
            )
    return ""


def loaded(
    plan_id: str, plan: Plan, workers: tuple[str, ...], in_flight: int, local: LocalStep | None, captures: Captures
) -> LoadedPlan:
    """The handle of a plan that `workers` have loaded."""
    sources: dict[int, str] = {}
    for program in plan.programs:
        for instruction in program.instructions:
            if isinstance(instruction, Fetch):
                sources.update(dict.fromkeys(instruction.slots, program.device))
            elif isinstance(instruction, Keep) and instruction.done is not None:
                sources[instruction.done] = program.device
    ports: list[FeedPort] = []
    for program in plan.programs if plan.training is None else ():
        fed = feed_slots(program)
        ports.append(FeedPort(worker_of(program.device), program.device, fed, tuple(plan.inputs[i] for i in fed)))
    nbytes = sum(s.nbytes for s in (*plan.inputs, *(o.spec for o in plan.outputs)))
    steps = Steps(plan.name, len(sources), min(in_flight, max(2, IN_FLIGHT_BYTES // max(nbytes, 1))))
    kinds = _kinds(plan)
    kept_bytes = bytes_on_devices(kinds)
    return LoadedPlan(
        plan_id,
        plan,
        workers,
        tuple(ports),
        sources,
        steps,
        Feeder(plan),
        Restorer(plan),
        local=local,
        kinds=kinds,
        kept_bytes=kept_bytes,
        brought=_brought(plan),
        overwrites=plan.donated,
        unread=frozenset(plan.donated) - {s for port in ports for s in port.slots},
        captures=captures,
        waits=_waits(plan),
    )


def _waits(plan: Plan) -> bool:
    """Whether a call waits: for outputs that it fetches, or for its effects, unless outputs that stay tell of them."""
    if any(o.kind == "fetch" for o in plan.outputs) or not plan.outputs:
        return True
    stays = any(o.kind == "keep" for o in plan.outputs)
    return not stays and any(type(i) is Fetch for program in plan.programs for i in program.instructions)


def _kinds(plan: Plan) -> tuple[Kind, ...]:
    kept = {o.index: o for o in reversed(plan.outputs) if o.kind == "keep"}
    return tuple(Kind(kept[i].spec, kept[i].device, kept[i].name) for i in range(len(kept)))


def _brought(plan: Plan) -> tuple[int, ...]:
    """An array of type float0 has no values that could stay anywhere."""
    constants = [p for p, o in enumerate(plan.outputs) if o.stays and o.kind == "constant"]
    return tuple(p for p in constants if plan.outputs[p].spec.dtype != "float0")
