"""Implements the services of a dataflow step: feeds, edges to other devices, and fetches.

`EdgeServices` is common to all plans: a Send pushes to the destination's worker and never waits for its Recv; a Recv
takes a value from the mailbox, with a deadline. `DataflowServices` adds the driver's feeds and fetches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flowml.arrays import TOKEN
from flowml.errors import DeadlineError, FlowmlError, WorkerLostError
from flowml.instructions import Send
from flowml.ir._jax import exact_types
from flowml.plan import ArraySpec, Message
from flowml_runtime import wire
from flowml_runtime.execution.kept import Cell, Kept, cells_of
from flowml_runtime.execution.lane import LARGE_BYTES, ROOM, Lane
from flowml_runtime.execution.mailbox import Cancelled, Claim, Mailbox, Parked
from flowml_runtime.execution.programs import Array, JaxDevice, LoadedProgram, feed_slots, overwritten_slots
from flowml_runtime.execution.recorder import Recorder
from flowml_runtime.execution.results import Results
from flowml_runtime.execution.window import Windows, window
from flowml_runtime.transport.endpoint import Sender
from flowml_runtime.transport.slots import SlotError

EDGE_SLOTS = 2
"""Number of values of an edge for which memory is reserved: one in use and one in flight."""


_NOTHING = np.empty(0, np.uint8)


def reserve_edges(sender: Sender, loaded: LoadedProgram) -> None:
    """Reserve memory for the values that a program sends, ahead of its steps. Raises FlowmlError naming the edge."""
    messages = (i.message for i in loaded.program.instructions if isinstance(i, Send))
    for edge in map(loaded.plan.messages.__getitem__, dict.fromkeys(messages)):
        specs = tuple(ArraySpec(t.shape, t.dtype) for t in edge.transfers)
        try:
            sender.reserve(edge.destination.split("/", 1)[0], specs, EDGE_SLOTS)
        except SlotError as error:
            raise FlowmlError(f"{edge}: {error}") from None


def ready(arrays: Sequence[Array]) -> Sequence[Array]:
    """Wait until the arrays are computed, and return them: sent arrays must not fail or change afterwards."""
    return jax.block_until_ready(arrays)


def host_view(arrays: Sequence[Array], device: JaxDevice) -> Sequence[Array]:
    """The arrays in a form that other threads of this process can use on any device.

    On CPU this is a NumPy view of the buffer, which costs nothing and keeps the buffer alive. XLA never overwrites a
    buffer that has a view, or memory that it did not allocate, even if it is donated. On other platforms it is the JAX
    array itself.
    """
    if device.platform == "cpu":
        return [np.asarray(a) for a in arrays]
    return ready(arrays)


def adopt(arrays: Sequence[Array], device: JaxDevice) -> Sequence[Array]:
    """The arrays; those on another device of this process are moved to `device`."""
    here = {device}
    with exact_types():
        return [jax.device_put(a, device) if isinstance(a, jax.Array) and a.devices() != here else a for a in arrays]


def must_adopt(device: JaxDevice) -> bool:
    """False if all arrays of this process are on `device` already, which is the common case on CPU."""
    return jax.local_device_count() > 1 or device.platform != "cpu"


def at_home(device: JaxDevice) -> bool:
    """True for JAX's default device.

    A result from there is returned unchanged. A result from another device is copied through the host: results of jit
    can be combined freely, but an array committed to a second device cannot.
    """
    return device == jax.local_devices()[0]


def own_array(array: Array) -> Array:
    """An array that a step may overwrite: a copy of one of the caller's, in the same process.

    XLA overwrites no memory that it did not allocate.
    """
    with exact_types():
        return jnp.copy(array) if isinstance(array, jax.Array) else array


class EdgeServices:
    """Sends and receives along a plan's edges for one device. Dataflow and training plans share it."""

    def __init__(
        self,
        plan_id: str,
        loaded: LoadedProgram,
        mailbox: Mailbox,
        sender: Sender,
        deadline_s: float = wire.DEADLINE_S,
        recorder: Recorder | None = None,
    ) -> None:
        self.recorder = recorder or Recorder()
        self.outbox = Lane(f"{loaded.name} send", ROOM)
        self.plan_id = plan_id
        self.device = loaded.name
        self.deadline_s = deadline_s
        self._mailbox = mailbox
        self._sender = sender
        self._adopts = must_adopt(loaded.device)
        self.bind(loaded)

    def bind(self, loaded: LoadedProgram) -> None:
        """Serve this program, which runs on the same device, from now on. No send of another may be under way."""
        self.loaded = loaded
        self._messages: tuple[Message, ...] = loaded.plan.messages
        self._specs = [tuple(ArraySpec(t.shape, t.dtype) for t in m.transfers) for m in self._messages]
        self._large = [m.nbytes >= LARGE_BYTES for m in self._messages]
        self._workers = [m.destination.split("/", 1)[0] for m in self._messages]
        self._sources = [m.source.split("/", 1)[0] for m in self._messages]

    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]:
        try:
            arrays = self._mailbox.take(
                (self.plan_id, step, self.device), ("edge", message, microbatch), self.deadline_s
            )
        except TimeoutError:
            raise self._late(step, message) from None
        return self.adopt(arrays)

    def send(self, step: int, message: int, microbatch: int, arrays: Sequence[Array]) -> None:
        """Send the arrays of a message. Without arrays it says that the microbatch is left out."""
        edge = self._messages[message]
        value = wire.Value(
            plan_id=self.plan_id,
            step=step,
            kind="edge",
            index=message,
            device=edge.destination,
            microbatch=microbatch,
            specs=self._specs[message] if arrays else (),
        )
        worker, device = self._workers[message], self.loaded.device
        if not self._large[message] or not arrays:
            self._push(value, worker, host_view(arrays, device))
            return

        def send() -> None:
            lane, way = f"{self.device} send", self.way(message)
            with self.recorder.record(lane, "send", str(edge), step, microbatch, edge.nbytes, way):
                self._push(value, worker, host_view(arrays, device))

        self.outbox.put(send, lambda error: self.send_failed(step, str(edge), error))

    def _push(self, value: wire.Value, worker: str, arrays: Sequence[Array]) -> None:
        try:
            self._sender.send(worker, value, arrays, self.deadline_s)
        except TimeoutError:
            raise self._stalled(value.step, value.index) from None

    def send_failed(self, step: int, node: str, error: BaseException) -> None:
        """Called on the outbox's thread if a large value could not be sent."""
        raise NotImplementedError

    def way(self, message: int) -> str:
        return self._sender.way(self._workers[message])

    def should_abandon(self, step: int) -> bool:
        return self._mailbox.is_cancelled((self.plan_id, step, self.device))

    def leaves_out(self, microbatch: int) -> bool:
        return False

    def computed(self) -> None:
        return

    def keep(self, step: int, slots: Sequence[int], done: int | None, arrays: Sequence[Array]) -> None:
        raise NotImplementedError("only a dataflow plan keeps outputs")

    def adopt(self, arrays: Sequence[Array]) -> Sequence[Array]:
        return adopt(arrays, self.loaded.device) if self._adopts else arrays

    def _late(self, step: int, message: int) -> DeadlineError:
        edge, worker = self._messages[message], self.device.split("/", 1)[0]
        return self._overdue(step, edge, worker, f"{edge} and it did not come; see whether {edge.source} is stuck")

    def _stalled(self, step: int, message: int) -> DeadlineError:
        edge, worker = self._messages[message], self._workers[message]
        what = f"{edge.destination} to take earlier values of {edge}; see whether that is stuck"
        return self._overdue(step, edge, worker, what)

    def _overdue(self, step: int, edge: Message, worker: str, what: str) -> DeadlineError:
        return DeadlineError(
            f"step {step} of plan {self.loaded.plan.name!r}: {self.device} waited {self.deadline_s:g} s for {what}, "
            "or allow a longer deadline: deadline_s= where the cluster is made",
            worker=worker,
            step=step,
            node=str(edge),
        )


