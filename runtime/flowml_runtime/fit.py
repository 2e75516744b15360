"""One fit, as the driver sees it: hand out work, keep the account, gather the history and the final stores.

Messages arrive on the endpoint's threads and are queued; the caller's thread takes them out, so that
callbacks run where the user called `fit` and Ctrl-C ends it there.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from flowml._jax import key_implementation
from flowml.data import Source, epoch_order
from flowml.errors import FlowmlError, WorkerError, WorkerLostError
from flowml.plan import Feed, Training
from flowml_runtime.host.programs import buffer_struct
from flowml_runtime.host.run import worker_of
from flowml_runtime.host.session import LoadedPlan, Session
from flowml_runtime.messages import (
    Ask,
    Batch,
    Failed,
    Grant,
    Item,
    Report,
    Retired,
    Settled,
    StartTraining,
    StepFailed,
    StopTraining,
    StoreValue,
    Traffic,
    Wire,
)
from flowml_runtime.messages import Source as SourceMessage
from flowml_runtime.protocol.ledger import Asked, Ledger, Summary, Work
from flowml_runtime.protocol.ledger import Settled as SettledEvent

Record = dict[str, Any]


@dataclass(frozen=True)
class FitOptions:
    """`run` is the number of the fit's first step, `total` how many steps there are (of a global batch each)."""

    run: int
    total: int
    batch_size: int
    seed: int
    shuffle: bool
    delays: Mapping[str, float]
    progress: bool | None


@dataclass(frozen=True)
class Outcome:
    params: list[Any]
    state: list[Any]
    history: list[Record]
    ledger: Summary
    seconds: float
    traffic: Mapping[str, Mapping[str, int]]


@dataclass
class _Tally:
    """The reports of one clock."""

    epoch: int
    losses: dict[int, float] = field(default_factory=dict[int, float])
    aux: dict[int, dict[int, Any]] = field(default_factory=dict[int, dict[int, Any]])


