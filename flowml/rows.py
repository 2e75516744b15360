"""Finds arrays of a batch whose rows are not examples: *time-major* ones have the examples in the second dimension."""

from __future__ import annotations

from collections.abc import Mapping

Shape = tuple[int, ...]


def swapped(shapes: Mapping[str, Shape], examples: int | None = None) -> str:
    """Which arrays have their examples in the second dimension, and the fix, as a sentence; "" if no array has.

    `shapes` are by the names of the arrays. Without the number of `examples`, arrays are only found beside others that
    have as many rows.
    """
    counts = {n for s in shapes.values() for n in s[:2]} if examples is None else {examples}
    fitting = [n for n in counts if all(n in s[:2] for s in shapes.values())]
    found = {n: {name: s for name, s in shapes.items() if s[0] != n} for n in fitting}
    found = {n: wrong for n, wrong in found.items() if wrong}
    if not found or (examples is None and 1 in found):
        return ""
    count, wrong = max(found.items())  # of two numbers of examples that fit, sequences are rarely the longer one
    named = " and ".join(f"{name} of shape {shape}" for name, shape in wrong.items())
    has = "has" if len(wrong) == 1 else "have"
    return f"{named} {has} the {count} examples in the second dimension (time-major); {advice(len(wrong))}"


def seems_swapped(shapes: Mapping[str, Shape]) -> str:
    """Advice for arrays that may all be time-major, as the end of a sentence; "" if they cannot be."""
    second = {s[1] if len(s) > 1 else 1 for s in shapes.values()}
    if len(second) != 1 or 1 in second:
        return ""
    return (
        f"; if the {second.pop()} examples are in the second dimension of {' and '.join(shapes)} (time-major), "
        f"{advice(len(shapes))}"
    )


def advice(arrays: int) -> str:
    """How to put the examples first."""
    return f"give np.swapaxes(x, 0, 1) for {'it' if arrays == 1 else 'each'}, so that a row is an example"
