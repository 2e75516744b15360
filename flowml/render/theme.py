"""Defines the colours and fonts of the drawings, for light and dark.

Every class has a literal colour and another one in the dark query. Programs without CSS variables or queries
(converters, old viewers) therefore draw the light picture. The background is part of the drawing, so that it is
readable on a light or dark page.
"""

from __future__ import annotations

FONT = "ui-sans-serif,system-ui,'Segoe UI',Roboto,'Helvetica Neue','DejaVu Sans',Arial,sans-serif"

_TINTS_LIGHT = ("#3978d8", "#dd7a2e", "#20967f", "#b5509a", "#7f8f1f", "#cf4759", "#6b62d6", "#7d6a57")
_TINTS_DARK = ("#6aa3f5", "#f0a060", "#4fc3ac", "#d983c2", "#b4c556", "#f07f8d", "#9f97f5", "#b8a48e")
_POLICIES_LIGHT = {
    "synchronous": "#475569",
    "bounded": "#0e7490",
    "asynchronous": "#c2410c",
    "periodic": "#a16207",
    "factors": "#7c3aed",
}
_POLICIES_DARK = {
    "synchronous": "#a8b5c6",
    "bounded": "#3cc0dc",
    "asynchronous": "#fb8a4c",
    "periodic": "#e3b341",
    "factors": "#b596ff",
}
POLICIES = tuple(_POLICIES_LIGHT)

_LIGHT = {
    "back": "#ffffff",
    "card": "#f5f7fa",
    "edge": "#d5dce5",
    "box": "#ffffff",
    "ink": "#1c2733",
    "muted": "#5c6b7a",
    "pill": "#e9eef5",
    "message": "#2f6fde",
    "local": "#9aa7b5",
    "bus": "#8d7cc9",
    "python": "#fff6e0",
}
_DARK = {
    "back": "#12161c",
    "card": "#1a2028",
    "edge": "#323c48",
    "box": "#232b35",
    "ink": "#e7ecf2",
    "muted": "#a0adbb",
    "pill": "#2a3440",
    "message": "#72a7ff",
    "local": "#6b7886",
    "bus": "#a598dd",
    "python": "#3a3320",
}


def stylesheet() -> str:
    """The style sheet of a drawing: light, and dark if the viewer prefers it."""
    dark = _colours(_DARK, _TINTS_DARK, _POLICIES_DARK)
    return f"{_SHAPES}{_colours(_LIGHT, _TINTS_LIGHT, _POLICIES_LIGHT)}@media (prefers-color-scheme:dark){{{dark}}}"


_SHAPES = f"""
.flowml text{{font-family:{FONT};font-size:11px}}
.flowml .title{{font-size:19px;font-weight:650}}
.flowml .headline{{font-size:13px}}
.flowml .heading,.flowml .name{{font-size:13px;font-weight:600}}
.flowml .small{{font-size:11px;font-weight:600}}
.flowml .label{{font-size:11px;font-weight:600;paint-order:stroke;stroke-width:5px;stroke-linejoin:round}}
.flowml .number{{font-size:10.5px;font-weight:700}}
.flowml path{{fill:none;stroke-linecap:round}}
"""


def _colours(base: dict[str, str], tints: tuple[str, ...], policies: dict[str, str]) -> str:
    rules = [
        f".flowml .back{{fill:{base['back']}}}",
        f".flowml .card{{fill:{base['card']};stroke:{base['edge']}}}",
        f".flowml .box{{fill:{base['box']};stroke:{base['edge']}}}",
        f".flowml .python .box{{fill:{base['python']}}}",
        f".flowml .pill{{fill:{base['pill']};stroke:{base['edge']}}}",
        f".flowml .store path{{fill:{base['box']};stroke:{base['edge']}}}",
        f".flowml text{{fill:{base['ink']}}}",
        f".flowml .muted{{fill:{base['muted']}}}",
        f".flowml .headline{{fill:{base['muted']}}}",
        f".flowml .label{{stroke:{base['back']};fill:{base['ink']}}}",
        f".flowml .number{{fill:{base['back']}}}",
        f".flowml .rule{{stroke:{base['edge']}}}",
    ]
    for kind in ("message", "local", "bus"):
        rules.append(f".flowml .{kind}{{stroke:{base[kind]}}}.flowml .{kind}-head{{fill:{base[kind]}}}")
    rules.append(f".flowml .stub{{stroke:{base['bus']}}}")
    rules += [f".flowml .tint{i}{{fill:{tint}}}" for i, tint in enumerate(tints)]
    rules += [f".flowml .{p}{{fill:{colour}}}" for p, colour in policies.items()]
    rules += [f".flowml .store .{p}-line{{stroke:{colour}}}" for p, colour in policies.items()]
    return "\n".join(rules) + "\n"
