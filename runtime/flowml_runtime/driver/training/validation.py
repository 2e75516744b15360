"""Validates the parameters of a fit while it goes on: after every so many steps, and at its end.

The parameters, and the state of the model, are those of a snapshot, so they lie between two steps of each replica. The
replicas go on as soon as the driver has them. The results belong to the record of the step before, which waits for
them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flowml.training.adapted import fast_of
from flowml.training.spec import TrainingSpec
from flowml.training.state import with_state
from flowml.training.step import loss_takes_rng, name_of, scaled, weight_of
from flowml_runtime.driver.training.history import Record

Measure = Callable[[Any, Any], dict[str, Any]]
"""Parameters, state -> the means of metrics over all examples."""


class Validation:
    """The validations of one fit."""

    def __init__(self, every: int, measure: Measure) -> None:
        self.every = every
        self._measure = measure
        self._waiting: tuple[int, Any, Any] | None = None
        self._found: dict[int, dict[str, Any]] = {}
        """Step -> results that no record has yet."""
        self._held: deque[Record] = deque()

    def give(self, steps: int, params: Any, state: Any) -> None:
        """The values after so many steps. `run` measures them."""
        self._waiting = steps, params, state

    def go_back(self, step: int) -> None:
        """Forget what belongs to this step and later ones, because they are done again."""
        if self._waiting is not None and self._waiting[0] > step:
            self._waiting = None
        self._found = {s: found for s, found in self._found.items() if s < step}
        self._held = deque(record for record in self._held if record["step"] < step)

    @property
    def waits(self) -> bool:
        """Whether values are to be measured."""
        return self._waiting is not None

    def run(self) -> None:
        """Measure what was given since the last call, if anything was."""
        if self._waiting is not None:
            (steps, *values), self._waiting = self._waiting, None
            self._found[steps - 1] = self._measure(*values)

    def completed(self, records: Iterable[Record], *, hold: int | None, over: bool) -> Iterator[Record]:
        """The records in order, those with results with "validation". `hold` is the clock before which replicas stop
        next. Without common clocks there is none, and the results belong to the first record that is not out yet, as do
        those of a snapshot that was taken later because a replica was late."""
        self._held.extend(records)
        while self._held:
            step = self._held[0]["step"]
            waits = hold is not None and step + 1 >= hold and (step + 1) % self.every == 0
            if waits and not over and step not in self._found:
                return
            record = self._held.popleft()
            for found in sorted(s for s in self._found if s <= step or (over and not self._held)):
                record["validation"] = self._found.pop(found)
            yield record


def parts(validation: Any, spec: TrainingSpec) -> tuple[Any, Callable[..., Any] | None]:
    """The source and the metrics of `validation=`. It may be a source alone: then the loss is measured."""
    given = validation if isinstance(validation, tuple) else ()  # pyright: ignore[reportUnknownVariableType]
    if len(given) == 2 and callable(given[1]):  # pyright: ignore[reportUnknownArgumentType]
        return given  # pyright: ignore[reportUnknownVariableType]
    if loss_takes_rng(spec.loss, has_state=spec.has_state):
        raise ValueError(
            f"{name_of(spec.loss)} takes a key, and validation has none; give validation=(source, metrics) with "
            "metrics(params, batch) -> dict of means, such as the loss without dropout"
        )
    return validation, None


def loss_metrics(spec: TrainingSpec) -> Callable[..., dict[str, Any]]:
    """The loss as metrics. With a weight they are means of two terms over examples, which `joined` divides."""

    def validation_loss(params: Any, *rest: Any) -> dict[str, Any]:
        *state, batch = rest
        if state:
            scalar, (_, aux) = with_state(spec.loss)(fast_of(params), batch, *state)
        else:
            value = spec.loss(fast_of(params), batch)
            scalar, aux = value if isinstance(value, tuple) else (value, None)
        if spec.weight is None:
            return {"loss": scalar}
        weight, rows = jnp.asarray(weight_of(spec.weight, aux, batch)), len(jax.tree_util.tree_leaves(batch)[0])
        return {"loss": scaled(scalar, weight) / rows, "weight": weight / rows}

    return validation_loss


def joined(found: dict[str, Any]) -> dict[str, Any]:
    """What `loss_metrics` says in the mean, as one loss."""
    return {"loss": found["loss"] / found["weight"] if found["weight"] else math.nan} if "weight" in found else found
