"""What the owner of worker processes and the zygote that starts them say to each other, one JSON object a line."""

from __future__ import annotations

import socket

import msgspec


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker has to be told. `cores` () leaves it where it is; `name` "" lets the coordinator choose."""

    coordinator: str
    token: str
    name: str = ""
    devices: int = 1
    cores: tuple[int, ...] = ()
    core_share: float = 0.0
    """Cores' worth of work it can do: less than its cores when it shares them. 0: all of them."""
    memory_bytes: int = 0
    """0: all of the machine's."""
    python: bool = False
    platform: str = "cpu"
    tls: tuple[str, str, str] | None = None
    shared_memory: bool = True
    checksum: bool | None = None
    """False: talk by gRPC to peers of this machine too."""

    def __repr__(self) -> str:
        return f"WorkerConfig(name={self.name!r}, coordinator={self.coordinator!r})"  # no token in logs


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
    """Zygote to owner. `status` is that of os.waitstatus_to_exitcode."""

    worker: str
    status: int


Request = Start | Kill
Report = Ready | Started | Exited


def hear(other: socket.socket) -> bytes:
    """What the other end has said; b"" once it is gone, also where it left something of ours unread."""
    try:
        return other.recv(2**16)
    except ConnectionResetError:
        return b""
