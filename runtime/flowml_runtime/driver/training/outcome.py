"""What a fit is asked for and what it returns, and how its values become buffers and values again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from flowml.ir.keys import key_implementation
from flowml.leaves import has_no_values
from flowml.splits import Shuffle
from flowml_runtime.driver.training.delays import Rows
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.stragglers import Stragglers
from flowml_runtime.driver.training.training_session import Simulated
from flowml_runtime.protocol.training.summary import Summary

OnNonFinite = Literal["refuse", "raise", "apply"]


@dataclass(frozen=True)
class FitOptions:
    """`run` is the number of the fit's first step. `total` is the number of steps, each of one global batch."""

    run: int
    total: int
    batch_size: int
    seed: int
    shuffle: Shuffle
    delays: Rows
    check_replicas: int
    on_nonfinite: OnNonFinite
    progress: bool | None
    rest: int = 0
    """The examples of a short batch at the end of each epoch, if it is used."""


@dataclass(frozen=True)
class Loss:
    """A loss of workers after which a fit went on.

    `step` is the step that the fit had reached, and `resumed_at` the one at which it went on, `seconds` later.
    """

    workers: tuple[str, ...]
    reason: str
    step: int
    resumed_at: int
    seconds: float


@dataclass(frozen=True)
class Change:
    """A change of the workers of a fit that is no loss: some have `joined`, and some have `left` after notice, before
    the step `step`, which ran with so many `replicas`. The others stood still for `seconds`. Some may join at a loss,
    which is in the losses too, if too few replicas would be left without them."""

    joined: tuple[str, ...]
    step: int
    replicas: int
    seconds: float
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    params: list[Any]
    state: list[Any]
    history: list[Record]
    ledger: Summary
    seconds: float
    traffic: Mapping[str, Mapping[str, int]]
    staleness: Mapping[str, Mapping[int, int]]
    stragglers: Stragglers
    simulated: Simulated | None
    model: tuple[tuple[Any, ...], ...] = ()
    """The last state of the model at each replica."""
    losses: tuple[Loss, ...] = ()
    changes: tuple[Change, ...] = ()


def as_buffer(value: Any) -> Any:
    """An array that can be sent: the words of a typed key, and as many booleans as a float0 array has places."""
    if has_no_values(value):
        return np.zeros(value.shape, np.bool_)
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(value)
    return value


def from_buffer(array: Any, dtype: str) -> Any:
    """The value that was sent as this array."""
    if dtype == str(jax.dtypes.float0):
        return np.zeros(np.shape(array), jax.dtypes.float0)
    if not dtype.startswith("key<"):
        return array
    return jax.random.wrap_key_data(jax.numpy.asarray(array), impl=key_implementation(dtype))
