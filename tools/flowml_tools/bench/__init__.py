"""`flowml bench` measures flowml side by side with other systems on this machine.

A benchmark is a module with a SUMMARY and a function `rows`. Its goals are ratios, because absolute times differ
between machines. A missed goal is printed as MISSED and does not fail the command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowml_tools.bench import (
    allreduce,
    dispatch,
    fidelity,
    filters,
    foreign_environment,
    loops,
    machines,
    memory,
    pipeline,
    policies,
    recovery,
    simulator,
    stragglers,
    training,
    transport,
)
from flowml_tools.bench.rows import BenchError, Row
from flowml_tools.bench.table import render
from flowml_tools.bench.timing import hush
from flowml_tools.command import CommandError, positive
from flowml_tools.plots import draw

SUMMARY = "side-by-side measurements, peers included where installed"
BENCHMARKS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        dispatch,
        transport,
        allreduce,
        training,
        pipeline,
        memory,
        machines,
        simulator,
        stragglers,
        fidelity,
        loops,
        filters,
        policies,
        recovery,
    )
}
DESCRIPTION = (
    "Measure flowml side by side with its peers on this machine, in turn. Takes several minutes.\n\n"
    + "\n".join(f"  {name:<11}{module.SUMMARY}" for name, module in BENCHMARKS.items())
    + "\n\nRay and TensorFlow run in an environment of their own: --make-peers installs it from the package index in\n"
    f"${foreign_environment.VARIABLE} (default: flowml/peers in the user's cache directory; 2 GB)."
)
PACKAGES = ("jax", "jaxlib", "numpy", "grpcio", "msgspec")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", metavar="NAMES", nargs="*", help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="also write the rows, with every measurement")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also write the plot of `policies` there, as SVG")
    parser.add_argument("--repeats", type=positive, metavar="N", help="measurements a row (default: as each needs)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="processes of `simulator` (default: one a core)")
    parser.add_argument("--machines", type=positive, metavar="N", help="machines of `simulator` (default: 20000)")
    parser.add_argument("--make-peers", action="store_true", help="install Ray and TensorFlow for later runs, and end")


def main(arguments: argparse.Namespace) -> int:
    if arguments.make_peers:
        return _make_peers(arguments)
    names: list[str] = list(dict.fromkeys(arguments.names)) or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            raise CommandError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    output: Path | None = arguments.json
    if output and not output.parent.is_dir():
        raise CommandError(f"the folder of {str(output)!r} does not exist")
    folder: Path | None = arguments.plots
    if folder and not folder.is_dir():
        raise CommandError(f"--plots {str(folder)!r} is not a folder")
    results: dict[str, Sequence[Row]] = {}
    for name in names:
        try:
            own = {"jobs": arguments.jobs, "machines": arguments.machines} if name == "simulator" else {}
            results[name] = BENCHMARKS[name].rows(arguments.repeats, **own)
        except BenchError as error:
            raise BenchError(f"{name}: {error}") from None
        finally:
            hush()
        shown = getattr(BENCHMARKS[name], "render", render)
        print(shown(name, results[name]), flush=True)
        if output:
            output.write_text(report(results))
        if folder and hasattr(BENCHMARKS[name], "plot"):
            (folder / f"{name}.svg").write_text(draw(BENCHMARKS[name].plot(results[name])))
    return 0


def _make_peers(arguments: argparse.Namespace) -> int:
    if arguments.names or arguments.json or arguments.repeats:
        raise CommandError("--make-peers measures nothing; give it alone, and then run the benchmarks")
    try:
        foreign_environment.make()
    finally:
        hush()
    print(f"{', '.join(foreign_environment.VERSIONS)}: installed in {foreign_environment.folder()}")
    return 0


def report(results: Mapping[str, Sequence[Row]]) -> str:
    """The rows of each benchmark, and a description of the machine and versions, as JSON text."""
    content = {
        "machine": _machine(),
        "versions": _versions(),
        "benchmarks": {name: [row.json() for row in rows] for name, rows in results.items()},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _machine() -> dict[str, object]:
    import psutil

    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str | None]:
    from flowml import __version__

    versions: dict[str, str | None] = {"flowml": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    peers = foreign_environment.complete()
    return versions | {package: version if peers else None for package, version in foreign_environment.VERSIONS.items()}
