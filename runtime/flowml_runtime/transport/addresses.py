"""Finds the addresses by which other machines and this one reach each other."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

from flowml.errors import ClusterError
from flowml_runtime.transport.security import is_loopback, split_address

_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Documentation addresses (RFC 5737, RFC 3849), used as addresses of some other machine."""


def advertised_host(bind: str) -> str:
    """The host by which others reach a server that listens at `bind`. Raises ClusterError if it cannot be found."""
    host, _ = split_address(bind)
    if host not in ("0.0.0.0", "::"):
        return bind.rpartition(":")[0]
    family = socket.AF_INET if host == "0.0.0.0" else socket.AF_INET6
    found = next((a for a in _own_addresses(family) if not is_loopback(a)), None)
    if found is None:
        raise ClusterError(
            f"cannot listen on {bind}: the address by which others reach this machine is not known, because there is "
            f"no route to other machines and {socket.gethostname()!r} resolves to loopback only; listen on the address "
            "itself, as in 10.0.0.5:7070"
        )
    return f"[{found}]" if family == socket.AF_INET6 else found


def bind_towards(address: str) -> str:
    """The address to listen on for peers at `address`: loopback, or the interface on the route to them."""
    host, port = split_address(address)
    if is_loopback(host):
        return "127.0.0.1:0"
    family, _, _, _, target = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses a route; for a datagram socket this sends nothing
        return f"{probe.getsockname()[0]}:0"


def reserve(address: str) -> socket.socket | None:
    """Keep the port of an address, or any free one for port 0, for the servers of which the caller knows, until the
    socket is closed. None if another process has it.

    The socket is bound and does not listen: connections to the port are refused while no server is there. A server that
    sets SO_REUSEADDR, as gRPC's do, may listen at it, and the system gives the port to nobody else.
    """
    host, port = split_address(address)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        return None
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(place)
    except OSError:
        held.close()
        return None
    return held


def _own_addresses(family: socket.AddressFamily) -> Iterator[str]:
    """The source address of this machine's traffic to others, then the addresses of its host name."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((_ELSEWHERE[family], 1))  # chooses a route; for a datagram socket this sends nothing
        yield probe.getsockname()[0]
    with suppress(OSError):
        yield from (str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, family))
