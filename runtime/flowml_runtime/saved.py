"""`save` and `load` keep the state of a loop of one's own on the disk: pytrees of arrays, in the format of checkpoints.

Workers write the values that stay with them, each into a file of its own, and read those that go to them, if they see
the same disk; else the values come here first. The tree is there in one step, when all files are on the disk, and the
one before is removed then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.tree_util import tree_structure

from flowml.arrays import ArraySpec, dtype_of
from flowml.errors import CheckpointError
from flowml.ir._jax import path_name
from flowml.ir.objects import array_leaves, leaves_of_modules
from flowml.leaves import check_known, has_no_values, why_no_array
from flowml.numbers import whole_number
from flowml_runtime.driver.call_io import signature
from flowml_runtime.driver.checkpoint import nested, newest
from flowml_runtime.driver.holdings import bytes_on_devices
from flowml_runtime.driver.lineage import Element, Lineage, Mark
from flowml_runtime.driver.remote import Kind as KeptKind
from flowml_runtime.driver.remote import Owner, Remote
from flowml_runtime.driver.training.differing import MOST, bounded, differences
from flowml_runtime.driver.training.outcome import as_buffer, from_buffer
from flowml_runtime.driver.training.snapshots import Key, hollow, key_of
from flowml_runtime.environment import checkpoints, locks
from flowml_runtime.put import placed

if TYPE_CHECKING:
    from flowml_runtime.cluster import Cluster


class Leaf(msgspec.Struct, frozen=True):
    """A leaf: its path, its dtype as JAX names it, its shape, and the device where it was, if any."""

    path: tuple[Key, ...]
    dtype: str
    shape: tuple[int, ...]
    device: str = ""


class Tree(msgspec.Struct, frozen=True):
    """What a manifest says. The array of leaf i is named "i"."""

    leaves: tuple[Leaf, ...]
    hollow: tuple[tuple[Key, ...], ...] = ()
    """The paths of containers without leaves."""


_FLOAT0 = str(jax.dtypes.float0)

MOST_SAVED = 8
"""How many saved trees a session knows, from which its loops may go on after a loss."""

Kind = tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]
"""The structure of a pytree, and the shape and dtype of each leaf."""


Place = tuple[int, int]
"""Leaves of a saved tree, from and to."""


@dataclass(frozen=True)
class Origin:
    """A handle that was saved: the mark of its batch, its number, and its name in what its maker returned."""

    mark: Mark
    number: int
    name: str
    element: Element | None = None
    """The element of the tree, if it has several and the value was sent or read."""

    def is_of(self, lineage: Lineage, number: int) -> bool:
        """Whether this is the very value."""
        return self.mark is lineage.mark and self.number == number

    def precedes(self, lineage: Lineage, name: str) -> bool:
        """Whether a value comes from this one: it is the same output of a later call, or this one was sent or read."""
        maker = self.mark.maker
        return self.mark in lineage.line and (maker is None or (lineage.maker, name) == (maker, self.name))


@dataclass
class Recovery:
    """What has gone on from a saved tree since the last loss."""

    began: int
    """The number of the first value that was made since."""
    revived: set[int] = field(default_factory=set[int])
    """The leaves that calls have taken."""
    read: set[tuple[Hashable, int]] = field(default_factory=set[tuple[Hashable, int]])
    """The functions that have taken them, each with the number of the value that was saved."""


@dataclass(eq=False)
class Saved:
    """A tree on the disk. `places` are those of itself and of its elements, by their kinds. `origins` are the handles
    that its leaves were; None for one that was in this process."""

    path: Path
    places: Mapping[Kind, Sequence[Place]]
    origins: Sequence[Origin | None] = ()
    written: tuple[int, int] | None = None
    """See `_written_at`."""
    made: int = 0
    """The number of the first value that was made since, in its session."""
    recovery: Recovery | None = None

    @property
    def types(self) -> Sequence[tuple[tuple[int, ...], str]]:
        """The shape and dtype of each leaf."""
        whole = 0, len(self.origins)
        return next(types for (_, types), places in self.places.items() if whole in places)

    @property
    def is_there(self) -> bool:
        """Whether it has been neither removed nor replaced by another tree."""
        return self.written is not None and _written_at(self.path) == self.written

    def fitting(self, value: Any) -> Sequence[Place]:
        """The places of the kind of a value. None if it has leaves that no tree has, such as functions."""
        try:
            return self.places.get(_kind(value), ())
        except (TypeError, ValueError, OverflowError):
            return ()

    def index(self, leaf: Remote) -> int | None:
        """The leaf that this very value was."""
        origins = enumerate(self.origins) if leaf.lineage.mark is not None else ()
        return next((i for i, o in origins if o is not None and o.is_of(leaf.lineage, leaf.number)), None)

    def precedes(self, value: Any, place: Place) -> bool:
        """Whether the handles in a value come from the leaves at a place, or are those."""
        known = [
            origin is None or origin.is_of(leaf.lineage, leaf.number) or origin.precedes(leaf.lineage, leaf.kind.name)
            for (_, leaf), origin in zip(array_leaves(value)[0], self.origins[slice(*place)], strict=True)
            if type(leaf) is Remote
        ]
        return all(known) and any(self.origins[slice(*place)])


def _written_at(path: Path) -> tuple[int, int] | None:
    """What tells a tree from one that is saved at the same place later. None if there is none."""
    try:
        found = (path / checkpoints.MANIFEST).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _kind(value: Any) -> Kind:
    return tree_structure(value), _types(leaf for _, leaf in array_leaves(value)[0])


def _types(leaves: Iterable[Any]) -> tuple[tuple[tuple[int, ...], str], ...]:
    return tuple((tuple(shape), str(dtype)) for shape, dtype, _ in map(signature, leaves))


def _note(tree: Any, path: Path) -> None:
    """Note where a tree is, for the sessions of its handles."""
    structure, leaves = tree_structure(tree), [leaf for _, leaf in array_leaves(tree)[0]]
    remotes = [leaf for leaf in leaves if type(leaf) is Remote]
    owners = {id(r.owner): r.owner for r in remotes if r.owner is not None}
    places: dict[Kind, list[Place]] = {}
    fixed, start, whole = leaves_of_modules(tree), 0, 0
    for child in structure.children() if owners else ():
        end = start + child.num_leaves - sum(i in fixed for i in range(whole, whole + child.num_leaves))
        kind = child, _types(leaves[start:end])
        places.setdefault(kind, []).append((start, end))
        start, whole = end, whole + child.num_leaves
    elements = [place for kind in places.values() for place in kind]
    places[structure, _types(leaves)] = [(0, len(leaves))]
    origins = _origins(leaves, elements)
    for owner in owners.values():
        saved = Saved(path, places, origins, _written_at(path), owner.next_number())
        owner.saved[:] = [saved, *owner.saved][:MOST_SAVED]
        saved_ones = [origin for record in owner.saved for origin in record.origins if origin is not None]
        known = {o.mark for o in saved_ones} | {o.element.mark for o in saved_ones if o.element is not None}
        for batch in owner.batches():
            batch.lineage.line &= known


def _origins(leaves: Sequence[Any], elements: Iterable[Place]) -> list[Origin | None]:
    """Those of the leaves of a tree with these elements. If there are several, values of a `put` get marks of them."""
    sent = {
        place: [leaf for leaf in leaves[slice(*place)] if type(leaf) is Remote and leaf.lineage.maker is None]
        for place in elements
    }
    found = [(leaf, place) for place, mine in sent.items() for leaf in mine]
    for leaf, _ in found:
        leaf.lineage.elements = {}
    known = {(leaf.lineage, leaf.number) for leaf, _ in found}
    if len({place for _, place in found}) > 1 and len(known) == len(found):
        types = {place: frozenset(leaf.kind.signature[:2] for leaf in mine) for place, mine in sent.items()}
        marks = {place: Mark(None, types[place], of_element=True) for place in sent}
        here = {(leaf.lineage, place): Element(leaf.lineage, marks[place]) for leaf, place in found}
        for leaf, place in found:
            leaf.lineage.elements[leaf.number] = here[leaf.lineage, place]
    return [
        Origin(x.lineage.marked(), x.number, x.kind.name, x.lineage.elements.get(x.number))
        if type(x) is Remote
        else None
        for x in leaves
    ]


def records_of(remotes: Iterable[Remote]) -> list[Saved]:
    """What was saved of values of the sessions of these, the newest first."""
    owners = {id(r.owner): r.owner for r in remotes if r.owner is not None}
    return [record for owner in owners.values() for record in owner.saved]


def taken_from(
    record: Saved, values: Mapping[int, tuple[Any, Place]], stays: Callable[[Any], bool] = lambda leaf: False
) -> dict[int, Any]:
    """Saved values in place of these, which have these leaves of the tree. Some leaves stay as they are."""
    read = leaves_of(record, {i for _, place in values.values() for i in range(*place)})
    found: dict[int, Any] = {}
    for number, (value, place) in values.items():
        pairs, made = array_leaves(value)
        found[number] = made(
            [leaf if stays(leaf) else read[i] for (_, leaf), i in zip(pairs, range(*place), strict=True)]
        )
    return found


def leaves_of(record: Saved, indices: Iterable[int]) -> dict[int, Any]:
    """These leaves of a saved tree, in this process."""
    tree, arrays = _read(record.path)
    return {i: _here(arrays[str(i)], tree.leaves[i].dtype) for i in indices}


def save(tree: Any, path: str | os.PathLike[str], *, keep: int = 1) -> Path:
    """Write a pytree of arrays and handles to the directory `path`. Returns when it is on the disk.

    Workers that see the directory write their values themselves. A process that is killed meanwhile leaves the tree
    that was saved before. Threads and processes that save there at the same time do so in turn. Kept loops that lose a
    worker go on from the last saved tree: see `docs/loops.md`.

    Args:
        tree: a pytree of arrays, numbers and `fm.Remote`s. What is no array in an equinox module is left out.
        path: a directory, which is made if it is not there.
        keep: how many saved trees stay there.

    Returns: where the tree is. Raises TypeError for a leaf that is no array, CheckpointError if the disk refuses or the
    directory holds checkpoints of a fit or of Orbax, WorkerLostError if a value is lost.
    """
    directory = checkpoints.named_directory("fm.save(path=)", path)
    if not os.fspath(path):
        raise ValueError("fm.save(path=''): give the name of a directory; '.' is the current one")
    whole_number("keep", keep, least=1)
    try:
        pairs, _ = array_leaves(tree)
    except ValueError as error:  # JAX sorts the keys of a dict
        raise TypeError(
            f"the tree cannot be saved: {str(error).splitlines()[0]}; give each dict keys of one kind, such as text"
        ) from error
    for p, value in pairs:
        check_known(f"save: leaf {path_name(p)!r}", value, "save")
    content = msgspec.json.encode(Tree(tuple(_leaf(p, value) for p, value in pairs), hollow(tree)))
    values = [value for _, value in pairs]
    if checkpoints.holds_orbax(directory):
        raise CheckpointError(
            f"no tree can be saved in {directory}: it holds checkpoints of Orbax; give fm.save another directory"
        )
    _check_trees(directory, checkpoints.snapshots(directory))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locks.turn(directory):
            before = checkpoints.snapshots(directory)
            with checkpoints.writing(directory, checkpoints.step_of(before[0]) + 1 if before else 1) as folder:
                entries = _written(folder, values)
                where = checkpoints.complete(folder, content, entries, keep)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"no tree could be saved in {directory}: {error}; what was saved before is as it was"
            f"{checkpoints.advice(error)}"
        ) from error
    _note(tree, where)
    return where


def _check_trees(directory: Path, before: Iterable[Path]) -> None:
    """Raise CheckpointError if a directory holds something else than trees: saving one would remove it."""
    for path in before:
        try:
            _tree(path)
        except checkpoints.FormatError as error:
            raise CheckpointError(f"no tree can be saved in {directory}: {error}; give another directory") from None
        except CheckpointError:
            continue  # it is damaged
        return


def load(
    path: str | os.PathLike[str], cluster: Cluster | None = None, placement: Any = None, *, like: Any = None
) -> Any:
    """The newest complete tree of a directory of `save`, or the one at `path`.

    Args:
        path: the directory.
        cluster: a cluster to bring the arrays to, where they stay as with `fm.put`. Workers that see the directory read
            them. Without a cluster they come here.
        placement: as for `fm.put`. By default each array goes where it was when it was saved, if that device is there.
        like: a pytree with the structure of the result, such as `(params, optimizer.init(params))`, from which what is
            no array in an equinox module is taken. Without it containers that are neither dicts nor sequences are dicts
            by attribute, and tuples are lists; None and empty containers are there.

    Raises CheckpointError if there is none, it is damaged, or it differs from `like`: it names the leaves;
    WorkerLostError if the placement names a lost worker.
    """
    directory = checkpoints.named_directory("fm.load", path)
    read = partial(_loaded, cluster=cluster, placement=placement, like=like)
    if checkpoints.snapshots(directory):
        found = newest(directory, read, "Loaded is")
        assert found is not None
        where, (tree, values) = found
    else:
        where, (tree, values) = directory, read(directory)
    if isinstance(values, CheckpointError):
        raise values
    if like is not None:
        numbers = {leaf.path: i for i, leaf in enumerate(tree.leaves)}
        pairs, made = array_leaves(like)
        loaded = made([values[numbers[tuple(map(key_of, p))]] for p, _ in pairs])
    else:
        found = [(leaf.path, value) for leaf, value in zip(tree.leaves, values, strict=True)]
        loaded = nested([*found, *((path, {}) for path in tree.hollow)])
    if [_keys(map(key_of, p)) for p, _ in array_leaves(loaded)[0]] == [_keys(x.path) for x in tree.leaves]:
        _note(loaded, where)
    return loaded


def _loaded(
    path: Path, cluster: Cluster | None, placement: Any, like: Any
) -> tuple[Tree, Sequence[Any] | CheckpointError]:
    """A tree, and the values of its leaves, here or on a cluster; an error in place of these if it differs from `like`.

    Raises CheckpointError if it is damaged.
    """
    tree, body = _tree(path)
    if like is not None and (differs := _differing(path, tree, like)):
        return tree, differs
    if cluster is not None:
        return tree, _on_cluster(path, tree, body, cluster, placement)
    _, arrays = _read(path)
    return tree, [_here(arrays[str(i)], leaf.dtype) for i, leaf in enumerate(tree.leaves)]


def _here(array: Any, dtype: str) -> Any:
    """A value in this process."""
    value = from_buffer(array, dtype)
    return value if has_no_values(value) else jnp.asarray(value)


def _keys(path: Iterable[Key]) -> list[str | int]:
    return [key for _, key in path]


def _leaf(path: Sequence[Any], value: Any) -> Leaf:
    try:
        shape, dtype, _ = signature(value)
        if isinstance(value, np.ndarray | np.generic | float) and not _fits(np.asarray(value), dtype):
            raise OverflowError
    except (TypeError, ValueError):
        raise TypeError(f"save: leaf {path_name(path)!r} {why_no_array(value)}") from None
    except OverflowError:
        raise OverflowError(
            f"save: leaf {path_name(path)!r} has numbers that 32 bits cannot hold, in which it would be saved; turn 64 "
            "bits on with jax_enable_x64, or scale them"
        ) from None
    return Leaf(tuple(map(key_of, path)), str(dtype), tuple(shape), value.device if type(value) is Remote else "")


def _fits(value: np.ndarray[Any, Any], dtype: Any) -> bool:
    """Whether numbers stay the same in the dtype that JAX gives them, but for their last bits."""
    if value.dtype == dtype or not np.issubdtype(value.dtype, np.number):
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        found = value.astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return bool(np.all(found == value))
    return bool(np.all(np.isfinite(found) == np.isfinite(value)))


def _written(folder: Path, values: Sequence[Any]) -> list[checkpoints.Entry]:
    """Have the arrays written into a folder: where each is."""
    remotes = {i: value for i, value in enumerate(values) if type(value) is Remote}
    owners: dict[int, tuple[Owner, list[int]]] = {}
    for i, remote in remotes.items():
        owner = remote.check(None)
        owners.setdefault(id(owner), (owner, []))[1].append(i)
    entries: dict[int, checkpoints.Entry] = {}
    numbers = {id(remote): i for i, remote in remotes.items()}
    token = checkpoints.invite(folder) if owners else ""
    for owner, mine in owners.values():
        for remote, entry in owner.write([remotes[i] for i in mine], folder, token):
            i = numbers[id(remote)]
            entries[i] = msgspec.structs.replace(entry, name=str(i))
    here: dict[str, Any] = {}
    for owner, mine in owners.values():
        missing = [i for i in mine if i not in entries]
        brought = owner.recall([remotes[i] for i in missing]) if missing else []
        here.update((str(i), as_buffer(value)) for i, value in zip(missing, brought, strict=True))
    for i, value in enumerate(values):
        if i not in remotes:
            here[str(i)] = as_buffer(value if isinstance(value, jax.Array) else np.asarray(value, signature(value)[1]))
    return [*checkpoints.write_arrays(folder / checkpoints.DATA, here), *entries.values()]


def _tree(path: Path) -> tuple[Tree, checkpoints.Body]:
    """What a manifest says. Raises CheckpointError for one of something else."""
    body = checkpoints.manifest(path)
    try:
        tree = msgspec.json.decode(body.content, type=Tree)
    except msgspec.DecodeError:
        raise checkpoints.FormatError(f"{path} holds a fit, and no tree of fm.save; read it with fm.restore") from None
    there = {entry.name for entry in body.arrays}
    lacking = [i for i in range(len(tree.leaves)) if str(i) not in there]
    if lacking:
        raise CheckpointError(f"the saved tree {path} lacks the arrays of leaves {lacking[:MOST]}; take an older one")
    return tree, body


def _read(path: Path) -> tuple[Tree, Mapping[str, np.ndarray[Any, Any]]]:
    return _tree(path)[0], checkpoints.read(path)[1]


def _on_cluster(path: Path, tree: Tree, body: checkpoints.Body, cluster: Cluster, placement: Any) -> Sequence[Any]:
    """The values on a cluster. Raises CheckpointError if one is damaged."""
    session = cluster.session
    session.check_owner()
    session.check_workers("nothing can be loaded on them")
    names = ["/".join(map(str, _keys(leaf.path))) for leaf in tree.leaves]
    devices = placed(names, cluster, placement, "load")
    if placement is None:
        there = {device.name for device in cluster.devices}
        before = [leaf.device for leaf in tree.leaves]
        devices = [device if device in there else first for device, first in zip(before, devices, strict=True)]
    empty = {i: np.zeros(x.shape, jax.dtypes.float0) for i, x in enumerate(tree.leaves) if x.dtype == _FLOAT0}
    sent = [i for i in range(len(names)) if i not in empty]
    kinds = [
        KeptKind(ArraySpec(tree.leaves[i].shape, _canonical(tree.leaves[i].dtype)), devices[i], names[i]) for i in sent
    ]
    session.held.check_room(bytes_on_devices(kinds), cluster.devices, "load")
    by_name = {entry.name: entry for entry in body.arrays}
    entries = [by_name[str(i)] for i in sent]

    def elsewhere(k: int) -> Any:
        entry = entries[k]
        return from_buffer(checkpoints.read_arrays(path, entry.file, [entry])[entry.name], tree.leaves[sent[k]].dtype)

    brought = iter(session.held.load(entries, kinds, path, elsewhere, "load") if kinds else [])
    return [empty[i] if i in empty else next(brought) for i in range(len(names))]


def _canonical(dtype: str) -> str:
    """The dtype that JAX gives an array of this one, by the setting of 64 bits."""
    if dtype.startswith("key<"):
        return dtype
    return str(jax.dtypes.canonicalize_dtype(dtype_of(dtype)))


def _differing(path: Path, tree: Tree, like: Any) -> CheckpointError | None:
    """The error if a tree differs from one with the leaves of `like`."""
    there = {leaf.path: (leaf.dtype, leaf.shape) for leaf in tree.leaves}
    leaves = (_leaf(p, value) for p, value in array_leaves(like)[0])
    differs = differences("leaf", there, {leaf.path: (leaf.dtype, leaf.shape) for leaf in leaves})
    if not differs:
        return None
    return CheckpointError(f"the saved tree {path} differs from like=: {bounded(differs)}; give a tree like it")
