"""Writes and reads the directories of checkpoints. Knows files, names and arrays, and nothing of training.

    PATH/step-000000000400/buffers.bin      the bytes of arrays, each at a multiple of 64
    PATH/step-000000000400/part17.bin       those that a worker has written itself
    PATH/step-000000000400/manifest.json    {"checksum": of the body, "body": {"format", "content", "arrays": [...]}}
    PATH/.fit                               locked by the fit that writes there, see `locks`
    PATH/.identity                          the name of the fit for workers that outlive their driver
    PATH/.last-*                            what these write when no driver comes, see `last_checkpoints`

A snapshot is written into a directory of another name. Its files are on the disk (fsync) before the directory gets its
name, in one step, and before an older snapshot is removed. So a directory `step-...` is complete, whenever the process
is killed. Nothing is pickled: an array is its bytes, with a dtype of numbers, and every length is checked before it is
read. Each array and the manifest have a checksum, so that a changed or truncated file is an error.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash

from flowml.arrays import ArraySpec, dtype_of
from flowml.errors import CheckpointError
from flowml_runtime.environment import locks

FORMAT = 1
DATA, MANIFEST, TOKEN, IDENTITY = "buffers.bin", "manifest.json", ".token", ".identity"
ORBAX = "_CHECKPOINT_METADATA"
"""The file by which Orbax knows its checkpoints."""
ORBAX_TREE = "_METADATA"
"""That of a pytree in one."""
ALIGNMENT = 64
MOST_BYTES = 2**30
"""Of a manifest."""

_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_NAME = re.compile(r"step-(\d{12})")
_FILE = re.compile(r"[a-z]+\d*\.bin")
_UNFINISHED = re.compile(r"\.(?:writing|offered|damaged)-\d{12}-(\d+)")
_ORBAX_STEP = re.compile(r"(?:.+_)?([0-9]+)")
"""Orbax names a step by its number, which may have zeros and, after a "_", a prefix before it."""
LAST = ".last-"
_offers = count()
_open: set[Path] = set()
"""The folders that this process has offered, of snapshots that may still become complete."""


_ADVICE = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT),
        "make room on the disk: an older checkpoint is removed only when a newer one is complete",
    ),
    errno.EFBIG: "let this process write larger files",
    errno.EROFS: "the disk is read-only",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this process write there"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), "see whether the directory was removed"),
    errno.EIO: "see whether the disk is damaged",
}


class FormatError(CheckpointError):
    """A snapshot of another version of flowml, or of something else. It is not damaged, so an older one does not
    replace it."""


class Entry(msgspec.Struct, frozen=True):
    """An array of a snapshot, and where its bytes are."""

    name: str
    spec: ArraySpec
    offset: _Offset
    checksum: str
    file: str = DATA


class Body(msgspec.Struct, frozen=True):
    """A manifest. `content` is what the writer says about the arrays."""

    format: int
    content: msgspec.Raw
    arrays: tuple[Entry, ...]


class _Manifest(msgspec.Struct, frozen=True):
    checksum: str
    body: msgspec.Raw


class _Version(msgspec.Struct, frozen=True):
    format: int


def advice(error: Exception) -> str:
    """What to do about an error of writing, to stand at the end of a sentence; "" if nothing is known."""
    found = _ADVICE.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    return f"; {found}" if found else ""


def write(directory: Path, step: int, content: bytes, arrays: Mapping[str, Any], keep: int) -> Path:
    """Write a snapshot, and remove all but the newest `keep`. `content` is JSON. Raises OSError if the disk refuses."""
    with writing(directory, step) as folder:
        return complete(folder, content, write_arrays(folder / DATA, arrays), keep)


@contextmanager
def writing(directory: Path, step: int) -> Generator[Path]:
    """A folder for the files of a snapshot, which is removed unless it is made `complete`."""
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / f".writing-{step:012d}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def offered(directory: Path) -> Path:
    """A folder into which workers write files of a snapshot. The caller has it `withdrawn`, or makes it `complete`."""
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / f".offered-{next(_offers):012d}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    _open.add(folder)
    try:
        folder.mkdir()
    except BaseException:
        _open.discard(folder)
        raise
    return folder


def withdraw(folder: Path) -> None:
    """Remove a folder that was `offered`. What a worker writes there meanwhile may keep it from being removed; then
    `remove_withdrawn` does, or the next snapshot."""
    _open.discard(folder)
    with suppress(OSError):  # the disk may be read-only by now: then no worker can write there either
        (folder / TOKEN).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_withdrawn(directory: Path) -> None:
    """Remove the folders that this process has withdrawn, and that are there all the same."""
    with suppress(OSError):  # what cannot be listed cannot be removed
        for path in directory.resolve().glob(f".offered-*-{os.getpid()}"):
            if path not in _open:
                shutil.rmtree(path, ignore_errors=True)


def part_of(worker: str) -> str:
    """The name of the file that a worker writes."""
    return f"part{xxhash.xxh3_64_intdigest(worker.encode())}.bin"


def complete(folder: Path, content: bytes, entries: Sequence[Entry], keep: int, step: int | None = None) -> Path:
    """Make the snapshot in a folder of `writing`, or in one that was `offered`, complete, whose arrays are in files
    there. Of the first, the name has the step."""
    directory, number = folder.parent, int(folder.name.split("-")[1]) if step is None else step
    target = named(folder, number, content, entries)
    _open.discard(folder)
    with suppress(OSError):  # the snapshot is complete all the same
        _remove(directory, keep)
    return target


def named(folder: Path, step: int, content: bytes, entries: Sequence[Entry]) -> Path:
    """Have a folder with all files of a snapshot on the disk under the name of a snapshot."""
    directory = folder.parent
    body = msgspec.json.encode(Body(FORMAT, msgspec.Raw(content), tuple(entries)))
    write_file(folder / MANIFEST, msgspec.json.encode(_Manifest(_checksum(body), msgspec.Raw(body))))
    (folder / TOKEN).unlink(missing_ok=True)
    sync(folder)
    locks.check_own(directory)
    target = directory / f"step-{step:012d}"
    if target.exists():  # it is damaged, else the fit would have gone on from it
        target.rename(directory / f".damaged-{step:012d}-{os.getpid()}")
    folder.rename(target)
    sync(directory)
    return target


def invite(folder: Path) -> str:
    """Let those who know what is returned write a file into a folder of `writing`."""
    token = secrets.token_hex(16)
    (folder / TOKEN).write_text(token)
    return token


def write_invited(folder: Path, file: str, token: str, arrays: Mapping[str, Any]) -> list[Entry] | None:
    """Write a file into a folder where another process has invited to do so, in place of one that this worker has
    written for the same question. None if that is not seen here: the other process has another disk. Raises OSError if
    the disk refuses."""
    try:
        if not _FILE.fullmatch(file) or (folder / TOKEN).read_text() != token:
            return None
    except (OSError, ValueError):
        return None
    (folder / file).unlink(missing_ok=True)
    return write_arrays(folder / file, arrays)


def prepare(directory: Path) -> None:
    """Make the directory if it is not there. Raises CheckpointError if nothing could be written into it, or it is one
    of Orbax."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK | os.X_OK)
        why = "it may not be written"
    except OSError as error:
        writable, why = False, str(error)
    if not writable:
        raise CheckpointError(
            f"no checkpoint can be written into {directory}: {why}; give fm.Checkpoint a directory that can be written"
        )
    if holds_orbax(directory):
        raise CheckpointError(
            f"{directory} holds checkpoints of Orbax; give fm.Checkpoint another directory, and begin from "
            "fm.from_orbax of this one"
        )


