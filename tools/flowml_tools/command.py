"""What the subcommands share: the error that a user's own mistake raises, and the arguments that many of them take."""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowml_runtime.cluster import Cluster


class CommandError(Exception):
    """A mistake in how the command was called; ends it with one line and exit status 2."""


def cores() -> int:
    """Cores that this process may run on (its affinity), which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def positive(text: str) -> int:
    """An argparse type for counts."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few; give 1 or more")
    return value


def address(text: str) -> str:
    """An argparse type for HOST:PORT (port 0: any free one)."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, e.g. 127.0.0.1:7070")
    return text


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Arguments of a command that talks to a cluster that runs already."""
    parser.add_argument("--token-file", type=Path, metavar="F", help="file with the token that `flowml launch` printed")
    add_tls(parser)


def add_tls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="own certificate; TLS is required beyond loopback")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="private key of --tls-cert")
    parser.add_argument("--tls-ca", type=Path, metavar="PEM", help="authority that signed the certificates")


def existing(path: Path, what: str) -> Path:
    if not path.is_file():
        raise CommandError(f"{what} {str(path)!r} does not exist")
    return path


def read_token(path: Path | None) -> str:
    """The token in `path`, which only its owner may be able to read. A token never stands in the arguments."""
    if path is None:
        raise CommandError("a cluster asks for its token: give --token-file with the file that `flowml launch` printed")
    if stat.S_IMODE(existing(path, "token file").stat().st_mode) & 0o077:
        raise CommandError(f"token file {str(path)!r} can be read by others: chmod 600 {path}")
    token = path.read_text().strip()
    if not token:
        raise CommandError(f"token file {str(path)!r} is empty; use the one that `flowml launch` printed")
    return token


def tls_files(arguments: argparse.Namespace) -> dict[str, Path]:
    """The --tls-* files that were given, by their name (cert, key, ca), each of which exists."""
    given: dict[str, Any] = {name: getattr(arguments, f"tls_{name}") for name in ("cert", "key", "ca")}
    files = {name: existing(path, f"--tls-{name}") for name, path in given.items() if path is not None}
    if ("cert" in files) != ("key" in files):
        raise CommandError("--tls-cert and --tls-key belong together; give both or neither")
    return files


def connect(at: str, arguments: argparse.Namespace) -> Cluster:
    """The running cluster at `at`, with the token and TLS files that the arguments name."""
    token, tls = read_token(arguments.token_file), tls_files(arguments)
    import flowml as fm

    return fm.Cluster.connect(at, token=token, tls=tls or None)
