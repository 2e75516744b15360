"""Defines the public errors. The text of each says what is wrong, where, and the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class FlowmlError(Exception):
    """Base class of every error that flowml raises on purpose.

    Errors during a run also have attributes, each None where it does not apply.

    Attributes:
        worker: name of the worker.
        step: number of the step.
        node: task, or edge between devices.
        remote_traceback: text of the traceback on the worker.
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
    """A device does not exist, pins contradict, a pattern matches nothing, or the model fits on no device."""


class UnsupportedError(FlowmlError):
    """A function cannot become a dataflow graph, for example because it calls Python where workers do not run it."""


class PlanError(FlowmlError):
    """A saved plan cannot be read: it is damaged, cut short, of another format, or not a plan."""


class PolicyError(FlowmlError, ValueError):
    """A policy, or a composition of policies, is not sound."""


class WorkerLostError(FlowmlError):
    """A worker died or stopped answering while work depended on it."""


class DeadlineError(FlowmlError, TimeoutError):
    """A wait passed its deadline. The text names the edge, both its devices and the step."""


class WorkerError(FlowmlError):
    """A task, callback or data source raised an exception on a worker."""


class NonFiniteError(WorkerError, FloatingPointError):
    """A result has a NaN or an infinity, and the call was made under `jax_debug_nans` or `jax_debug_infs`."""


class DivergedError(FlowmlError):
    """Replicas that must hold the same parameters differ. The text names the layer, the replicas and the step."""


class ClusterError(FlowmlError):
    """A cluster could not be started, joined or reached, because of its version, token, address or TLS files."""


class CheckpointError(FlowmlError, ValueError):
    """A checkpoint cannot be read, or belongs to another fit."""


class InUseError(CheckpointError):
    """Another fit writes into a directory of checkpoints. The text names its process.

    Attributes:
        driver: the name of its driver on the cluster, "" if it has none.
    """

    def __init__(self, message: str, *, driver: str = "") -> None:
        super().__init__(message)
        self.driver = driver


class SimulationError(FlowmlError, ValueError):
    """A model of a simulated machine or network makes no sense, or the models of a simulated cluster do not fit."""


class TraceError(FlowmlError, ValueError):
    """A recorded trace or table is damaged, cut short, or of another format. The text names the line and column."""


class FlowmlWarning(UserWarning):
    """Something runs but may not be what was meant. The text says what, where, and the fix."""


_LONGEST, _SHOWN = 80, 20


def one_line(name: str) -> str:
    """A user's name as errors show it: unprintable characters are escaped, and a long name is cut."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def named(names: Sequence[str]) -> str:
    """Names as errors list them: the first ones, and the total if some are left out."""
    head = ", ".join(map(one_line, names[:_SHOWN]))
    return head if len(names) <= _SHOWN else f"{head}, … ({len(names)} in all)"


def shadowed(what: str, takers: Mapping[str, str]) -> str:
    """The error of a pattern that matches only names that patterns before it have taken: name -> the pattern that has.

    The first pattern that matches a name decides, so `what` has no effect.
    """
    first = named(list(dict.fromkeys(map(repr, takers.values()))))
    return (
        f"{what} has no effect: the first pattern that matches decides, and {first} before it matches all that it does "
        f"({named(list(takers))}); put the narrower pattern first, or leave this one out"
    )
