"""Writes the last checkpoint of a fit whose driver does not come back: each worker writes its parts, and the one that
finds all of them there makes the snapshot complete.

    PATH/.last-KEY/part17.bin     the arrays of one worker
    PATH/.last-KEY/part17.json    where they are in that file, and what the worker knows of the whole snapshot

A part counts when its second file has its name, which is after both are on the disk. So if a worker is killed
meanwhile, the snapshot is not complete, and older checkpoints are as they were. What is left is removed with the next
checkpoint that is written to the directory. A worker that does not see the directory of the fit, because it is on
another machine, writes nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash

from flowml.errors import CheckpointError
from flowml_runtime.environment import checkpoints
from flowml_runtime.environment.checkpoints import IDENTITY, LAST, Entry

_NOT_KNOWN = b"null"


@dataclass(frozen=True)
class Known:
    """What a worker knows of a whole snapshot: the steps before it, and its content."""

    step: int
    content: bytes


class _Part(msgspec.Struct, frozen=True):
    arrays: tuple[Entry, ...]
    step: Annotated[int, msgspec.Meta(ge=0)] = 0
    content: msgspec.Raw = msgspec.Raw(_NOT_KNOWN)


Needs = Callable[[bytes], Iterable[str]]
"""A content -> the names of its arrays."""


def is_seen(directory: Path, fit: str) -> bool:
    """Whether the directory of a fit is seen here."""
    try:
        return (directory / IDENTITY).read_text() == fit
    except (OSError, ValueError):
        return False


def has(directory: Path, step: int) -> bool:
    """Whether there is a snapshot of at least so many steps."""
    return any(checkpoints.step_of(path) >= step for path in checkpoints.snapshots(directory)[:1])


def write(directory: Path, key: str, worker: str, arrays: Mapping[str, Any], known: Known | None) -> None:
    """Write the parts of one worker. Raises OSError if the disk refuses."""
    folder = _folder(directory, key)
    folder.mkdir(exist_ok=True)
    name = checkpoints.part_of(worker).removesuffix(".bin")
    (folder / f"{name}.bin").unlink(missing_ok=True)
    entries = tuple(checkpoints.write_arrays(folder / f"{name}.bin", arrays))
    part = _Part(entries, known.step, msgspec.Raw(known.content)) if known else _Part(entries)
    begun = folder / f".{name}"
    checkpoints.write_file(begun, msgspec.json.encode(part))
    begun.rename(folder / f"{name}.json")
    checkpoints.sync(folder)


def is_there(directory: Path, key: str) -> bool:
    """Whether the parts of a snapshot are where they were written: it is neither complete nor removed."""
    return _folder(directory, key).is_dir()


def forget(directory: Path, key: str) -> None:
    shutil.rmtree(_folder(directory, key), ignore_errors=True)


def complete(directory: Path, key: str, needs: Needs, keep: int) -> bool:
    """Make a snapshot complete if all parts are there. The caller has the lock of the directory.

    False if a part is missing. Raises OSError if the disk refuses.
    """
    folder = _folder(directory, key)
    parts = list(_parts(folder))
    known = next((part for part in parts if bytes(part.content) != _NOT_KNOWN), None)
    if known is None:
        return False
    entries = {entry.name: entry for part in parts for entry in part.arrays}
    if not entries.keys() >= set(needs(bytes(known.content))):
        return False
    if has(directory, known.step):  # the driver has written it, or a later one
        forget(directory, key)
        return True
    target = checkpoints.named(folder, known.step, bytes(known.content), tuple(entries.values()))
    for path in target.glob("part*.json"):
        path.unlink(missing_ok=True)
    checkpoints.remove_old(directory, keep)
    return True


def read(directory: Path, key: str, owners: Collection[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of these owners that workers have written. Raises CheckpointError if one is damaged."""
    folder, found = _folder(directory, key), dict[str, np.ndarray[Any, Any]]()
    for part in _parts(folder):
        mine = [entry for entry in part.arrays if entry.name.startswith(tuple(f"{owner}/" for owner in owners))]
        for file in {entry.file for entry in mine}:
            found |= checkpoints.read_arrays(folder, file, [entry for entry in mine if entry.file == file])
    return found


def _parts(folder: Path) -> Iterable[_Part]:
    """Those that count."""
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if name.startswith("part") and name.endswith(".json"):
            try:
                yield msgspec.json.decode((folder / name).read_bytes(), type=_Part)
            except (OSError, msgspec.DecodeError) as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from None


def _folder(directory: Path, key: str) -> Path:
    return directory / f"{LAST}{xxhash.xxh3_128_hexdigest(key.encode())}"
