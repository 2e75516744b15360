"""How many work items of an epoch, a replica or a group of layers had each fate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from flowml_runtime.protocol.training.summary import Tally

Fate = Literal["used", "dropped", "folded", "requeued", "duplicate"]


class AccountState(msgspec.Struct, frozen=True):
    """The items of an epoch, a replica or a group by fate at a snapshot."""

    fates: dict[str, int]
    left_out: int = 0
    copied: int = 0


@dataclass(slots=True)
class Account:
    """The same while a run goes on."""

    fates: dict[str, int] = field(default_factory=dict[str, int])
    """No Counter, which takes much longer to make and to read."""
    left_out: int = 0
    """Examples."""
    copied: int = 0

    def kept(self) -> AccountState:
        return AccountState(dict(self.fates), self.left_out, self.copied)

    @staticmethod
    def of(state: AccountState) -> Account:
        return Account(dict(state.fates), state.left_out, state.copied)

    def tally(self, unseen: int = 0) -> Tally:
        counts = {n: self.fates.get(n, 0) for n in ("used", "dropped", "folded", "requeued", "returned", "duplicate")}
        return Tally(**counts, unseen=unseen, left_out=self.left_out, copied=self.copied)
