"""Reads and writes checkpoints of Orbax, which most JAX programs use. It is an extra: `pip install flowml[orbax]`.

An Orbax checkpoint holds pytrees of arrays. A fit goes on from one as from any values: `fit(params, opt_state=...)`.
The buffers of replicas, the clocks and the ledger are only in checkpoints of flowml.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from flowml.errors import CheckpointError, UnsupportedError, one_line
from flowml.ir._jax import path_name
from flowml.ir.objects import array_leaves, leaves_of_modules
from flowml.leaves import why_no_array
from flowml.render.units import listed
from flowml_runtime.driver.checkpoint import restore
from flowml_runtime.driver.training.differing import bounded, differences
from flowml_runtime.driver.training.snapshots import Key, key_of
from flowml_runtime.environment import checkpoints
from flowml_runtime.environment.checkpoints import ORBAX_TREE
from flowml_runtime.saved import load

OLDER = "give another one, such as an older step"

Spec = tuple[str, tuple[int, ...]]
Specs = Mapping[tuple[Key, ...], Spec]


class _More(msgspec.Struct):
    random_key_impl: str | None = None


class _ArrayMetadata(msgspec.Struct):
    param_name: str
    ext_metadata: _More | None = None


class _Entry(msgspec.Struct):
    array_metadata: _ArrayMetadata


class _ArrayMetadatas(msgspec.Struct):
    """What Orbax writes of arrays into a file of its own."""

    array_metadatas: tuple[_Entry, ...] = ()


def to_orbax(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Read a directory that a fit or `fm.save` has written, and write its values to an Orbax checkpoint.

    Of a fit it has "params", "opt_state", "step" and, if the loss has state, "state". Orbax restores it with
    `StandardCheckpointer().restore(path, like)`, where `like` may have the named tuples of optax. Needs no cluster.

    Args:
        source: the name of the directory, as for `fm.restore` or `fm.load`. A tree is written by Orbax itself.
        path: a new directory.

    Returns: the absolute path. Raises CheckpointError if the source cannot be read or the path is not new.
    """
    named = checkpoints.named_directory
    directory = named("fm.to_orbax", source, " that a fit or fm.save has written", "; Orbax itself writes a tree")
    target = named("fm.to_orbax(path=)", path).resolve()
    tree = _tree(directory)
    if target.exists():
        raise CheckpointError(f"{target} is there already; give the name of a new directory")
    if not jax.tree_util.tree_leaves(tree):
        raise CheckpointError(f"{source} holds no array, and Orbax writes no empty checkpoint; save arrays")
    empty = [path_name(p) for p, value in jax.tree_util.tree_leaves_with_path(tree) if not np.size(value)]
    if empty:
        raise CheckpointError(
            f"Orbax writes no empty array, and {listed(tuple(empty))} in {source} holds nothing; leave it out"
        )
    try:
        with _orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(target, tree)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Orbax cannot write {target}: {one_line(str(error))}; see whether the directory can be written"
        ) from error
    return target


def from_orbax(path: str | os.PathLike[str], like: Any = None) -> Any:
    """The pytree of an Orbax checkpoint, with its arrays on the default device of this process.

    Args:
        path: a directory that an Orbax checkpointer has written, or that of a `CheckpointManager`, whose newest step is
            read. If it has several items, the result is a dict of those that are pytrees.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the structure of the result, such as
            `{"params": params, "opt_state": optimizer.init(params)}`, from which what is no array in an equinox module
            is taken. Without it containers are dicts and lists. Of several items, a dict with such a pytree for each,
            or None for one that is read as it is.

    Raises CheckpointError if there is none, it is damaged, or differs from `like`: it names the items or leaves.
    """
    found = _items(checkpoints.named_directory("fm.from_orbax", path).resolve())
    if not found:
        raise CheckpointError(f"{path} is no checkpoint of Orbax; give the directory that a checkpointer has written")
    if set(found) == {""}:
        return _restored(found[""], like)
    if like is not None:
        _check_items(path, found, like)
    return {name: _restored(item, None if like is None else like[name]) for name, item in found.items()}


def _check_items(path: str | os.PathLike[str], items: Mapping[str, Path], like: Any) -> None:
    """Raise CheckpointError if `like` has not these items."""
    if not isinstance(like, Mapping):
        raise CheckpointError(
            f"the Orbax checkpoint {path} has the items {listed(tuple(items))}, and like= is of type "
            f"{type(like).__name__}; give a dict with a tree for each"
        )
    here = list(map(str, like))
    differs = [f"item {name!r} is only there" for name in items if name not in here]
    differs += [f"item {name!r} is only here, or no pytree there" for name in here if name not in items]
    if differs:
        raise CheckpointError(
            f"the Orbax checkpoint {path} cannot be read as like=: {bounded(differs)}; give a dict with a tree for "
            f"each of its items {listed(tuple(items))}, or None for one to be read as it is"
        )


