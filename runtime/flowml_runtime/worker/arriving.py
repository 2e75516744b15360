"""Receives a plan on a worker: first its own bytes, then its large constants and executables, one piece at a time."""

from __future__ import annotations

import numpy as np

from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.transport.arrays import aligned_empty


class Arriving:
    """Collects the pieces, which arrive in order. Not thread-safe, because the driver's messages arrive one by one."""

    def __init__(self) -> None:
        self._parts: dict[str, np.ndarray] = {}
        self._part = ""
        self._filled = 0

    def take(self, piece: wire.LoadPlan, data: np.ndarray) -> bool:
        """Add a piece. Returns True for the last one. Raises ProtocolError if it is not the next piece."""
        if piece.start == 0 and piece.part not in self._parts and self._is_whole():
            self._parts[piece.part] = data if data.nbytes == piece.nbytes else aligned_empty(piece.nbytes)
            self._part, self._filled = piece.part, 0
        part = self._parts[self._part]
        if (piece.part, piece.start) != (self._part, self._filled) or self._filled + data.nbytes > part.nbytes:
            raise ProtocolError(f"bytes from {piece.start} on of part {piece.part!r} of a plan came out of order")
        if part is not data:
            part[piece.start : piece.start + data.nbytes] = data
        self._filled += data.nbytes
        if piece.last and not self._is_whole():
            raise ProtocolError(f"part {piece.part!r} of a plan ends after {self._filled} of {part.nbytes} bytes")
        return piece.last

    def taken(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The plan's bytes, and the other parts by name. The caller owns them from now on."""
        parts, self._parts = self._parts, {}
        return parts.pop(""), parts

    def _is_whole(self) -> bool:
        """Whether the current part is complete."""
        return not self._parts or self._filled == self._parts[self._part].nbytes
