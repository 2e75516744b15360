"""Says in what a snapshot differs from the fit that is to go on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowml.errors import CheckpointError
from flowml.plan import Training
from flowml.training.untrained import Untrained
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.snapshots import (
    TREES,
    Figures,
    Key,
    Snapshot,
    Trees,
    key_of,
    values_of,
    with_untrained,
)

Specs = Mapping[tuple[Key, ...], tuple[str, tuple[int, ...]]]
"""The dtype and the shape of each leaf, by its path."""
_MAY_DIFFER = ("update", "replicas", "stages", "microbatches")
"""The figures of which others are no error: see `reshaping`."""
MOST = 8
"""The most differences that an error names."""


def check(snapshot: Snapshot, path: Path | str, training: Training, now: Figures, trees: Trees, model: Model) -> None:
    """Raise CheckpointError if the snapshot belongs to another fit: it says what differs."""
    differs = list(_figures(snapshot.content.figures, now))
    mine = zip(TREES, (*trees[:2], model.state()), strict=True)
    leaves = {what: _leaves(snapshot, what, tree) for what, tree in mine}
    optimizer = leaves.pop("opt_state")
    others = [*(text for found in leaves.values() for text in found), *_untrained(snapshot, trees[2])]
    policies = [] if others else list(_policies(snapshot, training))  # policies have optimizers of their own
    differs += [*others, *optimizer] if others or not policies else policies
    if not differs:
        return
    of = "another fit" if policies or not (others or optimizer) else "another model or optimizer"
    raise CheckpointError(
        f"the checkpoint {path} belongs to {of}: {bounded(differs)}; resume with the same arguments, or begin "
        "from the values of fm.restore(path)"
    )


def _figures(there: Figures, here: Figures) -> Iterable[str]:
    for name in Figures.__struct_fields__:
        if name not in _MAY_DIFFER and getattr(there, name) != getattr(here, name):
            yield f"{name}={getattr(there, name)} there and {getattr(here, name)} here"


def _leaves(snapshot: Snapshot, what: str, tree: Any) -> list[str]:
    leaves = getattr(snapshot.content, what)
    pairs = zip(leaves, snapshot.leaves(leaves), strict=True)
    there = {leaf.path: (leaf.dtype, tuple(value.shape)) for leaf, value in pairs}
    paths = jax.tree_util.tree_leaves_with_path(tree)
    here = {tuple(map(key_of, p)): (str(x.dtype), tuple(x.shape)) for p, x in paths}
    return differences(f"{what} leaf", there, here)


def _untrained(snapshot: Snapshot, untrained: Untrained | None) -> list[str]:
    """How the leaves that are not trained differ. Their values are constants of what runs."""
    here = with_untrained(snapshot, untrained)
    both = [{leaf.path: (leaf, s.arrays[leaf.buffer]) for leaf in s.content.untrained} for s in (snapshot, here)]
    kinds = [{path: (leaf.dtype, tuple(x.shape)) for path, (leaf, x) in found.items()} for found in both]
    found = differences("params leaf", *kinds)
    return found or [
        f"params leaf {_name(path)!r} is not trained and has other values there"
        for path, (_, value) in both[0].items()
        if not np.array_equal(value, both[1][path][1])
    ]


def differences(what: str, there: Specs, here: Specs) -> list[str]:
    """What differs leaf by leaf: first those that only one has, then those of another type."""
    found: list[str] = []
    for mine, other, where in ((there, here, "there"), (here, there, "here")):
        found += [
            f"{what} {_name(p)!r}, {_shown(*spec)}, is only {where}" for p, spec in mine.items() if p not in other
        ]
    for path, spec in there.items():
        if here.get(path, spec) != spec:
            found.append(f"{what} {_name(path)!r} is {_shown(*spec)} there and {_shown(*here[path])} here")
    return found


def bounded(differs: Sequence[str]) -> str:
    """The first of these differences, and how many more there are."""
    return "; ".join(differs[:MOST]) + (f"; and {len(differs) - MOST} more" if len(differs) > MOST else "")


def _name(path: Iterable[Key]) -> str:
    return "/".join(str(key) for _, key in path)


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"


def _policies(snapshot: Snapshot, training: Training) -> Iterable[str]:
    """The parameters whose policies differ."""
    there = {f"{values_of(layer.name)}/{name}": layer for layer in snapshot.content.layers for name, _ in layer.buffers}
    here = {leaf: store for store in training.stores for leaf in store.leaves}
    told: set[tuple[str, str]] = set()
    for number, leaf in enumerate(snapshot.content.params):
        old, new = there.get(leaf.buffer), here.get(number)
        policies = old.policy if old else "none", new.policy.describe() if new else "none"
        if policies[0] != policies[1] and policies not in told:
            told.add(policies)
            yield f"parameter {_name(leaf.path)!r} has the policy {policies[0]} there and {policies[1]} here"
