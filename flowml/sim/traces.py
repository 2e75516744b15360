"""Reads recorded runs: the operations of a pipelined training job, and flowml's own traces.

A job is a table with a row for each operation of each worker, as CSV or as Parquet (which needs pyarrow). This is the
format of the traces that Lin et al. (Understanding stragglers in large model training using what-if analysis, 2025)
published. Its columns:

| column | meaning |
|---|---|
| `step` | number of the training step; a job need not have recorded all steps |
| `rank` | number of the worker |
| `dp_rank` | number of its replica |
| `stage` | number of its pipeline stage |
| `optype` | kind of the operation |
| `seq_id` | number of the operation among those of its kind, worker and step; the n-th send meets the n-th receive |
| `mc` | number of the part of the worker's model (an interleaved pipeline has several parts); -1 for none |
| `mb_id` | number of its microbatch; -1 for none |
| `start_ts` | seconds from the start of the step |
| `duration` | seconds |

The kinds: computations are `forward-compute`, `backward-compute`, `optimizer` and `gc` (a pause of the interpreter).
`forward-send` and `forward-recv` move activations to the next stage, `backward-send` and `backward-recv` move gradients
to the previous one. `params-all-gather` and `grads-reduce-scatter` join the replicas of a stage,
`embedding-grads-all-reduce` the first and the last stage of a replica, `optimizer-clip-main-grad` (the norm of the
gradient) all workers. `layernorm-grads-all-reduce` joins the workers that split one stage; here they are one worker.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from flowml.errors import TraceError, one_line
from flowml.sim import tables
from flowml.sim.recording import Operation, Recording

_COLUMNS: Mapping[str, tables.Column] = {
    "step": tables.number,
    "rank": tables.number,
    "dp_rank": tables.number,
    "stage": tables.number,
    "optype": tables.word,
    "seq_id": tables.integer,
    "mc": tables.integer,
    "start_ts": tables.seconds,
    "duration": tables.seconds,
}

_PAUSE = "gc"
"""The one kind that a step may be without."""
_COMPUTED = ("forward-compute", "backward-compute", "optimizer", _PAUSE)
_SENT = {
    "forward-send": ("forward transfer", 0),
    "forward-recv": ("forward transfer", -1),
    "backward-send": ("backward transfer", 0),
    "backward-recv": ("backward transfer", 1),
}
"""Kind -> the transfer that it is part of, and the stage of the sender relative to its own."""
_COLLECTIVES = {
    "params-all-gather": "replicas",
    "grads-reduce-scatter": "replicas",
    "embedding-grads-all-reduce": "ends",
    "optimizer-clip-main-grad": "all",
    "layernorm-grads-all-reduce": "one",
}
"""Kind -> who takes part."""


class _Row(NamedTuple):
    line: int
    step: int
    rank: int
    dp_rank: int
    stage: int
    optype: str
    seq_id: int
    mc: int
    start_ts: float
    duration: float


def read_operations(path: str | PathLike[str]) -> list[Operation]:
    """The operations of a job.

    Raises:
        TraceError: if the file is damaged or cut short. The text names the line (in a Parquet file, the row plus 1) and
            the column. A file with an operation whose partners are missing counts as cut short.
    """
    file = Path(path)
    if file.suffix == ".parquet":
        return _operations(tables.check(*_parquet(file), str(file), _COLUMNS), str(file))
    return parse_operations(tables.text_of(file), str(file))


def parse_operations(text: str, name: str) -> list[Operation]:
    """Like `read_operations`, from the text of a CSV file that errors call `name`."""
    return _operations(tables.read(text, name, _COLUMNS), name)


def _parquet(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise TraceError(
            f"reading {file} needs pyarrow; install it (pip install 'flowml[traces]') or save the table as CSV"
        ) from None
    try:
        opened = file.open("rb")
    except OSError as error:
        raise TraceError(tables.unread(file, error)) from None
    try:
        with opened:
            table = parquet.read_table(opened).to_pydict()
    except (ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise TraceError(
            f"{file} is not a whole Parquet file, or is damaged, {tables.AGAIN} ({one_line(first)})"
        ) from None
    lines = enumerate(zip(*table.values(), strict=True), start=2)
    return list(table), [(line, ["" if v is None else str(v) for v in values]) for line, values in lines]


def _operations(numbered: Iterable[tables.Numbered], name: str) -> list[Operation]:
    rows = [_Row(line, **values) for line, values in numbered]
    _check_workers(rows, name)
    found = [_operation(row, name) for row in rows]
    _check_partners(rows, found, name)
    _check_whole(rows, name)
    return found


def _operation(row: _Row, name: str) -> Operation:
    kind, transfer = row.optype, None
    if row.optype in _SENT:
        kind, sender = _SENT[row.optype]
        transfer = (kind, row.dp_rank, row.stage + sender, row.seq_id)
    elif row.optype in _COLLECTIVES:
        members = {"replicas": row.stage, "ends": row.dp_rank, "all": 0, "one": row.rank}
        transfer = (kind, members[_COLLECTIVES[kind]], row.mc, row.seq_id)
    elif row.optype not in _COMPUTED:
        known = ", ".join((*_COMPUTED, *_SENT, *_COLLECTIVES))
        raise TraceError(
            f"{name}, line {row.line}, column 'optype': {one_line(row.optype)!r} is not a kind of operation; the kinds "
            f"are {known}"
        )
    if row.mc > 0:
        raise TraceError(
            f"{name}, line {row.line}, column 'mc': {row.mc} is the second part of a worker's model or a later one; "
            f"interleaved pipelines cannot be replayed, so give a job of one part a worker (mc of at most 0)"
        )
    end_s = row.start_ts + row.duration
    return Operation(row.step, row.rank, row.dp_rank, row.stage, kind, row.start_ts, end_s, transfer, row.line)


def _check_workers(rows: Iterable[_Row], name: str) -> None:
    """Each rank is one stage of one replica, and no operation is there twice."""
    places: dict[int, tuple[int, int]] = {}
    ranks: dict[tuple[int, int], int] = {}
    seen: set[tuple[int, int, str, int, int]] = set()
    for row in rows:
        place = (row.dp_rank, row.stage)
        if places.setdefault(row.rank, place) != place or ranks.setdefault(place, row.rank) != row.rank:
            raise TraceError(
                f"{name}, line {row.line}, column 'rank': worker {row.rank} is stage {row.stage} of replica "
                f"{row.dp_rank} here, and another line contradicts that; a stage has one worker"
            )
        key = (row.step, row.rank, row.optype, row.seq_id, row.mc)
        if key in seen:
            raise TraceError(
                f"{name}, line {row.line}, column 'seq_id': {one_line(row.optype)} {row.seq_id} of worker {row.rank} "
                f"in step {row.step} is there twice; "
                "leave one of them out"
            )
        seen.add(key)


def _check_partners(rows: Sequence[_Row], operations: Sequence[Operation], name: str) -> None:
    """Every member of each transfer is there."""
    replicas: dict[int, set[int]] = defaultdict(set)
    for row in rows:
        replicas[row.stage].add(row.dp_rank)
    stages, workers = len(replicas), len({row.rank for row in rows})
    there: dict[tuple[int, Hashable], list[_Row]] = defaultdict(list)
    for row, operation in zip(rows, operations, strict=True):
        if operation.transfer is not None:
            there[operation.step, operation.transfer].append(row)
    for members in there.values():
        row = members[0]
        together = _COLLECTIVES.get(row.optype, "pair")
        sizes = {"replicas": len(replicas[row.stage]), "ends": min(stages, 2), "all": workers, "one": 1, "pair": 2}
        if len(members) != sizes[together]:
            raise TraceError(
                f"{name}, line {row.line}, column 'optype': {row.optype} {row.seq_id} of worker {row.rank} in step "
                f"{row.step} has {len(members) - 1} of its {sizes[together] - 1} partners; the file is cut short, or "
                f"lines are missing, {tables.AGAIN}"
            )


def _check_whole(rows: Sequence[_Row], name: str) -> None:
    """Each worker has in each step the kinds of its stage, and as many backward as forward computations."""
    counts: dict[tuple[int, int], dict[str, int]] = {}
    stages: dict[int, int] = {}
    kinds: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        own = counts.setdefault((row.step, row.rank), defaultdict(int))
        own[row.optype] += 1
        stages[row.rank] = row.stage
        kinds[row.stage].add(row.optype)
    for step in dict.fromkeys(row.step for row in rows):
        for rank, stage in stages.items():
            own = counts.get((step, rank), {})
            missing = sorted(kinds[stage] - own.keys() - {_PAUSE})
            if own.get("forward-compute", 0) > own.get("backward-compute", 0):
                missing.append("backward-compute")
            if missing:
                raise TraceError(
                    f"{name}, line {rows[-1].line} or before, column 'optype': {missing[0]} of worker {rank} in step "
                    f"{step} is missing; the file is cut short, or lines are missing, "
                    f"{tables.AGAIN}"
                )


_ANEW = "the file is damaged, so record or copy it again"

_BUSY = ("run", "push", "send", "fetch")
"""Spans in which a device works. A task starts without waiting for its result, so its time shows in the span that
first needs the result. In all other spans (feed, read, receive) the device waits for others."""


def read_compute_times(path: str | PathLike[str]) -> tuple[tuple[float, ...], ...]:
    """The seconds that each replica computed in each step, from a trace of flowml (`cluster.trace`) or of a job.

    A trace of flowml is JSON. It does not name replicas, so each worker counts as one. Its steps are those of the
    recorded programs, one after another. Raises TraceError.
    """
    file = Path(path)
    if file.suffix != ".json":
        return Recording(read_operations(file)).compute_times()
    content = tables.json_of(file)
    try:
        events = content["traceEvents"]
        _check_times(events, str(file))
        workers = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
        times = _times_by_worker(workers, lanes, [e for e in events if e.get("cat") in _BUSY])
    except TraceError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError):
        raise TraceError(
            f"{file} is not a trace that flowml wrote; give a file of `flowml trace` or cluster.trace, or a recorded "
            "job as .csv or .parquet"
        ) from None
    if not times:
        raise TraceError(f"{file} has no task; record a block in which the cluster computes")
    return times


def _check_times(events: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check the times of the spans that are read. Raises TraceError, which names the event."""
    for at, event in enumerate(events):
        for key, least in (("ts", -math.inf), ("dur", 0.0)) if event.get("cat") in _BUSY else ():
            value = event[key]
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError
            if not least <= value < math.inf or value == -math.inf:
                what = "a finite number" if key == "ts" else "a finite number of at least 0"
                raise TraceError(
                    f"{name}, traceEvents[{at}], {key!r}: {value!r} is not {what} of microseconds; {_ANEW}"
                )


def _times_by_worker(
    workers: Mapping[int, str], lanes: Mapping[tuple[int, int], str], spans: Iterable[Mapping[str, Any]]
) -> tuple[tuple[float, ...], ...]:
    """Sums up the busy time of each step. A task that comes again in a step begins the next program with that step."""
    tasks: dict[tuple[Any, ...], int] = defaultdict(int)
    program: dict[str, int] = defaultdict(int)
    totals: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for span in sorted(spans, key=lambda s: s["ts"]):
        device, arguments = lanes[span["pid"], span["tid"]], span["args"]
        if " " in device:  # a home, or what sends large values while the device goes on
            continue
        if span["cat"] == "run":
            task = (device, span["name"], arguments["step"], arguments["microbatch"])
            program[device] = tasks[task]
            tasks[task] += 1
        own, key = totals[workers[span["pid"]]], (program[device], int(arguments["step"]))
        own[key] = own.get(key, 0.0) + float(span["dur"]) / 1e6
    return tuple(tuple(s for _, s in sorted(totals[w].items())) for w in sorted(totals, key=_number))


def _number(worker: str) -> tuple[int, str]:
    digits = worker.rpartition(":")[2]
    return (int(digits) if digits.isdecimal() else -1, worker)
