"""Standard streams, which a service manager, a daemon or a notebook may have closed, or never opened."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Give the numbers 0, 1 and 2 to /dev/null where they are closed.

    Else the next socket or file would get such a number, and what some library prints would go there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one


def on_terminal() -> bool:
    """Whether somebody sees what is written to stderr as it is written."""
    try:
        return bool(sys.stderr) and sys.stderr.isatty()
    except ValueError:  # closed
        return False
