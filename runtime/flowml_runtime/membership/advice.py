"""What errors and warnings say about lost workers, and advise: complete commands, which can be copied."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection

from flowml_runtime.transport.security import TLS, TOKEN_FILE_VARIABLE

START_ANOTHER = "start it again with cluster.bring_back(cluster.lost), or start another cluster"
"""What to do about a lost worker if the cluster started its workers itself."""

LEAVE_OUT = "leave out the fault that ended the worker"
"""What to do about a lost worker that is simulated."""

FIT_AGAIN = (
    ', and fit again: on_loss="replace" or "shrink" lets a fit go on by itself, and checkpoint= lets the next one go '
    'on with resume="auto"'
)
"""What to do beside that about a fit that has ended."""

BEGIN_AGAIN = "begin again from values that you have fetched or saved"
"""What to do about a lost value."""

_BACK = "have what is lost again with cluster.bring_back(cluster.lost)"

_REMEDY = re.compile(
    rf"; (?:{re.escape(_BACK)}[^;]*, or )?"
    rf"({BEGIN_AGAIN}|{re.escape(START_ANOTHER)}|{LEAVE_OUT}|start another with `[^`]*`)({re.escape(FIT_AGAIN)})?$"
)

LAUNCH_AGAIN = "start the cluster again with `flowml launch`, and connect to it"
"""What to do about a lost coordinator."""


def start_worker(address: str, token: str | os.PathLike[str] | None, tls: TLS | None) -> str:
    """How to start a worker in a cluster that a driver has joined with this token, or file of the token."""
    given = os.environ.get(TOKEN_FILE_VARIABLE) if token is None else token
    # The token itself must not be printed: text may be either, as `find_token` says.
    is_file = not isinstance(token, str) or (os.sep in token and os.path.exists(token))
    file = os.path.abspath(given) if given is not None and is_file else "FILE"
    files = [f"--token-file {shlex.quote(file)}"]
    if tls is not None:
        files += ["--tls-cert PEM", "--tls-key PEM", f"--tls-ca {shlex.quote(os.path.abspath(tls.ca))}"]
    return f"start another with `flowml worker {address} {' '.join(files)}`"


def back_with(spares: int, remedy: str) -> str:
    """How a driver has lost workers again that others have started: what comes before the remedy."""
    if remedy in (START_ANOTHER, LAUNCH_AGAIN):
        return ""
    waits = f" ({spares} spare worker{'s wait' if spares > 1 else ' waits'})" if spares else ""
    return f"{_BACK}{waits}, or "


def without_remedy(text: str) -> str:
    """The text of an error of a loss without its advice, for one that advises something else."""
    return _REMEDY.sub("", text)


def lost_itself(worker: str, why: str) -> str:
    """That not a worker is lost, but this driver."""
    return (
        f"this process was suspended or cut off, and {worker} counts this driver as lost ({why}); another driver may "
        'have taken the fit over; connect to the cluster again, and call fit(resume="auto")'
    )


def waits(workers: Collection[str], timeout_s: float, remedy: str, *, launched: bool) -> str:
    """That a fit waits for others in the places of lost workers, which a launcher may start."""
    another = "another in its place" if len(workers) == 1 else "others in their places"
    it = "it" if len(workers) == 1 else "them"
    how = f"; the launcher starts {it}" if launched else f"; {remedy}"
    return f"{_lost(workers)}; waiting up to {timeout_s:g} s for {another}{how}"


def not_back(workers: Collection[str], timeout_s: float, remedy: str) -> str:
    """That nobody took the places of lost workers in time."""
    its = "its place" if len(workers) == 1 else "their places"
    return f"{_lost(workers)}, and no other took {its} within {timeout_s:g} s; {remedy}"


def _lost(workers: Collection[str]) -> str:
    return f"{' and '.join(sorted(workers))} {'was' if len(workers) == 1 else 'were'} lost"
