"""Brings a snapshot into the form of a fit with other replicas, stages, microbatches, or another placement.

Parameters, optimizer state and the clocks say the same in every form. Two cases differ in what else goes on:

* The replicas and stores are the same, and only their places have changed: everything goes on, under the names of the
  new stages.
* Otherwise every machine begins at the clock of the snapshot. The ledger is counted in the new items. Parameters and
  optimizer state of replicas' own become their mean, or stay, if the replicas are the same. So do sums of gradients and
  residuals, each of which is a share of a mean over replicas. What else belongs to one replica, or waits for a later
  clock, is dropped, and the caller is told.

Where the contributions of replicas are added up, and not averaged, what waits in all of them stays as much in all: each
keeps its own, and newcomers have none, so that nothing of it is lost if they are lost again.

A step adds up the gradients of its microbatches, so with other microbatches sums of gradients, and residuals of such
sums, are multiplied by the ratio of their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import msgspec
import numpy as np

from flowml.errors import CheckpointError
from flowml.plan import StoreSpec, Training
from flowml.policy import Delta
from flowml.training.valued import BATCH
from flowml_runtime import wire
from flowml_runtime.driver.training.amount import with_replicas, work_of
from flowml_runtime.driver.training.forms import (
    IN_SUMS,
    NUMBERS,
    STEPS,
    SUMS,
    Form,
    Moved,
    Reshaped,
    readers_stay,
    state_moves,
    where_moved,
)
from flowml_runtime.driver.training.joining import (
    Buffers,
    is_weight,
    joined_residuals,
    joined_sums,
    mean,
    regrouped_sums,
    times,
)
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.snapshots import Content, Figures, Layer, Snapshot, key_of, values_of
from flowml_runtime.protocol.training.clocks import contained
from flowml_runtime.protocol.training.closing import closed
from flowml_runtime.protocol.training.departed import Departed
from flowml_runtime.protocol.training.ledger import Ledger, LedgerState
from flowml_runtime.protocol.training.owed import Owed
from flowml_runtime.protocol.training.recounting import recounted
from flowml_runtime.protocol.training.terms import Group, Terms
from flowml_runtime.protocol.training.work import Work
from flowml_runtime.worker.training.resident import of_stage


def reshaped(snapshot: Snapshot, training: Training, total: int, now: Figures, model: Model) -> Reshaped:
    """The snapshot for a fit of `total` steps of this plan, with the figures `now`. `model`: with which it begins.

    Raises CheckpointError if the plan cannot go on from a snapshot in another form.
    """
    content = snapshot.content
    same = _same_stores(content, training)
    unit = content.figures.stages, content.figures.microbatches
    stays = (
        not where_moved(content, training) and readers_stay(content, training) and not state_moves(content, training)
    )
    if same and stays and unit == (now.stages, now.microbatches):
        return Reshaped(snapshot)
    if training.speculation is not None and content.figures.replicas != now.replicas:
        raise CheckpointError(
            f"the checkpoint is of {content.figures.replicas} replicas that take portions of a batch, and "
            f"{now.replicas} replicas cut it into others; give as many replicas, or begin from fm.restore(path)"
        )
    terms = Terms.of(training, total)
    if same:
        moved = Moved(snapshot, training, now, model)
        found = moved.result(terms)
        if SUMS not in moved.left_out:  # else the items of these are dropped
            return found
    return _Anew(snapshot, training, now, model).result(terms)


def with_shares(snapshot: Snapshot, params: Any) -> Snapshot:
    """The snapshot with the leaves of a batch as these parameters have them, if the optimizer evaluates the loss. They
    are zeros, whose shapes are those of the shares of replicas (`flowml.training.evaluated`)."""
    given = {tuple(map(key_of, p)): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    arrays = {
        leaf.buffer: np.zeros(given[leaf.path].shape, snapshot.arrays[leaf.buffer].dtype)
        for leaf in snapshot.content.params
        if leaf.path[:1] == (("attr", BATCH),) and leaf.path in given
    }
    return replace(snapshot, arrays={**snapshot.arrays, **arrays})


def _same_stores(content: Content, training: Training) -> bool:
    """Whether replicas and stores are the same, and each store that is on other stages is on one there and here. A fit
    that has gone on without lost replicas has fewer than it began with. Those that this one begins without are left out
    later (`Snapshot.of_live`)."""
    live = {stage.replica for stage in content.stopped.stages}
    if content.figures.replicas != len(training.replicas) or (live and not live.issuperset(training.live)):
        return False
    if content.layers != tuple(map(Layer.of, training.stores)):
        return False
    return all(len(old) == len(new) == 1 for old, new in where_moved(content, training).values())


@dataclass
class _Anew(Form):
    """Replicas or stores are others: every machine begins at one clock."""

    _regrouped: set[str] = field(default_factory=set[str])
    """Layers whose sums of gradients go on in others, and those."""

    def result(self, terms: Terms) -> Reshaped:
        figures, content = self.old.content.figures, self.old.content
        source = figures.examples, figures.batch_size, figures.rest
        work = work_of(self.training, terms, *source, figures.shuffle)
        rows = max(content.stopped.clocks) if terms.aligned else 0
        before = with_replicas(work, figures.replicas, figures.microbatches, *source)
        self._live = sorted({s.replica for s in content.stopped.stages}) or list(range(figures.replicas))
        content = self._without_lost(terms, before)
        waits = {(w.replica, w.clock) for w in content.stopped.waiting}
        unsettled = ((s.replica, u) for s in content.stopped.stages for u in s.unsettled)
        counted = {(r, u.clock) for r, u in unsettled if max(u.counted, default=-1) >= 0 or not u.open}

        def lost(replica: int, clock: int) -> bool:
            left = not self.left_out.keys().isdisjoint((SUMS, STEPS)) or (replica, clock) in waits
            return left and (replica, clock) not in counted

        clock = rows
        if not terms.aligned:
            clock = -(-recounted(content.ledger, before, work, rows, lost).granted // terms.replicas)
        for store in self.training.stores:
            self._give(store, clock, aligned=terms.aligned)
        self._note_what_is_left()
        settled, owed = self._settled(terms, before)
        ledger = recounted(settled, before, work, rows, lost)
        self.give_state()
        ledger = msgspec.structs.replace(ledger, owed=owed if before == work else ())
        return self.made(self._stopped(terms, clock), ledger)

    def _without_lost(self, terms: Terms, work: Work) -> Content:
        """What the snapshot says when the items of replicas that are not there have fates, if each contribution is
        applied on arrival."""
        content = self.old.content
        lost = frozenset(range(content.figures.replicas)).difference(self._live)
        if terms.aligned or not lost or not self._same_layers:
            return content
        ledger = Ledger(work)
        ledger.restore(content.ledger, content.stopped.clocks)
        departed = Departed(terms, ledger, saves=True, outlives=True)
        departed.restore(content.ledger, lost, content.stopped)
        kept = ledger.kept(content.stopped.clocks)
        state = msgspec.structs.replace(kept, unsent=departed.unsent(), owed=departed.owed(content.stopped))
        self.old = replace(self.old, content=msgspec.structs.replace(content, ledger=state))
        return self.old.content

    @property
    def _same_layers(self) -> bool:
        return [layer.name for layer in self.old.content.layers] == [store.name for store in self.training.stores]

    def _settled(self, terms: Terms, work: Work) -> tuple[LedgerState, tuple[Owed, ...]]:
        """The ledger of the snapshot, with the fates of items that were unsettled, if the groups of layers are the
        same. And what replicas have done and not pushed to all stores, by those that go on with it."""
        content, stores = self.old.content, self.training.stores
        firsts = [stage.committed for stage in content.stopped.stages if stage.stage == 0]
        if not self._same_layers or any(len(committed) != len(terms.groups) for committed in firsts):
            return content.ledger, ()
        left = {layer for what in (SUMS, STEPS) for layer in self.left_out.get(what, ())}
        replicas = range(content.figures.replicas)
        found = closed(content.ledger, work, terms, content.stopped, replicas, lambda n: stores[n].name not in left)
        return msgspec.structs.replace(found, owed=()), tuple(self._inherited(found.owed))

    def _inherited(self, owed: Iterable[Owed]) -> Iterator[Owed]:
        """What replicas owe to stores for which one alone has it: in shares of all it is not lost with one of them."""
        pairs = zip(self.training.live, self._heirs(), strict=True)
        heirs = {old: replica for replica, old in pairs if old is not None}
        joined = [s.local is not None and bool(s.policy.filters) for s in self.training.stores]
        stores = {n for n, s in enumerate(self.training.stores) if self._each_goes_on(s) and not joined[n]}
        for one in owed:
            lacking = tuple(n for n in one.lacking if n in stores)
            if one.replica in heirs and lacking:
                yield msgspec.structs.replace(one, replica=heirs[one.replica], lacking=lacking)

    def _each_goes_on(self, store: StoreSpec) -> bool:
        """Whether each replica goes on with what one has gathered for a store, and not with its share of all."""
        before, now = len(self._live), len(self.training.live)
        return before == now or (_adds_up(store) and before < now)

    def _version(self, number: int) -> int:
        """The version of a store: the newest of those that had its parameters."""
        content, mine = self.old.content, {*self.training.stores[number].leaves}
        homes = {content.params[i].buffer.rsplit("/values/", 1)[0] for i in mine if i < len(content.params)}
        versions = {f"home/{layer.name}": s.version for layer, s in _pairs(content)}
        return max((versions[home] for home in homes if home in versions), default=0)

    def _stopped(self, terms: Terms, clock: int) -> wire.Stopped:
        committed = tuple(committed_before(terms, group, clock) for group in terms.groups)
        stages = [wire.StageState(r, s, clock - 1, committed) for r in self.training.live for s in range(terms.stages)]
        stores: list[wire.StoreState] = []
        for number, store in enumerate(terms.stores):
            floor = contained(terms, store.policy.every, clock)
            version = self._version(number)
            stores.append(wire.StoreState(number, version, floor, floor - 1, (floor,) * terms.replicas))
        sites = [
            wire.SiteState(group.number, number, _decided(terms, group, clock))
            for group in terms.groups
            if group.relayed
            for number in range(len(group.sites))
        ]
        return wire.Stopped((clock,) * terms.replicas, tuple(stages), tuple(stores), tuple(sites))

    def _give(self, store: StoreSpec, clock: int, *, aligned: bool) -> None:
        """Give a home and the replicas what they keep for a store."""
        self._give_values(store)
        if store.local is not None:
            self._give_own(store, clock, aligned=aligned)
        mine = {r: {o: b for o, b in self._of_replica(r, store.name).items() if b} for r in self._live}
        if store.name not in self._layers():
            self._regroup(store, mine)
        for what, words in IN_SUMS.items():
            kept = {r: self.in_unit(store, what, one[what]) for r, one in mine.items() if what in one}
            if kept and not self._give_kept(store, what, kept):
                self.leave_out(words, store.name)

    def _regroup(self, store: StoreSpec, mine: Mapping[int, dict[str, Buffers]]) -> None:
        """Have the sums of gradients among what replicas keep, if layers of other names had the parameters."""
        places = [self._place(leaf) for leaf in store.leaves]
        layers = list(dict.fromkeys(layer for layer, _ in places))
        where = [(layers.index(layer), number) for layer, number in places]
        shapes = [self.old.arrays[self.old.content.params[leaf].buffer].shape for leaf in store.leaves]
        for r, kept in mine.items():
            sums = [self._of_replica(r, layer).get("sums", {}) for layer in layers]
            if not any(sums):
                continue
            found = regrouped_sums(sums, where, shapes)
            if found is None:
                self.leave_out(SUMS, store.name)
                kept.pop("sums", None)
            else:
                kept["sums"] = found
                self._regrouped.update((store.name, *layers))

    def _give_kept(self, store: StoreSpec, what: str, kept: Mapping[int, Buffers | None]) -> bool:
        """Give replicas what those before have `kept` of a store. Returns whether it has such a form."""
        adds, stages = _adds_up(store), {part.stage for part in store.parts}
        found = [one for one in kept.values() if one is not None]
        whole = len(found) == (len(kept) if adds else len(self._live))
        known = self._regrouped if what == "sums" else ()
        if not whole or len(stages) != 1 or (store.name not in self._layers() and store.name not in known):
            return False
        if self._each_goes_on(store):
            each = [{} if r is None else kept.get(r) or {} for r in self._heirs()]
        else:
            joined = joined_sums(found, adds=adds) if what == "sums" else joined_residuals(found)
            if joined is None:
                return False
            if adds:
                ratio = len(found), len(self.training.live)
                joined = {n: a if is_weight(n) else times(a, *ratio) for n, a in joined.items()}
            each = [joined] * len(self.training.live)
        for r, buffers in zip(self.training.live, each, strict=True):
            if not buffers:
                continue
            self.give(of_stage(r, min(stages), store.name, what), buffers)
        return True

    def _heirs(self) -> list[int | None]:
        """For each replica the one of the snapshot whose work it goes on with: the same, or one that is not there any
        more. None for a newcomer."""
        there = self.training.live
        others = iter([r for r in self._live if r not in there])
        return [r if r in self._live else next(others, None) for r in there]

    def _give_values(self, store: StoreSpec) -> None:
        """Give a home its values. Several stores may have a leaf of optimizer state, such as a count of their updates:
        each new one gets that of the store that had its parameters."""
        content = self.old.content
        layers = dict.fromkeys(layer for layer, _ in map(self._place, store.leaves) if layer)
        buffers: dict[str, Any] = {}
        for b in store.buffers:
            buffer = (content.params if b.kind == "parameter" else content.opt_state)[b.index].buffer
            mine = (f"{values_of(layer)}/{buffer.partition('/values/')[2]}" for layer in layers)
            buffers[b.name] = self.old.arrays[next((m for m in mine if m in self.old.arrays), buffer)]
        if any(values_of(layer) in content.owners for layer in layers):
            self.give(values_of(store.name), buffers)

    def _layers(self) -> set[str]:
        """The stores that keep the same."""
        return {layer.name for layer in self.old.content.layers} & {
            layer.name for layer in map(Layer.of, self.training.stores) if layer in self.old.content.layers
        }

    def _of_replica(self, replica: int, layer: str) -> dict[str, Buffers]:
        """What a replica keeps of a layer that is on one stage, by its kind."""
        found: dict[str, Buffers] = {}
        for owner in self.old.content.owners:
            kind = owner.split("/")
            if kind[:2] == ["replica", str(replica)] and "/".join(kind[4:-1]) == layer:
                buffers = self.of(owner) or {}
                found[kind[-1]] = found.get(kind[-1], {}) | buffers
        return found

    def _give_own(self, store: StoreSpec, clock: int, *, aligned: bool) -> None:
        """Give each replica parameters and optimizer state of its own: those that it had, or the mean."""
        found = [self._own(store, r) for r in self._live]
        whole = [one for one in found if one is not None]
        if len(whole) < len(found) or not whole:
            if any("own" in self._of_replica(r, layer.name) for r in self._live for layer in self.old.content.layers):
                self.leave_out(STEPS, store.name)
            return
        adds = _adds_up(store)
        keeps = self._each_goes_on(store) and not store.policy.filters
        joined = {name: mean([one[name] for one in whole]) for name in whole[0]}
        at_home = {f"params/{i}": joined[f"started/{i}"] for i in range(len(store.leaves))}
        newcomer = joined | at_home | {"steps": np.asarray(0, np.int64)}
        each = [newcomer if r is None else whole[self._live.index(r)] for r in self._heirs()] if keeps else []
        if adds:
            ratio = len(whole), len(self.training.live)
            for name, began in [(f"params/{i}", joined[f"started/{i}"]) for i in range(len(store.leaves))]:
                joined[name] = began + times(joined[name] - began, *ratio)
        for number, r in enumerate(self.training.live):
            buffers = each[number] if keeps else joined
            if not aligned:
                every, own = store.policy.every, [buffers] if keeps else whole
                waits = adds and any(int(one["steps"]) for one in own)  # then none takes before its next push
                taken = every.taken(clock if waits else clock - 1) if clock else -1
                numbers = {"steps": max(clock - every.pushed(clock), int(waits)), "taken": taken, "since": 0}
                buffers = buffers | {name: np.asarray(value, np.int64) for name, value in numbers.items()}
            self.give(of_stage(r, store.parts[0].stage, store.name, "own"), buffers)
            if any("rhythm" in self._of_replica(r, store.name) for r in self._live):  # simulated replicas go by this
                rhythm = {name: buffers[name] for name in NUMBERS}
                self.give(of_stage(r, store.parts[0].stage, store.name, "rhythm"), rhythm)

    def _own(self, store: StoreSpec, replica: int) -> Buffers | None:
        """What a replica keeps of its own for the parameters of a store, whose layers may have been others."""
        assert store.local is not None
        content, found = self.old.content, Buffers()
        first = None
        for place, leaf in enumerate(store.leaves):
            layer, index = self._place(leaf)
            own = self._of_replica(replica, layer).get("own") if layer else None
            if own is None or f"params/{index}" not in own:
                return None
            first = first or own
            found[f"params/{place}"] = own[f"params/{index}"]
            found[f"started/{place}"] = own.get(f"started/{index}", own[f"params/{index}"])
            if f"kept/{index}" in own:
                half = sum(name.startswith("kept/") for name in own) // 2
                found[f"kept/{place}"] = own[f"kept/{index}"]
                found[f"kept/{place + len(store.leaves)}"] = own[f"kept/{half + index}"]
        for place, leaf in enumerate(store.local.state):
            buffer = content.opt_state[leaf].buffer
            head, _, rest = buffer.partition("/own/state/")
            owner = "/".join(["replica", str(replica), *head.split("/")[2:]])
            name = f"{owner}/own/state/{rest}" if rest else buffer
            found[f"state/{place}"] = self.old.arrays.get(name, self.old.arrays[buffer])
        numbers = (first or {}) | self._of_replica(replica, store.name).get("rhythm", {})
        return found | {name: numbers[name] for name in (*NUMBERS, "weights") if name in numbers}

    def _place(self, leaf: int) -> tuple[str, int]:
        """The layer that had a parameter, and its number there."""
        buffer = self.old.content.params[leaf].buffer
        for layer in self.old.content.layers:
            head = f"{values_of(layer.name)}/"
            names = [name for name, _ in layer.buffers]
            if buffer.startswith(head) and buffer.removeprefix(head) in names:
                return layer.name, names.index(buffer.removeprefix(head))
        return "", 0

    def _note_what_is_left(self) -> None:
        """Note what belongs to owners that are not there, and what waits."""
        here = {store.name for store in self.training.stores}
        for owner, names in self.old.content.owners.items():
            kind = owner.split("/")
            layer = "/".join(kind[4:-1])
            known = kind[-1] == "sums" and layer in self._regrouped
            if kind[0] == "replica" and names and layer not in here and kind[-1] in IN_SUMS and not known:
                self.leave_out(IN_SUMS[kind[-1]], layer)
            elif kind[0] == "replica" and names and kind[-1] == "mirror":
                self.leave_out("copies of neighbours and changes that were not sent", layer)
        for part in self.old.content.stopped.waiting:
            self.leave_out("contributions that waited for a later clock", self.old.content.layers[part.store].name)


def _pairs(content: Content) -> Iterable[tuple[Layer, wire.StoreState]]:
    return ((content.layers[state.store], state) for state in content.stopped.stores)


def committed_before(terms: Terms, group: Group, clock: int) -> int:
    """The newest clock before `clock` about which a group has decided."""
    return contained(terms, group.every, clock) - 1


def _decided(terms: Terms, group: Group, clock: int) -> int:
    """The newest clock about which the sites of a group have decided."""
    above = group if not group.final else None if group.above is None else terms.groups[group.above]
    return -1 if above is None else committed_before(terms, above, clock)


def _adds_up(store: StoreSpec) -> bool:
    """Whether the contributions of replicas add up, because their kind does, or each is applied on arrival. Parameters
    do not."""
    policy = store.policy
    return not (policy.clocked and policy.apply.averages) and (store.local is None or isinstance(policy.payload, Delta))
