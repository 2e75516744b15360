"""Converts faults of a worker to messages, and these messages to typed errors for the caller."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowml.errors import (
    ClusterError,
    DeadlineError,
    DivergedError,
    FlowmlError,
    NonFiniteError,
    WorkerError,
    WorkerLostError,
)
from flowml.plan import Plan
from flowml_runtime import wire
from flowml_runtime.environment import checkpoints
from flowml_runtime.service import named, sendable, text_of

_HERE = str(Path(__file__).parent)
_KINDS: dict[type[BaseException], wire.FaultKind] = {
    DeadlineError: "deadline",
    WorkerLostError: "lost",
    DivergedError: "diverged",
    NonFiniteError: "nonfinite",
}
MAX_TEXT = 2**20
"""The most characters that a message's text field takes."""


def step_failed(plan_id: str, step: int, worker: str, node: str, error: BaseException) -> wire.StepFailed:
    """The message that tells a driver why a step failed here. For a lost peer, `worker` is the peer."""
    kind = _kind(error)
    return wire.StepFailed(
        plan_id=plan_id,
        step=step,
        worker=(error.worker or worker) if isinstance(error, WorkerLostError) else worker,
        node=sendable(node),
        kind=kind,
        error=one_line(error)[:MAX_TEXT],
        traceback=own_traceback(error) if kind == "error" else "",
    )


def step_cancelled(plan_id: str, step: int, driver: str, error: BaseException, reason: str) -> wire.StepFailed:
    """The message that tells a worker that a step has failed elsewhere with `error`, and why in one line."""
    lost = error.worker if isinstance(error, WorkerLostError) else None
    text = sendable(reason)[:MAX_TEXT]
    return wire.StepFailed(plan_id=plan_id, step=step, worker=lost or driver, node="", kind="cancelled", error=text)


def _kind(error: BaseException) -> wire.FaultKind:
    for type_, kind in _KINDS.items():
        if isinstance(error, type_):
            return kind
    return "error"


def one_line(error: BaseException) -> str:
    """An error as one line: flowml's own errors as text only, others with their type."""
    return text_of(error) if isinstance(error, FlowmlError) else named(error)


def refusal(error: OSError | FlowmlError) -> str:
    """Why something could not be written to the disk, as one line with what to do about it."""
    return f"{text_of(error)}{checkpoints.advice(error)}"


def own_traceback(error: BaseException) -> str:
    """The traceback without its leading frames, which only led from the executor to the failure."""
    trace: Any = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HERE):
        trace = trace.tb_next
    shown = error.with_traceback(trace) if trace is not None else error
    try:
        text = "".join(traceback.format_exception(shown))
    except BaseException:  # the traceback module calls methods of the error and of its members
        text = "".join(traceback.format_tb(shown.__traceback__)) + type(error).__name__
    return sendable(text)[-MAX_TEXT:]


def cluster_closed(step: int | None = None) -> ClusterError:
    return ClusterError("the cluster is closed; start another and pass it as cluster=", step=step)


def missing_workers(gone: Mapping[str, str], so: str, remedy: str) -> WorkerLostError:
    """The error of what cannot be done without workers that are gone."""
    which = " and ".join(f"{w} was lost ({reason})" for w, reason in gone.items())
    return WorkerLostError(f"{which}, so {so}; {remedy}", worker=next(iter(gone)))


def worker_lost(plan: Plan, step: int, worker: str, reason: str, remedy: str) -> WorkerLostError:
    """`remedy` is what the user of this cluster can do about it."""
    return WorkerLostError(
        f"{worker} was lost, and step {step} of {plan.name!r} needs it: {reason}; {remedy}",
        worker=worker,
        step=step,
    )


def load_failed(plan: Plan, message: wire.Failed) -> WorkerError:
    return WorkerError(
        f"{message.worker} cannot load plan {plan.name!r}: {message.error}",
        worker=message.worker,
        node=message.node,
        remote_traceback=message.traceback or None,
    )


def step_error(plan: Plan, message: wire.StepFailed, remedy: str) -> FlowmlError:
    if message.kind == "lost":
        return worker_lost(plan, message.step, message.worker, message.error, remedy)
    if message.kind == "deadline":
        return DeadlineError(message.error, worker=message.worker, step=message.step, node=message.node)
    kind = NonFiniteError if message.kind == "nonfinite" else WorkerError
    return kind(
        f"{message.error} (in {message.node!r} on {message.worker}, step {message.step} of {plan.name!r})",
        worker=message.worker,
        step=message.step,
        node=message.node,
        remote_traceback=message.traceback or None,
    )
