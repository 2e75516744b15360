"""Finds the snapshot from which a fit goes on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowml.callers import warn
from flowml.errors import CheckpointError, InUseError
from flowml.plan import Training
from flowml_runtime.driver.checkpoint import Checkpoint, readable, told
from flowml_runtime.driver.training.copied import copying
from flowml_runtime.driver.training.differing import check
from flowml_runtime.driver.training.fingerprint import differ
from flowml_runtime.driver.training.fit_arguments import Asked
from flowml_runtime.driver.training.kept import OWNED_S, KeptFit, claimed
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.reshaping import reshaped, with_shares
from flowml_runtime.driver.training.result import restored
from flowml_runtime.driver.training.saving import Saving
from flowml_runtime.driver.training.snapshots import Figures, Snapshot, Trees, holds_fits, with_untrained
from flowml_runtime.environment import checkpoints, locks


@contextmanager
def writing(asked: Asked, cluster: Any) -> Generator[Asked]:
    """Have what a fit writes: `_writing`, and the copies that workers keep of each other's state."""
    with _writing(asked, cluster) as found, copying(cluster, asked.replicate) as copies:
        yield replace(found, copies=copies)


@contextmanager
def _writing(asked: Asked, cluster: Any) -> Generator[Asked]:
    """Have the directory of snapshots, which no other fit writes meanwhile, and the fit on workers that outlive their
    driver.

    Raises CheckpointError if another one does, or it cannot be written, ValueError or TypeError for arguments that make
    no sense.
    """
    checkpoint, resume = asked.checkpoint, asked.resume
    if resume not in ("auto", None):
        raise ValueError(f"resume={resume!r}: give 'auto', or leave it out")
    if checkpoint is None:
        if resume is not None:
            raise ValueError("resume='auto' needs checkpoint=fm.Checkpoint(path), which says where the snapshots are")
        yield asked
        return
    if not isinstance(checkpoint, Checkpoint):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"checkpoint={checkpoint!r}: give an fm.Checkpoint(path, every_steps=...)")
    directory, anew = checkpoint.directory, resume is None
    checkpoints.prepare(directory)
    with ExitStack() as stack:
        if not getattr(cluster, "outlives", False):
            stack.enter_context(locks.locked(directory))
            _check_empty(directory, anew=anew)
            yield asked
            return
        kept = _taken(stack, checkpoint, cluster, anew=anew)
        yield replace(asked, kept=kept if kept.keeps else None)


def _taken(stack: ExitStack, checkpoint: Checkpoint, cluster: Any, *, anew: bool) -> KeptFit:
    """Have a directory, and its fit on workers that outlive their driver. If the process that has the directory is the
    fit's driver, and was lost by the workers, it is suspended, and loses the directory too."""
    me, directory = cluster.session.endpoint.name, checkpoint.directory

    def claim(wait_s: float, *, anew: bool = False) -> KeptFit:
        return stack.enter_context(claimed(cluster, checkpoints.identity(directory, anew=anew), wait_s, checkpoint))

    try:
        stack.enter_context(locks.locked(directory, me))
    except InUseError as error:
        if anew or not error.driver:
            raise
        try:
            kept = claim(0.0)
        except CheckpointError:
            raise error from None
        stack.enter_context(locks.locked(directory, me, kept.lost))
        return kept
    _check_empty(directory, anew=anew)
    found: list[KeptFit] = []
    stack.enter_context(checkpoints.undone(directory, unless=lambda: any(kept.begun for kept in found)))
    found.append(claim(OWNED_S, anew=anew))
    return found[0]


def _check_empty(directory: Path, *, anew: bool) -> None:
    if not holds_fits(directory):
        raise CheckpointError(
            f"{directory} holds trees of fm.save, and no fit; give fm.Checkpoint another directory, and begin from "
            "fm.load of this one"
        )
    if anew and checkpoints.snapshots(directory):
        raise CheckpointError(
            f"{directory} has checkpoints of an earlier fit; give resume='auto' to go on from the newest, or another "
            "directory"
        )


