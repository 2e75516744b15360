"""Chooses a placement automatically: compares one device with pipelines by their estimated time.

A pipeline seldom helps on one fast machine, and never helps a single call over slow links. The comparison is kept, so
`plan.explain()` can show the numbers. The estimate is not exact, so a pipeline is chosen only if its gain over one
device and over any shorter pipeline exceeds the error. Stages follow the fastest links, so a pipeline crosses a slow
link between two machines at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from flowml.devices import Device
from flowml.errors import PlacementError
from flowml.ir.cost import node_seconds
from flowml.ir.graph import Graph
from flowml.lowering.partition import partition
from flowml.lowering.program import route
from flowml.lowering.schedule import schedule
from flowml.placement.links import Links
from flowml.placement.memory import resident_bytes
from flowml.placement.pipeline import crossing_bytes, pipeline_items, pipeline_stages
from flowml.plan import Choice

ERROR = 0.2
"""The error of the estimate when two placements of one function are compared, as a share of the time."""
_WITHIN = f"estimate's error of {ERROR:.0%}"


def choose(
    graph: Graph,
    devices: Sequence[Device],
    objective: str,
    memory_bytes: int | None,
    links: Links,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[dict[int, str], tuple[Choice, ...], tuple[str, ...]]:
    """The best assignment that fits, all that were compared, and notes. Raises PlacementError if none fits.

    The search asks after each alternative whether it is `out_of_time`, so that there is at least one.
    """
    items = pipeline_items(graph)
    chain = _chain(devices, links, max(crossing_bytes(graph, items), default=0))
    counts = _stage_counts(min(len(devices), len(items)))
    candidates: list[tuple[str, dict[int, str]]] = []
    weighed: list[tuple[Choice, bool]] = []
    for name, assignment in _candidates(graph, devices, chain, counts, memory_bytes, links):
        candidates.append((name, assignment))
        weighed.append(_weigh(graph, name, assignment, devices, objective, memory_bytes, links))
        if out_of_time():
            break
    stopped = _stopped(len(weighed), 1 + len(counts))
    fitting = [i for i, (_, fits) in enumerate(weighed) if fits]
    if not fitting:
        raise _fits_nowhere(min(c.peak_bytes for c, _ in weighed), devices, memory_bytes, stopped)
    best = fitting[0]
    for i in fitting[1:]:
        if weighed[i][0].step_seconds < (1 - ERROR) * weighed[best][0].step_seconds:
            best = i
    choices = tuple(
        msgspec.structs.replace(c, chosen=i == best, note=_note(c, fits, weighed[best][0]))
        for i, (c, fits) in enumerate(weighed)
    )
    assignment = candidates[best][1]
    stages = [d for d in chain if d.name in set(assignment.values())]
    return assignment, choices, _notes(choices, objective, devices, stages, stopped)


def _candidates(
    graph: Graph,
    devices: Sequence[Device],
    chain: Sequence[Device],
    counts: Sequence[int],
    memory_bytes: int | None,
    links: Links,
) -> Iterator[tuple[str, dict[int, str]]]:
    """One device, then a pipeline of each number of stages, each made when it is asked for."""
    yield f"one device ({devices[0].name})", {n.id: devices[0].name for n in graph.nodes}
    for count in counts:
        limit = min((_limit(d, memory_bytes) for d in chain[:count]), default=float("inf"))
        bound = None if limit == float("inf") else int(limit)
        yield f"pipeline of {count} stages", pipeline_stages(graph, chain[:count], links, bound)


def _stopped(weighed: int, total: int) -> str:
    """What to say of a search that ended before all alternatives were compared; "" for a full one."""
    if weighed == total:
        return ""
    return f"the search stopped at time_limit_s after {weighed} of {total} alternatives"


def _fits_nowhere(smallest: int, devices: Sequence[Device], memory_bytes: int | None, stopped: str) -> PlacementError:
    limit = memory_bytes if memory_bytes is not None else max(d.memory_bytes or 0 for d in devices)
    needs = f"the best split needs at least {smallest:,} bytes on one device, devices have {limit:,}"
    if stopped:
        return PlacementError(f"{stopped}, and none so far fits: {needs}; raise time_limit_s")
    return PlacementError(f"the model fits on no device: {needs}; add devices or raise memory_bytes")


def _stage_counts(most: int) -> list[int]:
    """The numbers of stages to compare: all small ones, then steps no larger than the error of the estimate."""
    counts: list[int] = []
    stages = 2
    while stages < most:
        counts.append(stages)
        stages = max(stages + 1, int(stages * (1 + ERROR)))
    return [*counts, most] if most >= 2 else []


def _note(choice: Choice, fits: bool, best: Choice) -> str:
    if not fits or choice.step_seconds >= best.step_seconds:
        return choice.note
    gain = 1 - choice.step_seconds / best.step_seconds
    return f"{choice.note}; gains {gain:.1%}, within the {_WITHIN}"


def _chain(devices: Sequence[Device], links: Links, nbytes: int) -> list[Device]:
    """The devices in the order of the pipeline: each is the nearest remaining device to the one before it.

    The distance is the time to send `nbytes`, the largest transfer anywhere. Equal links keep the given order.
    """
    chain, left = [devices[0]], list(devices[1:])
    while left:
        chain.append(min(left, key=lambda d: links.between(chain[-1].name, d.name).seconds(nbytes)))
        left.remove(chain[-1])
    return chain


def _notes(
    choices: Sequence[Choice], objective: str, devices: Sequence[Device], stages: Sequence[Device], stopped: str
) -> tuple[str, ...]:
    cut = (f"{stopped}, and the best so far is used; raise it to compare all.",) if stopped else ()
    if cut and len(choices) == 1:
        return cut
    if choices[0].chosen and len(devices) > 1:
        if any(c.note.endswith(_WITHIN) for c in choices):
            return (*cut, f"no pipeline here is expected to gain more than the {_WITHIN} (objective: {objective}).")
        others = "any pipeline compared so far" if cut else "any pipeline here"
        return (*cut, f"one device is expected to be faster than {others} (objective: {objective}).")
    if list(devices[: len(stages)]) != stages:
        return (*cut, f"the stages follow the fastest links: {', then '.join(d.name for d in stages)}.")
    return cut


def _weigh(
    graph: Graph,
    name: str,
    assignment: dict[int, str],
    devices: Sequence[Device],
    objective: str,
    memory_bytes: int | None,
    links: Links,
) -> tuple[Choice, bool]:
    used = [d for d in devices if d.name in set(assignment.values())] or [devices[0]]
    latency, busiest, crossing = _play(partition(graph, assignment), {d.name: d for d in devices}, links)
    seconds = latency if objective == "latency" else busiest
    peaks = {d.name: resident_bytes(graph, assignment, d.name) for d in used}
    over = [d.name for d in used if peaks[d.name] > _limit(d, memory_bytes)]
    crosses = "1 value crosses" if crossing == 1 else f"{crossing} values cross" if crossing else ""
    return Choice(name, seconds, max(peaks.values()), f"does not fit on {over[0]}" if over else crosses), not over


def _play(graph: Graph, devices: Mapping[str, Device], links: Links) -> tuple[float, float, int]:
    """Seconds of one step, seconds a step of many in flight, and how many values cross.

    One step is simulated as `estimate` simulates the finished program: tasks run in order, each task costs its
    device's dispatch time, and a message leaves when the task that sends it ends.
    """
    seconds = {n.id: node_seconds(graph, n, devices[n.device]) for n in graph.nodes}
    tasks = schedule(graph, seconds)
    routing = route(graph, tasks)
    flights = [links.between(m.source, m.destination).seconds(m.nbytes) for m in routing.messages]
    clock_s: dict[str, float] = {}
    busy_s: dict[str, float] = {}
    arrived_s: dict[int, float] = {}
    for group in tasks.groups:
        device = group.device
        messages = [routing.carrying[v, device] for v in group.inputs if (v, device) in routing.carrying]
        work = sum(seconds[n.id] for n in group.nodes) + devices[device].dispatch_s
        clock_s[device] = max([clock_s.get(device, 0.0), *(arrived_s[m] for m in messages)]) + work
        busy_s[device] = busy_s.get(device, 0.0) + work
        arrived_s.update({m: clock_s[device] + flights[m] for m in routing.sent_by.get(group.index, ())})
    if not clock_s:
        return 0.0, 0.0, 0
    return max(clock_s.values()), max(busy_s.values()) + sum(flights) / len(busy_s), len(routing.carrying)


def _limit(device: Device, memory_bytes: int | None) -> float:
    limit = memory_bytes if memory_bytes is not None else device.memory_bytes
    return float("inf") if limit is None else limit