def holds_orbax(directory: Path) -> bool:
    """Whether a directory is a checkpoint of Orbax, or has steps of one."""
    return (directory / ORBAX).exists() or any((step / ORBAX).exists() for step in orbax_steps(directory))


def orbax_steps(directory: Path) -> list[Path]:
    """The steps of a `CheckpointManager` of Orbax, the newest last. A folder whose name has a prefix, and that is a
    pytree itself, is none: who wrote it has chosen its name."""
    found: list[tuple[int, Path]] = []
    for path in directory.glob("*[0-9]"):
        name = _ORBAX_STEP.fullmatch(path.name)
        if name is None:
            continue
        if (path / ORBAX_TREE).exists():
            is_step = path.name == name[1]
        else:
            is_step = (path / ORBAX).exists() or any(path.glob(f"*/{ORBAX_TREE}"))
        if is_step:
            found.append((int(name[1]), path))
    return [path for _, path in sorted(found)]


def named_directory(where: str, path: Any, of: str = "", fix: str = "") -> Path:
    """The path that a function was given. Raises TypeError if it is none: `of` says whose it is to be."""
    if not isinstance(path, str | os.PathLike):
        given = f"and not a value of type {type(path).__name__}"  # which may be large, so it is not shown
        raise TypeError(f"{where}: give the name of a directory{of}, {given}{fix}")
    return Path(path)