def _tree(source: Path) -> Any:
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
    if (path / ORBAX_TREE).exists():
        return {"": path}
    steps = [] if (path / checkpoints.ORBAX).exists() else checkpoints.orbax_steps(path)
    if steps:
        return _items(steps[-1])
    items = {p.name: p for p in sorted(path.iterdir()) if (p / ORBAX_TREE).exists()}
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
            if like is None or isinstance(error, msgspec.DecodeError):  # nothing is asked of it that it may not have
                raise CheckpointError(
                    f"the Orbax checkpoint {path} cannot be read, and may be damaged or incomplete ({reason}); {OLDER}"
                ) from error
            raise CheckpointError(f"the Orbax checkpoint {path} cannot be read as like=: {reason}") from error


def _leaves(checkpointer: Any, path: Path, like: Any, structs: Mapping[tuple[Key, ...], Any]) -> list[Any]:
    """The arrays in the places of these structs, which are the leaves of `like` without those of equinox modules that
    are no arrays. Raises CheckpointError with the leaves that differ."""
    fixed, (leaves, structure), rest = leaves_of_modules(like), jax.tree_util.tree_flatten(like), iter(structs.values())
    target = structure.unflatten([None if i in fixed else next(rest) for i in range(len(leaves))])
    try:
        found = jax.tree_util.tree_leaves(checkpointer.restore(path, target))
    except Exception as error:  # as above
        about = checkpointer.metadata(path).item_metadata
        if about is None:  # Orbax has found no array, because files are missing or cut off
            raise CheckpointError(
                f"the Orbax checkpoint {path} is damaged or incomplete: files of it are missing or cut off; {OLDER}"
            ) from error
        there = about.tree
        implementations = _implementations(path)
        pairs = jax.tree_util.tree_leaves_with_path(there)
        _check(path, {_keys(p): _spec(x, implementations) for p, x in pairs}, structs, error)
        read = checkpointer.restore(path, jax.tree_util.tree_map_with_path(lambda p, _: structs[_keys(p)], there))
        values = {_keys(p): value for p, value in jax.tree_util.tree_leaves_with_path(read)}
        found = [values[keys] for keys in structs]
    # Orbax reads a key as the key that it is, whatever is asked for.
    _check(path, {keys: _spec(value) for keys, value in zip(structs, found, strict=True)}, structs)
    return found


def _check(path: Path, there: Specs, structs: Mapping[tuple[Key, ...], Any], error: Exception | None = None) -> None:
    """Raise CheckpointError if a checkpoint with these leaves has other ones. Orbax converts dtypes of numbers, so that
    others are no difference."""
    here = {keys: _spec(struct) for keys, struct in structs.items()}
    here = {
        keys: there[keys] if keys in there and _converts(there[keys], spec) else spec for keys, spec in here.items()
    }
    differs = differences("leaf", there, here)
    if differs:
        raise CheckpointError(
            f"the Orbax checkpoint {path} cannot be read as like=: {bounded(differs)}; give a tree like it"
        ) from error


def _converts(there: Spec, here: Spec) -> bool:
    return there[1] == here[1] and not there[0].startswith("key<") and not here[0].startswith("key<")


def _spec(leaf: Any, implementations: Mapping[str, str] = MappingProxyType({})) -> Spec:
    """The dtype and the shape of a leaf, or of one with this metadata."""
    implementation = implementations.get(getattr(leaf, "name", ""))
    if implementation is not None:
        data = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        leaf = jax.eval_shape(partial(jax.random.wrap_key_data, impl=implementation), data)
    return str(leaf.dtype), tuple(leaf.shape)


def _implementations(path: Path) -> dict[str, str]:
    """The PRNG implementations of the keys in a pytree, by Orbax's names of them. Its metadata have the words of a key
    only."""
    found: dict[str, str] = {}
    for file in path.glob("array_metadatas/process_*"):
        for entry in msgspec.json.decode(file.read_bytes(), type=_ArrayMetadatas).array_metadatas:
            about = entry.array_metadata
            if about.ext_metadata is not None and about.ext_metadata.random_key_impl is not None:
                found[about.param_name] = about.ext_metadata.random_key_impl
    return found


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
