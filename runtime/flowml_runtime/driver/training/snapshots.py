"""What a snapshot of a fit holds, how it is made of what workers tell, and where its buffers go when a fit resumes.

A snapshot names every buffer by its owner (`worker.training.resident`): those of homes by layer, those of replicas by
replica, stage and layer. Beside them it has where all machines stand, the ledger of work items, and the fit's own
figures, which a fit that resumes must share. Parameters and optimizer state are leaves, each of which names a buffer,
and so is the state of the model as its rules join that of all replicas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np

from flowml.data import Source
from flowml.devices import worker_of
from flowml.errors import CheckpointError, named
from flowml.plan import ArraySpec, StoreSpec, Training
from flowml.splits import Shuffle
from flowml.training.untrained import Untrained
from flowml_runtime import wire
from flowml_runtime.driver.training.amount import work_of
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.outcome import as_buffer, from_buffer
from flowml_runtime.environment import checkpoints
from flowml_runtime.protocol.training.closing import closed
from flowml_runtime.protocol.training.ledger import LedgerState
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.worker.training.resident import of_waiting

Buffers = Mapping[str, Mapping[str, Any]]
"""The arrays of owners, by owner and name."""
Trees = tuple[Any, Any, Untrained | None]
"""The trained parameters, the optimizer state, and the parameters that are not trained."""

Key = tuple[str, str | int]
"""A step of a leaf's path: the kind of its container ("dict", "list", "attr") and the key in it."""


class Leaf(msgspec.Struct, frozen=True):
    """A leaf of a pytree: its path, its dtype as JAX names it, and the buffer with its value."""

    path: tuple[Key, ...]
    dtype: str
    buffer: str


class Layer(msgspec.Struct, frozen=True):
    """A store: its name, its policy in words, and the buffers of its home."""

    name: str
    policy: str
    buffers: tuple[tuple[str, ArraySpec], ...]

    @staticmethod
    def of(store: StoreSpec) -> Layer:
        return Layer(store.name, store.policy.describe(), tuple((b.name, b.spec) for b in store.buffers))


class Figures(msgspec.Struct, frozen=True):
    """What a fit that resumes must share with the one that wrote the snapshot."""

    replicas: int
    stages: int
    microbatches: int
    batch_size: int
    examples: int
    seed: int
    shuffle: Shuffle
    rest: int = 0
    """The examples of a short batch at the end of each epoch, if it is used."""
    update: str = ""
    """The name of the optimizer's update, as in `fingerprint`. Another one is no error: rates may be changed."""
    workers: str = "real"
    """What kind the workers are: a snapshot of simulated ones lacks what only real ones keep."""


