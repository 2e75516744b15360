"""Threads that serve others, and the one rule for them: a service thread goes on, or says what ends with it.

Others wait for what such a thread does, so one that ends in silence leaves them waiting for ever. Every thread of the
runtime is started by `start`. A loop keeps to the rule by `going_on`, which logs what one piece of work raises, so
that the next piece is taken up. Where a thread cannot go on, `failed(reason)` is called: it breaks the connection,
fails the plan or ends the membership that depended on the thread. If even that raises, the process ends with
`STATUS`: its peers see a process that is gone, and never one that is there and does nothing.
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
"""Errors of a system call that say that something has run out, which may be there again in a moment."""

SHORTAGE_S = 0.05
"""How long to wait before trying again after one of `SHORTAGES`."""

_log = logging.getLogger("flowml")


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
    """Log what the block raises, whatever it is. `what` says in a few words what then has not been done."""
    try:
        yield
    except BaseException as error:  # a user's callback may call sys.exit()
        _log.error("%s: %s", what, text_of(error), exc_info=error)


def text_of(error: BaseException) -> str:
    """An error's text in one line, also where its own `__str__` fails or gives what cannot be sent."""
    try:
        text = " ".join(str(error).split())
    except BaseException:
        text = "its text cannot be shown"
    return sendable(text)


def sendable(text: str) -> str:
    """The text without lone surrogates, which come from undecodable file names and which no wire carries."""
    return text.encode("utf-8", "backslashreplace").decode()


def named(error: BaseException) -> str:
    """An error's type and text in one line."""
    return f"{type(error).__name__}: {text_of(error)}".removesuffix(": ")


def end_process(reason: str) -> None:
    """End this process now, and say why."""
    with going_on("stderr is closed"):
        print(f"flowml: this process ends: {reason}", file=sys.stderr, flush=True)
    os._exit(STATUS)


def _serve(name: str, run: Callable[[], object], failed: Callable[[str], object]) -> None:
    try:
        run()
    except BaseException as error:
        reason = f"thread {name!r} failed: {named(error)}"
        try:
            _log.error("%s", reason, exc_info=error)
            failed(reason)
        except BaseException:
            traceback.print_exc()
            end_process(reason)
