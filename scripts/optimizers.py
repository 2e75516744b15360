"""Writes the table of optimizers in docs/training.md, from how the update of each is divided. `--check` only compares.

The optimizers are those that the tests find in optax and build. Run `make reference` after optax changes.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flowml.training.adapted import WantedError, adapted
from flowml.training.compiler import TrainingSpec
from flowml.training.optimizer import OptimizerSlices, slice_optimizer
from tests.training.optimizers import FOUND, REFUSED, built

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- optimizers: scripts/optimizers.py -->", "<!-- end -->"
ALONE = ": each home updates its layers alone"
BATCH = jax.ShapeDtypeStruct((8, 4), "float32")
WIDTH = 24
"""Of matrices, which are larger than what homes exchange."""


def main() -> int:
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    text = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.read_text() == text else 1
    PAGE.write_text(text)
    return 0


def table() -> str:
    """A row for each way to run, with the optimizers that run so."""
    rows: dict[tuple[float, str], list[str]] = {}
    for name in sorted(FOUND):
        rows.setdefault(way(name), []).append(f"`{name}`")
    lines = [f"| {text} | {', '.join(names)} |" for (_, text), names in sorted(rows.items())]
    return "\n".join(["| how it runs | optimizers |", "|---|---|", *lines])


def way(name: str) -> tuple[float, str]:
    """How an optimizer runs, and where that stands in the table."""
    if name in REFUSED:
        return 9, f"refused by a Trainer: {REFUSED[name][1]}"
    params: Any = {layer: {"w": jnp.ones((WIDTH, WIDTH)), "b": jnp.ones(WIDTH)} for layer in ("first", "last")}
    if name == "contrib.scale_by_muon":
        params = {layer: {"w": rest["w"]} for layer, rest in params.items()}
    params = optax.LookaheadParams.init_synced(params) if name == "lookahead" else params
    slices, wants = sliced(built(name), params)
    value = "value" in wants
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    first, because = slices.together
    layers = [next((layer for layer in ("first", "last") if layer in path), "value") for path in (*paths, "value")]
    shared = {i: {layers[k] for k, f in enumerate(first) if f == i} for i in because}
    if "loss" in wants:
        return 6, "all layers share a home, which evaluates the loss of the batch"
    if any(len(found) > 1 for found in shared.values()):
        return 5, f"coupled layers share a home, because of {' and '.join(sorted(set(because.values())))}"
    stores = [[i for i in range(slices.count) if layers[i] == layer] for layer in dict.fromkeys(layers[: slices.count])]
    if all(slices.is_closed(leaves) for leaves in stores):
        clipped = "examples" in wants
        return 0.5 if clipped else 0, "per leaf" + (", with the clipped gradient of each example" if clipped else ALONE)
    rounds = len(slices.divide(stores).combinations)
    with_loss = ", with the value of the loss" if value else ""
    return 1 + value, f"per leaf, with coupled values in {rounds} round{'s' if rounds > 1 else ''}{with_loss}"


def _loss(params: Any, batch: Any) -> Any:
    del batch
    return sum(jnp.sum(x**2) for x in jax.tree_util.tree_leaves(params))


def sliced(optimizer: Any, params: Any) -> tuple[OptimizerSlices, frozenset[str]]:
    """The slices of an optimizer, and what it wants beside gradients of the batch."""
    wants: frozenset[str] = frozenset()
    while True:
        spec, given = adapted(TrainingSpec(_loss, optimizer), params, jnp.asarray, wants, BATCH)
        try:
            return slice_optimizer(spec.optimizer, given), wants
        except WantedError as error:
            wants |= {error.what}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
