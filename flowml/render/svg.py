"""Draws a plan as SVG from the layouts of `lanes` and `grid`. It needs no other program.

Names come from the user and may hold any characters. All text therefore enters the document through `escape_text`,
which also drops characters that XML cannot hold. Every shape has a tooltip, and the attributes `data-id` and
`data-search`, by which a page can find it.
"""

from __future__ import annotations

import re
from html import escape

from flowml.plan import Plan
from flowml.render.drawing import Bar, Drawing, Path, PlacedBox, PlacedCard, PlacedStore, Words, fit, text_width
from flowml.render.grid import draw_grid
from flowml.render.lanes import draw_lanes
from flowml.render.scene import FEED, FETCH, PYTHON, Scene, make_scene
from flowml.render.theme import POLICIES, stylesheet

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LEGEND_HEIGHT = 48.0
_BOLD = 14.5
"""Bold text of 13 pixels is about as wide as plain text of this size."""


def draw_svg(plan: Plan, *, style: bool = True) -> str:
    """The drawing of `plan` as a document. Without `style`, the page around it must have the style sheet."""
    scene = make_scene(plan)
    drawing = draw_grid(plan, scene) if scene.grid else draw_lanes(scene)
    width, height = drawing.width, drawing.height + _LEGEND_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="flowml" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img">',
        f"<title>{escape_text(scene.name)}</title>",
        f"<desc>{escape_text(scene.headline)}</desc>",
        f"<style>{stylesheet()}</style>" if style else "",
        _markers(),
        f'<rect class="back" width="{width:.0f}" height="{height:.0f}" rx="10"/>',
        *map(_card, drawing.cards),
        *(f'<path class="rule" d="M{x1:.1f},{y1:.1f}L{x2:.1f},{y2:.1f}"/>' for x1, y1, x2, y2 in drawing.rules),
        *map(_path, drawing.paths),
        *map(_box, drawing.boxes),
        *map(_store, drawing.stores),
        *map(_bar, drawing.bars),
        *(_words(w, width) for w in drawing.words),
        _legend(scene, drawing),
        "</svg>",
    ]
    return "\n".join(p for p in parts if p) + "\n"


def escape_text(text: str) -> str:
    """Escape text for element content or quoted attributes. A line break becomes a character reference."""
    return escape(_FORBIDDEN.sub("\ufffd", text), quote=True).replace("\n", "&#10;").replace("\r", "&#13;")


def _markers() -> str:
    head = '<path class="{0}-head" d="M0,0L8,4L0,8z"/>'
    heads = "".join(
        f'<marker id="flowml-{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" markerHeight="{size}" '
        f'markerUnits="userSpaceOnUse" orient="auto-start-reverse">{head.format(kind)}</marker>'
        for kind, size in (("message", 10), ("local", 7), ("bus", 9))
    )
    return f"<defs>{heads}</defs>"


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{side}>{escape_text(" ".join(text.split()))}</text>'


def _words(words: Words, width: float) -> str:
    size = 21.0 if words.kind == "title" else _BOLD
    return _text(words.x, words.y, fit(words.text, width - 56, size), words.kind, words.anchor)


def _card(placed: PlacedCard) -> str:
    at, card = placed.at, placed.card
    facts = list(card.facts)
    if card.homes:
        facts.append(f"home of {', '.join(card.homes)}")
    width = at.w - 44
    detail = "\n".join([card.device, *facts])
    shown = " · ".join(facts) if width > 200 else facts[-1]
    lines = [
        _text(at.x + 24, at.y + 23, fit(card.device, width, _BOLD), "name"),
        _text(at.x + 24, at.y + 40, fit(shown, width, 11), "muted"),
    ]
    name = escape_text(card.device)
    return (
        f'<g data-id="{name}" data-search="{name}"><title>{escape_text(detail)}</title>'
        f'<rect class="card" x="{at.x:.1f}" y="{at.y:.1f}" width="{at.w:.1f}" height="{at.h:.1f}" rx="10"/>'
        f"{''.join(lines)}</g>"
    )


def _box(placed: PlacedBox) -> str:
    at, box = placed.at, placed.box
    pill = box.kind in (FEED, FETCH)
    shape = (
        f'<rect class="{"pill" if pill else "box"}" x="{at.x:.1f}" y="{at.y:.1f}" width="{at.w:.1f}" '
        f'height="{at.h:.1f}" rx="{at.h / 2 if pill else 6:.1f}"/>'
    )
    accent = "" if pill else f'<path class="tint{placed.tint}" d="{_accent(placed)}"/>'
    lines = _compact_lines(placed) if placed.compact else _pill_lines(placed) if pill else _task_lines(placed)
    search = f"{box.title} {box.detail}"
    return (
        f'<g class="{box.kind}" data-id="{escape_text(box.id)}" data-search="{escape_text(search)}">'
        f"<title>{escape_text(box.detail)}</title>{shape}{accent}{lines}</g>"
    )


