"""Numbers that users give: whole ones, of Python or NumPy, within the bounds of what a message carries."""

from __future__ import annotations

from numbers import Integral

MOST = 2**53 - 1
"""The largest count: every number up to here is exact as a float too, so all that read messages agree on it."""


def whole(value: object) -> int | None:
    """A whole number as an int, NumPy's integers too; None for anything else, a bool included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value)


def whole_number(name: str, value: object, *, least: int = 0) -> int:
    """The argument `name` as an int. Raises TypeError for what is no integer, ValueError for one out of bounds."""
    number = whole(value)
    if number is None:
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; give a whole number of at least {least}")
    if number < least:
        raise ValueError(f"{name}={number}: give at least {least}")
    if number > MOST:
        raise ValueError(f"{name}={number}: give less than 2**53, which is as far as messages count")
    return number
