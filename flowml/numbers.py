"""Checks whole numbers from users, which may be Python's or NumPy's, against the bounds of messages."""

from __future__ import annotations

import math
from numbers import Integral, Real

MOST = 2**53 - 1
"""The largest count. Every integer up to here is exact as a float, so all readers of messages agree on it."""


def whole(value: object) -> int | None:
    """A Python or NumPy integer as an int; None for anything else, including a bool."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value)


def real(value: object) -> float | None:
    """A Python or NumPy number as a float; None for anything else, including a bool. An int beyond all floats is ±∞."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # pyright: ignore[reportOperatorIssue]


def whole_number(name: str, value: object, *, least: int = 0, most: int = MOST) -> int:
    """The argument `name` as an int. Raises TypeError if it is not an integer, ValueError if it is out of bounds."""
    number = whole(value)
    if number is None:
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; give a whole number of at least {least}")
    if number < least:
        raise ValueError(f"{name}={number}: give at least {least}")
    if number > most:
        limit = "less than 2**53, which is as far as messages count" if most == MOST else f"at most {most}"
        raise ValueError(f"{name}={number}: give {limit}")
    return number
