"""`flowml worker` joins a cluster as one more worker on this machine, or has one leave it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from flowml_tools.command import add_connection, add_offer, add_transport, coordinator, read_token, tls

if TYPE_CHECKING:
    from flowml_runtime.transport.security import TLS

SUMMARY = "join a cluster as one more worker"
DESCRIPTION = """\
Join the cluster at HOST:PORT as one more worker, and serve it until it ends or Ctrl-C. At SIGTERM, or with --leave from
anywhere, a worker hands over what it does first, and then ends with status 0. With --spare the worker waits until a fit
asks for another in the place of a lost worker. It should offer the same --devices. A coordinator that is not there is
tried for 10 s, because it may be started again at the moment.
"""
PATIENCE_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "where `flowml launch` listens, or etcd://HOST:PORT/PREFIX"
    parser.add_argument("coordinator", type=coordinator, metavar="HOST:PORT", help=about)
    parser.add_argument(
        "--spare",
        action="store_true",
        help="wait, and take the place of a lost worker that a fit asks to have replaced",
    )
    add_transport(parser)
    add_connection(parser)
    add_offer(parser)
    parser.add_argument(
        "--leave", metavar="NAME", help="have the running worker NAME, such as worker:2, hand over and leave instead"
    )


def begin(arguments: argparse.Namespace) -> None:
    """Begin anew with the memory settings of a worker, after the arguments have been checked: before JAX is imported,
    and while there is one thread."""
    token, secured = read_token(arguments.token_file), tls(arguments)
    from flowml_runtime.environment import allocator
    from flowml_runtime.membership.etcd_log import address_of
    from flowml_runtime.transport.security import check_exposure

    check_exposure(address_of(arguments.coordinator), secured, token, "connect to")
    if arguments.leave is None:
        allocator.reexec()


def main(arguments: argparse.Namespace) -> int:
    token, secured = read_token(arguments.token_file), tls(arguments)
    if arguments.leave is not None:
        return _leave(arguments, token, secured)
    from flowml_runtime.worker.config import WorkerConfig
    from flowml_runtime.worker.leaving import GiveNotice, heed_notice
    from flowml_runtime.worker.process import LOST_COORDINATOR, serve

    config = WorkerConfig(
        coordinator=arguments.coordinator,
        token=token,
        devices=arguments.devices,
        platform=arguments.platform,
        python=arguments.allow_python,
        tls=secured and (str(secured.cert), str(secured.key), str(secured.ca)),
        shared_memory=arguments.transport == "auto",
        checksum=arguments.checksum,
        orphan_s=arguments.orphan,
        patience_s=PATIENCE_S,
        spare=arguments.spare,
        notice_s=arguments.notice,
    )
    heed_notice()
    try:
        reason = serve(
            config,
            joined=lambda name: print(f"joined as {name}; Ctrl-C leaves", flush=True),
            waits=lambda why: print(f"flowml: {why}", file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        return _end(128 + signal.SIGINT)
    except GiveNotice:
        return _end(0)
    if reason:
        print(f"flowml: {reason}", file=sys.stderr)
    return _end(LOST_COORDINATOR if reason else 0)


def _end(status: int) -> NoReturn:
    """End this process at once. A thread may be in the middle of a step, and Python's own end would abort it there."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _leave(arguments: argparse.Namespace, token: str, secured: TLS | None) -> int:
    """Have a worker leave, and return when it has: 0 if others had taken over before."""
    import flowml as fm
    from flowml_runtime.worker.leaving import HANDED_OVER

    name, shown = arguments.leave, {"transport": arguments.transport, "checksum": arguments.checksum}
    with fm.Cluster.connect(arguments.coordinator, token=token, tls=secured, **shown) as cluster:
        cluster.end_worker(name, notice=True)
        print(f"{name} hands over what it does", flush=True)
        cluster.notice(name, None, cluster.told)  # no deadline: the worker was given one when it was started
        reason = cluster.told.get(name, "its connection ended")
    if reason == HANDED_OVER:
        print(f"{name} has left")
        return 0
    print(f"flowml: {name} has ended, and its work may be lost: {reason}", file=sys.stderr)
    return 1
