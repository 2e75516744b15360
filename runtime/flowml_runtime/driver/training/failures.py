"""The error that a fit raises for a failure that a worker reports, or for its loss."""

from __future__ import annotations

from collections.abc import Sequence

from flowml.errors import (
    ClusterError,
    DeadlineError,
    DivergedError,
    FlowmlError,
    NonFiniteError,
    WorkerError,
    WorkerLostError,
)
from flowml_runtime import wire
from flowml_runtime.membership.advice import FIT_AGAIN


def failed_error(failed: wire.StepFailed, run: int) -> FlowmlError:
    """The error for a failed step. `run` is the number of the first step of the run."""
    worker, step, node = failed.worker, failed.step - run, failed.node
    kinds = {"deadline": DeadlineError, "diverged": DivergedError, "nonfinite": NonFiniteError}
    if failed.kind in kinds:
        return kinds[failed.kind](failed.error, worker=worker, step=step, node=node)
    return WorkerError(
        f"{worker} failed during training in {node!r} at step {step}: {failed.error}",
        worker=worker,
        step=step,
        node=node,
        remote_traceback=failed.traceback or None,
    )


def lost_error(worker: str, reason: str, remedy: str, step: int, unfinished: Sequence[str] | None) -> WorkerLostError:
    """The error for a worker that was lost at a step. After the last step `unfinished` are the layers whose values it
    had not sent."""
    when = f"during training at step {step}"
    if unfinished is not None:
        names = ", ".join(map(repr, unfinished)) or "what it trained"
        when = f"after the last step, before it had sent its part of the result ({names})"
    advice = f"{remedy}{FIT_AGAIN}"
    return WorkerLostError(f"{worker} was lost {when}: {reason}; {advice}", worker=worker, step=step)


def closed_error(step: int) -> ClusterError:
    """The error for a cluster that was closed, although no worker was reported lost."""
    return ClusterError(
        f"the cluster was closed during training at step {step}; start another and fit again; with checkpoint= the "
        'next fit can go on with resume="auto"',
        step=step,
    )
