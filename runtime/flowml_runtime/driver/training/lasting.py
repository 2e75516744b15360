"""Runs a fit to its end through the loss of workers: one run after another, each from the snapshot before.

    run -> a worker is lost -> the survivors stop -> the plan is loaded again, with others -> the next run

    replace    lost workers are started again, and the plan is the same
    shrink     replicas with a stage on a lost worker are left out, and their stores move (`flowml.training.without`)

A run is an epoch of membership: every message names the plan and the run that it belongs to, and all others are
dropped. A new run has another plan, as the workers name it, and the same executables.

The driver keeps the newest snapshot in memory (`saving`), where no loss of a worker can reach it. It lies between two
clocks and has the ledger of that moment. What was done after it is done again, so in the final state each work item has
one fate, and nothing is lost or applied twice. Records of steps that are done again replace those before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from flowml.devices import worker_of
from flowml.errors import FlowmlError, FlowmlWarning, UnsupportedError, WorkerLostError
from flowml.plan import Plan
from flowml.training.without import check_shrinks, why_too_few
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.training.fit import Fit
from flowml_runtime.driver.training.fit_arguments import Callback, OnLoss
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.outcome import Loss, Outcome
from flowml_runtime.driver.training.program import Program
from flowml_runtime.driver.training.saving import Saving

MOST_IN_VAIN = 10
"""How many losses without a new step in between a fit survives. More say that a step itself ends the worker."""

Make = Callable[[LoadedPlan, int, Saving], Fit]
"""A loaded plan, the number of a run, and its snapshots -> the run."""


def prepare(cluster: Any, on_loss: OnLoss) -> None:
    """Replace workers that were lost before the fit. Raises UnsupportedError if those of the cluster cannot be."""
    if on_loss != "raise" and not hasattr(cluster, "bring_back"):
        raise UnsupportedError(
            f"on_loss={on_loss!r}: simulated workers are lost and come back as the churn of their cluster says; leave "
            "on_loss out"
        )
    if on_loss == "replace":
        cluster.bring_back(cluster.lost)


class Losses:
    """What a fit does about lost workers."""

    def __init__(self, cluster: Any, program: Program, on_loss: OnLoss, least: int) -> None:
        """A fit goes on with at least `least` replicas."""
        self.on_loss: OnLoss = on_loss
        self.gone: dict[str, None] = {}
        """The workers whose replicas are left out."""
        self._cluster = cluster
        self._program = program
        self._least = least
        if on_loss == "shrink":
            check_shrinks(program.training)
            if least > len(program.training.replicas):
                raise ValueError(
                    f"min_replicas={least} can never be met: the Trainer has {len(program.training.replicas)} replicas"
                )

    def load(self, meanwhile: Callable[[], None]) -> LoadedPlan:
        """Load the plan of the fit. Calls `meanwhile` while workers compile it."""
        try:
            return self._program.load(meanwhile=meanwhile)
        except WorkerLostError as error:
            if self.on_loss == "raise":
                raise
            return self.after(error)[0]

    def after(self, error: FlowmlError) -> tuple[LoadedPlan, tuple[str, ...]]:
        """Load the plan after workers were lost: it, and they. Raises `error` if none was, or too few are left."""
        lost: dict[str, None] = {}
        while True:
            there = {device.worker for device in self._cluster.devices}
            named = {error.worker} if isinstance(error, WorkerLostError) else set[str]()
            found = [w for w in self._program.workers(self.gone) if w not in there or w in named]
            if not found:
                raise error
            lost.update(dict.fromkeys(found))
            if self.on_loss == "replace":
                self._cluster.bring_back(found)
            else:
                self._leave_out(found, error)
            try:
                return self._program.load(self.gone, anew=True), tuple(lost)
            except WorkerLostError as another:
                error = another

    def _leave_out(self, workers: Sequence[str], error: FlowmlError) -> None:
        self.gone.update(dict.fromkeys(workers))
        replicas = self._program.training.replicas
        left = [r for r, devices in enumerate(replicas) if {*map(worker_of, devices)}.isdisjoint(self.gone)]
        why = why_too_few(self._program.training, left)
        if why:
            raise WorkerLostError(
                f"{error}. {why}; give on_loss='replace', or a code for more stragglers",
                worker=workers[0],
                step=error.step,
            ) from error
        if len(left) < self._least:
            raise WorkerLostError(
                f"{error}. {len(left)} of {len(replicas)} replicas are left, and the fit needs {self._least} "
                "(min_replicas=); give on_loss='replace', or more replicas",
                worker=workers[0],
                step=error.step,
            ) from error


class Runs:
    """The runs of one fit."""

    def __init__(self, program: Program, make: Make, first: Fit, losses: Losses) -> None:
        self.fit = first
        """The newest run."""
        self.first = first.saving.first
        """The first step of the first run."""
        self._program = program
        self._make = make
        self._losses = losses
        self._records: list[Record] = []
        self._told = -1
        """The newest step whose record callbacks have seen."""
        self._survived: list[Loss] = []
        self._in_vain = 0
        """The newest losses without a new step before them."""
        self._reached = -1
        """`_told` at the newest loss."""

    @property
    def plan(self) -> Plan:
        """The plan with all replicas."""
        return self._program.compiled.plan

    def run(self, callbacks: Sequence[Callback]) -> Outcome:
        """Train to the end. Raises the error of a loss that the fit cannot go on after."""
        if self._losses.on_loss == "raise":
            return self.fit.run(*self._leaves(), callbacks)

        def take(record: Record) -> None:
            while self._records and self._records[-1]["step"] >= record["step"]:
                self._records.pop()
            self._records.append(record)
            if record["step"] > self._told:
                self._told = record["step"]
                for callback in callbacks:
                    callback(record)

        time = self._program.session.time
        began, held = time.now(), list[Record]()
        while True:
            try:
                outcome = self.fit.run(*self._leaves(), [take], held, time.now() - began)
                return replace(outcome, history=self._records, losses=tuple(self._survived))
            except FlowmlError as error:
                held = self._go_on(error, began)

    def _go_on(self, error: FlowmlError, began: float) -> list[Record]:
        """Prepare the next run after a loss. Returns the records that it is to show first."""
        before, now = self.fit, self._program.session.time.now
        lost_at = now()
        self._in_vain = self._in_vain + 1 if self._told == self._reached else 1
        self._reached = self._told
        if self._in_vain > MOST_IN_VAIN and isinstance(error, WorkerLostError):
            raise WorkerLostError(
                f"{error}. Workers were lost {self._in_vain} times without a new step in between, so the step itself "
                "may end them; look at their memory and at the code that runs in the step",
                worker=error.worker,
                step=error.step,
            ) from error
        handle, gone = self._losses.after(error)
        assert handle.plan.training is not None
        saving = before.saving.again(handle.plan.training)
        self.fit = self._make(handle, self._program.reserve(before.total), saving)
        why = str(error) if before.lost is None else before.lost.reason
        loss = Loss(gone, why, before.step, saving.first, now() - lost_at)
        self._survived.append(loss)
        warnings.warn(_told(loss, self._losses.on_loss), FlowmlWarning, stacklevel=5)
        return before.held(saving.first, lost_at - began)

    def _leaves(self) -> tuple[Sequence[Any], Sequence[Any]]:
        params, state, _ = self.fit.saving.trees
        return jax.tree_util.tree_leaves(params), jax.tree_util.tree_leaves(state)


def _told(loss: Loss, on_loss: OnLoss) -> str:
    workers = " and ".join(loss.workers)
    how = f"replaced within {loss.seconds:.1f} s" if on_loss == "replace" else "left out with its replica"
    return (
        f"{workers} was lost at step {loss.step} ({loss.reason}) and was {how}; the fit goes on from step "
        f"{loss.resumed_at}"
    )
