"""Checks arguments of public functions that are flags, choices or numbers, so that each wrong one gets one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flowml.numbers import real

MOST_S = 1e9
"""The longest time that is accepted: 31 years."""


def is_text(value: object) -> bool:
    """Whether an argument is text, whatever its declared type is."""
    return isinstance(value, str)


def flag(name: str, value: object) -> bool:
    """The argument `name` as a bool. Raises TypeError unless it is True or False, of Python or NumPy."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; give True or False")
    return bool(value)


def flag_or_none(name: str, value: object) -> bool | None:
    """The argument `name` as a bool, or None. Raises TypeError for anything else."""
    return None if value is None else flag(name, value)


def text(name: str, value: object) -> str:
    """The argument `name`, which must be text that is not blank. The error leaves the value out, which may be a secret.

    Raises TypeError for anything else.
    """
    if not isinstance(value, str) or not value.strip():
        raise TypeError(
            f"{name} is {'empty' if isinstance(value, str) else f'of type {type(value).__name__}'}; give text"
        )
    return value


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """The argument `name`, which must be one of `choices`. Raises ValueError for another value."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; give {' or '.join(map(repr, choices))}")
    return value


def seconds(name: str, value: object, *, zero: bool = False) -> float:
    """The argument `name` as seconds: a real number above 0, or at least 0 if `zero`, and at most MOST_S.

    Raises ValueError for anything else.
    """
    found = real(value)
    number = math.nan if found is None else found
    if not (0 < number <= MOST_S or (zero and number == 0)):
        raise ValueError(f"{name}={value!r}: give seconds {'of at least' if zero else 'above'} 0, at most {MOST_S:g}")
    return number


def number(name: str, value: object, *, least: float = 0.0, above: bool = False) -> float:
    """The argument `name` as a finite number of at least `least`, or above it. Raises ValueError for anything else."""
    found = real(value)
    if found is None or not math.isfinite(found) or found < least or (above and found == least):
        raise ValueError(f"{name}={value!r}: give a number {'above' if above else 'of at least'} {least:g}")
    return found
