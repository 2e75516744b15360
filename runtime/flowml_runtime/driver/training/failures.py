"""The error that a fit raises for a failure that a worker reports."""

from __future__ import annotations

from flowml.errors import DeadlineError, DivergedError, FlowmlError, NonFiniteError, WorkerError
from flowml_runtime import wire


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
