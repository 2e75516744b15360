"""Formats tables of each layer's policy and its traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowml.plan import Plan, Training
from flowml.render.scene import home_text
from flowml.render.units import bytes_text
from flowml_runtime.protocol.training.summary import Summary, Tally
from flowml_runtime.protocol.training.terms import Terms

FATES = ("used", "dropped", "folded", "requeued")


def layer_table(plan: Plan, traffic: Mapping[str, Mapping[str, int]], ledger: Summary, *, steps: int) -> str:
    """Policy, home, fates of work items and measured bytes by layer.

    `plain` is the bytes of one gradient per replica and step. Leaves that are not trained are at the end.
    """
    training = plan.training
    assert training is not None
    header = ("layer", "policy", "home", "parameters", *FATES)
    header += ("pushes", "pushed", "plain", "ratio", "crossed workers")
    tallies = _tallies(training, ledger)
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
                *(str(getattr(tallies[store.name], fate)) for fate in FATES),
                str(counts.get("pushes", 0)),
                bytes_text(pushed),
                bytes_text(plain),
                f"{pushed / plain:.3f}" if plain else "-",
                bytes_text(sum(counts.get(f"{what}_wire_bytes", 0) for what in ("pushed", "published", "shared"))),
            )
        )
    for name, spec in training.untrained:
        rows.append((name, "not trained", "-", bytes_text(spec.nbytes), *("-" for _ in header[4:])))
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _tallies(training: Training, ledger: Summary) -> dict[str, Summary | Tally]:
    """By layer the fates of the items: those for its group of layers, if groups have different ones."""
    terms = Terms.of(training, 1)
    names = group_names(training, terms)
    rows = {store: names[group] for store, group in terms.group_of.items() if names} | dict(ungrouped(training, terms))
    return {store.name: ledger.groups.get(rows.get(i, "")) or ledger for i, store in enumerate(training.stores)}


def group_names(training: Training, terms: Terms) -> list[str]:
    """A name for each group of stores that decides alone: its layers and policy. Empty if one decides for all."""
    if len(terms.groups) < 2 and len(terms.group_of) == len(terms.stores):
        return []
    return [policy_name(training, group.stores) for group in terms.groups]


def ungrouped(training: Training, terms: Terms) -> tuple[tuple[int, str], ...]:
    """The stores that decide nothing, and a name for the row of each."""
    return tuple((n, policy_name(training, (n,))) for n in range(len(terms.stores)) if n not in terms.group_of)


def policy_name(training: Training, stores: Sequence[int]) -> str:
    """A name for stores that are kept in step together: some of their layers, and the policy of the first."""
    layers = [training.stores[store].name for store in stores]
    shown = ", ".join(layers[:2]) + (f" and {len(layers) - 2} more" if len(layers) > 2 else "")
    return f"{shown} ({training.stores[stores[0]].policy.describe()})"
