"""Starts the runtime's service threads and reports their failures.

Other threads and processes wait for the work of a service thread. If it ended silently, they would wait for ever.
Therefore every thread of the runtime is started by `start`. A loop wraps each piece of work in `going_on`, which logs
an exception and lets the loop continue with the next piece. If the thread itself fails, `failed(reason)` is called: it
breaks the connection, fails the plan or ends the membership that depended on the thread. If `failed` raises too, the
process ends with `STATUS`, so that its peers see an ended process and not one that is alive but does nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager

from flowml.errors import ClusterError

STATUS = 70
"""Exit status of a process that a failed service thread ends: EX_SOFTWARE."""

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})
"""Errors of a system call that report a shortage of a resource, which may be over soon."""

SHORTAGE_S = 0.05
"""How long to wait before trying again after one of `SHORTAGES`."""

_log = logging.getLogger("flowml")

_first: list[Callable[[], object]] = []
"""What each thread does first."""


def in_each_thread(begin: Callable[[], object]) -> None:
    """Call `begin()` first on each thread that is started from now on. For state that belongs to a thread."""
    _first.append(begin)


def start(name: str, run: Callable[[], object], failed: Callable[[str], object]) -> threading.Thread:
    """Run `run` on a daemon thread. `failed(reason)` is called on it if that raises anything.

    Raises ClusterError if the system allows no more threads.
    """
    thread = threading.Thread(target=_serve, args=(name, run, failed), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise ClusterError(
            f"cannot start thread {name!r}: {error}; allow more threads (ulimit -u) or more memory"
        ) from None
    return thread


@contextmanager
def going_on(what: str) -> Generator[None]:
    """Log any exception of the block and suppress it. `what` says in a few words what was not done."""
    try:
        yield
    except BaseException as error:  # a user's callback may call sys.exit()
        _log.error("%s: %s", what, text_of(error), exc_info=error)


def text_of(error: BaseException) -> str:
    """An error's text in one line, even if its `__str__` fails or returns text that cannot be encoded."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "its text cannot be shown"
    return sendable(text)


def sendable(text: str) -> str:
    """The text without lone surrogates, which come from undecodable file names and cannot be encoded in UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def named(error: BaseException) -> str:
    """An error's type and text in one line."""
    return f"{type(error).__name__}: {text_of(error)}".removesuffix(": ")


def end_process(reason: str) -> None:
    """Print the reason and end this process at once."""
    with going_on("stderr is closed"):
        print(f"flowml: this process ends: {reason}", file=sys.stderr, flush=True)
    os._exit(STATUS)


def _serve(name: str, run: Callable[[], object], failed: Callable[[str], object]) -> None:
    try:
        for begin in _first:
            begin()
        run()
    except BaseException as error:
        reason = f"thread {name!r} failed: {named(error)}"
        try:
            _log.error("%s", reason, exc_info=error)
            failed(reason)
        except BaseException:
            traceback.print_exc()
            end_process(reason)
