"""Formats tables of each layer's policy and its traffic."""

from __future__ import annotations

from collections.abc import Mapping

from flowml.plan import Plan, Training
from flowml.render.scene import home_text
from flowml.render.units import bytes_text
from flowml_runtime.protocol.training.terms import Terms


def layer_table(plan: Plan, traffic: Mapping[str, Mapping[str, int]], *, steps: int) -> str:
    """Policy, home and measured bytes by layer. `plain` is the bytes of one gradient per replica and step."""
    training = plan.training
    assert training is not None
    header = ("layer", "policy", "home", "parameters", "pushes", "pushed", "plain", "ratio", "crossed workers")
    rows: list[tuple[str, ...]] = [header]
    for store in training.stores:
        counts = traffic.get(store.name, {})
        pushed = counts.get("pushed_bytes", 0)
        plain = store.nbytes * len(training.replicas) * steps
        rows.append(
            (
                store.name,
                store.policy.describe(),
                home_text(store) if store.collective else store.home.split("/", 1)[0],
                bytes_text(store.nbytes),
                str(counts.get("pushes", 0)),
                bytes_text(pushed),
                bytes_text(plain),
                f"{pushed / plain:.3f}" if plain else "-",
                bytes_text(counts.get("pushed_wire_bytes", 0) + counts.get("published_wire_bytes", 0)),
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def group_names(training: Training, terms: Terms) -> list[str]:
    """A name for each group of stores that decides alone: its layers and policy. Empty if there is only one group."""
    if len(terms.groups) < 2:
        return []
    found: list[str] = []
    for group in terms.groups:
        layers = [training.stores[store].name for store in group.stores]
        shown = ", ".join(layers[:2]) + (f" and {len(layers) - 2} more" if len(layers) > 2 else "")
        found.append(f"{shown} ({training.stores[group.stores[0]].policy.describe()})")
    return found
