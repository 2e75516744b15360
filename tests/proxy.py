"""A relay between a client and a server on loopback: it flips a bit, swaps bytes, cuts or resets the line, or is slow.

What it does, it does at a position in the bytes that a client sends, so that a test hits the middle of a message.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

Fault = Literal["none", "flip", "swap", "cut", "reset", "stall"]
CHUNK_BYTES = 2**16
SWAPPED_BYTES = 512


class Proxy:
    """Relays to `target` (host:port) from `address`. Use as a context manager."""

    def __init__(
        self,
        target: str,
        fault: Fault = "none",
        at: int = 0,
        bytes_per_s: float | None = None,
        near: bytes = b"",
        delay: Callable[[], float] | None = None,
    ) -> None:
        """`bytes_per_s` is how fast it lets a client's bytes through; it may be changed meanwhile. `delay` gives how
        many seconds it holds up what it relays next.

        The fault is at the first place from `at` on where the bytes are `near`. So a flip hits an array, and no length
        of gRPC's own framing: a receiver that waits for more bytes than come refuses nothing.
        """
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self._fault: Fault = fault
        self._at, self._near, self._delay = at, near, delay
        self.bytes_per_s = bytes_per_s
        self.reached = threading.Event()
        """Set once the fault has come to pass."""
        self._go_on = threading.Event()
        self._links: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def resume(self) -> None:
        """Let through what a stall has held up."""
        self._go_on.set()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        for link in (self._listener, *self._links):
            _shut(link)
        for thread in self._threads:
            thread.join(10.0)
        for link in (self._listener, *self._links):
            link.close()

    def _start(self, run: object, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, name="proxy", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                return
            self._links += [client, server]
            self._start(self._relay, client, server, True)
            self._start(self._relay, server, client, False)

    def _relay(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        done = 0
        with contextlib.suppress(OSError):
            while chunk := bytearray(source.recv(CHUNK_BYTES)):
                at = chunk.find(self._near, max(self._at - done, 0)) if done + len(chunk) > self._at else -1
                if upwards and self._fault != "none" and at >= 0 and not self.reached.is_set():
                    self._spoil(chunk, at + len(self._near) // 2, sink)
                else:
                    if upwards and self.bytes_per_s is not None:
                        time.sleep(len(chunk) / self.bytes_per_s)
                    if self._delay is not None:
                        time.sleep(self._delay())
                    sink.sendall(chunk)
                done += len(chunk)
        for link in (source, sink):
            _shut(link)

    def _spoil(self, chunk: bytearray, at: int, sink: socket.socket) -> None:
        if self._fault in ("flip", "swap"):
            if self._fault == "flip":
                chunk[at] ^= 1 << 3
            else:  # what was sent later is relayed first
                half = SWAPPED_BYTES // 2
                piece = chunk[at : at + SWAPPED_BYTES]
                chunk[at : at + SWAPPED_BYTES] = piece[half:] + piece[:half]
            self.reached.set()
            sink.sendall(chunk)
            return
        sink.sendall(chunk[:at])
        self.reached.set()
        if self._fault == "cut":
            raise ConnectionError
        if self._fault == "reset":  # without the usual farewell: what was sent and not taken is dropped
            sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sink.shutdown(socket.SHUT_RD)  # the other relay waits in recv(), and until that returns nothing is closed
            sink.close()
            raise ConnectionError
        self._go_on.wait()
        sink.sendall(chunk[at:])


def _shut(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
