"""The summary of a ledger: what became of all work items, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from flowml.errors import named

MOST_ROWS = 9
"""The most lines for epochs, for replicas and for groups of layers in the text of a summary."""


@dataclass(frozen=True, slots=True)
class Tally:
    """The number of items by fate. `left_out` is the number of examples in used items that were not computed, because
    a replica stopped between two microbatches. `copied` is the number of grants of items to others while this replica,
    or one in this epoch, had begun them."""

    used: int = 0
    dropped: int = 0
    folded: int = 0
    requeued: int = 0
    returned: int = 0
    unseen: int = 0
    duplicate: int = 0
    left_out: int = 0
    copied: int = 0

    def lacking(self, items: int) -> Tally:
        """The same for a layer without decisions that does not have so many of the items that count. What others have
        folded in is used there."""
        return replace(self, used=self.used + self.folded - items, folded=0, dropped=self.dropped + items)


@dataclass(frozen=True, slots=True)
class Summary:
    """The summary of a run. `epochs` and `replicas` hold one Tally each, in order; the totals count items.

    An item is used if some layer uses it. `groups` has a Tally for each group of layers that decides alone, by its
    name; it is empty if one decides for all. A layer that decides nothing, because its contributions are applied on
    arrival or added up among replicas, uses every item. It has a Tally only if it has lost some of them: what waited
    for its next push when a worker was lost, or when a fit went on that could not take it over. `duplicate` counts
    grants of items of which another grant is used.

    `unseen` of a replica is always 0, because an item that was not begun belongs to no replica. `seen` lists how many
    examples took part how many times; it is empty if it was not requested. `nonfinite` counts, by layer and replica,
    the gradients that were left out because they held NaN or infinity. A sum of several layers, or of a site, is left
    out whole: it counts for each of its layers, and for the replica that leads the site. Replica -1 counts such sums of
    finite gradients.
    `nonfinite_losses` counts, by replica, the losses that were left out of the history because they were not finite.
    `left_out` counts the examples of used items that were not computed, because a replica stopped between two
    microbatches. `partly` counts the used items that only some layers have, because a replica was lost before it had
    sent them to others, or a fit that resumed could not take over what waited there. `kept` has by layer the Euclidean
    norm of what the error feedback of all replicas had not sent.
    """

    used: int
    dropped: int
    folded: int
    requeued: int
    returned: int
    unseen: int
    outstanding: int
    item_size: int
    epochs: tuple[Tally, ...]
    replicas: tuple[Tally, ...]
    seen: tuple[tuple[int, int], ...] = ()
    groups: Mapping[str, Tally] = field(default_factory=dict[str, Tally])
    nonfinite: Mapping[str, Mapping[int, int]] = field(default_factory=dict[str, Mapping[int, int]])
    nonfinite_losses: Mapping[int, int] = field(default_factory=dict[int, int])
    kept: Mapping[str, float] = field(default_factory=dict[str, float])
    duplicate: int = 0
    left_out: int = 0
    lacking: int = 0
    """The examples by which the used items of short batches are smaller than `item_size`."""
    partly: int = 0

    @property
    def examples(self) -> int:
        """The number of examples that took part, each as often as it did."""
        return (self.used + self.folded) * self.item_size - self.left_out - self.lacking

    def __str__(self) -> str:
        """The totals, and at most `MOST_ROWS` epochs, replicas and groups of layers each. `table` has all of them."""
        return self._told(MOST_ROWS)

    def table(self) -> str:
        """One line for each epoch, replica and group of layers."""
        return self._told(None)

    def _told(self, most: int | None) -> str:
        names = ("used", "dropped", "folded", "requeued", *(["duplicate"] if self.duplicate else []), "unseen")
        rows = _some("epoch", [(f"epoch {i}", t) for i, t in enumerate(self.epochs)], most)
        rows += _some("replica", [(f"replica {i}", t) for i, t in enumerate(self.replicas)], most)
        rows += _some("group", list(self.groups.items()), most)
        width = max(14, *(len(label) + 2 for label, _ in rows))
        lines = [f"{f'items of {self.item_size}':<{width}}" + "".join(f"{n:>10}" for n in names)]
        for label, tally in rows:
            lines.append(f"{label:<{width}}" + "".join(f"{getattr(tally, n):>10}" for n in names))
        lines.append(f"{'total':<{width}}" + "".join(f"{getattr(self, n):>10}" for n in names))
        if self.left_out:
            whose = _by_replica({r: t.left_out for r, t in enumerate(self.replicas) if t.left_out})
            lines.append(f"examples of used items left out between microbatches: {whose}")
        if self.partly:
            lines.append(
                f"used items that only some layers have, because others lost what waited for them: {self.partly}"
            )
        if self.seen:
            lines.append("examples seen: " + ", ".join(f"{many} × {times}" for times, many in self.seen))
        alike: dict[str, list[str]] = {}
        for layer, counts in self.nonfinite.items():
            alike.setdefault(_by_replica(counts), []).append(layer)
        for counts, layers in alike.items():
            lines.append(f"not finite and left out of {named(layers)}: {counts}")
        if self.nonfinite_losses:
            lines.append(f"losses not finite and left out of the history: {_by_replica(self.nonfinite_losses)}")
        for layer, norm in self.kept.items():
            lines.append(f"kept by error feedback of {layer} and not sent: a norm of {norm:.3g}")
        return "\n".join(lines)


def _some(noun: str, rows: Sequence[tuple[str, Tally]], most: int | None) -> list[tuple[str, Tally]]:
    """These rows, or if they are more than `most` the first and last ones and the sum of those between."""
    if most is None or len(rows) <= most:
        return list(rows)
    ends = (most - 1) // 2
    between = [tally for _, tally in rows[ends:-ends]]
    summed = Tally(**{f.name: sum(getattr(tally, f.name) for tally in between) for f in fields(Tally)})
    return [*rows[:ends], (f"{len(between)} more {noun}s", summed), *rows[-ends:]]


def _by_replica(counts: Mapping[int, int]) -> str:
    return ", ".join(f"replica {r} × {n}" if r >= 0 else f"the sum × {n}" for r, n in sorted(counts.items()))
