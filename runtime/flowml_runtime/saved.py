"""`save` and `load` keep the state of a loop of one's own on the disk: pytrees of arrays, in the format of checkpoints.

Workers write the values that stay with them, each into a file of its own, if they see the same disk; else the values
come here first. The tree is there in one step, when all files are on the disk, and the one before is removed then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.tree_util import tree_flatten, tree_flatten_with_path, tree_structure, tree_unflatten

from flowml.errors import CheckpointError
from flowml.ir._jax import path_name
from flowml.leaves import why_no_array
from flowml.numbers import whole_number
from flowml_runtime.driver.call_io import signature
from flowml_runtime.driver.checkpoint import nested, newest
from flowml_runtime.driver.remote import Owner, Remote
from flowml_runtime.driver.training.differing import MOST, bounded, differences
from flowml_runtime.driver.training.outcome import as_buffer, from_buffer
from flowml_runtime.driver.training.snapshots import Key, hollow, key_of
from flowml_runtime.environment import checkpoints
from flowml_runtime.put import put

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


MOST_SAVED = 8
"""How many saved trees a session knows, from which its loops may go on after a loss."""

Kind = tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]
"""The structure of a pytree, and the shape and dtype of each leaf."""


@dataclass(frozen=True)
class Saved:
    """A tree on the disk. `places` are the leaves, from and to, of itself and of its elements by their kinds; None for
    a kind that several elements have."""

    path: Path
    places: Mapping[Kind, tuple[int, int] | None]

    def place(self, value: Any) -> tuple[int, int] | None:
        """The leaves that stand for this value; None if the tree has none of its kind, or several, or the value has
        leaves that no tree has, such as functions."""
        try:
            return self.places.get(_kind(value))
        except (TypeError, ValueError, OverflowError):
            return None


def _kind(value: Any) -> Kind:
    leaves, structure = tree_flatten(value)
    return structure, tuple((tuple(shape), str(dtype)) for shape, dtype, _ in map(signature, leaves))


def _note(tree: Any, path: Path) -> None:
    """Note where a tree is, for the sessions of its handles."""
    leaves, structure = tree_flatten(tree)
    remotes = [leaf for leaf in leaves if type(leaf) is Remote]
    owners = {id(r.owner): r.owner for r in remotes if r.owner is not None}
    places: dict[Kind, tuple[int, int] | None] = {}
    start = 0
    for child in structure.children() if owners else ():
        end = start + child.num_leaves
        kind = child, _kind(leaves[start:end])[1]
        places[kind] = None if kind in places else (start, end)
        start = end
    places[structure, _kind(leaves)[1]] = 0, len(leaves)
    for owner in owners.values():
        owner.saved[:] = [Saved(path, places), *owner.saved][:MOST_SAVED]


def records_of(remotes: Iterable[Remote]) -> list[Saved]:
    """What was saved of values of the sessions of these, the newest first."""
    owners = {id(r.owner): r.owner for r in remotes if r.owner is not None}
    return [record for owner in owners.values() for record in owner.saved]


def taken_from(record: Saved, values: Mapping[int, tuple[Any, tuple[int, int]]]) -> dict[int, Any]:
    """Saved values in place of these, which have these leaves of the tree."""
    tree, arrays = _read(record.path)
    found: dict[int, Any] = {}
    for number, (value, (start, end)) in values.items():
        leaves = [jnp.asarray(from_buffer(arrays[str(i)], tree.leaves[i].dtype)) for i in range(start, end)]
        found[number] = tree_unflatten(tree_structure(value), leaves)
    return found


def save(tree: Any, path: str | os.PathLike[str], *, keep: int = 1) -> Path:
    """Write a pytree of arrays and handles to the directory `path`. Returns when it is on the disk.

    Workers that see the directory write their values themselves. A process that is killed meanwhile leaves the tree
    that was saved before. Kept loops that lose a worker go on from the last saved tree: see `docs/loops.md`.

    Args:
        tree: a pytree of arrays, numbers and `fm.Remote`s.
        path: a directory, which is made if it is not there.
        keep: how many saved trees stay there.

    Returns: where the tree is. Raises TypeError for a leaf that is no array, CheckpointError if the disk refuses,
    WorkerLostError if a value is lost.
    """
    directory = Path(path)
    whole_number("keep", keep, least=1)
    pairs, _ = tree_flatten_with_path(tree)
    content = msgspec.json.encode(Tree(tuple(_leaf(p, value) for p, value in pairs), hollow(tree)))
    values = [value for _, value in pairs]
    before = checkpoints.snapshots(directory)
    number = checkpoints.step_of(before[0]) + 1 if before else 1
    try:
        with checkpoints.writing(directory, number) as folder:
            entries = _written(folder, values)
            where = checkpoints.complete(folder, content, entries, keep)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"no tree could be saved in {directory}: {error}; what was saved before is as it was; see "
            "whether the disk is full or read-only"
        ) from error
    _note(tree, where)
    return where


def load(
    path: str | os.PathLike[str], cluster: Cluster | None = None, placement: Any = None, *, like: Any = None
) -> Any:
    """The newest complete tree of a directory of `save`, or the one at `path`.

    Args:
        path: the directory.
        cluster: a cluster to bring the arrays to, where they stay as with `fm.put`. Without one they come here.
        placement: as for `fm.put`. By default each array goes where it was when it was saved, if that device is there.
        like: a pytree with the structure of the result, such as `(params, optimizer.init(params))`. Without it
            containers that are neither dicts nor sequences are dicts by attribute, and tuples are lists.

    Raises CheckpointError if there is none, it is damaged, or it differs from `like`: it names the leaves.
    """
    directory = Path(path)
    if checkpoints.snapshots(directory):
        found = newest(directory, _read, "Loaded is")
        assert found is not None
        where, (tree, arrays) = found
    else:
        where, (tree, arrays) = directory, _read(directory)
    if like is not None:
        _check(where, tree, like)
    values: list[Any] = [from_buffer(arrays[str(i)], leaf.dtype) for i, leaf in enumerate(tree.leaves)]
    if cluster is None:
        values = [jnp.asarray(value) for value in values]
    else:
        values = _put(values, tree.leaves, cluster, placement)
    if like is not None:
        numbers = {leaf.path: i for i, leaf in enumerate(tree.leaves)}
        paths = (tuple(map(key_of, p)) for p, _ in tree_flatten_with_path(like)[0])
        loaded = tree_unflatten(tree_structure(like), [values[numbers[p]] for p in paths])
    else:
        pairs = [(leaf.path, value) for leaf, value in zip(tree.leaves, values, strict=True)]
        loaded = nested([*pairs, *((path, {}) for path in tree.hollow)])
    if [_keys(map(key_of, p)) for p, _ in tree_flatten_with_path(loaded)[0]] == [_keys(x.path) for x in tree.leaves]:
        _note(loaded, where)
    return loaded


def _keys(path: Iterable[Key]) -> list[str | int]:
    return [key for _, key in path]


def _leaf(path: Sequence[Any], value: Any) -> Leaf:
    try:
        shape, dtype, _ = signature(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"save: leaf {path_name(path)!r} {why_no_array(value)}") from None
    return Leaf(tuple(map(key_of, path)), str(dtype), tuple(shape), value.device if type(value) is Remote else "")


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


def _read(path: Path) -> tuple[Tree, Mapping[str, np.ndarray[Any, Any]]]:
    content, arrays = checkpoints.read(path)
    try:
        tree = msgspec.json.decode(content, type=Tree)
    except msgspec.DecodeError:
        raise CheckpointError(f"{path} holds a fit, and no tree of fm.save; read it with fm.restore") from None
    lacking = [i for i in range(len(tree.leaves)) if str(i) not in arrays]
    if lacking:
        raise CheckpointError(f"the saved tree {path} lacks the arrays of leaves {lacking[:MOST]}; take an older one")
    return tree, arrays


def _put(values: Sequence[Any], leaves: Sequence[Leaf], cluster: Cluster, placement: Any) -> list[Any]:
    """The values on a cluster."""
    if placement is not None:
        tree = put(nested([(leaf.path, value) for leaf, value in zip(leaves, values, strict=True)]), cluster, placement)
        order = jax.tree_util.tree_leaves(nested([(leaf.path, i) for i, leaf in enumerate(leaves)]))
        return [
            v for _, v in sorted(zip(order, jax.tree_util.tree_leaves(tree), strict=True), key=lambda pair: pair[0])
        ]
    there = {device.name for device in cluster.devices}
    named = {str(i): value for i, value in enumerate(values)}
    devices = {str(i): leaf.device for i, leaf in enumerate(leaves) if leaf.device in there}
    found = put(named, cluster, devices or None)
    return [found[str(i)] for i in range(len(values))]


def _check(path: Path, tree: Tree, like: Any) -> None:
    """Raise CheckpointError if a tree differs from one with the leaves of `like`."""
    there = {leaf.path: (leaf.dtype, leaf.shape) for leaf in tree.leaves}
    here: dict[Any, tuple[str, tuple[int, ...]]] = {}
    for p, value in tree_flatten_with_path(like)[0]:
        leaf = _leaf(p, value)
        here[leaf.path] = leaf.dtype, leaf.shape
    differs = differences("leaf", there, here)
    if differs:
        raise CheckpointError(f"the saved tree {path} differs from like=: {bounded(differs)}; give a tree like it")