def _accent(placed: PlacedBox) -> str:
    at = placed.at
    return (
        f"M{at.x + 6:.1f},{at.y:.1f}h-1q-5,0 -5,6v{at.h - 12:.1f}q0,6 5,6h1z"
        if at.h > 12
        else f"M{at.x:.1f},{at.y:.1f}h5v{at.h:.1f}h-5z"
    )


def _task_lines(placed: PlacedBox) -> str:
    at, box = placed.at, placed.box
    x, width = at.x + 16, at.w - 26
    title = f"{box.title} (Python)" if box.kind == PYTHON else box.title
    lines = [_text(x, at.y + 21, fit(title, width, _BOLD), "name")]
    lines += [_text(x, at.y + 38 + 16 * i, fit(fact, width, 11), "muted") for i, fact in enumerate(box.facts)]
    return "".join(lines)


def _pill_lines(placed: PlacedBox) -> str:
    at, box = placed.at, placed.box
    width = at.w - 36
    title = fit(f"in: {box.title}" if box.kind == FEED else box.title, width, 12)
    if not box.facts:
        return _text(at.cx, at.cy + 4, title, "small", "middle")
    facts = fit(", ".join(box.facts), width, 11)
    return _text(at.cx, at.y + 18, title, "small", "middle") + _text(at.cx, at.y + 32, facts, "muted", "middle")


def _compact_lines(placed: PlacedBox) -> str:
    at, box = placed.at, placed.box
    return _text(at.cx + 2, at.cy + 4, fit(box.short, at.w - 14, 11), "muted", "middle")


def _store(placed: PlacedStore) -> str:
    at, store = placed.at, placed.store
    x, y, w, h, r = at.x, at.y, at.w, at.h, 8.0
    body = f"M{x:.1f},{y + r:.1f}v{h - 2 * r:.1f}a{w / 2:.1f},{r} 0 0 0 {w:.1f},0v{-(h - 2 * r):.1f}"
    lid = f"M{x:.1f},{y + r:.1f}a{w / 2:.1f},{r} 0 0 1 {w:.1f},0a{w / 2:.1f},{r} 0 0 1 {-w:.1f},0z"
    lines = [
        f'<circle class="{store.policy}" cx="{x + 18:.1f}" cy="{y + 27:.1f}" r="5"/>',
        _text(x + 30, y + 31.5, fit(store.name, w - 44, _BOLD), "name"),
        *(_text(x + 14, y + 47 + 14 * i, fit(fact, w - 26, 11), "muted") for i, fact in enumerate(store.facts)),
    ]
    search = f"{store.name} {store.detail}"
    return (
        f'<g class="store" data-id="{escape_text(store.id)}" data-search="{escape_text(search)}">'
        f'<title>{escape_text(store.detail)}</title><path d="{body}"/><path class="{store.policy}-line" d="{lid}"/>'
        f"{''.join(lines)}</g>"
    )


def _path(path: Path) -> str:
    head = {"message": "message", "local": "local", "stub": "bus"}.get(path.kind)
    end = f' marker-end="url(#flowml-{head})"' if head else ""
    both = ' marker-start="url(#flowml-bus)"' if path.kind == "stub" else ""
    ends = f' data-source="{escape_text(path.source)}" data-target="{escape_text(path.target)}"' if path.source else ""
    title = f"<title>{escape_text(path.detail)}</title>" if path.detail else ""
    return f'<path class="{path.kind}" d="{path.data}" stroke-width="{path.weight:.1f}"{end}{both}{ends}>{title}</path>'


def _bar(bar: Bar) -> str:
    at = bar.at
    label = _text(at.cx, at.cy + 4, bar.text, "number", "middle") if at.w > text_width(bar.text, 11) + 2 else ""
    return (
        f'<g><title>{escape_text(bar.detail)}</title><rect class="tint{bar.tint}" x="{at.x:.1f}" y="{at.y:.1f}" '
        f'width="{at.w:.1f}" height="{at.h:.1f}" rx="3"/>{label}</g>'
    )


def _legend(scene: Scene, drawing: Drawing) -> str:
    """The meaning of the lines and colours that occur in the drawing."""
    y = drawing.height + 18
    x = 28.0
    kinds = {p.kind for p in drawing.paths}
    parts: list[str] = []
    names = {"message": "message between devices", "local": "within a device", "stub": "push and publish"}
    for kind, name in names.items():
        if kind in kinds:
            parts.append(_path(Path(f"M{x:.1f},{y:.1f}h26", kind, 1.8)))
            parts.append(_text(x + 36, y + 4, name, "muted"))
            x += 36 + text_width(name, 11) + 22
    for policy in POLICIES:
        if any(s.policy == policy for s in scene.stores):
            parts.append(f'<circle class="{policy}" cx="{x + 5:.1f}" cy="{y:.1f}" r="5"/>')
            parts.append(_text(x + 16, y + 4, policy, "muted"))
            x += 16 + text_width(policy, 11) + 22
    return "".join(parts)
