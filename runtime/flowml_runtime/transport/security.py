"""Handles tokens and TLS, and refuses connections beyond this machine without both.

A token is a secret that all members of a cluster share. It is sent in the metadata of a call and stored in files that
only their owner can read. It is never put into arguments, the environment or logs.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowml.errors import ClusterError

TOKEN_FILE_VARIABLE = "FLOWML_TOKEN_FILE"


@dataclass(frozen=True)
class TLS:
    """PEM files: this process's certificate and key, and the authority that signed all certificates."""

    cert: Path
    key: Path
    ca: Path

    @staticmethod
    def of(given: object) -> TLS | None:
        """From a mapping with "cert", "key" and "ca"; None for an empty one. Raises ClusterError for anything else."""
        if given is None or isinstance(given, TLS):
            return given
        files: Mapping[str, Any] = given if isinstance(given, Mapping) else {"": None}
        if not all(isinstance(path, str | os.PathLike) for path in files.values()):
            raise ClusterError(
                f"tls={given!r} is of type {type(given).__name__}; give the paths of three PEM files, "
                "tls={'cert': ..., 'key': ..., 'ca': ...}"
            )
        if not files:
            return None
        missing = [name for name in ("cert", "key", "ca") if name not in files]
        if missing or len(files) != 3:
            raise ClusterError(f"TLS takes cert, key and ca, and nothing else; given: {', '.join(map(str, files))}")
        return TLS(*(Path(files[name]) for name in ("cert", "key", "ca")))

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Contents of cert, key and ca. Raises ClusterError naming the file that cannot be read or used."""
        check_files(self.ca, self.cert, self.key)
        return self.cert.read_bytes(), self.key.read_bytes(), self.ca.read_bytes()


def check_files(
    ca: str | os.PathLike[str] | None, cert: str | os.PathLike[str] | None, key: str | os.PathLike[str] | None
) -> None:
    """Raises ClusterError naming the PEM file that cannot be read or used. An authority, or a certificate with its key,
    may be missing."""
    for path in filter(None, (cert, key, ca)):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ClusterError(f"cannot read the TLS file {error.filename}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if cert is not None:
        try:
            context.load_cert_chain(cert, key, password=lambda: "")  # an encrypted one is refused, and not asked for
        except ssl.SSLError as error:
            raise ClusterError(f"TLS files {cert} and {key} are not a certificate and its key: {error}") from None
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except ssl.SSLError as error:
            raise ClusterError(f"TLS file {ca} does not hold an authority's certificate: {error}") from None


def new_token() -> str:
    return secrets.token_urlsafe(32)


def same_token(a: str, b: str) -> bool:
    """Compares two tokens in a time that does not depend on where they differ."""
    return hmac.compare_digest(a.encode(), b.encode())


def write_token(path: Path, token: str) -> None:
    """Write a token into a new file that only its owner can read. Raises ClusterError if it exists already, or cannot
    be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ClusterError(f"token file {path} exists already; remove it or use the token in it") from None
    except OSError as error:
        why = f"cannot write the token file {path}: {error.strerror}"
        raise ClusterError(f"{why}; name one in a folder that is there and can be written") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")


def find_token(token: object) -> str:
    """The token: as given, or read from the file that is given or named by FLOWML_TOKEN_FILE. Raises ClusterError."""
    if token is None:
        named = os.environ.get(TOKEN_FILE_VARIABLE)
        if not named:
            raise ClusterError(f"the cluster needs its token: give token=, or name its file in {TOKEN_FILE_VARIABLE}")
        return _read_token(Path(named))
    if not isinstance(token, str | os.PathLike):
        raise ClusterError(
            f"token is of type {type(token).__name__}; give the token as text, or the path of the file that holds it"
        )
    if not isinstance(token, str) or (os.sep in token and Path(token).exists()):
        return _read_token(Path(token))
    if not token.strip():
        raise ClusterError("the token is empty; use the one that `flowml launch` wrote")
    return token.strip()


def _read_token(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ClusterError(f"the token file {path} is a folder; name the file in it")
        if stat.S_IMODE(mode) & 0o077:
            raise ClusterError(f"token file {path} can be read by others: chmod 600 {path}")
        token = path.read_text().strip()
    except OSError as error:
        raise ClusterError(f"cannot read the token file {path}: {error.strerror}") from None
    except ValueError as error:  # a path with a null character, or a file that is not text
        raise ClusterError(f"cannot read the token file {str(path)!r}: {error}") from None
    if not token:
        raise ClusterError(f"token file {path} is empty; use the one that `flowml launch` wrote")
    return token


def split_address(address: object) -> tuple[str, int]:
    """Host and port of "host:port". Raises ClusterError."""
    host, colon, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise ClusterError(f"{address!r} is not an address; give HOST:PORT, e.g. 127.0.0.1:7070")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(address: str, tls: TLS | None, token: str, what: str) -> None:
    """Raises ClusterError if it is unsafe to `what` ("listen on", "connect to") this address."""
    if not token:
        raise ClusterError(f"refusing to {what} {address} without a token")
    if tls is None and not is_loopback(split_address(address)[0]):
        raise ClusterError(
            f"refusing to {what} {address} without TLS: beyond this machine a certificate, its key and a CA are "
            "needed, tls={'cert': ..., 'key': ..., 'ca': ...}; or use 127.0.0.1"
        )
