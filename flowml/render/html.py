"""Draws a plan as one self-contained web page: a drawing that can be moved and zoomed, and all tables beside it.

The page may show names from an untrusted model, so all text is escaped. A content security policy allows only our
own style and script (by their hashes) and no downloads.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from flowml.plan import ArraySpec, Plan, StoreSpec
from flowml.render.page import SCRIPT, STYLE
from flowml.render.program_text import device_lists
from flowml.render.scene import headline, home_text, push_text, spec_text
from flowml.render.svg import draw_svg, escape_text
from flowml.render.text import compare_with_one_device, why
from flowml.render.theme import stylesheet
from flowml.render.units import bytes_text, clip, flops_text, plural, seconds_text


def draw_html(plan: Plan) -> str:
    """The page of `plan`, as text."""
    style = stylesheet() + STYLE
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    name = escape_text(clip(plan.name, 120))
    sections = "\n".join(s for s in _sections(plan) if s)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{name} - flowml plan</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p>{escape_text(headline(plan))}</p>
<input id="search" type="search" placeholder="Search  ( / )" aria-label="Search tasks, layers and devices">
<button id="in" type="button" aria-label="Zoom in">+</button>
<button id="out" type="button" aria-label="Zoom out">&minus;</button>
<button id="fit" type="button">Fit</button>
</header>
<main>
<figure>
{draw_svg(plan, style=False)}<pre id="detail" hidden></pre>
</figure>
{sections}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _sections(plan: Plan) -> Sequence[str]:
    return (
        _estimate(plan),
        _choices(plan),
        _layers(plan.training.stores) if plan.training else "",
        _devices(plan),
        _tasks(plan),
        _transfers(plan),
        _instructions(plan),
        _notes(plan),
    )


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: str, chosen: int = -1) -> str:
    """A table. `right` has an "r" for each column that holds numbers; row `chosen` is highlighted."""
    sides = [' class="number"' if side == "r" else "" for side in right.ljust(len(header))]
    head = "".join(f"<th{side}>{escape_text(text)}</th>" for text, side in zip(header, sides, strict=True))
    lines = [
        ('<tr class="chosen">' if i == chosen else "<tr>")
        + "".join(f"<td{side}>{escape_text(cell)}</td>" for cell, side in zip(row, sides, strict=True))
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    body = "\n".join(lines)
    return _section(title, f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape_text(title)}</h2>\n{content}</section>"


def _estimate(plan: Plan) -> str:
    estimate = plan.estimate
    facts = (
        f"{seconds_text(estimate.step_seconds)} a step, {seconds_text(estimate.single_device_seconds)} on one device, "
        f"{bytes_text(estimate.transfer_bytes)} sent."
    )
    return _section("Estimate", f"<p>{escape_text(f'{facts} {compare_with_one_device(plan)}')}</p>")


def _choices(plan: Plan) -> str:
    if not plan.choices:
        return ""
    rows = [(c.name, seconds_text(c.step_seconds), bytes_text(c.peak_bytes), c.note) for c in plan.choices]
    chosen = next((i for i, c in enumerate(plan.choices) if c.chosen), -1)
    reason = why(plan.choices)
    title = f"What was weighed. {reason}" if reason else "What was weighed"
    return _table(title, ("placement", "step", "peak memory", "note"), rows, " rr ", chosen)


def _layers(stores: Sequence[StoreSpec]) -> str:
    rows = [
        (
            s.name,
            s.policy.describe(),
            home_text(s),
            bytes_text(s.nbytes),
            push_text(s),
            s.policy.every.between,
            ", ".join(str(p) for p in sorted({part.stage for part in s.parts})),
        )
        for s in stores
    ]
    header = ("layer", "policy", "home", "parameters", "pushed", "every", "stage")
    return _table("Layers and their policies", header, rows, "   rrrr")


def _devices(plan: Plan) -> str:
    rows = [
        (
            p.device,
            str(len(p.tasks)),
            flops_text(p.flops),
            bytes_text(p.bytes),
            bytes_text(plan.estimate.peak_bytes.get(p.device, 0)),
            ", ".join(dict.fromkeys(layer for t in p.tasks for layer in t.layers)),
        )
        for p in plan.partitions
    ]
    return _table("Devices", ("device", "tasks", "work", "touched", "peak memory", "layers"), rows, " rrrr ")


def _tasks(plan: Plan) -> str:
    rows = [
        (t.name, t.kind, ", ".join(t.layers), str(t.nodes), flops_text(t.flops), seconds_text(t.seconds))
        for t in plan.tasks
    ]
    return _table("Tasks", ("task", "kind", "layers", "nodes", "work", "estimate"), rows, "   rrr")


def _transfers(plan: Plan) -> str:
    rows = [
        (t.source, t.destination, t.layer or "-", spec_text(ArraySpec(t.shape, t.dtype)), bytes_text(t.nbytes))
        for t in plan.transfers
    ]
    return _table("Transfers", ("from", "to", "layer", "value", "size"), rows, "    r") if rows else ""


def _instructions(plan: Plan) -> str:
    blocks = "\n".join(f"<pre>{escape_text(block)}</pre>" for block in device_lists(plan))
    count = plural(sum(len(p.instructions) for p in plan.programs), "instruction")
    return f"<section><details><summary>{count}, device by device</summary>\n{blocks}</details></section>"


def _notes(plan: Plan) -> str:
    items = "".join(f"<li>{escape_text(n)}</li>" for n in plan.notes)
    return _section("Notes", f"<ul>{items}</ul>") if items else ""