def identity(directory: Path, *, anew: bool) -> str:
    """The name of the fit that writes into a directory. It gets one if it has none, and a new one if it begins `anew`.

    Raises CheckpointError if it can be neither read nor written.
    """
    path = directory / IDENTITY
    try:
        known = "" if anew or not path.exists() else path.read_text()
        if not re.fullmatch("fit-[0-9a-f]{32}", known):
            known = f"fit-{secrets.token_hex(16)}"
            write_file(path, known.encode())
            sync(directory)
    except (OSError, ValueError) as error:
        why = advice(error) if isinstance(error, OSError) else ""
        raise CheckpointError(
            f"{path} can be neither read nor written: {error}{why or '; give another directory'}"
        ) from None
    return known


@contextmanager
def undone(directory: Path, *, unless: Callable[[], bool]) -> Generator[None]:
    """If the body raises an error, leave in a directory the name of a fit that was there before, `unless` the new fit
    has begun: workers may keep that for another driver."""
    path = directory / IDENTITY
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if before is not None and not unless():
                write_file(path, before)
            elif not unless():
                path.unlink(missing_ok=True)
        raise


def snapshots(directory: Path) -> list[Path]:
    """The snapshots of a directory, the newest first."""
    found = [p for p in directory.iterdir() if _NAME.fullmatch(p.name)] if directory.is_dir() else []
    return sorted(found, key=lambda p: p.name, reverse=True)


def step_of(snapshot: Path) -> int:
    """The number of steps before a snapshot, from its name."""
    found = _NAME.fullmatch(snapshot.name)
    return int(found[1]) if found else 0


def read(snapshot: Path) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """The content and the arrays of a snapshot.

    Raises CheckpointError for one that is not there, is damaged, or has another format.
    """
    body = manifest(snapshot)
    if not body.arrays:
        read_arrays(snapshot, DATA, ())
    files = dict.fromkeys(entry.file for entry in body.arrays)
    found = (read_arrays(snapshot, name, [e for e in body.arrays if e.file == name]) for name in files)
    return bytes(body.content), {name: array for arrays in found for name, array in arrays.items()}


def manifest(snapshot: Path) -> Body:
    """What a snapshot says of its arrays. Raises CheckpointError as `read` does."""
    with _reading(snapshot):
        return _body(snapshot / MANIFEST)


