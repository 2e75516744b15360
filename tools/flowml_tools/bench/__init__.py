"""`flowml bench` measures flowml side by side with other systems on this machine.

A benchmark is a module with a SUMMARY and a function `rows`. One that takes minutes and has many lines has `parts` too,
which yields each line when it is known; after Ctrl-C those that are there are kept. Its goals are ratios, because
absolute times differ between machines. A missed goal is printed as MISSED and does not fail the command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

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
from flowml_tools.bench.policy_entries import parsed
from flowml_tools.bench.rows import BenchError, Part, Row
from flowml_tools.bench.table import render
from flowml_tools.bench.timing import hush
from flowml_tools.command import CommandError, make_folder, positive, seconds
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
    parser.add_argument(
        "--policies", metavar="NAME,...", help="those of `policies`: quorum, or diloco(8) (default: all)"
    )
    parser.add_argument("--cluster", choices=policies.KINDS, help="the replicas of `policies` (default: threads)")
    parser.add_argument("--time", type=seconds, metavar="SECONDS", help="begin nothing in `policies` that ends later")
    parser.add_argument("--full", action="store_true", help="more seeds and steps in `policies`: about half an hour")
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
    if folder:
        make_folder("--plots", folder)
    settings = {name: _settings(name, names, arguments) for name in OPTIONS}
    results: dict[str, Sequence[Row]] = {}
    left_out: dict[str, Mapping[str, str]] = {}
    for name in names:
        found: list[Row] = []

        def take(part: Part, name: str = name, found: list[Row] = found) -> None:
            found += part.rows
            left_out.update({name: part.left_out} if part.left_out else {})
            hush()
            print(part.text, end="\n" if part.text else "", flush=True)

        try:
            with closing(_parts(name, arguments.repeats, settings.get(name, {}))) as parts:
                _take_all(parts, take)
        except BenchError as error:
            raise BenchError(f"{name}: {error}") from None
        finally:
            hush()
            results |= {name: found} if found else {}
            _write(output, folder, name, results, left_out)
    return 0


def _take_all(parts: Generator[Part], take: Callable[[Part], None]) -> None:
    """Take each part. A benchmark hears of an interrupt that comes while one is printed, and says what was not run."""
    try:
        for part in parts:
            take(part)
    except (KeyboardInterrupt, SystemExit) as stop:
        with suppress(type(stop), StopIteration):
            take(parts.throw(stop))
        raise


OPTIONS = {"simulator": ("jobs", "machines"), "policies": ("policies", "cluster", "time", "full")}
"""The options of one benchmark alone."""


def _settings(name: str, names: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of one benchmark, as arguments of its function. Raises CommandError if it is not among `names`."""
    given = {option: value for option in OPTIONS[name] if (value := getattr(arguments, option)) not in (None, False)}
    if given and name not in names:
        raise CommandError(f"--{next(iter(given))} is an option of `{name}` alone; give it with that benchmark")
    if name != "policies":
        return given
    chosen = parsed(given["policies"]) if "policies" in given else []
    if chosen:
        policies.chosen(chosen)  # a wrong name is refused before anything runs
    return {
        "names": chosen,
        "kind": given.get("cluster", policies.KINDS[0]),
        "seconds": given.get("time"),
        "full": bool(given.get("full")),
    }


def _parts(name: str, repeats: int | None, settings: Mapping[str, Any]) -> Generator[Part]:
    """What a benchmark finds, as it comes."""
    module = BENCHMARKS[name]
    if hasattr(module, "parts"):
        yield from module.parts(repeats, **settings)
    else:
        found = module.rows(repeats, **settings)
        yield Part(getattr(module, "render", render)(name, found), tuple(found))


def _write(
    output: Path | None,
    folder: Path | None,
    name: str,
    results: Mapping[str, Sequence[Row]],
    left_out: Mapping[str, Mapping[str, str]],
) -> None:
    """Write the rows of all benchmarks so far, and the plot of this one."""
    if output and results:
        output.write_text(report(results, left_out))
    if folder and name in results and hasattr(BENCHMARKS[name], "plot"):
        (folder / f"{name}.svg").write_text(draw(BENCHMARKS[name].plot(results[name])))
        print(f"  written: {folder / name}.svg")


def _make_peers(arguments: argparse.Namespace) -> int:
    if arguments.names or arguments.json or arguments.repeats:
        raise CommandError("--make-peers measures nothing; give it alone, and then run the benchmarks")
    try:
        foreign_environment.make()
    finally:
        hush()
    print(f"{', '.join(foreign_environment.VERSIONS)}: installed in {foreign_environment.folder()}")
    return 0


def report(results: Mapping[str, Sequence[Row]], left_out: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The rows of each benchmark, why others were left out, the machine and the versions, as JSON text."""
    content = {
        "machine": _machine(),
        "versions": _versions(),
        "benchmarks": {name: [row.json() for row in rows] for name, rows in results.items()},
        "left out": left_out or {},
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
