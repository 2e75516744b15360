"""Writes what this worker keeps of a fit whose driver does not come back, and completes the checkpoint if all is there.

`protocol.training.kept_fits` decides when, and `environment.last_checkpoints` has the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from flowml.errors import CheckpointError, InUseError
from flowml_runtime.environment import last_checkpoints, locks
from flowml_runtime.environment.last_checkpoints import Known
from flowml_runtime.execution.faults import refusal
from flowml_runtime.protocol.training.kept_fits import Write

_log = logging.getLogger("flowml")


@dataclass(frozen=True)
class Found:
    """What a worker keeps of a snapshot: arrays by owner and name, and what it knows of the whole."""

    arrays: Mapping[str, Any]
    known: Known | None


class _Leaf(msgspec.Struct, frozen=True):
    buffer: str


class _Content(msgspec.Struct, frozen=True):
    """The fields of a snapshot's content that name its arrays."""

    owners: dict[str, tuple[str, ...]]
    params: tuple[_Leaf, ...]
    opt_state: tuple[_Leaf, ...]
    state: tuple[_Leaf, ...] = ()
    untrained: tuple[_Leaf, ...] = ()


def write_last(asked: Write, worker: str, found: Mapping[str, Found]) -> bool:
    """Write what is here of the last snapshots of a fit. True if nothing is left to do: one is whole on the disk, or
    another driver has the directory. Says in the log of the worker what goes wrong."""
    directory = Path(asked.directory)
    if not last_checkpoints.is_seen(directory, asked.fit):
        if not asked.again:
            _warn(asked, f"{worker} does not see the directory of this fit there")
        return False
    try:
        if asked.again:
            return _is_gone(directory, asked.keys) or _complete(directory, asked)
        return not _write_parts(directory, worker, found) or _complete(directory, asked)
    except InUseError as error:
        _warn(asked, str(error))
        return True
    except (OSError, CheckpointError) as error:
        if any(last_checkpoints.is_there(directory, key) for key in asked.keys):  # else another driver has written
            _warn(asked, refusal(error))
            _forget(directory, asked.keys)
        return False


def _is_gone(directory: Path, keys: Sequence[str]) -> bool:
    """Whether one that was written here is complete by now, or was removed. Then the others are not needed."""
    gone = not all(last_checkpoints.is_there(directory, key) for key in keys)
    if gone:
        _forget(directory, keys)
    return gone


def _forget(directory: Path, keys: Iterable[str]) -> None:
    for key in keys:
        last_checkpoints.forget(directory, key)


def _write_parts(directory: Path, worker: str, found: Mapping[str, Found]) -> bool:
    """False if a newer checkpoint is on the disk already."""
    steps = [part.known.step for part in found.values() if part.known is not None]
    if steps and last_checkpoints.has(directory, max(steps)):
        return False
    for key, part in found.items():
        last_checkpoints.write(directory, key, worker, part.arrays, part.known)
    return True


def _complete(directory: Path, asked: Write) -> bool:
    """Complete the newest snapshot of which all parts are there."""
    with locks.locked(directory, locks.WORKERS, asked.lost):
        for place, key in reversed([*enumerate(asked.keys)]):
            if last_checkpoints.complete(directory, key, _names, asked.keep):
                _forget(directory, asked.keys[:place])
                return True
    if asked.again:
        _warn(asked, "parts of other workers are missing: they were lost, or are on machines without this directory")
    return False


def _names(content: bytes) -> Iterable[str]:
    """The names of the arrays of a snapshot."""
    found = msgspec.json.decode(content, type=_Content)
    yield from (f"{owner}/{name}" for owner, names in found.owners.items() for name in names)
    for leaves in (found.params, found.opt_state, found.state, found.untrained):
        yield from (leaf.buffer for leaf in leaves)


def _warn(asked: Write, why: str) -> None:
    _log.warning(
        "the last checkpoint of a fit without a driver could not be written to %s: %s; older checkpoints there are as "
        "they were",
        asked.directory,
        why,
    )