class Content(msgspec.Struct, frozen=True):
    """All of a snapshot but its arrays. `steps` are those before it, and `owners` names the buffers of each owner."""

    steps: int
    figures: Figures
    layers: tuple[Layer, ...]
    stopped: wire.Stopped
    ledger: LedgerState
    owners: dict[str, tuple[str, ...]]
    params: tuple[Leaf, ...]
    opt_state: tuple[Leaf, ...]
    state: tuple[Leaf, ...] = ()
    hollow: dict[str, tuple[tuple[Key, ...], ...]] = {}
    """The paths of containers without leaves in "params", "opt_state" and "state"."""
    untrained: tuple[Leaf, ...] = ()
    """The leaves of the parameters that are not trained."""
    state_stages: tuple[int, ...] = ()
    """The stage of each leaf of the model's state."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in memory. `arrays` are by the name of owner and buffer: "home/conv/values/kernel"."""

    content: Content
    arrays: Mapping[str, Any]

    def write(self, directory: Path, keep: int) -> Path:
        content = msgspec.json.encode(self.content)
        return checkpoints.write(directory, self.content.steps, content, self.arrays, keep)

    def encoded(self) -> tuple[bytes, Collection[str], Mapping[str, Any]]:
        """The content, the names of the arrays of owners, and the arrays that are here."""
        owners = self.content.owners.items()
        names = [f"{owner}/{name}" for owner, named in owners for name in named]
        return msgspec.json.encode(self.content), names, self.arrays

    @staticmethod
    def read(path: Path) -> Snapshot:
        """Raises CheckpointError for one that is damaged."""
        encoded, arrays = checkpoints.read(path)
        content = _content(encoded)
        if content is None:
            raise checkpoints.FormatError(f"{path} holds a tree of fm.save, and no fit; read it with fm.load")
        missing = [
            name
            for name in (
                *(leaf.buffer for leaf in (*content.params, *content.opt_state, *content.state, *content.untrained)),
                *(f"{owner}/{name}" for owner, names in content.owners.items() for name in names),
            )
            if name not in arrays
        ]
        if missing:
            raise CheckpointError(f"the checkpoint {path} lacks the buffers {named(missing)}")
        return Snapshot(content, arrays)

    def leaves(self, leaves: Sequence[Leaf]) -> list[Any]:
        """Their values. Those of typed keys are keys."""
        return [from_buffer(self.arrays[leaf.buffer], leaf.dtype) for leaf in leaves]

    def states(self, training: Training, model: Model) -> tuple[tuple[Any, ...], ...]:
        """The leaves of the model's state at each replica. `model` is the state with which the fit began."""
        owners = self.content.owners.items()
        buffers = {o: {n: self.arrays[f"{o}/{n}"] for n in names} for o, names in owners if o.endswith("/model/state")}
        return _states(training, buffers, model)

    def of_live(self, training: Training, total: int) -> Snapshot:
        """The part for a run of `training` to the step `total` that leaves out the replicas that are lost. What of
        their contributions waits, or was not pushed, is left out, and the ledger says for which layers."""
        lost, content = training.lost, self.content
        if not lost:
            return self
        stopped = content.stopped
        waiting = {w: of_waiting(training.stores[w.store].name, w) for w in stopped.waiting if w.replica in lost}
        left = {*waiting.values(), *(o for o in content.owners if o.startswith(tuple(f"replica/{r}/" for r in lost)))}
        there = {worker_of(d) for r in training.live for d in training.replicas[r]}
        left.update(o for o in content.owners if o.startswith("reader/") and o.split("/")[1] not in there)
        ledger = content.ledger
        terms, f = Terms.of(training, total), content.figures
        open_of = {*(replica for replica, _, _ in ledger.outstanding), *(one.replica for one in ledger.owed)}
        if terms.aligned and not open_of.isdisjoint(lost):
            work = work_of(training, terms, f.examples, f.batch_size, f.rest, f.shuffle)
            ledger = closed(ledger, work, terms, stopped, lost, lambda store: False)
        stopped = msgspec.structs.replace(
            stopped,
            stages=tuple(s for s in stopped.stages if s.replica not in lost),
            waiting=tuple(w for w in stopped.waiting if w not in waiting),
        )
        owners = {owner: names for owner, names in content.owners.items() if owner not in left}
        return replace(self, content=msgspec.structs.replace(content, stopped=stopped, ledger=ledger, owners=owners))

    @property
    def trees(self) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...], tuple[Leaf, ...]]:
        """The leaves of the parameters, the optimizer state and the model's state."""
        return self.content.params, self.content.opt_state, self.content.state

    def values(self, store: StoreSpec) -> list[Any]:
        """The buffers of a store's home. None without arithmetic, where stores keep their first values."""
        if values_of(store.name) not in self.content.owners:
            return []
        return [self.arrays[f"{values_of(store.name)}/{b.name}"] for b in store.buffers]

    def version(self, store: int) -> int:
        return self.content.stopped.stores[store].version

    def messages(self, training: Training, ids: dict[str, Any]) -> Iterable[tuple[str, wire.Wire, list[Any]]]:
        """(worker, message, arrays) of what workers restore, but for the values of homes. Contributions that waited for
        a later clock, or for others, come again."""
        waiting = {of_waiting(training.stores[w.store].name, w): w for w in self.content.stopped.waiting}
        for owner, part in waiting.items():
            arrays = [self.arrays[f"{owner}/{name}"] for name in self.content.owners.get(owner, ())]
            about: dict[str, Any] = {**msgspec.structs.asdict(part), "incarnation": 0, "specs": _specs(arrays)}
            yield _receiver(training, part), wire.Contribution(**ids, **about), arrays
        others = {values_of(store.name) for store in training.stores} | waiting.keys()
        for owner, names in self.content.owners.items():
            if owner not in others:
                arrays = [self.arrays[f"{owner}/{name}"] for name in names]
                told = wire.Buffers(**ids, owner=owner, names=names, specs=_specs(arrays))
                yield _place(owner, training), told, arrays


