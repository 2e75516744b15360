"""Checks the numbers from which a user makes the models of a simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowml.errors import SimulationError
from flowml.numbers import MOST, real, whole

LEAST_RATE = 1e-3
"""The lowest rate of a link, so that the time of a message never overflows."""


def number(model: str, name: str, value: object, *, least: float = 0.0, open_at_least: bool = False) -> float:
    """A finite float of at least `least`, or above it. Raises SimulationError, which names the model and argument."""
    bound = f"above {least:g}" if open_at_least else f"of at least {least:g}"
    found = real(value)
    if found is None:
        raise SimulationError(f"{model}: {name}={value!r} is of type {type(value).__name__}; give a number {bound}")
    if not math.isfinite(found) or found < least or (open_at_least and found == least):
        raise SimulationError(f"{model}: {name}={found:g} makes no sense; give a finite number {bound}")
    return found


def rate(model: str, name: str, value: object) -> float:
    """Bytes per second, at least LEAST_RATE. Infinite is allowed: bytes take no time."""
    if real(value) == math.inf:
        return math.inf
    found = number(model, name, value, open_at_least=True)
    if found < LEAST_RATE:
        raise SimulationError(f"{model}: {name}={found:g} makes no sense; give at least {LEAST_RATE:g} bytes a second")
    return found


def sequence(model: str, name: str, value: object, of: str) -> Sequence[Any]:
    """A sequence that is no text. `of` says what its elements are."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise SimulationError(f"{model}: {name} is of type {type(value).__name__}; give a list of {of}")
    return value


def share(model: str, name: str, value: object) -> float:
    """A float in (0, 1]."""
    found = number(model, name, value, open_at_least=True)
    if found > 1:
        raise SimulationError(f"{model}: {name}={found:g} makes no sense; a share lies in (0, 1]")
    return found


def integer(model: str, name: str, value: object) -> int:
    """An integer of Python or NumPy."""
    found = whole(value)
    if found is None:
        raise SimulationError(f"{model}: {name}={value!r} is of type {type(value).__name__}; give a whole number")
    return found


def count(model: str, name: str, value: object, *, least: int = 0) -> int:
    """An integer of at least `least`."""
    found = whole(value)
    if found is None or not least <= found <= MOST:
        raise SimulationError(f"{model}: {name}={value!r} makes no sense; give a whole number of at least {least}")
    return found
