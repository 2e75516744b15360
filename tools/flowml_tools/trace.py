"""`flowml trace` records what the devices of a run do on a time axis, and prints a recorded training run as a story.

Each sentence of the story is one event of one state machine: what the driver or a worker was told, and what it did as a
result. An event has a number, and the number of the event that caused it. So causes are printed before their effects,
even if the clocks of the machines disagree.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowml_tools.command import CommandError, add_script
from flowml_tools.run import add_cluster, cluster, entered, run_script
from flowml_tools.script import script

SUMMARY = "record a run for Perfetto, or tell a recorded one as a story"
DESCRIPTION = """\
Run FILE.py with a cluster around it, as `flowml run` does, and write what its devices did to OUT.json, for Perfetto
(https://ui.perfetto.dev) or chrome://tracing. Options of flowml go before FILE.py; -o may also follow it.

  flowml trace FILE.py -o OUT.json [ARGS]
  flowml trace --story OUT.json            print each event of a training run and what it caused, ordered by cause
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--story", type=Path, metavar="OUT.json", help="tell a recorded run; runs nothing")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.json", help="where to write what is recorded")
    add_cluster(parser)
    add_script(parser, needed=False)


def main(arguments: argparse.Namespace) -> int:
    if arguments.story is not None:
        if arguments.file is not None:
            raise CommandError("--story tells a run that was recorded; give it alone, or FILE.py and -o to record one")
        for line in story(_read(arguments.story)):
            print(line)
        return 0
    if arguments.file is None:
        raise CommandError("give a script and -o OUT.json to record it, or --story OUT.json to read what was recorded")
    output, args = _output(arguments.output, arguments.args)
    path = script(arguments.file)
    with entered(cluster(arguments)).trace(output):
        run_script(path, args)
    return 0


def _output(output: Path | None, args: list[str]) -> tuple[Path, list[str]]:
    """The output path, and the remaining arguments for the script, because -o may follow the script's name."""
    if output is None and args[:1] in (["-o"], ["--output"]) and len(args) > 1:
        output, args = Path(args[1]), args[2:]
    if output is None:
        raise CommandError("say where to write what is recorded: -o OUT.json")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"the folder of {str(output)!r} does not exist")
    return output, args


@dataclass(frozen=True, order=True)
class Told:
    """One event of a story. `at` is in microseconds from the start of the trace."""

    at: float
    event: str
    cause: str
    text: str


def _read(path: Path) -> list[Told]:
    if not path.is_file():
        raise CommandError(f"there is no file {str(path)!r}")
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        found = [
            Told(e["ts"], e["args"]["event"], e["args"]["cause"], e["name"]) for e in events if e.get("cat") == "story"
        ]
    except (ValueError, KeyError, TypeError):
        raise CommandError(f"{str(path)!r} is not a trace that flowml wrote") from None
    if not found:
        raise CommandError(f"{str(path)!r} tells of no training; the story of a trace is that of its fits")
    return found


def story(told: Iterable[Told]) -> Iterator[str]:
    """One line per event, in the order of time, but each after the event that caused it."""
    for one in _by_cause(told):
        after = f"  [after {one.cause}]" if one.cause else ""
        yield f"{one.at / 1e3:10.2f} ms  {one.event}  {one.text}{after}"


def _by_cause(told: Iterable[Told]) -> Iterator[Told]:
    told = sorted(told)
    known = {one.event for one in told}
    waiting: dict[str, list[Told]] = {}
    ready: list[Told] = []
    for one in told:
        if one.cause in known and one.cause != one.event:
            waiting.setdefault(one.cause, []).append(one)
        else:
            ready.append(one)
    heapq.heapify(ready)
    while ready:
        one = heapq.heappop(ready)
        yield one
        for after in waiting.pop(one.event, ()):
            heapq.heappush(ready, after)
    yield from (one for rest in waiting.values() for one in rest)  # events in a cycle, which no run produces