def _content(encoded: bytes | msgspec.Raw) -> Content | None:
    """What a manifest says of a fit; None if it is that of something else."""
    try:
        return msgspec.json.decode(encoded, type=Content)
    except msgspec.DecodeError:
        return None


def holds_fits(directory: Path) -> bool:
    """Whether the newest manifest of a directory that can be read is that of a fit, or none can."""
    for path in checkpoints.snapshots(directory):
        try:
            return _content(checkpoints.manifest(path).content) is not None
        except CheckpointError:
            continue
    return True


def _specs(arrays: Iterable[Any]) -> tuple[ArraySpec, ...]:
    return tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays)


def _receiver(training: Training, part: wire.Waiting) -> str:
    """The worker where a part of a contribution waits: the home, or that of the leader of its site."""
    store = training.stores[part.store]
    site = store.site_of(part.replica) if store.relayed and not part.of_site else None
    return worker_of(store.copies[0] if site is None else training.replicas[site.replicas[0]][0])


def values_of(layer: str) -> str:
    """The owner of the values of a store's home."""
    return f"home/{layer}/values"


def _place(owner: str, training: Training) -> str:
    """The worker that keeps the buffers of an owner."""
    kind, number, *rest = owner.split("/")
    if kind == "replica":
        return worker_of(training.replicas[int(number)][int(rest[1])])
    if kind == "reader":
        return number
    if kind == "site":
        return worker_of(training.replicas[int(number)][0])
    found = next(store for store in training.stores if owner.startswith(f"home/{store.name}/"))
    return worker_of(found.copies[0])


def taken(
    training: Training,
    figures: Figures,
    steps: int,
    stopped: wire.Stopped,
    ledger: LedgerState,
    buffers: Buffers,
    trees: Trees,
    model: Model,
    written: Mapping[str, tuple[str, ...]],
) -> Snapshot:
    """The snapshot of what workers have told. Of the owners in `written` it has only the names of buffers. `trees` are
    those that the fit began with, for their structure, and for leaves that are in no buffer. `model` is the state that
    it began with."""
    arrays = {f"{owner}/{name}": a for owner, found in buffers.items() for name, a in found.items()}
    elsewhere = {f"{owner}/{name}" for owner, names in written.items() for name in names}
    places = _places(training, stopped)
    leaves: list[tuple[Leaf, ...]] = []
    joined = model.after(_states(training, buffers, model)).state()
    for what, tree in zip(TREES, (*trees[:2], joined), strict=True):
        made: list[Leaf] = []
        for i, (path, value) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
            buffer = places.get((what, i), f"{what}/{i}")
            if buffer not in elsewhere:
                arrays.setdefault(buffer, np.asarray(as_buffer(value)))
            made.append(Leaf(tuple(map(key_of, path)), str(value.dtype), buffer))
        leaves.append(tuple(made))
    owners = {**{owner: tuple(found) for owner, found in buffers.items()}, **written}
    layers = tuple(map(Layer.of, training.stores))
    stages = tuple(leaf.stage for leaf in training.state)
    empty: dict[str, tuple[tuple[Key, ...], ...]] = dict(zip(TREES, map(hollow, (*trees[:2], joined)), strict=True))
    content = Content(steps, figures, layers, stopped, ledger, owners, *leaves, hollow=empty, state_stages=stages)
    return with_untrained(Snapshot(content, arrays), trees[2])


