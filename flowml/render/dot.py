"""Draws a plan as DOT, for Graphviz and other programs that read it: `dot -Tpdf plan.dot > plan.pdf`.

A device is a cluster (in training inside the cluster of its replica), a task is a node, a message is an edge, and a
store is a cylinder. Pushes and publications of a stage meet in one point, so eight workers have eight edges instead of
eight for each store. The `graphviz` package builds the text; the program of that name is not needed.
"""

from __future__ import annotations

import graphviz

from flowml.plan import Plan
from flowml.render.scene import FEED, FETCH, LOCAL, PYTHON, Box, Card, Cylinder, Scene, make_scene
from flowml.render.units import clip

_NAME, _TIP = 48, 400
_FONT = "Helvetica"
_FILLS = {FEED: "#e9eef5", FETCH: "#e9eef5", PYTHON: "#fff6e0"}


def draw_dot(plan: Plan) -> str:
    """The DOT source of `plan`."""
    scene = make_scene(plan)
    graph = graphviz.Digraph("flowml", strict=False)
    graph.attr(
        rankdir="TB", compound="true", newrank="true", labelloc="t", fontname=_FONT, fontsize="16", nodesep="0.35",
        label=f"{_safe(scene.name)}\\n{_safe(scene.headline, 200)}",
    )  # fmt: skip
    graph.attr("node", fontname=_FONT, fontsize="11", shape="box", style="rounded,filled", color="#9aa7b5")
    graph.attr("edge", fontname=_FONT, fontsize="10", color="#2f6fde", fontcolor="#1c2733")
    _devices(graph, scene)
    for arrow in scene.arrows:
        graph.edge(
            arrow.source,
            arrow.target,
            label=_safe(arrow.label),
            tooltip=_tip(arrow.detail),
            penwidth="1.0" if arrow.kind == LOCAL else "1.6",
            color="#9aa7b5" if arrow.kind == LOCAL else "#2f6fde",
        )
    _stores(graph, scene)
    return graph.source


def _safe(text: str, length: int = _NAME) -> str:
    """Text for a quoted label: one line, literal, without markup or escape sequences."""
    return graphviz.escape(clip("".join(c for c in text if c.isprintable() or c.isspace()), length))


def _tip(text: str) -> str:
    return graphviz.escape("".join(c for c in text if c.isprintable() or c == "\n")[:_TIP])


def _devices(graph: graphviz.Digraph, scene: Scene) -> None:
    numbers = {c.device: i for i, c in enumerate(scene.cards)}
    replicas = scene.grid or (tuple(numbers),)
    for replica, devices in enumerate(replicas):
        inside = graphviz.Digraph(f"cluster_replica{replica}")
        inside.attr(label=f"replica {replica}", color="#d5dce5", style="rounded")
        for device in devices:
            if device in numbers:
                inside.subgraph(_cluster(scene.cards[numbers[device]], numbers[device]))
        if scene.grid:
            graph.subgraph(inside)
        else:
            graph.body.extend(inside.body[1:])


def _cluster(card: Card, number: int) -> graphviz.Digraph:
    cluster = graphviz.Digraph(f"cluster_device{number}")
    label = "\\n".join([_safe(card.device), _safe(" · ".join(card.facts))])
    cluster.attr(label=label, style="rounded,filled", fillcolor="#f5f7fa", color="#d5dce5", fontsize="12")
    for box in card.boxes:
        _node(cluster, box)
    return cluster


def _node(cluster: graphviz.Digraph, box: Box) -> None:
    label = "\\n".join([_safe(box.title), *(_safe(f) for f in box.facts)])
    shape = "oval" if box.kind in (FEED, FETCH) else "box"
    cluster.node(box.id, label=label, shape=shape, fillcolor=_FILLS.get(box.kind, "#ffffff"), tooltip=_tip(box.detail))


def _stores(graph: graphviz.Digraph, scene: Scene) -> None:
    """Cylinders by stage, connected to the devices of the stage through one point."""
    numbers = {c.device: i for i, c in enumerate(scene.cards)}
    for stage in sorted({s.stage for s in scene.stores}):
        bus = f"bus{stage}"
        graph.node(bus, label="", shape="point", width="0.12", color="#8d7cc9", tooltip=f"stores of stage {stage}")
        for device in (r[stage] for r in scene.grid if stage < len(r)):
            card = scene.cards[numbers[device]]
            if card.boxes:
                graph.edge(
                    card.boxes[-1].id, bus, ltail=f"cluster_device{numbers[device]}", dir="both", color="#8d7cc9",
                    style="dashed", tooltip="push and publish",
                )  # fmt: skip
        for store in (s for s in scene.stores if s.stage == stage):
            _store(graph, store, bus)


def _store(graph: graphviz.Digraph, store: Cylinder, bus: str) -> None:
    label = "\\n".join([_safe(store.name), *(_safe(f, 64) for f in store.facts)])
    graph.node(store.id, label=label, shape="cylinder", style="filled", fillcolor="#ffffff", tooltip=_tip(store.detail))
    graph.edge(bus, store.id, dir="both", color="#8d7cc9", tooltip=_tip(store.detail))
