"""Runs steps of a plan on the caller's thread, on a worker in the same process. Nothing waits for another thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowml.errors import FlowmlError
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.remote import Remote
from flowml_runtime.execution.faults import step_error, step_failed
from flowml_runtime.execution.inline import LocalStep
from flowml_runtime.execution.programs import Array
from flowml_runtime.execution.step_program import StepFault


def run(handle: LoadedPlan, local: LocalStep, buffers: Sequence[Any], remedy: str) -> list[Array]:
    """Run a step whose values do not stay. Returns the fetched outputs. Raises the error of a failed step."""
    step = handle.steps.skip()
    try:
        return local(step, buffers)
    except StepFault as fault:
        raise _error(handle, step, fault, remedy) from fault.__cause__


def run_kept(
    handle: LoadedPlan, local: LocalStep, buffers: Sequence[Any], kept: Sequence[Remote], first: int, remedy: str
) -> list[Array] | None:
    """Run a step that takes values which stay, or leaves outputs: those of `kept`, with numbers from `first` on.

    Returns the fetched outputs. None, without effect, if it would have to wait for a value. Raises the error of a
    failed step.
    """
    names = [b.number if type(b) is Remote else 0 for b in buffers]
    step = handle.steps.skip()
    taken = local.take(names)
    if taken is None:
        return None
    donation = handle.donate(f"step {step} of {handle.plan.name}", buffers) if handle.overwrites else None
    if kept:
        kept[0].made_here(local.value, donation)
    try:
        return local.keep(step, buffers, taken, first)
    except StepFault as fault:
        error = _error(handle, step, fault, remedy)
        if donation is not None:
            donation.error = error
        if kept:
            kept[0].fail(error)
        raise error from fault.__cause__


def _error(handle: LoadedPlan, step: int, fault: StepFault, remedy: str) -> FlowmlError:
    message = step_failed(handle.plan_id, step, handle.workers[0], fault.node, fault.__cause__ or fault)
    return step_error(handle.plan, message, remedy)