def with_untrained(snapshot: Snapshot, untrained: Untrained | None) -> Snapshot:
    """The snapshot with these leaves that are not trained."""
    pairs = zip(untrained.paths, untrained.leaves, strict=True) if untrained else ()
    made = {Leaf(tuple(map(key_of, p)), str(x.dtype), f"untrained/{i}"): x for i, (p, x) in enumerate(pairs)}
    arrays = {leaf.buffer: np.asarray(as_buffer(value)) for leaf, value in made.items()}
    content = msgspec.structs.replace(snapshot.content, untrained=tuple(made))
    return Snapshot(content, {**snapshot.arrays, **arrays})


TREES = ("params", "opt_state", "state")
NONE, EMPTY = "none", "empty"
"""The kinds of the last key in the path of a None, and in that of an empty list or tuple."""


def _states(training: Training, buffers: Buffers, model: Model) -> tuple[tuple[Any, ...], ...]:
    """The leaves of the model's state at each replica. What no step has changed yet is as it began."""
    found: list[tuple[Any, ...]] = []
    for replica, begun in enumerate(model.replicas):
        leaves, seen = list(begun), Counter[int]()
        for i, leaf in enumerate(training.state):
            kept = buffers.get(f"replica/{replica}/stage/{leaf.stage}/model/state", {})
            leaves[i] = kept.get(f"leaf/{seen[leaf.stage]}", leaves[i])
            seen[leaf.stage] += 1
        found.append(tuple(leaves))
    return tuple(found)


def _places(training: Training, stopped: wire.Stopped) -> dict[tuple[str, int], str]:
    """("params" or "opt_state", number of a leaf) -> its buffer. If several stores keep a leaf, the one with the most
    applies has it, as at the end of a fit; what the first replica keeps of its own optimizer state stands for all."""
    found: dict[tuple[str, int], str] = {}
    kinds = {"parameter": "params", "state": "opt_state"}
    for state in sorted(stopped.stores, key=lambda s: (s.version, -s.store)):
        store = training.stores[state.store]
        found.update({(kinds[b.kind], b.index): f"{values_of(store.name)}/{b.name}" for b in store.buffers})
    for store in training.stores:
        for i, leaf in enumerate(store.local.state if store.local else ()):
            owner = f"replica/{training.live[0]}/stage/{store.parts[0].stage}/{store.name}/own"
            found["opt_state", leaf] = f"{owner}/state/{i}"
    return found


def hollow(tree: Any) -> tuple[tuple[Key, ...], ...]:
    """The paths of the empty containers, such as the state of a transformation that has none. That of a None ends with
    `NONE`, that of a list or tuple with `EMPTY`."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_empty)
    return tuple((*map(key_of, path), *_kind_of_empty(node)) for path, node in nodes if _is_empty(node))


def _is_empty(node: Any) -> bool:
    return not jax.tree_util.tree_leaves(node, is_leaf=lambda child: child is not node)


def _kind_of_empty(node: Any) -> tuple[Key, ...]:
    if node is None:
        return ((NONE, 0),)
    return ((EMPTY, 0),) if type(node) in (list, tuple) else ()


def key_of(key: Any) -> Key:
    """A step of a path of JAX."""
    match key:
        case jax.tree_util.DictKey(key=name):
            return ("dict", name if isinstance(name, str | int) else str(name))
        case jax.tree_util.SequenceKey(idx=index):
            return ("list", index)
        case jax.tree_util.GetAttrKey(name=name):
            return ("attr", name)
        case _:
            return ("attr", str(getattr(key, "key", key)))


def figures(
    training: Training, source: Source, batch_size: int, seed: int, shuffle: Shuffle, rest: int, workers: str
) -> Figures:
    """Those of a fit."""
    replicas = len(training.replicas)
    stages = len(training.replicas[0])
    return Figures(
        replicas, stages, training.microbatches, batch_size, source.examples, seed, shuffle, rest, workers=workers
    )
