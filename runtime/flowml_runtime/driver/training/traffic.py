"""Adds up by layer what the workers of a fit tell about what they have sent."""

from __future__ import annotations

import math
from collections.abc import Iterable

from flowml.plan import Training
from flowml_runtime import wire


def sent_bytes(training: Training, traffic: Iterable[wire.Traffic]) -> dict[str, dict[str, int]]:
    """Bytes by layer, summed over all workers."""
    names = ("pushes", "pushed_bytes", "pushed_wire_bytes", "published_wire_bytes", "shared_wire_bytes")
    totals: dict[str, dict[str, int]] = {s.name: dict.fromkeys(names, 0) for s in training.stores}
    for told in traffic:
        for store, *counts in told.stores:
            for name, amount in zip(names, counts, strict=True):
                totals[training.stores[store].name][name] += amount
    return totals


def totals(training: Training, traffic: Iterable[wire.Traffic]) -> tuple[dict[int, int], dict[int, int]]:
    """By store the bytes of contributions, and all bytes that crossed to another worker."""
    rows = list(enumerate(sent_bytes(training, traffic).values()))
    pushed = {store: found["pushed_bytes"] for store, found in rows}
    return pushed, {store: sum(n for name, n in found.items() if "wire" in name) for store, found in rows}


def kept_norms(training: Training, traffic: Iterable[wire.Traffic]) -> dict[str, float]:
    """By layer the norm of what error feedback has not sent."""
    squares: dict[int, float] = {}
    for store, found in (pair for told in traffic for pair in told.kept):
        squares[store] = squares.get(store, 0.0) + found
    return {training.stores[store].name: math.sqrt(squares[store]) for store in sorted(squares)}
