"""`flowml worker`: join this machine to a cluster as one more worker."""

from __future__ import annotations

import argparse
import sys

from flowml_tools.command import add_connection, address, positive, read_token, tls

SUMMARY = "join a cluster as one more worker"
DESCRIPTION = "Join the cluster at HOST:PORT as one more worker, and serve it until it ends or Ctrl-C."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("coordinator", type=address, metavar="HOST:PORT", help="where `flowml launch` listens")
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="devices it offers (default 1)")
    parser.add_argument("--platform", default="cpu", help="what JAX calls them: cpu, cuda, … (default cpu)")
    parser.add_argument("--allow-python", action="store_true", help="run Python callbacks that plans carry")
    add_connection(parser)


def main(arguments: argparse.Namespace) -> int:
    token, secured = read_token(arguments.token_file), tls(arguments)
    from flowml_runtime.host.process import serve
    from flowml_runtime.host.security import check_exposure
    from flowml_runtime.host.spawning import WorkerConfig

    check_exposure(arguments.coordinator, secured, token, "connect to")
    config = WorkerConfig(
        coordinator=arguments.coordinator,
        token=token,
        devices=arguments.devices,
        platform=arguments.platform,
        python=arguments.allow_python,
        tls=secured and (str(secured.cert), str(secured.key), str(secured.ca)),
    )
    reason = serve(config, joined=lambda name: print(f"joined as {name}; Ctrl-C leaves", flush=True))
    print(f"flowml: {reason}", file=sys.stderr)
    return 0
