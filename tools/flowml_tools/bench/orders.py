"""A peer's side of the talk with whoever measures: orders come on stdin, answers go to stdout, one line each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator


def orders() -> Iterator[str]:
    return (line.strip() for line in sys.stdin)


def say(text: object) -> None:
    print(text, flush=True)


def keep_answers_apart() -> None:
    """Whatever else is printed in this process goes to stderr, also by libraries in C++: gloo greets its peers."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