class Fit:
    """Runs one fit over a loaded training plan."""

    def __init__(
        self, session: Session, handle: LoadedPlan, source: Source, options: FitOptions, aux_tree: Any
    ) -> None:
        training = handle.plan.training
        if training is None:
            raise FlowmlError(f"plan {handle.plan.name!r} is not a training plan")
        self._session = session
        self._handle = handle
        self._training: Training = training
        self._source = source
        self._options = options
        self._aux_tree = aux_tree
        self._ids: dict[str, Any] = {"plan_id": handle.plan_id, "run": options.run}
        self._inbox: queue.SimpleQueue[tuple[str, Any, Sequence[Any]]] = queue.SimpleQueue()
        replicas = len(training.replicas)
        steps_per_epoch = source.examples // options.batch_size
        self._work = Work(
            replicas=replicas,
            items_per_epoch=steps_per_epoch * replicas,
            item_size=training.item_size,
            total_clocks=options.total,
            aligned=any(s.clocked for s in training.stores),
        )
        self._ledger = Ledger(self._work)
        self._history = _History(replicas, self._work.clocks_per_epoch, training.aux_leaves, aux_tree)
        self._values: dict[int, tuple[int, Sequence[Any]]] = {}
        self._traffic: dict[str, list[tuple[int, ...]]] = {}
        self._retired: set[tuple[int, int]] = set()
        self._slots = _slots_by_device(handle)

    def run(self, params: Sequence[Any], state: Sequence[Any], callbacks: Sequence[Callable[[Record], Any]]) -> Outcome:
        """Train to the end. Whatever ends it early, the workers are told to stop."""
        self._session.register(self._handle.plan_id, self)
        progress = _Progress(self._options.total, self._options.progress)
        began = time.monotonic()
        try:
            self._start(params, state)
            while not self._is_over():
                self._take(*self._inbox.get())
                for record in self._history.ready():
                    record["seconds"] = time.monotonic() - began
                    progress.show(record)
                    for callback in callbacks:
                        callback(record)
            for record in self._history.rest():
                record["seconds"] = time.monotonic() - began
                progress.show(record)
                for callback in callbacks:
                    callback(record)
            seconds = time.monotonic() - began
        finally:
            progress.close()
            self._broadcast(StopTraining(**self._ids, discard=not self._is_over()))
        return self._outcome(params, state, seconds)

    # The endpoint's threads.

    def on_message(self, peer: str, message: Wire, arrays: Sequence[Any]) -> None:
        self._inbox.put((peer, message, arrays))

    def on_lost(self, peer: str, reason: str) -> None:
        if peer in self._handle.workers:
            self._inbox.put((peer, _Lost(reason), ()))

    # The caller's thread.

    def _start(self, params: Sequence[Any], state: Sequence[Any]) -> None:
        options, shipped = self._options, self._source.arrays is not None
        self._broadcast(
            StartTraining(
                **self._ids,
                total_clocks=options.total,
                seed=options.seed,
                shuffle=options.shuffle,
                examples=self._source.examples,
                source="shipped" if shipped else "fed",
                delays=tuple(options.delays.items()),
            )
        )
        for index, store in enumerate(self._training.stores):
            arrays = [np.asarray(params[i]) for i in store.leaves]
            specs = (*store.specs, *store.state_specs)
            for i, spec in zip(store.state, store.state_specs, strict=True):
                arrays.append(np.asarray(_as_buffer(state[i]), buffer_struct(spec).dtype))
            message = StoreValue(**self._ids, store=index, version=0, specs=specs)
            self._session.endpoint.send(worker_of(store.home), message, arrays)
        if shipped:
            self._ship()

    def _ship(self) -> None:
        """Send each worker the whole leaves that its stages read, once."""
        assert self._source.arrays is not None
        specs = self._training.batch_specs
        by_worker: dict[str, set[int]] = {}
        for device, slots in self._slots.items():
            by_worker.setdefault(worker_of(device), set()).update(slots)
        for worker, slots in by_worker.items():
            order = tuple(sorted(slots))
            arrays = [np.ascontiguousarray(self._source.arrays[s], specs[s].dtype) for s in order]
            whole = tuple(_whole(specs[s], a) for s, a in zip(order, arrays, strict=True))
            message = SourceMessage(**self._ids, slots=order, specs=whole)
            self._session.endpoint.send(worker, message, arrays)

    def _is_over(self) -> bool:
        everyone = sum(len(r) for r in self._training.replicas)
        return len(self._values) == len(self._training.stores) and len(self._retired) == everyone

    def _take(self, peer: str, message: Any, arrays: Sequence[Any]) -> None:
        if isinstance(message, _Lost):
            raise WorkerLostError(
                f"{peer} was lost during training at step {self._history.step}: {message.reason}; start the worker "
                "again and continue from the parameters you have",
                worker=peer,
                step=self._history.step,
            )
        if isinstance(message, Failed | StepFailed):
            raise WorkerError(
                f"{message.worker} failed during training in {message.node!r}: {message.error}",
                worker=message.worker,
                step=self._history.step,
                node=message.node,
                remote_traceback=message.traceback or None,
            )
        if getattr(message, "run", None) != self._options.run:
            return  # of an earlier fit that was stopped
        match message:
            case Ask():
                self._grant(message)
            case Settled():
                self._ledger.step(SettledEvent(message.replica, message.fates))
                self._history.settled(message.replica, message.fates)
            case Report():
                self._history.report(message, arrays)
            case StoreValue():
                self._values[message.store] = (message.version, arrays)
            case Traffic():
                self._traffic[message.worker] = list(message.stores)
            case Retired():
                self._retired.add((message.replica, message.stage))
            case _:
                raise FlowmlError(f"the driver has no use for {type(message).__name__} during training")

    def _grant(self, ask: Ask) -> None:
        for grant in self._ledger.step(Asked(ask.replica, ask.clocks, ask.returned)):
            if self._source.arrays is None:
                for _, item in grant.items:
                    self._feed(ask.replica, item)
            message = Grant(**self._ids, replica=grant.replica, items=grant.items, exhausted=grant.exhausted)
            self._session.endpoint.send(worker_of(self._training.replicas[grant.replica][0]), message)

    def _feed(self, replica: int, item: Item) -> None:
        options, specs = self._options, self._training.batch_specs
        order = epoch_order(self._source.examples, options.seed, item.epoch, shuffle=options.shuffle)
        leaves = self._source.take(order[item.start : item.start + item.size])
        for device in self._training.replicas[replica]:
            slots = self._slots.get(device, ())
            arrays = [np.ascontiguousarray(leaves[s], specs[s].dtype) for s in slots]
            if slots:
                message = Batch(
                    **self._ids,
                    device=device,
                    sequence=item.sequence,
                    slots=slots,
                    specs=tuple(_whole(specs[s], a) for s, a in zip(slots, arrays, strict=True)),
                )
                self._session.endpoint.send(worker_of(device), message, arrays)

    def _broadcast(self, message: Wire) -> None:
        for worker in self._handle.workers:
            try:
                self._session.endpoint.send(worker, message)
            except WorkerLostError:
                continue

    def _outcome(self, params: Sequence[Any], state: Sequence[Any], seconds: float) -> Outcome:
        final, states, newest = list(params), list(state), [-1] * len(state)
        for index, (version, arrays) in self._values.items():
            store = self._training.stores[index]
            for leaf, array in zip(store.leaves, arrays[: len(store.leaves)], strict=True):
                final[leaf] = array
            for leaf, spec, array in zip(store.state, store.state_specs, arrays[len(store.leaves) :], strict=True):
                if version > newest[leaf]:  # a step count kept by several stores: that of the one applied most
                    states[leaf], newest[leaf] = _from_buffer(array, spec.dtype), version
        self._ledger.validate()
        options = self._options

        def order(epoch: int) -> list[int]:
            return epoch_order(self._source.examples, options.seed, epoch, shuffle=options.shuffle).tolist()

        return Outcome(final, states, self._history.records, self._ledger.summary(order), seconds, self._bytes())

    def _bytes(self) -> dict[str, dict[str, int]]:
        """Bytes by store, summed over workers."""
        names = ("pushes", "pushed_bytes", "pushed_wire_bytes", "published_wire_bytes")
        totals: dict[str, dict[str, int]] = {s.name: {n: 0 for n in names} for s in self._training.stores}
        for rows in self._traffic.values():
            for store, *counts in rows:
                for name, count in zip(names, counts, strict=True):
                    totals[self._training.stores[store].name][name] += count
        return totals


