"""`flowml simulate` runs a script whose trainers use a simulated cluster, and prints what each fit took there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from flowml_tools.command import CommandError, Parser, add_script, counted, natural, positive
from flowml_tools.run import run_script
from flowml_tools.script import script

if TYPE_CHECKING:
    from flowml.sim import ComputeModel, NetworkModel
    from flowml_runtime.driver.training.result import TrainingResult
    from flowml_runtime.sim.cluster import SimulatedCluster
    from flowml_tools.spot import Spot

SUMMARY = "run a script under virtual time, on a simulated cluster"
DESCRIPTION = """\
Run FILE.py like `python FILE.py ARGS`. Every fm.Trainer without a cluster of its own trains on a simulated one: the
same code, with the times of models. After each fit its virtual time, bytes, work items and late workers are printed.
With --advise other policies are simulated too, and ranked by the time to as many examples. With --spot the goodput on
machines that come and go is printed: of synchronous training that is restarted, of elastic and of decoupled training.

  --compute     constant:SECONDS | exponential:SHIFT,MEAN | lognormal:MEAN,SIGMA | pareto:SCALE,ALPHA | recorded:TRACE
                seconds that a step of one replica computes, such as lognormal:0.1,0.3. TRACE is a file that
                `flowml trace` wrote, or a recorded job (CSV or Parquet)
  --stragglers  FACTOR,SHARE: this share of the workers is slower by this factor, such as 3,0.25
  --network     LATENCY,BYTES_PER_S[,UPLINK[,DOWNLINK]] of each pair of workers, such as 1e-3,60e6; UPLINK and DOWNLINK
                bound what a worker sends and receives at a time. Or regions:TABLE.csv[:REGION=WORKERS,...]; without
                numbers the workers are spread over all regions of the table
  --spot        TRACE.json[,GAP_S[,NOTICE_S[,RESTART_S]]][,COUNTS]: a record of spot machines, replayed with intervals
                of GAP_S (30). Machines give notice NOTICE_S (5) before they go; a restart of all takes RESTART_S (10).
                COUNTS says which machines the record counts: available (the default) or preempted

Options of flowml go before FILE.py, or all of them directly after it. The other arguments go to the script.
"""
MODELS = {
    "constant": ("Constant", 1),
    "exponential": ("ShiftedExponential", 2),
    "lognormal": ("LogNormal", 2),
    "pareto": ("Pareto", 2),
}
"""Name -> model of `flowml.sim`, and the number of its arguments."""
FLAGS = ("--no-arithmetic", "--compiled", "--advise")
OPTIONS = ("--workers", "--compute", "--stragglers", "--network", "--seed", "--jobs", "--spot", *FLAGS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_options(parser)
    add_script(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, metavar="N", help="simulated workers (required)")
    parser.add_argument("--compute", type=compute, metavar="MODEL", help="seconds of a replica's step (required)")
    parser.add_argument("--stragglers", type=stragglers, metavar="FACTOR,SHARE", help="slow workers (none)")
    parser.add_argument("--network", type=network, default="1e-4,1e9", metavar="NETWORK", help="the links (1e-4,1e9)")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the models (0)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="processes that simulate (1, or cores if that pays)")
    parser.add_argument("--spot", type=spot, metavar="TRACE.json", help="after each fit, the goodput on spot machines")
    parser.add_argument("--no-arithmetic", action="store_true", help="clocks and bytes only: losses are NaN")
    parser.add_argument("--compiled", action="store_true", help="as machine code; the first time compiles it")
    parser.add_argument("--advise", action="store_true", help="after each fit, rank other policies on these machines")


def _split(arguments: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
    """The options, which may all follow the script's name, and the arguments of the script."""
    if arguments.workers is not None and arguments.compute is not None:
        return arguments, arguments.args
    args, end = arguments.args, 0
    while end < len(args) and (name := args[end].partition("=")[0]) in OPTIONS:
        end += 1 if "=" in args[end] or name in FLAGS else 2
    parser = Parser(prog="flowml simulate", allow_abbrev=False, add_help=False)
    _add_options(parser)
    options = parser.parse_args(args[:end], arguments)
    missing = [name for name in ("--workers N", "--compute MODEL") if getattr(options, name[2:].split()[0]) is None]
    if missing:
        raise CommandError(
            f"give {' and '.join(missing)}, before {arguments.file} or directly after it, as in "
            f"`flowml simulate {arguments.file} --workers 84 --compute lognormal:0.1,0.3`"
        )
    return options, args[end:]


def main(arguments: argparse.Namespace) -> int:
    from flowml_runtime.sim.cluster import SimulatedCluster

    options, args = _split(arguments)
    path = script(options.file)
    cluster = SimulatedCluster(
        options.workers,
        options.compute if options.stragglers is None else options.stragglers(options.compute),
        options.network(options.workers),
        seed=options.seed,
        arithmetic=not options.no_arithmetic,
        jobs=options.jobs,
        compiled=options.compiled,
    )
    fits: list[str] = []

    def on_result(result: TrainingResult) -> None:
        fits.append(described(result, options.workers))
        print(fits[-1], flush=True)

    cluster.on_result = on_result
    cluster.on_fit = _on_fit(options, cluster)
    with cluster:
        run_script(path, args)
    if not fits:
        raise CommandError(
            f"{options.file} has trained nothing on the simulated cluster; call fit() of an fm.Trainer without "
            "cluster=, and outside of blocks such as `with fm.Cluster.local(...)`, in which it trains on real workers"
        )
    return 0


