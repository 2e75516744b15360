"""`flowml faults` runs random training runs with faults, under virtual time, and checks that each keeps its promises.

cases       a seed determines policies, groups of layers, machines, network and faults
layout      a run of given policies, without a model
world       the real machines of driver and workers, joined by the simulator, and a record of all that happens
draws       random policies, of every kind; `rarer` puts rarer values into some of them
values      integers in place of arrays, which show what a version contains
matrices    matrices that do, where replicas do more than add up gradients
history     the record; `timeline` puts it in order, and `checker` and `contents` find violations in it,
            `snapshots` those of its snapshots
coverage    which values of knobs have met which kinds of faults
knobs       which knobs no case draws, and why
members     whole fits whose workers leave, are lost and come back
campaign    many seeds, and what to print of one that fails
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flowml_tools.command import count, counted, positive, seconds

SUMMARY = "random training runs with faults, under virtual time, checked for broken promises"
DESCRIPTION = """\
Each seed is a small training run: random policies, groups of layers, machines and networks, with crashes, partitions,
stalls, interrupted fits, and lost, repeated and reordered messages. The driver's and the workers' state machines are
those of real runs. Their invariants are checked after every event, and the history of the run at its end: staleness
bounds, contributions lost or applied twice, coefficients, the ledger, copies, and bytes.

With --members each seed is a whole fit whose workers leave with and without notice and come back, which shrinks, waits
for them or is elastic. With --spot FILE they go and come as in a part of a record of spot machines, which counts the
available ones, or with --spot FILE,preempted the others.

A seed that breaks a promise is printed with its case, what it broke, its last events, and the command that repeats it.
"""
SEEDS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_seed, metavar="N", help="run only this seed, and print its events")
    parser.add_argument("--seeds", type=positive, default=SEEDS, metavar="N", help=f"the number of seeds ({SEEDS})")
    parser.add_argument("--first", type=_seed, default=0, metavar="N", help="the first seed (0)")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    parser.add_argument("--time", type=seconds, default=None, metavar="SECONDS", help="stop then (no limit)")
    parser.add_argument("--coverage", action="store_true", help="print how often each value meets each kind of fault")
    parser.add_argument("--members", action="store_true", help="whole fits whose workers leave and come back")
    parser.add_argument("--spot", type=counted, metavar="FILE", help="the same, as recorded spot machines did")
    parser.add_argument("--events", type=positive, default=30, metavar="N", help="the last events to print (30)")


def main(arguments: argparse.Namespace) -> int:
    from flowml_tools.faults.campaign import campaign

    if arguments.members or arguments.spot is not None:
        return _members(arguments)
    if arguments.seed is not None:
        return _one(arguments.seed, arguments.events)
    began, failed = time.monotonic(), 0
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    ran: list[int] = []
    for seed, finding in campaign(seeds, arguments.time or float("inf"), arguments.jobs):
        ran.append(seed)
        if finding is not None:
            failed += 1
            print(f"{finding.report(arguments.events)}\n", flush=True)
        if sys.stderr.isatty() and len(ran) % 100 == 0:
            print(f"\r{len(ran)} seeds, {failed} failed", end="", file=sys.stderr, flush=True)
    if arguments.coverage:
        _cover(ran)
    few = f" of {len(seeds)}, which the time did not allow," if len(ran) < len(seeds) else ""
    print(f"{count(len(ran), 'seed')}{few} in {time.monotonic() - began:.0f} s: {failed or 'none'} broke a promise")
    return 1 if failed else 0


def _members(arguments: argparse.Namespace) -> int:
    from flowml_tools.faults.members import MembersCase

    make, again = MembersCase.of, "flowml faults --members"
    if arguments.spot is not None:
        record, counts = arguments.spot
        make = partial(MembersCase.spot, record=Path(record), counts=counts or "available")
        again = f"{again} --spot {','.join([record, counts] if counts else [record])}"
    first, number = (arguments.first, arguments.seeds) if arguments.seed is None else (arguments.seed, 1)
    began, ran, failed = time.monotonic(), 0, 0
    for seed in range(first, first + number):
        if time.monotonic() - began > (arguments.time or float("inf")):
            break
        ran += 1
        case = make(seed)
        if wrong := case.run():
            failed += 1
            print(
                f"seed {seed} breaks a promise: {wrong}\n{case}\nagain: {again} --seed {seed}",
                flush=True,
            )
    print(f"{count(ran, 'fit')} in {time.monotonic() - began:.0f} s: {failed or 'none'} broke a promise")
    return 1 if failed else 0


def _cover(seeds: Sequence[int]) -> None:
    from flowml_tools.faults import draws
    from flowml_tools.faults.cases import Case
    from flowml_tools.faults.coverage import Coverage

    drawn = draws.refused
    print(Coverage.of(map(Case.of, seeds)).table())
    print(f"{draws.refused - drawn} unsound compositions were drawn, and each was refused with a PolicyError")


def _one(seed: int, events: int) -> int:
    from flowml_tools.faults.campaign import run
    from flowml_tools.faults.cases import Case

    outcome = run(Case.of(seed), always=True)
    assert outcome is not None
    print(outcome.report(events))
    return 1 if outcome.violations else 0


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number from 0")
    return value
