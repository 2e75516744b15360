"""Has one fit at most write into a directory of checkpoints: it locks a file there.

The kernel gives the lock back when the process ends, however it ends, so that none is left by a killed one. The file
says who has it: the process, as a driver of a cluster. A suspended process keeps its lock, so that of a driver that is
known to be lost is taken from it. If the directory is removed under a fit and made again, the fit locks it again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from flowml.callers import warn
from flowml.errors import CheckpointError, InUseError

LOCK = ".fit"
WORKERS = "workers"
"""Who has a lock, in place of a driver: workers that complete a last checkpoint. They have it for a moment."""
PATIENCE_S = 10.0
TURN_S = 600.0
"""How long others may save a tree before who waits for them gives up."""
AGAIN_S = 0.02


@dataclass
class _Own:
    file: FileIO
    driver: str


_own: dict[Path, _Own] = {}
"""The locks of this process."""


@contextmanager
def locked(directory: Path, driver: str = "", lost: Collection[str] = ()) -> Generator[None]:
    """Be the only fit that writes into a directory, as `driver` of a cluster. Raises InUseError if another one does.

    The lock of a driver that is known to be `lost` is taken from it: it writes nothing more, see `check_own`. Workers
    that complete a last checkpoint (`WORKERS`) wait for a driver that has just ended, and a driver waits for them.
    """
    path = directory.resolve() / LOCK
    own = _own[path] = _Own(_taken(path, driver, lost), driver)
    try:
        yield
    finally:
        if _own.get(path) is own:
            del _own[path]
        with own.file as file:
            if driver != WORKERS and _is_at(file, path):  # theirs refuses a driver that was suspended and wakes up
                with suppress(OSError):  # the directory may be read-only now
                    path.unlink(missing_ok=True)  # while it is locked: later it may be that of another fit


def check_own(directory: Path) -> None:
    """Raise CheckpointError if another process has taken the lock of this one, or has locked a directory that this one
    writes into and that was removed meanwhile."""
    path = directory.resolve() / LOCK
    pid, host, _ = _holder(path)
    if pid and (pid, host) != _here():
        raise CheckpointError(f"process {pid} on {host} has taken {directory} over, as this one was lost")
    own = _own.get(path)
    if own is not None and not path.exists():
        before, own.file = own.file, _taken(path, own.driver, ())
        before.close()


def _taken(path: Path, driver: str, lost: Collection[str]) -> FileIO:
    """The locked file, which says who has it."""
    until = time.monotonic() + PATIENCE_S
    while (file := _lock(path)) is None:
        pid, host, of = _holder(path)
        if of in lost:
            with turn(path.parent):
                if _holder(path)[2] in lost:
                    path.unlink(missing_ok=True)
        elif (pid and WORKERS not in (driver, of)) or time.monotonic() > until:
            holder = f"process {pid} on {host}" if pid else "another process"
            raise InUseError(
                f"{path.parent} is in use by a fit of {holder}; wait for its end, stop it, or give another directory",
                driver=of,
            )
        else:
            threading.Event().wait(AGAIN_S)
    try:
        file.truncate(0)
        file.write(" ".join((*_here(), driver)).encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            file.close()
            raise
        warn(  # the kernel has locked it nevertheless
            f"the disk of {path.parent} is full ({error.strerror}); the fit goes on, and its checkpoints are written "
            "once there is space"
        )
    return file


@contextmanager
def turn(directory: Path) -> Generator[None]:
    """Wait until nobody else has a turn in a directory: another process, or a thread of this one, that takes a lock
    over or saves a tree. Raises InUseError after TURN_S."""
    number, until = os.open(directory, os.O_RDONLY | os.O_DIRECTORY), time.monotonic() + TURN_S
    try:
        while not _may(number):
            if time.monotonic() > until:
                raise InUseError(f"another process has written there for {TURN_S:g} s; see whether it is stuck")
            threading.Event().wait(AGAIN_S)
        yield
    finally:
        with suppress(OSError):  # a fork of this process has the descriptor too, and would keep the lock
            fcntl.flock(number, fcntl.LOCK_UN)
        os.close(number)


def _may(number: int) -> bool:
    """Lock a directory, if nobody else has it. On a file system without locks nobody has."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _lock(path: Path) -> FileIO | None:
    """The locked file; None if another process, or another fit of this one, has it. It is open while it is locked."""
    while True:
        file = path.open("a+b", buffering=0)  # one that is closed writes nothing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            warn(
                f"{path.parent} is on a file system without locks ({error.strerror}), so nothing keeps a second "
                "fit from writing there too"
            )
            return file
        if _is_at(file, path):
            return file
        file.close()  # the fit that had it has removed it meanwhile


def _is_at(file: FileIO, path: Path) -> bool:
    """Whether this is the file of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:  # it, or its directory, is removed or something else
        return False


def _here() -> tuple[str, str]:
    return str(os.getpid()), socket.gethostname()


def _holder(path: Path) -> tuple[str, str, str]:
    """The process, the machine and the driver that have a lock, as far as its file says."""
    try:
        pid, host, *driver = path.read_text().split()
    except (OSError, ValueError):
        return "", "", ""
    return pid, host, driver[0] if driver else ""
