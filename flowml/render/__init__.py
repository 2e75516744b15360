"""Draws and explains plans as text, DOT, SVG or HTML. The results are strings; JAX is not used.

scene     the boxes and arrows of a plan, without positions
lanes, grid     positions: one lane for each device, or a grid of stages and replicas
svg, html, dot, text    the formats
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from flowml.errors import FlowmlError
from flowml.plan import Plan
from flowml.render.dot import draw_dot
from flowml.render.html import draw_html
from flowml.render.svg import draw_svg
from flowml.render.text import draw_text, explain

__all__ = ["draw_dot", "draw_html", "draw_svg", "draw_text", "explain", "render"]

_FORMATS = {".svg": draw_svg, ".dot": draw_dot, ".txt": draw_text, ".html": draw_html}


def render(plan: Plan, path: str | PathLike[str]) -> Path:
    """Draw `plan` and write it to the file `path`. Its suffix chooses the format. Returns the path.

    Raises FlowmlError for another suffix, or a file that cannot be written.
    """
    target = Path(path)
    draw = _FORMATS.get(target.suffix.lower())
    if draw is None:
        raise FlowmlError(f"cannot draw a plan as {target.name!r}; end the name in {', '.join(_FORMATS)}")
    try:
        target.write_text(draw(plan), encoding="utf-8", errors="replace")
    except OSError as error:
        raise FlowmlError(f"cannot write the drawing {target}: {error.strerror}; choose another path") from None
    return target
