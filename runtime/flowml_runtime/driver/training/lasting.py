"""Runs a fit to its end through the loss of workers: one run after another, each from the snapshot before.

    run -> a worker is lost -> the survivors stop -> it is replaced, the plan is loaded again -> the next run

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
from typing import Any, Protocol

import jax

from flowml.errors import FlowmlError, FlowmlWarning, UnsupportedError, WorkerLostError
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.training.fit import Fit
from flowml_runtime.driver.training.fit_arguments import Callback, OnLoss
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.outcome import Loss, Outcome
from flowml_runtime.driver.training.program import Program
from flowml_runtime.driver.training.saving import Saving
from flowml_runtime.driver.training.training_session import TrainingCluster

Make = Callable[[LoadedPlan, int, Saving], Fit]
"""A loaded plan, the number of a run, and the snapshots of it -> the run."""


class LastingCluster(Protocol):
    """A cluster whose workers may come back."""

    def bring_back(self, workers: Sequence[str]) -> None: ...


def check_losses(cluster: TrainingCluster, on_loss: OnLoss) -> None:
    """Raise UnsupportedError if workers of the cluster cannot be replaced."""
    if on_loss != "raise" and not hasattr(cluster, "bring_back"):
        raise UnsupportedError(
            f"on_loss={on_loss!r}: simulated workers are lost and come back as the churn of their cluster says; leave "
            "on_loss out"
        )


class Runs:
    """The runs of one fit."""

    def __init__(self, cluster: Any, program: Program, make: Make, first: Fit, on_loss: OnLoss) -> None:
        self.fit = first
        """The newest run."""
        self._cluster = cluster
        self._program = program
        self._make = make
        self._on_loss: OnLoss = on_loss
        self._records: list[Record] = []
        self._told = -1
        """The newest step whose record callbacks have seen."""
        self._losses: list[Loss] = []

    def run(self, callbacks: Sequence[Callback]) -> Outcome:
        """Train to the end. Raises the error of a loss that the fit cannot go on after."""
        if self._on_loss == "raise":
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
                return replace(outcome, history=self._records, losses=tuple(self._losses))
            except FlowmlError as error:
                lost_at = time.now() - began
                saving, handle, gone = self._recovered(error)
                held = self.fit.held(saving.first, lost_at)
                step, why = self.fit.step, str(error) if self.fit.lost is None else self.fit.lost.reason
                self.fit = self._make(handle, self._program.reserve(self.fit.total), saving)
                self._losses.append(Loss(gone, why, step, saving.first, time.now() - began - lost_at))
                _warn(self._losses[-1])

    def _leaves(self) -> tuple[Sequence[Any], Sequence[Any]]:
        params, state = self.fit.saving.trees
        return jax.tree_util.tree_leaves(params), jax.tree_util.tree_leaves(state)

    def _recovered(self, error: FlowmlError) -> tuple[Saving, LoadedPlan, tuple[str, ...]]:
        """What the next run begins with, and the workers that were lost. Raises `error` if none was."""
        replaced: dict[str, None] = {}
        while True:
            gone = self._gone(error)
            if not gone:
                raise error
            replaced.update(dict.fromkeys(gone))
            self._cluster.bring_back(gone)
            try:
                return self.fit.saving.again(), self._program.load_again(), tuple(replaced)
            except WorkerLostError as another:
                error = another

    def _gone(self, error: FlowmlError) -> list[str]:
        """The workers of the plan that are lost."""
        there = {device.worker for device in self._cluster.devices}
        named = {error.worker} if isinstance(error, WorkerLostError) else set[str]()
        return [w for w in self._program.workers if w not in there or w in named]


def _warn(loss: Loss) -> None:
    warnings.warn(
        f"{' and '.join(loss.workers)} was lost at step {loss.step} ({loss.reason}) and was replaced within "
        f"{loss.seconds:.1f} s; the fit goes on from step {loss.resumed_at}",
        FlowmlWarning,
        stacklevel=5,
    )
