"""`flowml launch` starts a cluster that others connect to, and runs it until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from flowml_tools.command import (
    add_bind,
    add_lost_after,
    add_offer,
    add_tls,
    add_transport,
    announce,
    count,
    natural,
    positive,
    read_token,
    tls,
)

SUMMARY = "start a cluster and print how to connect to it"
DESCRIPTION = """\
Start a coordinator and N workers on this machine, print the lines that connect to them and that join more workers, and
run until Ctrl-C. A line tells of each worker that joins, is lost, is replaced or leaves. The token is written to a
file that only its owner can read, and never printed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--workers", type=positive, default=1, metavar="N", help="workers to start (default 1)")
    parser.add_argument(
        "--spares",
        type=natural,
        default=0,
        metavar="N",
        help="workers that wait to take the place of lost ones (default 0)",
    )
    parser.add_argument("--on", choices=["local"], default="local", help="where the workers run (default local)")
    add_bind(parser)
    parser.add_argument("--token-file", type=Path, metavar="F", help="use the token in F, or write a new one there")
    parser.add_argument(
        "--state",
        default="",
        metavar="DIR",
        help="where the coordinator keeps its log (default: a temporary folder, removed at the end)",
    )
    add_lost_after(parser)
    add_tls(parser)
    add_transport(parser)
    add_offer(parser)


def main(arguments: argparse.Namespace) -> int:
    secured = tls(arguments)
    with _token(arguments.token_file) as (token, path):
        from flowml_runtime.launch.launched import LaunchedCluster

        spares = f" and {count(arguments.spares, 'spare')}" if arguments.spares else ""
        print(f"starting {count(arguments.workers, 'worker')}{spares}", file=sys.stderr)
        cluster = LaunchedCluster(
            arguments.bind,
            arguments.workers,
            secured,
            token,
            spares=arguments.spares,
            devices_per_worker=arguments.devices,
            allow_python=arguments.allow_python,
            platform=arguments.platform,
            transport=arguments.transport,
            checksum=arguments.checksum,
            lost_after_s=arguments.lost_after,
            orphan_s=arguments.orphan,
            notice_s=arguments.notice,
            state=arguments.state,
        )
        try:
            announce(cluster.address, path, secured)
            cluster.news.tell(lambda line: print(line, flush=True))
            cluster.wait()  # no deadline: it runs until it is stopped, and a signal ends the wait
        finally:
            cluster.close()
    return 0


@contextmanager
def _token(path: Path | None) -> Generator[tuple[str, Path]]:
    """The token and the file that holds it: the user's file, made if missing, or a temporary one."""
    from flowml_runtime.transport.security import new_token, write_token

    if path is not None and path.exists():
        yield read_token(path), path
        return
    token = new_token()
    if path is not None:
        write_token(path, token)
        yield token, path
        return
    with TemporaryDirectory(prefix="flowml-") as folder:
        write_token(made := Path(folder, "token"), token)
        yield token, made
