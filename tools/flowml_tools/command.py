"""Code that the subcommands share: the error for a wrong call, and common arguments."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from flowml.sim.churn import Counts
    from flowml_runtime.cluster import Cluster
    from flowml_runtime.transport.security import TLS


class Parser(argparse.ArgumentParser):
    """A wrong value of an argument is one line, as other errors of flowml. Where the arguments themselves are wrong,
    the usage is printed too."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):
            self.exit(2, f"flowml: error: {message}\n")
        super().error(message)


class CommandError(Exception):
    """A wrong call of the command. It ends with one line on stderr and exit status 2."""


def count(number: int, noun: str) -> str:
    """`2 workers`, `1 worker`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def positive(text: str) -> int:
    """An argparse type for counts."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few; give 1 or more")
    return value


def natural(text: str) -> int:
    """An argparse type for seeds, and for counts of which 0 is one."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def counted(text: str) -> tuple[str, Counts | None]:
    """A record of spot machines without its last word, which says what it counts, and that word: `x.json,preempted`."""
    given, _, word = text.rpartition(",")
    if word == "available" or word == "preempted":
        return given, word
    return text, None


def seconds(text: str) -> float:
    """An argparse type for times above zero."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a valid time; give seconds above 0")
    return value


def lost_after(text: str) -> float:
    """An argparse type for how long a member may be silent."""
    from flowml_runtime.protocol.membership import LEAST_LOST_AFTER_S, TOO_SOON

    value = seconds(text)
    if value < LEAST_LOST_AFTER_S:
        raise argparse.ArgumentTypeError(f"{text}: {TOO_SOON}")
    return value


def seconds_or_none(text: str) -> float:
    """An argparse type for times, of which 0 is one."""
    try:
        if float(text) == 0:
            return 0.0
        return seconds(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text} is not a valid time; give 0, or seconds above 0") from None


def add_script(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """Add arguments for a script and its own arguments."""
    parser.add_argument("file", nargs=None if needed else "?", metavar="FILE.py", help="the script")
    rest = parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    rest.required = False  # argparse would name them where the script is missing


def address(text: str) -> str:
    """An argparse type for HOST:PORT (port 0: any free one)."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, e.g. 127.0.0.1:7070")
    return text


def coordinator(text: str) -> str:
    """An argparse type for the HOST:PORT of a coordinator, or its place in etcd."""
    return text if text.startswith(("etcd://", "etcds://")) else address(text)


def add_offer(parser: argparse.ArgumentParser) -> None:
    """Add arguments that say what each started worker offers."""
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="devices of a worker (default 1)")
    parser.add_argument("--platform", default="cpu", help="what JAX calls them: cpu, cuda, … (default cpu)")
    parser.add_argument(
        "--allow-python", action="store_true", help="run the Python callbacks and data sources that plans carry"
    )
    parser.add_argument(
        "--orphan",
        type=seconds_or_none,
        default=600.0,
        metavar="SECONDS",
        help="how long a worker keeps the newest snapshot of a fit whose driver was lost (default 600)",
    )
    parser.add_argument(
        "--notice",
        type=seconds,
        default=25.0,
        metavar="SECONDS",
        help="how long a worker may take to hand over after SIGTERM, before it leaves anyway (default 25)",
    )


def add_transport(parser: argparse.ArgumentParser) -> None:
    """Add arguments that say how processes exchange arrays."""
    parser.add_argument(
        "--transport",
        choices=["auto", "grpc"],
        default="auto",
        help="auto: shared memory between processes of one machine; grpc: gRPC between all (default auto)",
    )
    parser.add_argument(
        "--checksum",
        action=argparse.BooleanOptionalAction,
        help="checksums on every message, or on none (default: on messages to other machines)",
    )


def add_bind(parser: argparse.ArgumentParser) -> None:
    """Add the argument that says where a coordinator listens."""
    parser.add_argument(
        "--bind",
        type=address,
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="where to listen (default 127.0.0.1, any free port); beyond loopback TLS is required",
    )


def add_lost_after(parser: argparse.ArgumentParser) -> None:
    """Add the argument that says when a silent worker is lost."""
    parser.add_argument(
        "--lost-after",
        type=lost_after,
        default=5.0,
        metavar="SECONDS",
        help="how long a worker may be silent before it is lost (default 5)",
    )


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that connects to a running cluster."""
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="F",
        help="the file with the token that `flowml launch` named (default: $FLOWML_TOKEN_FILE)",
    )
    add_tls(parser)


def add_tls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="own certificate; TLS is required beyond loopback")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="private key of --tls-cert")
    parser.add_argument("--tls-ca", type=Path, metavar="PEM", help="the authority that signed all certificates")


def read_token(path: Path | None) -> str:
    """Read the token from `path` or $FLOWML_TOKEN_FILE. Arguments never hold a token, because other users see them."""
    from flowml.errors import ClusterError
    from flowml_runtime.transport.security import find_token

    try:
        return find_token(path)
    except ClusterError as error:
        hint = "" if path else "; --token-file F names one"
        raise CommandError(f"{error}{hint}") from None


def tls(arguments: argparse.Namespace) -> TLS | None:
    """The three --tls-* files, or none of them."""
    from flowml_runtime.transport.security import TLS

    given: dict[str, Path | None] = {name: getattr(arguments, f"tls_{name}") for name in ("cert", "key", "ca")}
    files = {name: path for name, path in given.items() if path is not None}
    if not files:
        return None
    if len(files) < len(given):
        raise CommandError("--tls-cert, --tls-key and --tls-ca belong together; give all three")
    for name, path in files.items():
        if not path.is_file():
            raise CommandError(f"--tls-{name} {str(path)!r} is not a file")
    return TLS(**files)


def connection_options(token_file: Path, secured: TLS | None) -> str:
    """The arguments of `add_connection`, quoted for a shell."""
    files = {"--token-file": token_file}
    if secured is not None:
        files |= {"--tls-cert": secured.cert, "--tls-key": secured.key, "--tls-ca": secured.ca}
    return " ".join(f"{option} {shlex.quote(str(path))}" for option, path in files.items())


def announce(at: str, token_file: Path, secured: TLS | None) -> None:
    """Print how to use and to stop the cluster at an address."""
    options = connection_options(token_file, secured)
    files = {} if secured is None else {"cert": str(secured.cert), "key": str(secured.key), "ca": str(secured.ca)}
    print(f"cluster at {at}, token in {token_file}")
    print("  in Python:   import flowml as fm; from pathlib import Path")
    print(
        f"               fm.Cluster.connect({at!r}, token=Path({str(token_file)!r}){f', tls={files}' if files else ''})"
    )
    print(f"  a script:    flowml run --on {at} {options} FILE.py")
    print(f"  one more:    flowml worker {at} {options}")
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a shell script starts background commands like this
    print(f"`kill {os.getpid()}` stops it." if deaf else "Ctrl-C stops it.", flush=True)


def connect(at: str, arguments: argparse.Namespace) -> Cluster:
    """Connect to the running cluster at `at` with the token and TLS files of the arguments."""
    token, secured = read_token(arguments.token_file), tls(arguments)
    import flowml as fm

    return fm.Cluster.connect(
        at,
        token=token,
        tls=secured,
        deadline_s=arguments.deadline,
        transport=arguments.transport,
        checksum=arguments.checksum,
    )


def make_folder(option: str, folder: Path) -> None:
    """Make the folder that an option names, if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CommandError(f"{option} {str(folder)!r} is not a folder") from None
    except OSError as error:
        raise CommandError(f"{option} {str(folder)!r} cannot be made: {error.strerror}; give another folder") from None
