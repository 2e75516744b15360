"""Holds the style and the script of the HTML page, which are the same for every plan.

The script does not depend on plans. It moves the view box of the drawing, marks the shapes whose `data-search` matches
the search, and shows the tooltip of a clicked shape. It writes text, never markup.
"""

from __future__ import annotations

from flowml.render.theme import FONT

STYLE = f"""
:root{{color-scheme:light dark}}
*{{box-sizing:border-box}}
body{{margin:0;font:14px/1.5 {FONT};background:#eef1f5;color:#1c2733}}
header{{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:10px;align-items:center;
padding:10px 20px;background:#fff;border-bottom:1px solid #d5dce5}}
header h1{{font-size:17px;margin:0;max-width:40em;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}}
header p{{margin:0;color:#5c6b7a;flex:1 1 16em}}
input,button{{font:inherit;color:inherit;background:#f5f7fa;border:1px solid #c6d0db;
border-radius:7px;padding:4px 10px}}
input{{width:15em}}
button{{cursor:pointer}}
:focus-visible{{outline:2px solid #2f6fde;outline-offset:1px}}
main{{padding:16px 20px 40px;max-width:1700px;margin:auto}}
figure{{margin:0 0 16px;background:#fff;border:1px solid #d5dce5;border-radius:12px;overflow:hidden;position:relative}}
figure svg{{display:block;width:100%;height:auto;max-height:78vh;touch-action:none;cursor:grab}}
figure svg.moving{{cursor:grabbing}}
figure .back{{rx:0}}
#detail{{position:absolute;right:12px;bottom:12px;max-width:min(34em,80%);margin:0;padding:10px 14px;border-radius:9px;
background:#1c2733;color:#fff;font:12px/1.45 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:45%;overflow:auto}}
.flowml.searching [data-search]:not(.found){{opacity:.2}}
.flowml.tracing [data-source]:not(.traced){{opacity:.12}}
.flowml .picked .box,.flowml .picked .pill,.flowml .picked .card{{stroke:#2f6fde;stroke-width:2}}
section{{background:#fff;border:1px solid #d5dce5;border-radius:12px;padding:12px 18px;margin:0 0 14px;overflow-x:auto}}
h2{{font-size:14px;margin:0 0 6px}}
table{{border-collapse:collapse;font-size:13px;width:100%}}
th{{text-align:left;font-weight:600;color:#5c6b7a}}
th,td{{padding:3px 14px 3px 0;border-bottom:1px solid #e6ebf1;vertical-align:top}}
td{{overflow-wrap:anywhere;min-width:4em}}
.number{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
tr.chosen td{{font-weight:650}}
tr[hidden]{{display:none}}
pre{{margin:6px 0 0;font:12px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}}
summary{{cursor:pointer;font-weight:600}}
@media (prefers-color-scheme:dark){{
body{{background:#0c0f13;color:#e7ecf2}}
header,figure,section{{background:#12161c;border-color:#323c48}}
header p,th{{color:#a0adbb}}
input,button{{background:#232b35;border-color:#414d5b}}
th,td{{border-color:#232b35}}
#detail{{background:#e7ecf2;color:#12161c}}
}}
@media print{{header{{position:static}}input,button{{display:none}}figure svg{{max-height:none}}}}
"""

SCRIPT = """
"use strict";
(() => {
  const svg = document.querySelector("figure svg");
  const detail = document.getElementById("detail");
  const search = document.getElementById("search");
  const whole = svg.viewBox.baseVal;
  const home = [whole.x, whole.y, whole.width, whole.height];
  let view = home.slice();
  const show = () => svg.setAttribute("viewBox", view.join(" "));
  const at = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [point.x, point.y];
  };
  const zoom = (factor, x, y) => {
    const width = Math.min(Math.max(view[2] * factor, home[2] / 40), home[2] * 3);
    const by = width / view[2];
    view = [x - (x - view[0]) * by, y - (y - view[1]) * by, width, view[3] * by];
    show();
  };
  const middle = () => [view[0] + view[2] / 2, view[1] + view[3] / 2];
  document.getElementById("in").onclick = () => zoom(0.8, ...middle());
  document.getElementById("out").onclick = () => zoom(1.25, ...middle());
  document.getElementById("fit").onclick = () => { view = home.slice(); show(); };
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(event.deltaY * 0.002), ...at(event));
  }, { passive: false });

  let grip = null, moved = false;
  svg.addEventListener("pointerdown", (event) => { grip = at(event); moved = false; });
  svg.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const [x, y] = at(event);
    if (Math.abs(x - grip[0]) + Math.abs(y - grip[1]) < 4 && !moved) return;
    if (!moved) svg.setPointerCapture(event.pointerId);
    moved = true;
    svg.classList.add("moving");
    view[0] += grip[0] - x;
    view[1] += grip[1] - y;
    show();
  });
  const drop = () => { grip = null; svg.classList.remove("moving"); };
  svg.addEventListener("pointerup", drop);
  svg.addEventListener("pointercancel", drop);

  const clear = () => {
    svg.classList.remove("tracing");
    for (const old of svg.querySelectorAll(".picked,.traced")) old.classList.remove("picked", "traced");
    detail.hidden = true;
  };
  svg.addEventListener("click", (event) => {
    if (moved) return;
    clear();
    const part = event.target.closest("[data-id],[data-source]");
    if (!part) return;
    const title = part.querySelector("title");
    detail.textContent = title ? title.textContent : "";
    detail.hidden = !detail.textContent;
    part.classList.add("picked");
    const id = part.dataset.id;
    if (!id) return;
    let touched = false;
    for (const arrow of svg.querySelectorAll("[data-source]")) {
      if (arrow.dataset.source === id || arrow.dataset.target === id) {
        arrow.classList.add("traced");
        touched = true;
      }
    }
    svg.classList.toggle("tracing", touched);
  });

  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const matches = (text) => words.every((word) => text.includes(word));
    svg.classList.toggle("searching", words.length > 0);
    for (const part of svg.querySelectorAll("[data-search]")) {
      part.classList.toggle("found", matches(part.dataset.search.toLowerCase()));
    }
    for (const row of document.querySelectorAll("tbody tr")) row.hidden = !matches(row.textContent.toLowerCase());
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.value = ""; search.dispatchEvent(new Event("input")); clear(); }
    if (event.key === "/" && document.activeElement !== search) { event.preventDefault(); search.focus(); }
  });
})();
"""
