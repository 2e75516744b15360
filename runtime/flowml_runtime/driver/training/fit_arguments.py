"""Checks the arguments of a fit before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax

from flowml.arguments import choice, flag
from flowml.data import Source, as_source
from flowml.errors import UnsupportedError
from flowml.numbers import whole_number
from flowml.plan import Training
from flowml.rows import seems_swapped
from flowml.splits import Shards, Shuffle, WithReplacement
from flowml.training.pieces import short_items
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.training.copied import Copies
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.kept import KeptFit
from flowml_runtime.driver.training.rhythms import warn_of_rhythms

Callback = Callable[[Record], Any]
OnLoss = Literal["raise", "replace", "shrink"]
"""What to do when a worker is lost."""
Last = Literal["drop", "use"]
"""What to do with the examples at the end of an epoch that do not fill a batch."""


@dataclass(frozen=True)
class Asked:
    """The arguments of a fit. `rest` is the number of examples of the short batch at the end of each epoch, if there is
    one and it is used."""

    data: Source
    batch_size: int
    total: int
    rest: int
    seed: int
    shuffle: Shuffle
    progress: bool | None
    callbacks: Sequence[Callback]
    validation: Any
    validate_every: int
    checkpoint: Checkpoint | None
    resume: Literal["auto"] | None
    on_loss: OnLoss
    min_replicas: int
    elastic: bool
    """Whether replicas whose workers join later take part from then on."""
    replicate: int = 0
    copies: Copies | None = None
    """The copies that workers keep of each other's state, if they do."""
    kept: KeptFit | None = None
    """The fit as the workers keep it, if they outlive their driver."""

    @staticmethod
    def of(
        source: Any,
        size: tuple[int, int | None, int | None, int, Shuffle, Last],
        callbacks: Any,
        progress: bool | None,
        validation: tuple[Any, int | None],
        saving: tuple[Checkpoint | None, Literal["auto"] | None],
        losses: tuple[OnLoss | None, int | None, int, Literal["elastic"] | None],
    ) -> Asked:
        """`size` is batch size, epochs, steps, seed, shuffle and last; `validation` is validation and validate_every;
        `saving` is checkpoint and resume; `losses` is on_loss, min_replicas, replicate and replicas. Raises ValueError
        or TypeError for what makes no sense."""
        data, callbacks = as_source(source), _checked(callbacks)
        batch_size, epochs, steps, seed, shuffle, last = size
        batch_size, seed = whole_number("batch_size", batch_size, least=1), whole_number("seed", seed)
        shuffle = _shuffle(shuffle)
        progress = None if progress is None else flag("progress", progress)
        rest = rest_of(data, batch_size, last)
        total = _total_steps(data, batch_size, epochs, steps, rest)
        given, every = validation
        if given is None and every is not None:
            raise ValueError("validate_every is for validation=; give both or neither")
        every = max(1, data.examples // batch_size + bool(rest)) if every is None else every
        every = whole_number("validate_every", every, least=1)
        lasts = _lasts(*losses)
        return Asked(data, batch_size, total, rest, seed, shuffle, progress, callbacks, given, every, *saving, *lasts)


def _shuffle(given: object) -> Shuffle:
    """Raises TypeError for what is no order of an epoch."""
    if isinstance(given, Shards | WithReplacement):
        return given
    try:
        return flag("shuffle", given)
    except TypeError as error:
        raise TypeError(f"{error}, fm.Shards() or fm.WithReplacement()") from None


def _lasts(
    on_loss: OnLoss | None, least: int | None, copies: int, replicas: Literal["elastic"] | None
) -> tuple[OnLoss, int, bool, int]:
    """What a fit does about lost workers, with how many replicas it goes on, whether others may join, and the copies of
    each worker's state."""
    if on_loss is not None:
        choice("on_loss", on_loss, get_args(OnLoss))
    if replicas not in (None, "elastic"):
        raise ValueError(f"replicas={replicas!r}: give 'elastic', or leave it out; the Trainer has their number")
    if replicas == "elastic" and on_loss in ("replace", "raise"):
        raise ValueError(
            f"replicas='elastic' with on_loss={on_loss!r}: an elastic fit goes on without lost workers until others "
            "join; leave on_loss out"
        )
    on_loss = on_loss or ("shrink" if replicas == "elastic" else "raise")
    if least is not None and on_loss != "shrink":
        raise ValueError(
            "min_replicas is for replicas='elastic' or on_loss='shrink'; give one of them, or leave min_replicas out"
        )
    if whole_number("replicate", copies) and on_loss == "raise":
        raise ValueError(
            "replicate= is for a fit that goes on after a loss; give on_loss='replace' or 'shrink' too, or leave "
            "replicate out"
        )
    least = whole_number("min_replicas", 1 if least is None else least, least=1)
    return on_loss, least, replicas == "elastic", copies


def rest_of(source: Source, batch_size: int, last: Last) -> int:
    """The examples of the short batch that ends an epoch; 0 if there is none, or it is dropped."""
    return source.examples % batch_size if choice("last", last, get_args(Last)) == "use" else 0


def check_items(training: Training, asked: Asked) -> None:
    """Raise ValueError or UnsupportedError if a fit of this plan cannot use the short batch at the end of an epoch, or
    cannot give its replicas examples of their own. Warn if it ends before its replicas first exchange something."""
    warn_of_rhythms(training, asked.total)
    if isinstance(asked.shuffle, Shards):
        _check_shards(training)
    if asked.rest:
        short_items(asked.rest, training)


def _check_shards(training: Training) -> None:
    """Raise UnsupportedError if replicas do not get work items of their own, or some of them get too few."""
    if training.code is not None or training.speculation is not None:
        what = "with a code replicas compute each other's examples"
        raise UnsupportedError(
            f"shuffle=Shards(): {what if training.code else 'replicas take portions in turn'}, so none has examples of "
            "its own; give shuffle=True, or a policy without it"
        )
    if any(store.policy.epoch_share is not None for store in training.stores):
        raise UnsupportedError(
            "shuffle=Shards(): an epoch ends when a share of its work items is done, and what is left would be the "
            "same slow replicas' shards in every epoch, whose examples would count less for good; give shuffle=True, "
            "with which free replicas take the next item, or a policy whose epochs end with all items, such as "
            "fm.policies.asynchronous()"
        )


def _total_steps(source: Source, batch_size: int, epochs: int | None, steps: int | None, rest: int) -> int:
    """The steps of a fit, whose epochs end with a batch of `rest` examples if that is not 0. Raises ValueError if there
    are none."""
    if (epochs is None) == (steps is None):
        raise ValueError("give fit() either epochs= or steps=")
    per_epoch = source.examples // batch_size + bool(rest)
    if per_epoch < 1:
        seems = "" if source.arrays is None else seems_swapped(source.shapes_of(source.arrays))
        raise ValueError(
            f"batch_size {batch_size} needs at least that many examples; the source has {source.examples}{seems}"
        )
    total = whole_number("epochs", epochs) * per_epoch if steps is None else whole_number("steps", steps)
    if total < 1:
        raise ValueError(f"epochs={epochs}, steps={steps}: there is nothing to do; give at least 1")
    return total


def _checked(given: Any) -> Sequence[Callback]:
    """The callbacks of a fit. Raises TypeError for anything else."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not all(callable(c) for c in given):
        raise TypeError(f"callbacks={given!r}: give a list of functions that take a record, such as [print]")
    return given


def compiling(name: str, batch: Any) -> str:
    """What a line of progress says."""
    shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree_util.tree_leaves(batch)[:4])
    return f"compiling {name} for batches of {shapes}"
