"""The configuration of a worker, which it gets when it starts."""

from __future__ import annotations

import msgspec

from flowml_runtime.transport.ending import Ending
from flowml_runtime.worker.leaving import NOTICE_S

ORPHAN_S = 600.0
"""How long workers that outlive their drivers keep a fit whose driver is lost, unless they are told otherwise."""


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The configuration of a worker. `cores=()` does not pin it; `name=""` lets the coordinator choose a name."""

    coordinator: str
    token: str
    name: str = ""
    devices: int = 1
    cores: tuple[int, ...] = ()
    core_share: float = 0.0
    """How many cores' worth of work it can do: less than `cores` if it shares them. 0: all of them."""
    memory_bytes: int = 0
    """0: all memory of the machine."""
    python: bool = False
    platform: str = "cpu"
    tls: tuple[str, str, str] | None = None
    shared_memory: bool = True
    """False: use gRPC for peers on this machine too."""
    checksum: bool | None = None
    compiled: str = ""
    """A folder that the workers of this machine share, where they keep what they compile. "": they share nothing."""
    compile_cache: tuple[tuple[str, str | int | float | bool | None], ...] = ()
    """The settings of JAX's persistent compilation cache: (name, value)."""
    patience_s: float = 0.0
    """How long it tries to join while nothing listens where the coordinator should be, which may be started again."""
    spare: bool = False
    """It waits until it is asked to take the place of a lost worker."""
    places: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """For a spare: the cores of each worker whose place it may take."""
    orphan_s: float = 0.0
    """How long it keeps the newest snapshot of a fit whose driver is lost."""
    notice_s: float = NOTICE_S
    """How long it may take to hand over before it leaves."""
    ending: Ending | None = None
    """For tests: where its process ends."""

    def __repr__(self) -> str:
        return f"WorkerConfig(name={self.name!r}, coordinator={self.coordinator!r})"  # no token in logs
