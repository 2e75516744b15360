"""What a snapshot becomes in another form, and the form in which only places have changed.

If the replicas and stores are the same, everything goes on, under the names of the new stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from flowml.devices import worker_of
from flowml.errors import named
from flowml.plan import StoreSpec, Training
from flowml.policy import filters
from flowml_runtime import wire
from flowml_runtime.driver.training.joining import Buffers, is_weight, times
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.snapshots import Content, Figures, Layer, Snapshot
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.worker.training.resident import of_stage

SUMS, STEPS = "gradients that waited for the next push", "local steps since the last push"
_FILTERS = "what the filters remember"
NUMBERS = ("steps", "taken", "since")
"""Where a replica stands that has own parameters (`worker.training.own_values`)."""
IN_SUMS = {"sums": SUMS, "filters": _FILTERS}
"""What replicas keep of a store in the unit of its sums of gradients."""


@dataclass(frozen=True)
class Reshaped:
    """A snapshot in another form, and sentences about what of it is left out."""

    snapshot: Snapshot
    left_out: tuple[str, ...] = ()


def where_moved(content: Content, training: Training) -> dict[str, tuple[frozenset[int], frozenset[int]]]:
    """The stages of each store there and here, where they differ."""
    found: dict[str, tuple[frozenset[int], frozenset[int]]] = {}
    for store in training.stores:
        tail = f"/{store.name}/sums"
        there = frozenset(int(o.split("/")[3]) for o in content.owners if _is_of_stage(o) and o.endswith(tail))
        here = frozenset(part.stage for part in store.parts)
        if there and there != here:
            found[store.name] = there, here
    return found


def _is_of_stage(owner: str) -> bool:
    return owner.startswith("replica/")


def readers_stay(content: Content, training: Training) -> bool:
    """Whether each layer whose readers remember something is read by the same workers, of those that are not lost."""
    live = {worker_of(device) for r in training.live for device in training.replicas[r]}
    there: dict[str, set[str]] = {}
    for owner in content.owners:
        if owner.startswith("reader/"):
            _, worker, layer = owner.split("/", 2)
            there.setdefault(layer, set()).add(worker)
    readers = {s.name: live.intersection(map(worker_of, s.readers)) for s in training.stores}
    return all(readers[name] == there[name] for name in readers.keys() & there.keys())


def state_moves(content: Content, training: Training) -> bool:
    """Whether leaves of the model's state are on other stages."""
    return tuple(leaf.stage for leaf in training.state) != content.state_stages


@dataclass
class Form:
    """A snapshot on its way into another form."""

    old: Snapshot
    training: Training
    now: Figures
    model: Model
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    arrays: dict[str, Any] = field(default_factory=dict[str, Any])
    left_out: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """What is left out, in words -> of which layers."""

    def __post_init__(self) -> None:
        content = self.old.content
        leaves = (*content.params, *content.opt_state, *content.state, *content.untrained)
        self.arrays.update({leaf.buffer: self.old.arrays[leaf.buffer] for leaf in leaves})

    def of(self, owner: str) -> Buffers | None:
        """The buffers of an owner of the snapshot."""
        names = self.old.content.owners.get(owner)
        return None if names is None else {name: self.old.arrays[f"{owner}/{name}"] for name in names}

    def give(self, owner: str, buffers: Mapping[str, Any]) -> None:
        self.owners[owner] = tuple(buffers)
        self.arrays.update({f"{owner}/{name}": array for name, array in buffers.items()})

    def leave_out(self, what: str, layer: str) -> None:
        found = self.left_out.setdefault(what, [])
        if layer not in found:
            found.append(layer)

    def in_unit(self, store: StoreSpec, what: str, buffers: Buffers) -> Buffers | None:
        """Sums of gradients, or what filters remember of them, for the microbatches of this fit. None if they have no
        such form: gradients with weights are sums of another unit."""
        before, now = self.old.content.figures.microbatches, self.now.microbatches
        if before == now or not buffers or (what == "filters" and not _filters_sums(store)):
            return buffers
        weights = [int(array) for name, array in buffers.items() if is_weight(name)]
        others = any(name.split("/")[-1] != filters.RESIDUAL for name in buffers) if what == "filters" else False
        if store.applies.weighted or others or any(weight * now % before for weight in weights):
            return None
        return {name: times(array, now, before) for name, array in buffers.items()}

    def give_state(self) -> None:
        """The state of the model, as its rules have joined that of all replicas. What is added up begins at one."""
        joined = [self.old.arrays[leaf.buffer] for leaf in self.old.content.state]
        first = self.training.live[0]
        for r in self.training.live if joined else ():
            triples = zip(self.model.rules, joined, self.model.replicas[r], strict=True)
            leaves = [begun if rule == "sum" and r != first else j for rule, j, begun in triples]
            for stage in dict.fromkeys(leaf.stage for leaf in self.training.state):
                mine = [leaves[i] for i, leaf in enumerate(self.training.state) if leaf.stage == stage]
                self.give(f"replica/{r}/stage/{stage}/model/state", {f"leaf/{i}": a for i, a in enumerate(mine)})

    def made(self, stopped: wire.Stopped, ledger: Any) -> Reshaped:
        content = msgspec.structs.replace(
            self.old.content,
            figures=self.now,
            layers=tuple(map(Layer.of, self.training.stores)),
            stopped=stopped,
            ledger=ledger,
            owners=self.owners,
            state_stages=tuple(leaf.stage for leaf in self.training.state),
        )
        told = tuple(f"{what} of {named(layers)}" for what, layers in self.left_out.items())
        return Reshaped(replace(self.old, content=content, arrays=self.arrays), told)


