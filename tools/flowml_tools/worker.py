"""`flowml worker` joins a cluster as one more worker on this machine."""

from __future__ import annotations

import argparse
import sys

from flowml_tools.command import add_connection, add_offer, add_transport, address, read_token, tls

SUMMARY = "join a cluster as one more worker"
DESCRIPTION = "Join the cluster at HOST:PORT as one more worker, and serve it until it ends or Ctrl-C."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("coordinator", type=address, metavar="HOST:PORT", help="where `flowml launch` listens")
    add_transport(parser)
    add_connection(parser)
    add_offer(parser)


def main(arguments: argparse.Namespace) -> int:
    token, secured = read_token(arguments.token_file), tls(arguments)
    from flowml_runtime.environment import allocator
    from flowml_runtime.transport.security import check_exposure

    check_exposure(arguments.coordinator, secured, token, "connect to")
    allocator.reexec()  # after the arguments have been checked, and before JAX is imported
    from flowml_runtime.worker.config import WorkerConfig
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
    )
    reason = serve(config, joined=lambda name: print(f"joined as {name}; Ctrl-C leaves", flush=True))
    print(f"flowml: {reason}", file=sys.stderr)
    return LOST_COORDINATOR
