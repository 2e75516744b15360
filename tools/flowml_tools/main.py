"""The entry point of the `flowml` command. Each subcommand is a module.

Errors are printed as one readable line, and Ctrl-C prints no traceback. The subcommands import flowml and JAX only when
they run, so that `flowml --help` is fast.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from flowml_runtime.environment.streams import open_standard_streams
from flowml_runtime.interrupts import Terminated, heeding_interrupts
from flowml_tools import bench, coordinator, doctor, faults, launch, reproduce, run, simulate, trace, viz, worker
from flowml_tools.command import CommandError, Parser

INTERRUPTED = 128 + signal.SIGINT
DESCRIPTION = "Run JAX functions as dataflow programs on many devices and machines."


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status: 0, 1 (failed), 2 (wrong call), 130 (Ctrl-C)."""
    open_standard_streams()
    arguments = _parser().parse_args(argv)
    if arguments.command not in (run.main, simulate.main):  # a script chooses its own encoding
        _print_anywhere()
    try:
        if arguments.command is worker.main:
            worker.begin(arguments)
        # before signals are heeded: one that comes while its libraries load crashes them
        importlib.import_module("jax")
        with heeding_interrupts():
            _heed_signals()
            return arguments.command(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has closed it (`flowml doctor | head`), so the buffered rest is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error, arguments.traceback)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """Turn a signal into SystemExit, so that `with` blocks close their clusters."""
    raise Terminated(signum)


def _heed_signals() -> None:
    """Let SIGTERM and SIGHUP close clusters, also if `entry` or the parent blocked them. Signals that `nohup` ignores
    stay so."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


_PLAIN = {"µ": "u", "×": "x", "…": "...", "→": "->", "·": "."}


def _print_anywhere() -> None:
    """Replace characters that stdout cannot encode (LANG=C, PYTHONIOENCODING=ascii) instead of failing."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end

    codecs.register_error("flowml-plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it is None if it was closed before the start
            stream.reconfigure(errors="flowml-plain")


def _parser() -> argparse.ArgumentParser:
    from flowml import __version__

    shared = Parser(add_help=False)
    shared.add_argument("--traceback", action="store_true", help="with an error, show where it came from")
    parser = Parser(prog="flowml", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"flowml {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (run, launch, coordinator, worker, simulate, reproduce, faults, viz, trace, bench, doctor):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            parents=[shared],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(command=module.main)
    return parser


def _report(error: Exception, with_traceback: bool) -> int:
    if with_traceback:
        traceback.print_exception(error)
    first, *rest = str(error).splitlines() or [""]
    if _expected(error):
        print(f"flowml: error: {first}", file=sys.stderr)
    else:
        print(f"flowml: error: {type(error).__name__}: {first} (--traceback shows where)", file=sys.stderr)
    if rest and not with_traceback:
        print("flowml: --traceback shows the rest", file=sys.stderr)
    return 2 if _wrong_call(error) else 1


def _expected(error: Exception) -> bool:
    """Whether the error's message says what is wrong and how to fix it."""
    from flowml.errors import FlowmlError

    return isinstance(error, CommandError | FlowmlError)


def _wrong_call(error: Exception) -> bool:
    from flowml.errors import PlacementError, PolicyError, UnsupportedError

    return isinstance(error, CommandError | PlacementError | PolicyError | UnsupportedError)


if __name__ == "__main__":
    sys.exit(main())
