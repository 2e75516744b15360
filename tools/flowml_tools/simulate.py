"""`flowml simulate` runs a script whose trainers use a simulated cluster, and prints what each fit took there."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flowml_tools.command import positive
from flowml_tools.run import run_script
from flowml_tools.script import script

if TYPE_CHECKING:
    from flowml.sim import ComputeModel, Network
    from flowml_runtime.driver.training.result import TrainingResult

SUMMARY = "run a script under virtual time, on a simulated cluster"
DESCRIPTION = """\
Run FILE.py like `python FILE.py ARGS`. Every fm.Trainer without a cluster of its own trains on a simulated one: the
same code, with the times of models. After each fit its virtual time, bytes, work items and late workers are printed.

  --compute   constant:SECONDS | exponential:SHIFT,MEAN | lognormal:MEAN,SIGMA | pareto:SCALE,ALPHA
              seconds that a step of one replica computes, such as lognormal:0.1,0.3
  --network   LATENCY,BYTES_PER_S of each pair of workers, such as 1e-3,60e6

Options of flowml go before FILE.py. Arguments after it go to the script.
"""
MODELS = {
    "constant": ("Constant", 1),
    "exponential": ("ShiftedExponential", 2),
    "lognormal": ("LogNormal", 2),
    "pareto": ("Pareto", 2),
}
"""Name -> model of `flowml.sim`, and the number of its arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, required=True, metavar="N", help="simulated workers")
    parser.add_argument("--compute", type=compute, required=True, metavar="MODEL", help="seconds of a replica's step")
    parser.add_argument("--network", type=network, default="1e-4,1e9", metavar="LATENCY,RATE", help="(1e-4,1e9)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the models (0)")
    parser.add_argument("--no-arithmetic", action="store_true", help="clocks and bytes only: losses are NaN")
    parser.add_argument("file", metavar="FILE.py", help="the script")
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")


def main(arguments: argparse.Namespace) -> int:
    from flowml_runtime.sim.cluster import SimulatedCluster

    path = script(arguments.file)
    cluster = SimulatedCluster(
        arguments.workers,
        arguments.compute,
        arguments.network,
        seed=arguments.seed,
        arithmetic=not arguments.no_arithmetic,
    )
    fits: list[str] = []

    def on_result(result: TrainingResult) -> None:
        fits.append(described(result, arguments.workers))
        print(fits[-1], flush=True)

    cluster.on_result = on_result
    with cluster:
        run_script(path, arguments.args)
    if not fits:
        print(f"{arguments.file} has trained nothing on the simulated cluster; give its Trainer no cluster of its own")
    return 0


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
    from flowml.errors import SimulationError

    name, _, numbers = text.partition(":")
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"{text!r} names no model; there are {', '.join(MODELS)}")
    model, count = MODELS[name]
    try:
        return getattr(flowml.sim, model)(*_numbers(count)(numbers))
    except SimulationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def network(text: str) -> Network:
    """An argparse type for networks, such as `1e-3,60e6`."""
    import flowml.sim
    from flowml.errors import SimulationError

    try:
        return flowml.sim.Network(*_numbers(2, "1e-3,60e6")(text))
    except SimulationError as error:
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