class DataflowServices(EdgeServices):
    """The services of a dataflow plan: inputs come with the feed, outputs go to the driver."""

    def __init__(
        self,
        plan_id: str,
        loaded: LoadedProgram,
        mailbox: Mailbox,
        sender: Sender,
        driver: str,
        deadline_s: float = wire.DEADLINE_S,
        recorder: Recorder | None = None,
        kept: Kept | None = None,
        results: Results | None = None,
    ) -> None:
        super().__init__(plan_id, loaded, mailbox, sender, deadline_s, recorder)
        self._driver = driver
        self._kept = kept or Kept()
        self._results = results
        self._cells: list[Cell] = []
        """The kept values that this step was fed with."""
        self._overwritten = overwritten_slots(loaded)
        self.on_fault: Callable[[int, str, BaseException], None] = lambda *_: None
        """Called with (step, node, error) if a value could not be sent after its step had continued."""
        self._slots = feed_slots(loaded.program)
        self._fed: Mapping[int, Array] = {}
        self._number = loaded.plan.devices.index(self.device)
        self._outputs = {o.index: o.spec for o in loaded.plan.outputs if o.kind == "fetch"}
        self._at_home = at_home(loaded.device)
        self.windows = Windows(self._messages)
        self._windowed = [window(m) > 0 for m in self._messages]
        self._claim: Claim | None = None
        """The claim for which the step was parked."""
        self._awaited = driver
        """The peer whose message is expected next: the driver with a feed, or the peer for which a step is parked."""
        self._expired = -1
        self._lost: dict[str, str] = {}
        """Lost worker -> reason. All that it sent before has arrived."""

    def begin(self, arrays: Sequence[Array]) -> None:
        """Accept the feed of the step that runs next."""
        self._cells = cells_of(arrays)
        self._fed = dict(zip(self._slots, self.adopt(arrays), strict=True))

    def release(self, arrays: Sequence[Array]) -> None:
        self._kept.leave(cells_of(arrays))

    def resume(self) -> None:
        self._awaited = self._driver

    def expect(self) -> None:
        if self._results is None or not self._results.pending:
            self._sender.expect(self._awaited)

    def sends(self, step: int) -> bool:
        """Whether results of a step that has ended here are still to be sent."""
        return self._results is not None and self._results.has(step)

    def end(self, step: int) -> None:
        """Release the inputs, which would otherwise stay alive until the next step."""
        self._fed = {}
        if self._cells:
            self._kept.leave(self._cells)
            self._cells = []
        self._claim = None
        self.windows.finish(step)
        self._mailbox.finish((self.plan_id, step, self.device))

    def lose(self, peer: str, reason: str) -> None:
        """A worker of the plan is lost: steps that wait for something of it fail from now on."""
        self._lost[peer] = reason

    def in_vain(self) -> bool:
        """Whether the step is parked for something that a lost worker will not send."""
        return self._awaited in self._lost

    def expire(self, step: int, claim: Claim) -> None:
        if self._kept.expire(self._cells, claim) or self._mailbox.expire((self.plan_id, step, self.device), claim):
            self._expired = step
            self.windows.cancel(step)

    def receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]:
        arrays = self._receive(step, message, microbatch)
        if self._windowed[message]:
            taken = wire.Taken(plan_id=self.plan_id, step=step, index=message, device=self._messages[message].source)
            with contextlib.suppress(WorkerLostError):  # a lost producer does not wait for it
                self._sender.send(self._sources[message], taken)
        return arrays

    def _receive(self, step: int, message: int, microbatch: int) -> Sequence[Array]:
        scope = (self.plan_id, step, self.device)
        claim = self._claim or self._mailbox.claim(scope, ("edge", message, microbatch))
        if not claim.done:
            self._claim = claim
            self._awaited = self._sources[message]
            raise Parked(claim)
        self._claim = None
        if claim.cancelled:
            if claim.expired:
                raise self._gone(self._sources[message]) or self._late(step, message)
            raise Cancelled(scope)
        return self.adopt(claim.value)

    def _gone(self, peer: str) -> WorkerLostError | None:
        return WorkerLostError(self._lost[peer], worker=peer) if peer in self._lost else None

    def send(self, step: int, message: int, microbatch: int, arrays: Sequence[Array]) -> None:
        if self._windowed[message]:
            try:
                claim = self.windows.enter(message, step)
            except Cancelled:
                if self._expired == step:
                    raise (self._gone(self._workers[message]) or self._stalled(step, message)) from None
                raise
            if claim is not None:
                self._awaited = self._workers[message]
                raise Parked(claim)
        super().send(step, message, microbatch, arrays)

    def send_failed(self, step: int, node: str, error: BaseException) -> None:
        self.on_fault(step, node, error)

    def feed(self, step: int, slots: Sequence[int], microbatch: int) -> Sequence[Array]:
        fed = [self._fed[s] for s in slots]
        if not self._cells:
            return fed
        return self._kept.taken(fed, [s in self._overwritten for s in slots]) or [self._given(step, s) for s in slots]

    def _given(self, step: int, slot: int) -> Array:
        """An input. A kept one may have to be made first, or be in use by a step that was fed before."""
        given = self._fed[slot]
        if not isinstance(given, Cell):
            return given
        sole = slot in self._overwritten
        claim = self._kept.claim(given, sole=sole)
        if not claim.done:
            if self._expired == step:
                raise self._waited(step, slot)
            raise Parked(claim)
        if given.error:
            raise given.why(self.loaded.plan.input_names[slot])
        return given.value

    def _waited(self, step: int, slot: int) -> DeadlineError:
        name, worker = self.loaded.plan.input_names[slot], self.device.split("/", 1)[0]
        return DeadlineError(
            f"step {step} of plan {self.loaded.plan.name!r}: {self.device} waited {self.deadline_s:g} s for input "
            f"{name!r}, which an earlier call makes or reads; see what holds that call, or allow a longer deadline: "
            "deadline_s= where the cluster is made",
            worker=worker,
            step=step,
            node="feed",
        )

    def keep(self, step: int, slots: Sequence[int], done: int | None, arrays: Sequence[Array]) -> None:
        self._kept.fill((self.plan_id, step, self.device), slots, arrays)
        if done is not None:
            specs = (ArraySpec((0,), "uint8"),)
            self._when_ready(step, arrays, lambda _: self._send_fetched(step, (done,), 0, specs, (_NOTHING,)))

    def fetch(self, step: int, slots: Sequence[int], microbatch: int, arrays: Sequence[Array]) -> None:
        specs = tuple(self._outputs.get(s, TOKEN) for s in slots)

        def send(arrays: Sequence[Array]) -> None:
            held = arrays if self._at_home else host_view(arrays, self.loaded.device)
            self._send_fetched(step, slots, microbatch, specs, held)

        self._when_ready(step, arrays, send)

    def _when_ready(self, step: int, arrays: Sequence[Array], send: Callable[[Sequence[Array]], None]) -> None:
        """Send arrays when they are computed: at once, or on another thread if that takes long."""
        if self._results is None or self.recorder.on:  # a trace shows what a device waits for
            send(ready(arrays))
        else:
            self._results.send(step, arrays, send, lambda error: self.send_failed(step, "fetch", error))

    def _send_fetched(
        self, step: int, slots: Sequence[int], microbatch: int, specs: tuple[ArraySpec, ...], arrays: Sequence[Array]
    ) -> None:
        value = wire.Value(
            plan_id=self.plan_id,
            step=step,
            kind="fetch",
            index=self._number,
            device=self.device,
            microbatch=microbatch,
            slots=tuple(slots),
            specs=specs,
        )
        self._sender.send(self._driver, value, arrays)

    def read(self, step: int, store: int, leaves: Sequence[int]) -> Sequence[Array]:
        raise NotImplementedError("a dataflow plan has no stores to read")

    def push(self, step: int, store: int, part: int, arrays: Sequence[Array]) -> None:
        raise NotImplementedError("a dataflow plan has no stores to push to")