def read_arrays(snapshot: Path, file: str, entries: Iterable[Entry]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a snapshot in one of its files, by name, each with the checksum of its entry. Raises
    CheckpointError if one is damaged."""
    if not _FILE.fullmatch(file):
        raise CheckpointError(f"the checkpoint {snapshot} names the file {file!r}, which it cannot have; {OLDER}")
    with _reading(snapshot), (snapshot / file).open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        return {entry.name: _array(snapshot, opened, size, entry) for entry in entries}


@contextmanager
def _reading(snapshot: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if not (snapshot / MANIFEST).exists() and not _NAME.fullmatch(snapshot.name):
            raise CheckpointError(f"there is no checkpoint at {snapshot}; see whether that is its name") from None
        why = f"{error.strerror or error}{f' ({Path(error.filename).name})' if error.filename else ''}"
        raise CheckpointError(f"the checkpoint {snapshot} cannot be read: {why}; {OLDER}") from None


OLDER = "take an older one"


def _body(path: Path) -> Body:
    if path.stat().st_size > MOST_BYTES:
        raise CheckpointError(f"the checkpoint {path.parent} has a manifest of more than {MOST_BYTES} bytes; {OLDER}")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=_Manifest)
        if _checksum(manifest.body) != manifest.checksum:
            raise CheckpointError(f"the manifest of the checkpoint {path.parent} was changed or is damaged; {OLDER}")
        found = msgspec.json.decode(manifest.body, type=_Version).format
        if found != FORMAT:
            raise FormatError(
                f"the checkpoint {path.parent} has format {found}, and this version of flowml reads format {FORMAT}; "
                f"{'install a newer version' if found > FORMAT else 'read it with the version that wrote it'}"
            )
        return msgspec.json.decode(manifest.body, type=Body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the manifest of the checkpoint {path.parent} is damaged ({error}); {OLDER}") from None


def _array(snapshot: Path, file: Any, size: int, entry: Entry) -> np.ndarray[Any, Any]:
    where = f"{entry.name!r} in the checkpoint {snapshot}"
    try:
        dtype = dtype_of(entry.spec.dtype)
    except (AttributeError, TypeError):
        dtype = np.dtype(object)
    if dtype.hasobject or dtype.itemsize == 0 or dtype.names:
        raise CheckpointError(f"{where} has dtype {entry.spec.dtype!r}, which holds no numbers; {OLDER}")
    nbytes = entry.spec.nbytes
    if entry.offset + nbytes > size:
        raise CheckpointError(f"{where} ends at byte {entry.offset + nbytes} of a file of {size}: it is cut; {OLDER}")
    buffer = np.empty(nbytes, np.uint8)
    file.seek(entry.offset)
    if file.readinto(buffer.data) != nbytes or _checksum(buffer) != entry.checksum:
        raise CheckpointError(f"{where} was changed or is damaged: its checksum is another one; {OLDER}")
    return buffer.view(dtype).reshape(entry.spec.shape)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> list[Entry]:
    """Write arrays to a new file. Raises OSError if the disk refuses."""
    entries: list[Entry] = []
    with path.open("xb") as file:
        for name, value in arrays.items():
            array = np.ascontiguousarray(value).reshape(np.shape(value))  # the first makes a number a row
            if array.dtype.hasobject:
                raise CheckpointError(
                    f"the buffer {name!r} holds Python objects, and a checkpoint only arrays of numbers"
                )
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            data = array.reshape(-1).view(np.uint8)
            spec = ArraySpec(array.shape, array.dtype.name)
            entries.append(Entry(name, spec, file.tell(), _checksum(data), path.name))
            file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    return entries


def write_file(path: Path, data: bytes) -> None:
    """Have a file with these bytes on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def set_aside(directory: Path, after: int) -> None:
    """The snapshots after a step are damaged. They no longer count, and are removed when the next one is complete."""
    for path in snapshots(directory):
        if step_of(path) > after:
            path.rename(directory / f".damaged-{step_of(path):012d}-{os.getpid()}")


def _remove(directory: Path, keep: int) -> None:
    """Remove the snapshots before the newest `keep`, and what killed processes have left."""
    remove_old(directory, keep)
    remove_withdrawn(directory)
    for path in directory.iterdir():
        found = _UNFINISHED.fullmatch(path.name)
        dead = found is not None and (path.name.startswith(".damaged") or not Path(f"/proc/{found[1]}").exists())
        if dead or path.name.startswith(LAST):
            shutil.rmtree(path, ignore_errors=True)


def remove_old(directory: Path, keep: int) -> None:
    """Remove the snapshots before the newest `keep`."""
    for old in snapshots(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _checksum(data: Any) -> str:
    return xxhash.xxh3_128_hexdigest(data.data if isinstance(data, np.ndarray) else data)