class Moved(Form):
    """The replicas and stores are the same, and some are elsewhere."""

    def result(self, terms: Terms) -> Reshaped:
        content, where = self.old.content, where_moved(self.old.content, self.training)
        readers = {*map(worker_of, (d for store in self.training.stores for d in store.readers))}
        moves = state_moves(content, self.training)
        stays = readers_stay(content, self.training)
        for owner in content.owners:
            kind = owner.split("/")
            if kind[0] != "replica":
                if kind[0] != "reader" or (stays and kind[1] in readers):
                    self.give(owner, self.of(owner) or {})
            elif owner.endswith("/model/state"):
                if not moves:
                    self.give(owner, self.of(owner) or {})
            elif kind[-1] != "read":
                self._move(owner, where)
        self._give_read()
        if moves:
            self.give_state()
        stages = [self._stage(terms, r, s) for r in self.training.live for s in range(terms.stages)]
        return self.made(msgspec.structs.replace(content.stopped, stages=tuple(stages)), content.ledger)

    def _move(self, owner: str, where: Mapping[str, tuple[frozenset[int], frozenset[int]]]) -> None:
        _, r, _, stage, *rest = owner.split("/")
        layer, what = "/".join(rest[:-1]), rest[-1]
        buffers = self.of(owner) or {}
        if what in IN_SUMS:
            (store,) = (store for store in self.training.stores if store.name == layer)
            found = self.in_unit(store, what, buffers)
            if found is None:
                self.leave_out(IN_SUMS[what], layer)
                return
            buffers = found
        to = min(where[layer][1]) if layer in where else int(stage)
        self.give(of_stage(int(r), to, layer, what), buffers)

    def _give_read(self) -> None:
        """What replicas have read of stores, at the stages that read them now."""
        count = len(self.training.replicas)
        for store in self.training.stores:
            for r in self.training.live:
                prefix, tail = f"replica/{r}/", f"/{store.name}/read"
                old = [o for o in self.old.content.owners if o.startswith(prefix) and o.endswith(tail)]
                found = next((b for b in map(self.of, old) if b), None)
                for device in store.read_by(r, count) if found else ():
                    stage = self.training.replicas[r].index(device)
                    self.give(of_stage(r, stage, store.name, "read"), found or {})

    def _stage(self, terms: Terms, replica: int, stage: int) -> wire.StageState:
        """Where a stage stands: where all stages of its replica do, with what concerns its stores."""
        old = [s for s in self.old.content.stopped.stages if s.replica == replica]
        pushes = {n for n, s in enumerate(terms.stores) if stage in s.stages}
        device, count = self.training.replicas[replica][stage], len(self.training.replicas)
        reads = {n for n, s in enumerate(self.training.stores) if device in s.read_by(replica, count)}
        return wire.StageState(
            replica,
            stage,
            old[0].begun,
            old[0].committed,
            tuple(sorted({p for s in old for p in s.pushed if p[0] in pushes})),
            tuple(sorted({a for s in old for a in s.applied if a[0] in pushes | reads})),
            tuple(sorted({t for s in old for t in s.taken if t[0] in reads})),
            next(s for s in old if s.stage == 0).unsettled if stage == 0 else (),
        )


def _filters_sums(store: StoreSpec) -> bool:
    """Whether the filters of a store get sums of gradients: neither changes nor parameters, nor means."""
    return not store.policy.local and all(part.finish is None for part in store.parts)
