"""Types for the arguments of the examples: a number that makes no sense is one line of error, with the fix."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0, and of at most 32 bits, which every random generator takes as a seed."""
    return _whole(text, 0)


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, such as 10") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time; give seconds above 0, such as 10")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 10") from None
    if not least <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is out of range; give {least} or more, and less than 2**32")
    return value
