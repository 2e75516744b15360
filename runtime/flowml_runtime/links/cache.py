"""Stores measured links in a small file of the user's cache directory, for later programs.

The file is `flowml/links.json` under $XDG_CACHE_HOME, else ~/.cache. A figure is stored with the machine that measured
it, the two hosts and the way, and is used for a week. The file is optional: one that cannot be read, is damaged or has
another format counts as empty and is replaced at the next measurement.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from flowml.placement.links import Link

FRESH_S = 7 * 24 * 3600.0
MAX_FIGURES = 256
MAX_FILE_BYTES = 2**20
FORMAT = 1

_Text = Annotated[str, msgspec.Meta(max_length=256)]


def machine_id() -> str:
    """Identifies this machine, also after a restart: its name, cores and processor."""
    model = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{socket.gethostname()}, {os.cpu_count()} x {model or platform.machine()}"[:256]


class _Figure(msgspec.Struct, frozen=True):
    machine: _Text
    source: _Text
    destination: _Text
    way: _Text
    latency_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    bytes_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e15)]
    measured_at_s: float
    """Time of the wall clock."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.machine, self.source, self.destination, self.way


class _File(msgspec.Struct, frozen=True):
    format: Annotated[int, msgspec.Meta(ge=FORMAT, le=FORMAT)]
    links: Annotated[tuple[_Figure, ...], msgspec.Meta(max_length=MAX_FIGURES)]


_decoder = msgspec.json.Decoder(_File)


def links_file() -> Path | None:
    """The file of stored links; None for a user without a home directory, for whom nothing is stored."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "flowml" / "links.json"
    except RuntimeError:  # no HOME, and no entry in the password file, as in many containers
        return None


class RememberedLinks:
    """The stored links. Reading and writing never raise: links that cannot be stored are measured again."""

    def __init__(self, path: Path | None = None, now_s: Callable[[], float] = time.time) -> None:
        self._path = path or links_file()
        self._now_s = now_s
        self._machine = machine_id()

    def find(self, source: str, destination: str, way: str) -> Link | None:
        """The link that this machine measured from host to host by this way, if the figure is less than a week old."""
        wanted = (self._machine, source, destination, way)
        found = next((f for f in self._read() if f.key == wanted), None)
        if found is None or not 0 <= self._now_s() - found.measured_at_s < FRESH_S:
            return None
        return Link(found.latency_s, found.bytes_per_s, way, measured=True)

    def remember(self, source: str, destination: str, link: Link) -> None:
        """Store a measurement in place of an earlier one. Beyond `MAX_FIGURES` the oldest are removed."""
        figure = _Figure(self._machine, source, destination, link.way, link.latency_s, link.bytes_per_s, self._now_s())
        kept = sorted((f for f in self._read() if f.key != figure.key), key=lambda f: -f.measured_at_s)
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._write(self._path, _File(FORMAT, (figure, *kept[: MAX_FIGURES - 1])))

    def _read(self) -> tuple[_Figure, ...]:
        if self._path is None:
            return ()
        try:
            if self._path.stat().st_size > MAX_FILE_BYTES:
                return ()
            return _decoder.decode(self._path.read_bytes()).links
        except (OSError, msgspec.DecodeError):
            return ()

    @staticmethod
    def _write(path: Path, file: _File) -> None:
        """Replace the file atomically: a concurrent reader finds either the old or the new file."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(dir=path.parent, prefix="links-")  # readable for its owner only
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(msgspec.json.format(msgspec.json.encode(file)))
            os.replace(made, path)
        except BaseException:
            Path(made).unlink(missing_ok=True)
            raise
