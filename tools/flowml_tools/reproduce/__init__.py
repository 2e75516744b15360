"""`flowml reproduce` runs the claims of papers and prints them beside what this machine finds.

A claim is a module with a `CLAIM`, named for its paper, and listed in `CLAIMS` below. By default it runs at reduced
size, in seconds; `--full` runs it at the size of the paper, or as near to it as one machine comes.
"""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from pathlib import Path

from flowml_tools.command import CommandError, make_folder, natural
from flowml_tools.reproduce import (
    adam,
    admm,
    backup,
    chaos,
    coded_reduce,
    coding,
    compensation,
    d_psgd,
    decoupled,
    diloco,
    double_buffering,
    downpour,
    drop_compute,
    elastic,
    ensemble,
    gaia,
    local_sgd,
    no_loco,
    one_bit,
    parameter_server,
    power_sgd,
    qsgd,
    ring,
    rudra,
    sandblaster,
    skeleton,
    sparse_loco,
    ssp,
    streaming_diloco,
    top_k,
    voting,
    zinkevich,
)
from flowml_tools.reproduce.claims import Claim
from flowml_tools.reproduce.page import Run, text, write

SUMMARY = "the papers' claims beside ours"
CLAIMS: dict[str, Claim] = {
    module.__name__.rpartition(".")[2]: module.CLAIM
    for module in (
        adam,
        downpour,
        sandblaster,
        parameter_server,
        ssp,
        chaos,
        zinkevich,
        double_buffering,
        local_sgd,
        elastic,
        backup,
        compensation,
        coding,
        coded_reduce,
        drop_compute,
        rudra,
        ring,
        d_psgd,
        no_loco,
        diloco,
        streaming_diloco,
        decoupled,
        sparse_loco,
        gaia,
        admm,
        ensemble,
        voting,
        power_sgd,
        one_bit,
        qsgd,
        top_k,
        skeleton,
    )
}
DESCRIPTION = (
    "Run the claims of papers, and say whether they are reproduced. A claim takes seconds; with --full minutes.\n\n"
    + "\n".join(f"  {name:<17}{claim.paper}" for name, claim in CLAIMS.items())
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAME", nargs="*", help="the claims to run, of the list above")
    parser.add_argument("--all", action="store_true", help="run every claim")
    parser.add_argument("--list", action="store_true", help="print the names of the claims and their papers")
    parser.add_argument("--full", action="store_true", help="run at the size of the paper where this machine can")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of all random numbers (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/reproduce.md and its plots")


def main(arguments: argparse.Namespace) -> int:
    """Run the claims. A claim that is not reproduced is a result, not a failure, so the status is 0."""
    if arguments.list and not (arguments.all or arguments.names):
        print("\n".join(f"{name:<17}{claim.paper}" for name, claim in CLAIMS.items()))
        return 0
    if arguments.list or arguments.all == bool(arguments.names):
        raise CommandError(f"give names, --all or --list; there are {', '.join(CLAIMS)}")
    names: list[str] = list(CLAIMS) if arguments.all else list(dict.fromkeys(arguments.names))
    for name in names:
        if name not in CLAIMS:
            near = get_close_matches(name, CLAIMS, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise CommandError(f"there is no claim {name!r}; {meant}there are {', '.join(CLAIMS)}")
    folder: Path | None = arguments.out
    if folder is not None:
        make_folder("--out", folder)  # before claims run for minutes
    runs: dict[str, Run] = {}
    try:
        for name in names:
            claim = CLAIMS[name]
            runs[name] = Run(claim, claim.run(arguments.full, arguments.seed), arguments.seed)
            print(text(name, runs[name]), end="\n\n", flush=True)
    finally:  # what is there when a later claim is interrupted
        if folder is not None and runs:
            print(f"written: {write(folder, runs, full=arguments.full)}")
    return 0
