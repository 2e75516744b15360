"""`flowml coordinator` runs the coordinator of a cluster by itself, with its state in a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flowml_tools.command import add_bind, add_lost_after, add_tls, add_transport, announce, read_token, tls

SUMMARY = "run a coordinator that can be started again where it was"
DESCRIPTION = """\
Run the coordinator of a cluster until Ctrl-C, and keep its log, its address and its token in a folder. Workers join it
with `flowml worker`. If it ends, in any way, the cluster goes on for a minute. Start it again with the same folder
within that time, and everything joins it again.

With its log in etcd, one on another machine may wait for the log (give both the same token), and goes on when the first
one is killed, suspended or cut off.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "where its state is: a folder, made if missing, or etcd://HOST:PORT/PREFIX"
    parser.add_argument("--state", required=True, metavar="DIR", help=about)
    add_bind(parser)
    add_lost_after(parser)
    parser.add_argument(
        "--token-file", type=Path, metavar="F", help="use the token in F (default: DIR/token; etcd has none)"
    )
    add_tls(parser)
    add_transport(parser)


def main(arguments: argparse.Namespace) -> int:
    secured, state = tls(arguments), arguments.state
    from flowml.errors import ClusterError
    from flowml_runtime.membership.etcd import is_etcd
    from flowml_runtime.membership.process import CoordinatorConfig, serve_coordinator, token_in
    from flowml_runtime.transport.addresses import advertised_host
    from flowml_runtime.transport.security import split_address

    if not is_etcd(state):
        state = str(Path(state).absolute())
    elif arguments.token_file is None:
        raise ClusterError(f"--state {state}: etcd keeps no token; give --token-file F, the same for all coordinators")
    token_file = arguments.token_file or token_in(Path(state))
    config = CoordinatorConfig(
        bind=arguments.bind,
        token=read_token(token_file),
        state=state,
        tls=secured and (str(secured.cert), str(secured.key), str(secured.ca)),
        shared_memory=arguments.transport == "auto",
        checksum=arguments.checksum,
        lost_after_s=arguments.lost_after,
        ends_cluster=False,
    )
    reached_at = advertised_host(arguments.bind)

    def listening(address: str) -> None:
        announce(f"{reached_at}:{split_address(address)[1]}", token_file, secured)

    reason = serve_coordinator(config, listening)
    print(f"flowml: the coordinator ends: {reason}", file=sys.stderr)
    return 1
