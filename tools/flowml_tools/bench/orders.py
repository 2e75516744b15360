"""Reads orders on stdin and writes answers to stdout, one line each, in a peer process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator


def orders() -> Iterator[str]:
    return (line.strip() for line in sys.stdin)


def say(text: object) -> None:
    print(text, flush=True)


def keep_answers_apart() -> None:
    """Send all other output to stderr, also that of C++ libraries, because gloo prints a greeting."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
