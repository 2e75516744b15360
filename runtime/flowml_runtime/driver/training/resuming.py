"""Finds the snapshot from which a fit goes on."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from flowml.errors import CheckpointError, FlowmlWarning
from flowml.plan import Training
from flowml_runtime.driver.checkpoint import Checkpoint, newest
from flowml_runtime.driver.training.differing import check
from flowml_runtime.driver.training.fingerprint import differ
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.reshaping import reshaped
from flowml_runtime.driver.training.result import restored
from flowml_runtime.driver.training.saving import Saving
from flowml_runtime.driver.training.snapshots import Figures, Snapshot, Trees
from flowml_runtime.environment import checkpoints


@contextmanager
def writing(checkpoint: Checkpoint | None, resume: Literal["auto"] | None) -> Generator[None]:
    """Have the directory of snapshots, which no other fit writes meanwhile.

    Raises CheckpointError if another one does, or it cannot be written, ValueError or TypeError for arguments that make
    no sense.
    """
    if resume not in ("auto", None):
        raise ValueError(f"resume={resume!r}: give 'auto', or leave it out")
    if checkpoint is None:
        if resume is not None:
            raise ValueError("resume='auto' needs checkpoint=fm.Checkpoint(path), which says where the snapshots are")
        yield
        return
    if not isinstance(checkpoint, Checkpoint):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"checkpoint={checkpoint!r}: give an fm.Checkpoint(path, every_steps=...)")
    checkpoints.prepare(checkpoint.directory)
    with checkpoints.locked(checkpoint.directory):
        yield


def saving_of(
    checkpoint: Checkpoint | None,
    resume: Literal["auto"] | None,
    training: Training,
    trees: Trees,
    model: Model,
    now: Figures,
    total: int,
) -> Saving:
    """The snapshots of a fit of `total` steps with these figures, which would begin with these trees, and
    this state of the model.

    Raises CheckpointError if the snapshot to go on from belongs to another fit or is behind its end, or if that is not
    asked for.
    """
    if checkpoint is None:
        return Saving(None, None, now, trees, model)
    directory = checkpoint.directory
    if resume is None:
        if checkpoints.snapshots(directory):
            raise CheckpointError(
                f"{directory} has checkpoints of an earlier fit; give resume='auto' to go on from the newest, or "
                "another directory"
            )
        return Saving(checkpoint, None, now, trees, model)
    found = newest(directory)
    if found is None:
        return Saving(checkpoint, None, now, trees, model)
    path, snapshot = found
    check(snapshot, path, training, now, trees, model)
    if differ(snapshot.content.figures.update, now.update):
        warnings.warn(
            f"the update of the optimizer is another one than that which wrote the checkpoint {path}, such as with "
            "another learning rate or schedule; the fit goes on with the new one and the state of the old one. If that "
            "is not meant, give the optimizer of the fit that wrote it",
            FlowmlWarning,
            stacklevel=5,
        )
    steps = snapshot.content.steps
    if steps > total:
        raise CheckpointError(
            f"the checkpoint {path} is behind the end of this fit: it has {steps} steps, and the fit has "
            f"{total} in all; steps= and epochs= count from the beginning, so give at least {steps} steps"
        )
    snapshot = _in_form(snapshot, path, training, total, now, model)
    leaves = (snapshot.content.params, snapshot.content.opt_state)
    values = tuple(restored(tree, snapshot.leaves(of)) for tree, of in zip(trees[:2], leaves, strict=True))
    return Saving(checkpoint, snapshot, now, (values[0], values[1], trees[2]), model)


def _in_form(snapshot: Snapshot, path: Path, training: Training, total: int, now: Figures, model: Model) -> Snapshot:
    """The snapshot in the form of this fit. Warns of what of it has no place there."""
    found, there = reshaped(snapshot, training, total, now, model), snapshot.content.figures
    if found.left_out:
        forms = [f"{f.replicas} replicas of {f.stages} stages and {f.microbatches} microbatches" for f in (there, now)]
        warnings.warn(
            f"the checkpoint {path} was written by {forms[0]}, and the fit goes on with {forms[1]}, without "
            f"{'; without '.join(found.left_out)}. Parameters and optimizer state are the same",
            FlowmlWarning,
            stacklevel=6,
        )
    return found.snapshot
