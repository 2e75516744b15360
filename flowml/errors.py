"""The errors a user meets: each says what is wrong, where, and the fix."""

from __future__ import annotations

from collections.abc import Sequence


class FlowmlError(Exception):
    """Base of every error that flowml raises on purpose.

    During a run the attributes say where: `worker`, `step`, `node` (task or edge), and `remote_traceback`,
    the text of the traceback on the worker; each is None where it does not apply.
    """

    def __init__(
        self,
        message: str,
        *,
        worker: str | None = None,
        step: int | None = None,
        node: str | None = None,
        remote_traceback: str | None = None,
    ) -> None:
        super().__init__(message)
        self.worker = worker
        self.step = step
        self.node = node
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\nOn the worker:\n{self.remote_traceback}" if self.remote_traceback else text


class PlacementError(FlowmlError):
    """A device that does not exist, contradicting pins, a pattern that matches nothing, a model that fits nowhere."""


class UnsupportedError(FlowmlError):
    """A function that cannot be traced into a dataflow graph, e.g. because of an effect."""


class PlanError(FlowmlError):
    """A saved plan that cannot be read: damaged, cut short, of another format, or no plan at all."""


class PolicyError(FlowmlError, ValueError):
    """A policy, or a composition of policies, that is not sound."""


class WorkerLostError(FlowmlError):
    """A worker died or stopped answering while work depended on it."""


class DeadlineError(FlowmlError, TimeoutError):
    """A wait passed its deadline; names the edge, both its devices and the step."""


class WorkerError(FlowmlError):
    """An exception raised on a worker while it ran a task, callback or data source."""


class DivergedError(FlowmlError):
    """Replicas that must hold the same parameters hold different ones; names the layer, the replicas and the step."""


class ClusterError(FlowmlError):
    """A cluster that could not be started, joined or reached: version, token, address, TLS."""


class FlowmlWarning(UserWarning):
    """What runs, but may not be what was meant: says what, where, and the fix."""


_LONGEST, _SHOWN = 80, 20


def one_line(name: str) -> str:
    """A name that a user chose, as an error shows it: what does not print is escaped, what is long is cut."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def named(names: Sequence[str]) -> str:
    """Names as an error lists them: the first of them, and how many there are if that is not all."""
    head = ", ".join(map(one_line, names[:_SHOWN]))
    return head if len(names) <= _SHOWN else f"{head}, … ({len(names)} in all)"
