"""Opens missing standard streams, which a service manager, a daemon or a notebook may have closed or never opened."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Open /dev/null as descriptor 0, 1 and 2, where these are closed.

    Otherwise the next socket or file would get such a number, and output of libraries would be written there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one


def on_terminal() -> bool:
    """Whether stderr is a terminal."""
    try:
        return bool(sys.stderr) and sys.stderr.isatty()
    except ValueError:  # closed
        return False