@dataclass(frozen=True)
class _Lost:
    reason: str


def _whole(spec: Any, array: np.ndarray) -> Any:
    return type(spec)(array.shape, spec.dtype)


def _as_buffer(value: Any) -> Any:
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return value


def _from_buffer(array: Any, dtype: str) -> Any:
    if not dtype.startswith("key<"):
        return array
    return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=key_implementation(dtype))


def _slots_by_device(handle: LoadedPlan) -> dict[str, tuple[int, ...]]:
    """The batch leaves that each device reads."""
    training = handle.plan.training
    assert training is not None
    found: dict[str, tuple[int, ...]] = {}
    for program in handle.plan.programs:
        slots = {s for i in program.instructions if isinstance(i, Feed) for s in i.slots}
        mine = tuple(sorted(s for s in slots if s < training.batch_leaves))
        if mine:
            found[program.device] = mine
    return found


class _History:
    """Turns the reports of replicas into one record a step, in order of steps.

    A step is complete when every replica has reported it or is known to be past it. The losses of dropped
    work items are left out.
    """

    def __init__(self, replicas: int, clocks_per_epoch: int, aux_leaves: int, aux_tree: Any) -> None:
        self._replicas = replicas
        self._clocks_per_epoch = clocks_per_epoch
        self._aux_leaves = aux_leaves
        self._aux_tree = aux_tree
        self._open: dict[int, _Tally] = {}
        self._newest = [-1] * replicas
        self._dropped: set[int] = set()
        self._items: dict[tuple[int, int], int] = {}
        self.step = 0
        self.records: list[Record] = []

    def report(self, report: Report, arrays: Sequence[Any]) -> None:
        self._newest[report.replica] = max(self._newest[report.replica], report.clock)
        if report.clock < self.step:
            return
        tally = self._open.setdefault(report.clock, _Tally(report.item.epoch))
        self._items[report.replica, report.clock] = report.item.sequence
        for slot, array in zip(report.slots, arrays, strict=True):
            if slot == 0:
                tally.losses[report.replica] = float(np.asarray(array))
            else:
                tally.aux.setdefault(report.replica, {})[slot] = np.asarray(array)

    def settled(self, replica: int, fates: Sequence[tuple[Item, str]]) -> None:
        self._dropped.update(item.sequence for item, fate in fates if fate == "dropped")

    def ready(self) -> list[Record]:
        """Records of the steps that every replica is past."""
        found: list[Record] = []
        while self._open and self._is_complete():
            found.append(self._close())
        return found

    def rest(self) -> list[Record]:
        found: list[Record] = []
        while self._open:
            found.append(self._close())
        return found

    def _is_complete(self) -> bool:
        step = min(self._open)
        tally = self._open[step]
        return max(self._open) > step + 1 or len(tally.losses) == self._replicas

    def _close(self) -> Record:
        step = min(self._open)
        tally = self._open.pop(step)
        self.step = step + 1
        kept = [r for r in tally.losses if self._items[r, step] not in self._dropped] or list(tally.losses)
        losses = [tally.losses[r] for r in kept]
        record: Record = {
            "step": step,
            "epoch": tally.epoch,
            "loss": float(np.mean(losses)) if losses else float("nan"),
            "replicas": len(losses),
        }
        if self._aux_leaves:
            rows = [tally.aux[r] for r in kept if len(tally.aux.get(r, ())) == self._aux_leaves]
            record["aux"] = jax.tree_util.tree_unflatten(
                self._aux_tree, [_over_replicas([row[s + 1] for row in rows]) for s in range(self._aux_leaves)]
            )
        self._items = {k: v for k, v in self._items.items() if k[1] > step}
        self.records.append(record)
        return record


def _over_replicas(values: Sequence[np.ndarray]) -> Any:
    """Floating values are averaged over the replicas, counts are summed."""
    if not values:
        return np.nan
    total = sum(values[1:], values[0])
    return total if values[0].dtype.kind in "iub" else total / len(values)


class _Progress:
    """One line on stderr, rewritten a few times a second, where somebody can see it."""

    def __init__(self, total: int, wanted: bool | None) -> None:
        self._total = total
        self._shown = sys.stderr.isatty() if wanted is None else wanted
        self._next_s = time.monotonic() + 0.5
        self._open = False

    def show(self, record: Record) -> None:
        now = time.monotonic()
        if not self._shown or now < self._next_s:
            return
        self._next_s = now + 0.25
        self._open = True
        rate = (record["step"] + 1) / max(record["seconds"], 1e-9)
        line = f"step {record['step'] + 1}/{self._total}  epoch {record['epoch']}  loss {record['loss']:.4f}"
        sys.stderr.write(f"\r\x1b[K{line}  {rate:.1f} steps/s")
        sys.stderr.flush()

    def close(self) -> None:
        if self._open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
