"""Reaches etcd, where a coordinator may keep its log so that no single machine has to be trusted.

A place in etcd is written `etcd://HOST:PORT[,HOST:PORT...]/PREFIX`. Any member of the etcd cluster answers for all, so
the next one is asked if one cannot be reached. Beyond loopback it is `etcds://...?ca=FILE&cert=FILE&key=FILE`, by TLS:
`ca` is the authority that has signed etcd's certificate (default: those of the system), and etcd may ask for `cert`.

The client is etcd3gw, which OpenStack keeps. It speaks to etcd's own HTTP gateway, and to nothing between: proxies and
authorities that the environment names are for other connections.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from flowml.errors import ClusterError
from flowml_runtime.transport.security import check_files, is_loopback, split_address

PATIENCE_S = 2.0
"""How long one member of etcd may take to answer."""

T = TypeVar("T")


def is_etcd(address: object) -> bool:
    return isinstance(address, str) and address.startswith(("etcd://", "etcds://"))


@dataclass(frozen=True)
class Place:
    """Where in etcd something is."""

    address: str
    hosts: tuple[tuple[str, int], ...]
    prefix: str
    tls: Mapping[str, str] | None

    @staticmethod
    def of(address: str) -> Place:
        """Raises ClusterError for an address that makes no sense, or is not safe."""
        parts = urlsplit(address)
        prefix = parts.path.strip("/")
        if parts.scheme not in ("etcd", "etcds") or not prefix or not parts.netloc:
            raise ClusterError(f"{address!r} is no place in etcd; give one such as etcd://127.0.0.1:2379/my-cluster")
        hosts = tuple(split_address(host) for host in parts.netloc.split(","))
        secure = parts.scheme == "etcds"
        outside = [host for host, _ in hosts if not is_loopback(host)]
        if outside and not secure:
            raise ClusterError(
                f"{address!r}: etcd on {outside[0]} is reached without TLS; give etcds://…/{prefix}?ca=FILE&cert=FILE&"
                "key=FILE"
            )
        options = parse_qs(parts.query, keep_blank_values=True)
        unknown = sorted(options.keys() - {"ca", "cert", "key"})
        if unknown:
            raise ClusterError(f"{address!r}: {unknown[0]!r} is no option; give ca, cert and key, which are files")
        for name, files in options.items():
            if files[1:] or not files[0]:
                raise ClusterError(f"{address!r}: {name}= is given {_times(files)}; give one file")
        if options and not secure:
            raise ClusterError(f"{address!r}: etcd:// is without TLS, so {min(options)}= has no effect; write etcds://")
        if ("cert" in options) != ("key" in options):
            raise ClusterError(f"{address!r}: a certificate and its key go together; give cert and key, or neither")
        return Place(address, hosts, f"/{prefix}/", {n: f[0] for n, f in options.items()} if secure else None)


class Etcd:
    """The keys below a prefix. Its methods may be called from any thread, and raise ClusterError if no member of etcd
    answers."""

    def __init__(self, place: Place, patience_s: float = PATIENCE_S) -> None:
        try:
            from etcd3gw.client import Etcd3Client  # here, because few need the extra
            from requests import Session
        except ImportError:
            raise ClusterError(
                f"{place.address} needs a client of etcd, which is not installed: pip install 'flowml[etcd]'"
            ) from None
        self._place = place
        tls = place.tls or {}
        check_files(tls.get("ca"), tls.get("cert"), tls.get("key"))
        session = Session()
        session.trust_env = False  # else REQUESTS_CA_BUNDLE would take the place of `ca`
        session.verify = tls.get("ca", True)
        session.cert = (tls["cert"], tls["key"]) if "cert" in tls else None
        about: dict[str, Any] = {"protocol": "http" if place.tls is None else "https", "session": session}
        self._clients: list[Any] = [
            Etcd3Client(host, port, api_path="/v3/", timeout=patience_s, **about) for host, port in place.hosts
        ]
        self._lock = threading.Lock()
        self._first = 0
        """The member that has answered last."""

    def get(self, key: str) -> str:
        """The value of a key, or ""."""
        found = self.read(key)
        return found[0][1].decode() if found else ""

    def created(self, key: str) -> tuple[str, int]:
        """The value of a key and the revision in which it was made; ("", 0) if it is not there."""
        found = self._ask(lambda c: c.get(self._name(key), metadata=True))
        return (found[0][0].decode(), int(found[0][1]["create_revision"])) if found else ("", 0)

    def read(self, key: str, *, below: bool = False) -> list[tuple[str, bytes]]:
        """The keys and values of a key, or of all that begin with it, in order."""
        name = self._name(key)
        if below:
            found = self._ask(lambda c: c.get_prefix(name, sort_order="ascend", sort_target="key"))
        else:
            found = self._ask(lambda c: c.get(name, metadata=True))
        return [(about["key"].decode().removeprefix(self._place.prefix), value) for value, about in found]

    def commit(
        self,
        holder: tuple[str, int],
        puts: Sequence[tuple[str, bytes]],
        *,
        lease: int = 0,
        clear: tuple[str, str] | None = None,
    ) -> bool:
        """Write all of these at once if the key `holder` is the one that was made in its revision (0: it is not there),
        and remove the keys from the first of `clear` to before the second. False if it is not."""
        key, revision = holder
        compare = {"key": self._coded(key), "result": "EQUAL", "target": "CREATE", "create_revision": revision}
        about = {"lease": lease} if lease else {}
        changes: list[dict[str, Any]] = []
        if clear is not None:
            first, end = map(self._coded, clear)
            changes.append({"request_delete_range": {"key": first, "range_end": end}})
        for name, value in puts:
            coded = base64.b64encode(value).decode()
            changes.append({"request_put": {"key": self._coded(name), "value": coded, **about}})
        told = self._ask(lambda c: c.transaction({"compare": [compare], "success": changes, "failure": []}))
        return bool(told.get("succeeded"))

    def grant(self, seconds: int) -> int:
        """A new lease: the keys that are put with it are removed when it was not kept for so long."""
        return int(self._ask(lambda c: c.lease(seconds)).id)

    def keep(self, lease: int) -> bool:
        """Keep a lease for another term. False if it is over."""
        told = self._ask(lambda c: c.post(c.get_url("/lease/keepalive"), json={"ID": lease}))
        return int(told["result"].get("TTL", -1)) > 0

    def _name(self, key: str) -> str:
        return self._place.prefix + key

    def _coded(self, key: str) -> str:
        return base64.b64encode(self._name(key).encode()).decode()

    def _ask(self, question: Callable[[Any], T]) -> T:
        """Ask the member that has answered last, and then the others. A change may be asked for twice, so every change
        here has the same effect the second time."""
        from etcd3gw.exceptions import Etcd3Exception

        wrong: Exception | None = None
        for turn in range(len(self._clients)):
            number = (self._first + turn) % len(self._clients)
            try:
                with self._lock:  # the client's connection is for one thread at a time
                    found = question(self._clients[number])
            except (Etcd3Exception, OSError, ValueError, KeyError) as error:
                wrong = error
                continue
            self._first = number
            return found
        raise ClusterError(f"etcd at {self._place.address} cannot be used: {_reason(wrong)}; see whether it runs")


def _times(files: Sequence[str]) -> str:
    return f"{len(files)} times" if files[1:] else "without a file"


def _reason(error: Exception | None) -> str:
    words = " ".join(str(part) for part in (error.args if error else ())).strip()
    return words.splitlines()[0][:300] if words else type(error).__name__