def saving_of(asked: Asked, training: Training, trees: Trees, model: Model, now: Figures) -> Saving:
    """The snapshots of a fit with these figures, which would begin with these trees, and this state of the model.

    Raises CheckpointError if the snapshot to go on from belongs to another fit or is behind its end.
    """
    checkpoint, kept, total = asked.checkpoint, asked.kept, asked.total
    found = None if checkpoint is None or asked.resume is None else _newest(checkpoint, kept, trees)
    if found is None:
        return Saving(checkpoint, None, now, trees, model, kept)
    where, snapshot = found[0], with_shares(found[1], trees[0])
    check(snapshot, where, training, now, trees, model)
    if differ(snapshot.content.figures.update, now.update):
        warn(
            f"the update of the optimizer is another one than that which wrote the checkpoint {where}, such as with "
            "another learning rate or schedule; the fit goes on with the new one and the state of the old one. If that "
            "is not meant, give the optimizer of the fit that wrote it"
        )
    steps = snapshot.content.steps
    if steps > total:
        raise CheckpointError(
            f"the checkpoint {where} is behind the end of this fit: it has {steps} steps, and the fit has "
            f"{total} in all; steps= and epochs= count from the beginning, so give at least {steps} steps"
        )
    snapshot = _in_form(snapshot, where, training, total, now, model)
    leaves = (snapshot.content.params, snapshot.content.opt_state)
    values = tuple(restored(tree, snapshot.leaves(of)) for tree, of in zip(trees[:2], leaves, strict=True))
    return Saving(checkpoint, snapshot, now, (values[0], values[1], trees[2]), model, kept)


def _newest(checkpoint: Checkpoint, kept: KeptFit | None, trees: Trees) -> tuple[Path | str, Snapshot] | None:
    """The newest snapshot, and where it is: on the disk, or on the workers if they keep a newer one, or one that cannot
    be read from the disk. That is written first, because they keep it only until the next."""
    directory = checkpoint.directory
    written = checkpoints.snapshots(directory)
    named = checkpoints.step_of(written[0]) if written else 0
    held = None if kept is None else kept.newest(named)
    if held is None:
        found, errors = readable(directory)
        steps = 0 if found is None else found[1].content.steps
        held = kept.newest(steps) if kept is not None and errors else None
        if held is None:
            told(directory, found, errors)
            if kept is not None:
                _tell_incomplete(kept, found)
            if found is not None:
                checkpoints.set_aside(directory, steps)
            return found
        for error in errors:
            warn(f"{error}. The fit goes on from the snapshot of step {held.content.steps} that the workers keep")
        checkpoints.set_aside(directory, steps)
    snapshot, where = with_untrained(held, trees[2]), f"of step {held.content.steps} that the workers keep"
    try:
        snapshot.write(checkpoint.directory, checkpoint.keep)
    except OSError as error:
        warn(
            f"the checkpoint {where} could not be written to {checkpoint.directory}: {error}; the fit goes on from it, "
            f"and older checkpoints are as they were{checkpoints.advice(error)}"
        )
    return where, snapshot


def _tell_incomplete(kept: KeptFit, found: tuple[Path, Snapshot] | None) -> None:
    """Warn if workers keep a part of a snapshot that is newer than that on the disk, and others that had the rest are
    gone."""
    steps = kept.incomplete(0 if found is None else found[1].content.steps)
    if steps is None:
        return
    which = f"the snapshot of step {steps}, and the rest is lost" if steps else "the first snapshot"
    what = "begins anew" if found is None else f"goes on from the older checkpoint {found[0]}"
    warn(f"the workers keep only a part of {which}, so the fit {what}")


def _in_form(
    snapshot: Snapshot, path: Path | str, training: Training, total: int, now: Figures, model: Model
) -> Snapshot:
    """The snapshot in the form of this fit. Warns of what of it has no place there."""
    found, there = reshaped(snapshot, training, total, now, model), snapshot.content.figures
    if found.left_out:
        forms = [f"{f.replicas} replicas of {f.stages} stages and {f.microbatches} microbatches" for f in (there, now)]
        warn(
            f"the checkpoint {path} was written by {forms[0]}, and the fit goes on with {forms[1]}, without "
            f"{'; without '.join(found.left_out)}. Parameters and optimizer state are the same"
        )
    return found.snapshot
