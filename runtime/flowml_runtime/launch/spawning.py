"""What the owner of worker processes and the zygote that starts them say to each other, one JSON object a line."""

from __future__ import annotations

import socket

import msgspec

from flowml_runtime.worker.config import WorkerConfig


class Start(msgspec.Struct, frozen=True, tag=True):
    """Owner to zygote: start a worker that writes its errors to the file `log`."""

    config: WorkerConfig
    log: str


class Kill(msgspec.Struct, frozen=True, tag=True):
    """Owner to zygote: send a signal to a worker, if it is still there."""

    worker: str
    number: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Zygote to owner: all is imported, workers can be started."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """Zygote to owner."""

    worker: str
    pid: int


class Exited(msgspec.Struct, frozen=True, tag=True):
    """Zygote to owner. `status` is that of os.waitstatus_to_exitcode; `reason` says why there never was a process."""

    worker: str
    status: int
    reason: str = ""


Request = Start | Kill
Report = Ready | Started | Exited


def hear(other: socket.socket) -> bytes:
    """What the other end has said; b"" once it is gone, also where it left something of ours unread."""
    try:
        return other.recv(2**16)  # no deadline: called when there is something to read
    except ConnectionResetError:
        return b""
