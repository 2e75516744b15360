"""What a worker is told when it is started."""

from __future__ import annotations

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
    """False: talk by gRPC to peers of this machine too."""
    checksum: bool | None = None

    def __repr__(self) -> str:
        return f"WorkerConfig(name={self.name!r}, coordinator={self.coordinator!r})"  # no token in logs
