"""How an epoch visits the examples, beyond a shuffled and a plain order. JAX-free, because messages carry these values.

Each is a rule from (number of examples, seed, epoch) to an array of indices, so every worker computes the same order,
and a fit that goes on from a snapshot has the order that it had.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np

from flowml.arguments import flag
from flowml.numbers import MOST, whole_number
from flowml.signatures import misfit

Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
_ASSIGNED, _WITHIN, _DRAWN = 1, 2, 3
"""The streams of random numbers beside that of a shuffled epoch."""


class _Worded(msgspec.StructMeta):
    """Words the error for arguments that a split does not have."""

    def __call__(cls, *given: Any, **named: Any) -> Any:
        has = dict.fromkeys(cls.__struct_fields__, False)
        wrong = misfit(cls.__name__, has, len(given), named, "")
        if given and has:
            wrong = f"{cls.__name__}({given[0]!r}): give arguments by name, such as {cls.__struct_fields__[0]}="
        if wrong:
            raise TypeError(wrong)
        return super().__call__(*given, **named)


class Shards(msgspec.Struct, frozen=True, tag=True, kw_only=True, metaclass=_Worded):
    """Each replica has a shard of the examples, and draws its share of each batch from it.

    Shards are equal but for one example. What does not fill a batch of all replicas is at the end of the epoch. Where
    replicas share no clocks (Downpour, `asynchronous`), each visits its shard at its own pace, and begins its next
    epoch while others are in the one before. The shards are those of replicas as long as each takes its own work item
    of each step: after a loss of workers, and where work is dropped and goes back to the queue, other replicas take it.

    Args:
        reassign_every: the epochs after which all examples are dealt to the replicas anew; 0: never.
        reshuffle: whether a shard is visited in another order in each epoch.
        contiguous: whether a shard is a range of neighbouring examples, as where each site has data of its own. It
            needs `reassign_every=0`.
        shards, each: `fit` fills these in: the number of shards, and how many examples each gives to a batch.
    """

    reassign_every: Count = 0
    reshuffle: bool = True
    contiguous: bool = False
    shards: Annotated[int, msgspec.Meta(ge=1, le=MOST)] = 1
    each: Annotated[int, msgspec.Meta(ge=1, le=MOST)] = 1

    def __post_init__(self) -> None:
        whole_number("reassign_every", self.reassign_every)
        for name in ("reshuffle", "contiguous"):
            flag(name, getattr(self, name))
        if self.contiguous and self.reassign_every:
            raise ValueError(
                f"Shards(contiguous=True, reassign_every={self.reassign_every}): ranges of neighbouring examples stay "
                "where they are; leave one of them out"
            )

    def __repr__(self) -> str:
        fields = zip(self.__struct_fields__, self.__struct_defaults__, strict=True)
        given = [f"{name}={getattr(self, name)}" for name, default in fields if getattr(self, name) != default]
        return f"Shards({', '.join(given)})"

    def order(self, examples: int, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch: for each batch in turn the examples of each shard, then what is left."""
        dealt = np.arange(examples)
        if not self.contiguous:
            period = epoch // self.reassign_every if self.reassign_every else 0
            dealt = np.random.default_rng([seed, period, _ASSIGNED]).permutation(examples)
        mine = np.array_split(dealt, self.shards)
        if self.reshuffle:
            mine = [np.random.default_rng([seed, epoch, _WITHIN, i]).permutation(s) for i, s in enumerate(mine)]
        batches = examples // (self.shards * self.each)
        used = batches * self.each
        rows = np.stack([shard[:used].reshape(batches, self.each) for shard in mine], axis=1)
        return np.concatenate([rows.reshape(-1), *(shard[used:] for shard in mine)])


class WithReplacement(msgspec.Struct, frozen=True, tag=True, metaclass=_Worded):
    """Each example of an epoch is drawn from all, so that some come several times and others not at all."""

    def order(self, examples: int, seed: int, epoch: int) -> np.ndarray:
        """The indices of an epoch."""
        return np.random.default_rng([seed, epoch, _DRAWN]).integers(0, examples, examples)


Split = Shards | WithReplacement
Shuffle = bool | Split
"""How an epoch visits the examples: in a new order each time, in order (False), or as a value says."""


def dealt(shuffle: Shuffle, replicas: int, batch_size: int) -> Shuffle:
    """The same for a fit with so many replicas and examples in a batch."""
    if not isinstance(shuffle, Shards):
        return shuffle
    size = whole_number("batch_size", batch_size, least=1)
    return msgspec.structs.replace(shuffle, shards=replicas, each=max(1, size // replicas))
