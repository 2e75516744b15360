"""Checkpoints as users see them: where snapshots of a fit are written, and how they are read without a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import jax.numpy as jnp
import numpy as np

from flowml.callers import warn
from flowml.errors import CheckpointError
from flowml.numbers import whole_number
from flowml.training.valued import BATCH, VALUE
from flowml_runtime.driver.training.snapshots import EMPTY, NONE, TREES, Key, Leaf, Snapshot
from flowml_runtime.environment import checkpoints

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a fit writes snapshots. The last one is written at the end of the fit.

    Args:
        path: a directory, which is made if it is not there.
        every_steps: the number of steps between snapshots.
        every_s: the number of seconds between snapshots, instead of `every_steps`.
        keep: how many snapshots to keep. Older ones are removed when a newer one is complete.

    Raises:
        ValueError, TypeError: for arguments that make no sense.
    """

    path: str | os.PathLike[str]
    every_steps: int | None = None
    every_s: float | None = None
    keep: int = 3

    def __post_init__(self) -> None:
        checkpoints.named_directory("fm.Checkpoint(path=)", self.path)
        if not os.fspath(self.path):
            raise ValueError("Checkpoint(path=''): give the name of a directory; '.' is the current one")
        if self.every_steps is not None and self.every_s is not None:
            raise ValueError("Checkpoint: give every_steps or every_s, and not both")
        if self.every_steps is not None:
            whole_number("every_steps", self.every_steps, least=1)
        every_s: Any = self.every_s
        if every_s is not None and not (type(every_s) in (int, float) and 0 < every_s < float("inf")):
            raise ValueError(f"Checkpoint(every_s={every_s!r}): give a number of seconds above 0")
        whole_number("keep", self.keep, least=1)

    @property
    def directory(self) -> Path:
        return Path(self.path)


def newest(
    directory: Path, read: Callable[[Path], T] = Snapshot.read, what: str = "The fit goes on from"
) -> tuple[Path, T] | None:
    """The newest snapshot of a directory that is complete; None if there is none. Warns of each that is damaged.

    Raises CheckpointError if there are some, and all are damaged, or the newest is of another version of flowml.
    """
    return told(directory, *readable(directory, read), what)


def told(
    directory: Path, found: tuple[Path, T] | None, errors: list[CheckpointError], what: str = "The fit goes on from"
) -> tuple[Path, T] | None:
    """What `readable` has found. Warns of damaged snapshots; raises CheckpointError if there are no others."""
    if found is None and errors:
        why = str(errors[0]).removesuffix(f"; {checkpoints.OLDER}")
        raise CheckpointError(
            f"none of the {len(errors)} checkpoints in {directory} can be read; remove them to begin anew. The newest: "
            f"{why}"
        )
    if found is not None:
        for error in errors:
            warn(f"{error}. {what} {found[0].name}")
    return found


def readable(
    directory: Path, read: Callable[[Path], T] = Snapshot.read
) -> tuple[tuple[Path, T] | None, list[CheckpointError]]:
    """The newest snapshot of a directory that is complete, or None, and why newer ones cannot be read. Another process
    may write there meanwhile.

    Raises CheckpointError if the newest is of another version of flowml.
    """
    there = checkpoints.snapshots(directory)
    errors: list[CheckpointError] = []
    for path in there:
        try:
            return (path, read(path)), errors
        except checkpoints.FormatError:
            raise
        except CheckpointError as error:
            if checkpoints.snapshots(directory)[:1] != there[:1]:  # it was removed, as a newer one is complete
                return readable(directory, read)
            errors.append(error)
    return None, errors


@dataclass(frozen=True)
class Restored:
    """A snapshot as plain values. Containers of pytrees that are neither dicts nor sequences are dicts by attribute.

    Attributes:
        params, opt_state: the pytrees of the fit after `step` steps.
        step: the number of steps before the snapshot.
        buffers: every buffer, by owner and name, such as "replica/1/stage/0/conv/filters/push/0.0/residual".
        state: the state of the model, joined as in `TrainingResult`; None if the loss has none.
    """

    params: Any
    opt_state: Any
    step: int
    buffers: Mapping[str, np.ndarray[Any, Any]] = field(repr=False)
    state: Any = None


def restore(path: str | os.PathLike[str]) -> Restored:
    """The newest complete snapshot of a checkpoint's directory, or the snapshot at `path`. Needs no cluster.

    Raises CheckpointError if there is none, or it is damaged.
    """
    directory = checkpoints.named_directory("fm.restore", path)
    if checkpoints.snapshots(directory):
        found = newest(directory, what="Restored is")
    else:
        found = (directory, Snapshot.read(directory))
    assert found is not None
    snapshot, content = found[1], found[1].content
    params, opt_state, state = (
        _paths(snapshot, what, leaves) for what, leaves in zip(TREES, snapshot.trees, strict=True)
    )
    given = [[("attr", name)] for name in (VALUE, BATCH)]
    if any([*leaf.path] == given[0] for leaf in content.params):
        params = [(path[1:], value) for path, value in params if [*path[:1]] not in given]
    rest = _paths(snapshot, "", content.untrained)
    above = {path[:i] for path, _ in rest for i in range(len(path) + 1)}
    params = nested([*rest, *(found for found in params if found[0] not in above)])
    return Restored(params, nested(opt_state), content.steps, snapshot.arrays, nested(state) if content.state else None)


def _paths(snapshot: Snapshot, what: str, leaves: Sequence[Leaf]) -> list[tuple[tuple[Key, ...], Any]]:
    """The leaves, and the containers without leaves, with their paths."""
    values = [jnp.asarray(value) for value in snapshot.leaves(leaves)]
    found = [(leaf.path, value) for leaf, value in zip(leaves, values, strict=True)]
    return [*found, *((path, {}) for path in snapshot.content.hollow.get(what, ()))]


def nested(leaves: Sequence[tuple[Sequence[Key], Any]]) -> Any:
    """The nested containers whose leaves have these paths."""
    if not leaves:
        return {}
    if not leaves[0][0]:
        return leaves[0][1]
    if leaves[0][0][0][0] in (NONE, EMPTY):
        return None if leaves[0][0][0][0] == NONE else []
    groups: dict[str | int, list[tuple[Sequence[Key], Any]]] = {}
    for path, value in leaves:
        groups.setdefault(path[0][1], []).append((path[1:], value))
    built = {key: nested(found) for key, found in groups.items()}
    if leaves[0][0][0][0] != "list":
        return built
    places = cast(dict[int, Any], built)
    return [places.get(i, {}) for i in range(max(places) + 1)]
