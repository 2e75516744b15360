"""`flowml worker`: join this machine to a cluster as one more worker."""

from __future__ import annotations

import argparse

from flowml_tools.command import add_connection, address, positive, read_token, tls

SUMMARY = "join a cluster as one more worker"
DESCRIPTION = "Join the cluster at HOST:PORT as one more worker, and serve it until it ends or Ctrl-C."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("coordinator", type=address, metavar="HOST:PORT", help="where `flowml launch` listens")
    parser.add_argument("--devices", type=positive, default=1, metavar="N", help="devices it offers (default 1)")
    add_connection(parser)


def main(arguments: argparse.Namespace) -> int:
    token, secured = read_token(arguments.token_file), tls(arguments)
    raise NotImplementedError
