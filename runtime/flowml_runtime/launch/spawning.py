"""Defines the messages between the owner of worker processes and the zygote: one JSON object per line."""

from __future__ import annotations

import socket

import msgspec

from flowml_runtime.membership.process import CoordinatorConfig
from flowml_runtime.worker.config import WorkerConfig

Config = WorkerConfig | CoordinatorConfig


class Start(msgspec.Struct, frozen=True, tag=True):
    """Owner to zygote: start a worker, or a coordinator, that writes its errors to the file `log`."""

    config: Config
    log: str


class Kill(msgspec.Struct, frozen=True, tag=True):
    """Owner to zygote: send a signal to a worker, if it is still alive."""

    worker: str
    number: int


class Rename(msgspec.Struct, frozen=True, tag=True):
    """Owner to zygote: the process of `worker` has another name from now on."""

    worker: str
    name: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Zygote to owner: everything is imported, and workers can be started."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """Zygote to owner: a worker's process was started."""

    worker: str
    pid: int


class Listening(msgspec.Struct, frozen=True, tag=True):
    """Coordinator to owner: it can be joined at an address. It is short, so nothing of the zygote comes inside it."""

    address: str


class Exited(msgspec.Struct, frozen=True, tag=True):
    """Zygote to owner: the process `pid` of a worker ended with `status` (of os.waitstatus_to_exitcode), or none (0)
    could start for `reason`."""

    worker: str
    pid: int
    status: int
    reason: str = ""


def save_s_of(config: Config) -> float:
    """How long a process may take to write what would be lost with it, when it is to end."""
    return config.notice_s if isinstance(config, WorkerConfig) else 0.0


Request = Start | Kill | Rename
Report = Ready | Started | Listening | Exited


def hear(other: socket.socket) -> bytes:
    """Data from the other end; b"" once it has ended, even if it left data of ours unread."""
    try:
        return other.recv(2**16)  # no deadline: called when there is something to read
    except ConnectionResetError:
        return b""
