"""Reads and writes checkpoints of Orbax, which most JAX programs use. It is an extra: `pip install flowml[orbax]`.

An Orbax checkpoint holds pytrees of arrays. A fit goes on from one as from any values: `fit(params, opt_state=...)`.
The buffers of replicas, the clocks and the ledger are only in checkpoints of flowml.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from flowml.errors import CheckpointError, UnsupportedError, one_line
from flowml.ir._jax import path_name
from flowml.ir.objects import array_leaves, leaves_of_modules
from flowml.leaves import why_no_array
from flowml_runtime.driver.checkpoint import restore
from flowml_runtime.driver.training.differing import bounded, differences
from flowml_runtime.driver.training.snapshots import Key, key_of
from flowml_runtime.saved import load


def to_orbax(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write what `fm.restore(source)` or `fm.load(source)` returns as an Orbax checkpoint, to a new directory `path`.

    Of a fit it has "params", "opt_state", "step" and, if the loss has state, "state". Orbax restores it with
    `StandardCheckpointer().restore(path, like)`, where `like` may have the named tuples of optax. Needs no cluster.

    Returns: the absolute path. Raises CheckpointError if the source cannot be read or the path is not new.
    """
    tree, target = _tree(source), Path(path).resolve()
    if target.exists():
        raise CheckpointError(f"{target} is there already; give the name of a new directory")
    if not jax.tree_util.tree_leaves(tree):
        raise CheckpointError(f"{source} holds no array, and Orbax writes no empty checkpoint; save arrays")
    try:
        with _orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Orbax cannot write {target}: {one_line(str(error))}; see whether the directory can be written and no "
            "array is empty"
        ) from error
    return target


def from_orbax(path: str | os.PathLike[str], like: Any = None) -> Any:
    """The pytree of an Orbax checkpoint, with its arrays on the default device of this process.

    Args:
        path: a directory that an Orbax checkpointer has written, or that of a `CheckpointManager`, whose newest step is
            read. If it has several items, the result is a dict of those that are pytrees.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the structure of the result, such as
            `{"params": params, "opt_state": optimizer.init(params)}`, from which what is no array in an equinox module
            is taken. Without it containers are dicts and lists.

    Raises CheckpointError if there is none, it is damaged, or differs from `like`: it names the leaves.
    """
    found = _items(Path(path).resolve())
    if not found:
        raise CheckpointError(f"{path} is no checkpoint of Orbax; give the directory that a checkpointer has written")
    if set(found) == {""}:
        return _restored(found[""], like)
    return {name: _restored(item, like and like.get(name)) for name, item in found.items()}


def _tree(source: str | os.PathLike[str]) -> Any:
    """What a directory of flowml holds."""
    try:
        fit = restore(source)
    except CheckpointError as error:
        try:
            return load(source)
        except CheckpointError:
            raise error from None
    tree = {"params": fit.params, "opt_state": fit.opt_state, "step": fit.step}
    return tree if fit.state is None else tree | {"state": fit.state}


def _items(path: Path) -> dict[str, Path]:
    """The pytrees of a checkpoint by name. One that has no name has the name ""."""
    if not path.is_dir():
        return {}
    if (path / "_METADATA").exists():
        return {"": path}
    steps = sorted((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    items = {p.name: p for p in sorted((steps[-1] if steps else path).iterdir()) if (p / "_METADATA").exists()}
    return {"": items["default"]} if set(items) == {"default"} else items


def _restored(path: Path, like: Any) -> Any:
    pairs, made = array_leaves(like)
    structs = {_keys(p): _struct(p, leaf) for p, leaf in pairs}
    with _orbax().StandardCheckpointer() as checkpointer:
        try:
            if like is None:
                return checkpointer.restore(path)
            return made(_leaves(checkpointer, path, like, structs))
        except CheckpointError:
            raise
        except (
            Exception
        ) as error:  # Orbax has no error of its own: a ValueError, KeyError, or what a file system raises
            reason = " ".join(str(error).split())[:500]
            what = "cannot be read" if like is None else "cannot be read as like="
            raise CheckpointError(f"the Orbax checkpoint {path} {what}: {reason}") from error


def _leaves(checkpointer: Any, path: Path, like: Any, structs: Mapping[tuple[Key, ...], Any]) -> list[Any]:
    """The arrays in the places of these structs, which are the leaves of `like` without those of equinox modules that
    are no arrays. Raises CheckpointError with the leaves that differ."""
    fixed, (leaves, structure), rest = leaves_of_modules(like), jax.tree_util.tree_flatten(like), iter(structs.values())
    target = structure.unflatten([None if i in fixed else next(rest) for i in range(len(leaves))])
    try:
        return jax.tree_util.tree_leaves(checkpointer.restore(path, target))
    except Exception as error:  # as above
        there = checkpointer.metadata(path).item_metadata.tree
        _check(path, there, structs, error)
        found = checkpointer.restore(path, jax.tree_util.tree_map_with_path(lambda p, _: structs[_keys(p)], there))
        values = {_keys(p): value for p, value in jax.tree_util.tree_leaves_with_path(found)}
        return [values[keys] for keys in structs]


def _check(path: Path, there: Any, here: Mapping[tuple[Key, ...], Any], error: Exception) -> None:
    """Raise CheckpointError if a checkpoint with this metadata has other leaves. Orbax converts dtypes, so that others
    are no difference."""
    specs = {_keys(p): (str(x.dtype), tuple(x.shape)) for p, x in jax.tree_util.tree_leaves_with_path(there)}
    mine = {keys: (str(x.dtype), tuple(x.shape)) for keys, x in here.items()}
    mine = {keys: specs[keys] if keys in specs and specs[keys][1] == spec[1] else spec for keys, spec in mine.items()}
    differs = differences("leaf", specs, mine)
    if differs:
        raise CheckpointError(
            f"the Orbax checkpoint {path} cannot be read as like=: {bounded(differs)}; give a tree like it"
        ) from error


def _struct(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)
    except (TypeError, ValueError):
        raise TypeError(f"from_orbax: like: leaf {path_name(path)!r} {why_no_array(leaf)}") from None


def _keys(path: Iterable[Any]) -> tuple[Key, ...]:
    """The names in a path. Orbax has those of attributes and dicts alike."""
    return tuple(("", str(key_of(key)[1])) for key in path)


def _orbax() -> ModuleType:
    try:
        import orbax.checkpoint
    except ImportError:
        raise UnsupportedError(
            "orbax-checkpoint is not installed, and reads and writes checkpoints of Orbax: pip install 'flowml[orbax]'"
        ) from None
    return orbax.checkpoint