def _on_fit(options: argparse.Namespace, cluster: SimulatedCluster) -> Callable[[Any, Any, Any, Any], None] | None:
    """What to print after each fit, if anything."""
    if not options.advise and options.spot is None:
        return None
    if options.spot is not None:
        doubt = options.spot.doubt(options.workers)  # a record that makes no sense is refused before anything runs
        if doubt:
            print(f"flowml: warning: {doubt}", file=sys.stderr, flush=True)
    from flowml_runtime.advise import advise

    def tell(trainer: Any, params: Any, batch: Any, state: Any) -> None:
        if options.advise:
            print(f"\n{advise(trainer, params, batch, cluster=cluster, state=state)}", flush=True)
        if options.spot is not None:
            print(f"\n{options.spot.compared(trainer, params, batch, state, cluster)}", flush=True)

    return tell


def described(result: TrainingResult, workers: int) -> str:
    """A fit in words: its time, its bytes by layer, its work items, and who was late."""
    steps, seconds = len(result.history), result.virtual_seconds or 0.0
    ledger = result.ledger
    return "\n".join(
        (
            f"{steps} steps of {len(ledger.replicas)} replicas on {workers} workers: {seconds:.6g} s of virtual time, "
            f"{seconds / max(steps, 1):.4g} s a step; {result.events} events, trace {result.trace_hash}",
            result.table(),
            f"work items of {ledger.item_size} examples: {ledger.used} used, {ledger.dropped} dropped, "
            f"{ledger.folded} folded, {ledger.requeued} requeued, {ledger.unseen} unseen",
            str(result.stragglers()),
        )
    )


def compute(text: str) -> ComputeModel:
    """An argparse type for models of machines, such as `lognormal:0.1,0.3`."""
    import flowml.sim

    name, _, rest = text.partition(":")
    if name == "recorded":
        return _made(lambda: flowml.sim.Recorded(rest))
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"{text!r} names no model; there are {', '.join(MODELS)}, recorded")
    model, count = MODELS[name]
    return _made(lambda: getattr(flowml.sim, model)(*_numbers(count)(rest)))


def stragglers(text: str) -> Callable[[ComputeModel], ComputeModel]:
    """An argparse type for slow workers, such as `3,0.25`: what makes some of a model's workers slow."""
    import flowml.sim

    factor, share = _numbers(2, "3,0.25")(text)
    _made(lambda: flowml.sim.Straggler(flowml.sim.Constant(1), factor, share=share))  # refused here, by this option
    return lambda base: flowml.sim.Straggler(base, factor, share=share)


def network(text: str) -> Callable[[int], NetworkModel]:
    """An argparse type for networks, such as `1e-3,60e6` or `regions:table.csv:Oregon=2,Tokyo=2`: the network of a
    number of workers."""
    import flowml.sim

    name, _, rest = text.partition(":")
    if name == "regions":
        path, _, members = rest.partition(":")
        table = _made(lambda: flowml.sim.Regions.read(path))
        chosen = _members(members) if members else None
        if chosen is not None:
            _made(lambda: flowml.sim.Sites(table, chosen))
        return lambda workers: flowml.sim.Sites(table, chosen or _spread(table.names, workers))
    count = max(2, min(4, text.count(",") + 1))
    made = _made(lambda: flowml.sim.Network(*_numbers(count, "1e-3,60e6")(text)))
    return lambda workers: made


def spot(text: str) -> Spot:
    """An argparse type for records of spot machines, such as `trace.json,30,5,preempted`."""
    from flowml.errors import SimulationError
    from flowml_tools.spot import Spot

    given, counts = counted(text)
    path, *rest = given.split(",")
    if len(rest) > 3:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not TRACE.json, at most 3 numbers, and available or preempted, such as "
            "trace.json,30,5,10,preempted"
        )
    try:
        numbers = _numbers(len(rest), "30,5,10")(",".join(rest)) if rest else ()
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; only available or preempted may come after the numbers") from None
    try:
        return Spot(path, *numbers, counts=counts)
    except SimulationError as error:  # a ValueError, whose text argparse would leave out
        raise argparse.ArgumentTypeError(str(error).removeprefix("--spot: ")) from None


def _members(text: str) -> dict[str, int]:
    """The number of workers of each region."""
    found: dict[str, int] = {}
    for part in text.split(","):
        region, _, count = part.partition("=")
        if not region or not count.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r} is not a region and its workers, such as Oregon=2")
        found[region] = int(count)
    return found


def _spread(names: Sequence[str], workers: int) -> list[str]:
    """The region of each worker: neighbours in one region, and as many in each as possible."""
    return [names[worker * len(names) // workers] for worker in range(workers)]


Made = TypeVar("Made")


def _made(make: Callable[[], Made]) -> Made:
    """What `make` makes. A model that makes no sense, or a file that cannot be read, is an error of the argument."""
    from flowml.errors import FlowmlError

    try:
        return make()
    except FlowmlError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _numbers(count: int, example: str = "0.1,0.3") -> Callable[[str], Sequence[float]]:
    def parse(text: str) -> Sequence[float]:
        parts: list[Any] = text.split(",")
        try:
            values = [float(part) for part in parts]
        except ValueError:
            values = []
        if len(values) != count:
            given = example if count > 1 else example.partition(",")[0]
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} number{'s' * (count > 1)}, such as {given}")
        return values

    return parse
