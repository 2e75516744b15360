"""Describes a plan as text: `explain` says what was chosen and why, `draw_text` lists the work of every device.

Both are for a terminal, with aligned columns and without colour. Each name stays on one line, so a name cannot
imitate a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flowml.plan import ArraySpec, Choice, Estimate, Plan, PlanLink, StoreSpec, Training, Transfer
from flowml.policy.topology import sent_bytes
from flowml.render.program_text import device_lists
from flowml.render.scene import headline, home_text, push_text, spec_text, varies
from flowml.render.timeline import timeline
from flowml.render.units import bytes_text, clip, flops_text, plural, rate_text, seconds_text

_WIDEST = 56
_ROWS = 40


def explain(plan: Plan) -> str:
    """Text that says which placement was chosen, what it was compared with, and why. It ends with a newline."""
    sections = [
        f"{clip(plan.name, _WIDEST)}: {headline(plan)}",
        _estimate(plan),
        _choices(plan.choices),
        _partitions(plan),
        _transfers(plan),
        _links(plan.links),
        _training(plan.training) if plan.training else "",
        _notes(plan.notes),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def draw_text(plan: Plan) -> str:
    """A chart of when each device runs which task, then the instructions of every device."""
    sections = [f"{clip(plan.name, _WIDEST)}: {headline(plan)}", _chart(plan), *device_lists(plan)]
    return "\n\n".join(s for s in sections if s) + "\n"


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Aligned columns under a title. `right` has an "r" for each column that holds numbers."""
    shown = [[clip(cell, _WIDEST) for cell in row] for row in rows[:_ROWS]]
    widths = [max(map(len, column)) for column in zip(header, *shown, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right[i : i + 1] == "r" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return ("  " + "  ".join(padded)).rstrip()

    lines = [title, line(header), *map(line, shown)]
    if len(rows) > _ROWS:
        lines.append(f"  … {len(rows) - _ROWS:,} more")
    return "\n".join(lines)


def _estimate(plan: Plan) -> str:
    estimate = plan.estimate
    rows = [
        ("one step", seconds_text(estimate.step_seconds)),
        ("the same on one device", seconds_text(estimate.single_device_seconds)),
        ("sent between devices", bytes_text(estimate.transfer_bytes)),
    ]
    if estimate.peak_bytes:
        device, peak = max(estimate.peak_bytes.items(), key=lambda item: item[1])
        rows.append(("most memory", f"{bytes_text(peak)} on {clip(device, _WIDEST)}"))
    width = max(len(name) for name, _ in rows)
    lines = ["Estimate", *(f"  {name.ljust(width)}  {value}" for name, value in rows)]
    verdict = compare_with_one_device(plan)
    return "\n".join([*lines, f"  {verdict}"] if verdict else lines)


def compare_with_one_device(plan: Plan) -> str:
    """A sentence that compares the plan with one device; empty if there is nothing to compare."""
    estimate: Estimate = plan.estimate
    step, single = estimate.step_seconds, estimate.single_device_seconds
    if len(plan.programs) < 2 or step <= 0 or single <= 0 or max(step, single) == float("inf"):
        return ""
    if step > single:
        return (
            f"One device would be faster: {seconds_text(single)} instead of {seconds_text(step)} a step. "
            "Use this plan if the model does not fit on one device."
        )
    return f"This plan is {single / step:.3g} times as fast as one device."


def _choices(choices: Sequence[Choice]) -> str:
    if not choices:
        return ""
    rows = [
        ("→" if c.chosen else "", c.name, seconds_text(c.step_seconds), bytes_text(c.peak_bytes), c.note)
        for c in choices
    ]
    text = table("Placements compared (→ chosen)", ("", "placement", "step", "peak memory", "note"), rows, "llrrl")
    reason = why(choices)
    return f"{text}\n  {reason}" if reason else text


def why(choices: Sequence[Choice]) -> str:
    """Why the chosen placement was preferred to the best of the others."""
    chosen = next((c for c in choices if c.chosen), None)
    others = sorted((c for c in choices if not c.chosen), key=lambda c: c.step_seconds)
    if chosen is None or not others:
        return ""
    best = others[0]
    name = clip(best.name, _WIDEST)
    if chosen.step_seconds < best.step_seconds:
        return f"Chosen as the fastest: {name}, the next best, takes {seconds_text(best.step_seconds)}."
    if best.peak_bytes > chosen.peak_bytes:
        return (
            f"{name} would take {seconds_text(best.step_seconds)}, but {bytes_text(best.peak_bytes)} of memory "
            f"where the chosen one takes {bytes_text(chosen.peak_bytes)}."
        )
    reason = f": {clip(best.note, _WIDEST)}" if best.note else "; the placement asked for was kept"
    return f"{name} would take {seconds_text(best.step_seconds)}{reason}."


def _partitions(plan: Plan) -> str:
    rows: list[Sequence[str]] = []
    for partition in plan.partitions:
        layers = dict.fromkeys(layer for t in partition.tasks for layer in t.layers)
        peak = plan.estimate.peak_bytes.get(partition.device)
        rows.append(
            (
                partition.device,
                str(len(partition.tasks)),
                flops_text(partition.flops),
                bytes_text(partition.bytes),
                bytes_text(peak) if peak is not None else "-",
                ", ".join(layers),
            )
        )
    return table("Devices", ("device", "tasks", "work", "touched", "peak memory", "layers"), rows, "lrrrrl")


def _transfers(plan: Plan) -> str:
    if not plan.transfers:
        return "Transfers\n  none: nothing crosses between devices"
    messages, scope = plan.messages, ""
    if plan.training and len(plan.training.replicas) > 1:
        first = plan.training.replicas[0]
        messages = tuple(m for m in messages if m.source in first and m.destination in first)
        scope = "of replica 0; the others send the same: "
    heaviest: list[Transfer] = sorted((t for m in messages for t in m.transfers), key=lambda t: -t.nbytes)
    rows = [
        (t.source, t.destination, t.layer or "-", spec_text(ArraySpec(t.shape, t.dtype)), bytes_text(t.nbytes))
        for t in heaviest
    ]
    times = f", {plan.training.microbatches} times a step" if plan.training and plan.training.microbatches > 1 else ""
    title = f"Transfers ({scope}{plural(len(rows), 'value')} in {plural(len(messages), 'message')}{times})"
    return table(title, ("from", "to", "layer", "value", "size"), rows, "llllr")


def _links(links: Sequence[PlanLink]) -> str:
    """The links that the estimate used, and whether they were measured. Equal links in both directions share a row."""
    facts = {(k.source, k.destination): (k.way, k.latency_s, k.bytes_per_s, k.measured) for k in links}
    both = {(a, b) for a, b in facts if facts[a, b] == facts.get((b, a))}
    rows: list[Sequence[str]] = []
    for (a, b), (way, latency_s, bytes_per_s, measured) in facts.items():
        if (a, b) not in both or a < b:
            edge = f"{a} {'↔' if (a, b) in both else '→'} {b}"
            known = "measured" if measured else "assumed"
            rows.append((edge, way or "-", seconds_text(latency_s), rate_text(bytes_per_s), known))
    header = ("between", "way", "latency", "rate", "")
    return table("Links (as the estimate took them)", header, rows, "llrrl") if rows else ""


def _training(training: Training) -> str:
    stores = training.stores
    return "\n\n".join(s for s in (_grid(training), _stores(stores), _pushed(stores), _reduced(stores)) if s)


def _grid(training: Training) -> str:
    stages = max((len(r) for r in training.replicas), default=0)
    rows = [
        (f"replica {i}", *replica, *("-" for _ in range(stages - len(replica))))
        for i, replica in enumerate(training.replicas)
    ]
    each = plural(training.microbatches, "microbatch", "microbatches")
    title = f"Replicas ({training.schedule}; a work item of {training.item_size} examples in {each})"
    return table(title, ("", *(f"stage {s}" for s in range(stages))), rows)


def _stores(stores: Sequence[StoreSpec]) -> str:
    rows = [
        (
            s.name,
            s.policy.describe(),
            home_text(s),
            bytes_text(s.nbytes),
            push_text(s),
            s.policy.every.between,
            ",".join(str(stage) for stage in sorted({p.stage for p in s.parts})),
        )
        for s in stores
    ]
    header = ("layer", "policy", "home", "parameters", "pushed", "every", "stage")
    return table("Layers", header, rows, "lllrrrr")


def _pushed(stores: Sequence[StoreSpec]) -> str:
    """The bytes that one replica pushes in a step, and what `every`, factors and filters save."""
    pushed = sum(s.push_bytes / s.every for s in stores)
    plain = sum(s.nbytes for s in stores)
    most = "at most " if any(map(varies, stores)) else ""
    if not stores or (pushed >= plain and not most):
        return f"  Each replica pushes {bytes_text(plain)} a step, its plain gradients."
    return f"  Each replica pushes {most}{bytes_text(pushed)} a step; plain gradients would take {bytes_text(plain)}."


def _reduced(stores: Sequence[StoreSpec]) -> str:
    """What replicas add up among themselves: the number of buckets, their schedules, and bytes sent by a worker."""
    buckets = [(s, p, p.reduction) for s in stores for p in s.parts if p.reduction is not None]
    if not buckets:
        return ""
    schedules = Counter(f"{r.schedule}{f' {r.fanout}' if r.fanout else ''}" for _, _, r in buckets)
    known = ", ".join(f"{count} by {name}" for name, count in schedules.items())
    summed = sum(p.nbytes / s.every for s, p, _ in buckets)
    sent = sum(
        len(r.workers) * sent_bytes(r.schedule, p.nbytes, len(r.workers), r.route) / s.every for s, p, r in buckets
    )
    workers = {w for _, _, r in buckets for w in r.workers}
    return (
        f"  Replicas add up {bytes_text(summed)} a step in {plural(len(buckets), 'bucket')} ({known}); "
        f"each worker sends {bytes_text(sent / len(workers))} for that on average."
    )


def _notes(notes: Sequence[str]) -> str:
    return "\n".join(["Notes", *(f"  - {' '.join(n.split())}" for n in notes)]) if notes else ""


_CHART_WIDTH = 88
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _chart(plan: Plan) -> str:
    """When each device runs each task: a letter for the task, then the microbatch. In training only the first replica
    is shown."""
    devices = plan.training.replicas[0] if plan.training and plan.training.replicas else plan.devices
    bars = timeline(plan, devices)
    if not bars:
        return ""
    end_s = max(b.end_s for b in bars)
    letters: dict[int, str] = {}
    for bar in bars:
        letters.setdefault(bar.task, _LETTERS[len(letters) % len(_LETTERS)])
    rows = {d: [" "] * _CHART_WIDTH for d in devices if any(b.device == d for b in bars)}
    for bar in bars:
        first = int(bar.start_s / end_s * (_CHART_WIDTH - 1))
        length = max(int(bar.end_s / end_s * (_CHART_WIDTH - 1)) - first, 1)
        cells = f"{letters[bar.task]}{bar.microbatch if plan.training else ''}".ljust(length, "─")[:length]
        rows[bar.device][first : first + length] = cells
    width = max(len(clip(d, 24)) for d in rows)
    lines = [f"  {clip(d, 24).ljust(width)}  {''.join(cells).rstrip()}" for d, cells in rows.items()]
    key = ", ".join(f"{letter} {clip(plan.tasks[t].name, 40)}" for t, letter in letters.items())
    scope = "replica 0, " if plan.training and len(plan.training.replicas) > 1 else ""
    return "\n".join([f"Timeline ({scope}estimated, {seconds_text(end_s)})", *lines, f"  {key}"])
