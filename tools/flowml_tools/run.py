"""`flowml run` runs a script with a cluster around it."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flowml_tools.command import (
    CommandError,
    add_connection,
    add_offer,
    add_script,
    add_transport,
    address,
    connect,
    positive,
    seconds,
)
from flowml_tools.script import own_errors, script

if TYPE_CHECKING:
    from flowml_runtime.cluster import Cluster

SUMMARY = "run a script with a local cluster, or on a running one"
DESCRIPTION = """\
Run FILE.py like `python FILE.py ARGS`, with a cluster around it that fm.dataflow and fm.Trainer use by default:
worker processes on this machine, or with --on a cluster that `flowml launch` started. Inside the `with` block of a
cluster that the script makes, that cluster is used instead.

Options of flowml go before FILE.py. Arguments after it go to the script.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_cluster(parser)
    parser.add_argument(
        "--jit",
        choices=("auto",),
        help="auto: run jax.jit functions of the script on the cluster where that is faster, and report what ran where",
    )
    add_script(parser)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Add arguments that choose the cluster of a script."""
    parser.add_argument("--workers", type=positive, metavar="N", help="worker processes (default: one a core)")
    parser.add_argument("--on", type=address, metavar="HOST:PORT", help="a cluster that runs already")
    parser.add_argument(
        "--deadline",
        type=seconds,
        default=300.0,
        metavar="S",
        help="seconds that a worker waits for another before the call fails (default 300)",
    )
    add_transport(parser)
    add_connection(parser)
    add_offer(parser)


def main(arguments: argparse.Namespace) -> int:
    path = script(arguments.file)
    made = entered(cluster(arguments))
    if arguments.jit is None:
        run_script(path, arguments.args)
    else:
        run_with_auto_jit(path, arguments.args, made)
    return 0


def run_with_auto_jit(path: Path, args: list[str], made: Cluster) -> None:
    """Run a script whose `jax.jit` functions may run on the cluster. Print to stderr which did, and why."""
    from flowml_runtime.auto_jit import auto_jit

    with auto_jit(made, path.resolve().parent) as record:
        try:
            run_script(path, args)
        finally:
            for line in record.lines() or ["no function of the script was called through jax.jit"]:
                print(f"flowml: {line}", file=sys.stderr)


def cluster(arguments: argparse.Namespace) -> Cluster:
    """The cluster that the arguments of `add_cluster` name."""
    if arguments.on is not None:
        if arguments.workers is not None:
            raise CommandError("--workers starts a local cluster and --on joins one; give one of them")
        return connect(arguments.on, arguments)
    if arguments.token_file is not None:
        raise CommandError("--token-file goes with --on HOST:PORT; a local cluster makes its own token")
    from flowml_runtime.cluster import Cluster
    from flowml_runtime.environment.machine import cores

    return Cluster.local(
        arguments.workers or len(cores()),
        arguments.devices,
        allow_python=arguments.allow_python,
        platform=arguments.platform,
        deadline_s=arguments.deadline,
        transport=arguments.transport,
        checksum=arguments.checksum,
    )


def entered(made: Cluster) -> Cluster:
    """Make `made` the cluster of a script. It is closed when this process ends, after all that the script leaves for
    its end: threads that still run, and atexit handlers. These run in reverse order, that of the cluster last."""
    return made.__enter__()


def run_script(path: Path, args: list[str]) -> None:
    """Run a script as `python FILE.py ARGS` would."""
    sys.argv = [str(path), *args]
    sys.path.insert(0, str(path.resolve().parent))
    with own_errors(path):
        runpy.run_path(str(path), run_name="__main__")
