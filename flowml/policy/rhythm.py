"""Defines `Every` and `Once`: at which steps a replica pushes, and at which it takes a new value from the home."""

from __future__ import annotations

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import whole
from flowml.policy.mathematics import due, window
from flowml.policy.wording import Value
from flowml.signatures import worded

ONCE = 2**31 - 1
"""The steps between pushes of a policy that pushes once, at the end of the run."""


class Every(Value, frozen=True, tag=True):
    """A replica pushes every `push` steps and after the last one. All counts are in steps.

    Args:
        push: the number of steps between pushes. Between them a replica adds up its gradients, or updates its local
            parameters (`Delta`, `Weights`).
        pull: the number of steps between takes of the home's value, if it differs from `push`. With an unbounded
            staleness and a multiple of `push`, the home sends a replica only what it takes.
        offset: the first push is after `offset` steps (0: after `push` steps).
        fragments: the layers are split into so many groups of neighbours, which push in turn, `push / fragments` steps
            after each other (Douillard et al., Streaming DiLoCo, 2025).
        delay: a replica takes the value that its push has led to `delay` steps later, and computes meanwhile.

    Raises:
        PolicyError: for a value that is out of range.
    """

    push: int = 1
    pull: int | None = None
    offset: int = 0
    fragments: int = 1
    delay: int = 0

    def __post_init__(self) -> None:
        push = self._whole("push", self.push, 1, "the number of steps between pushes is an int of at least 1")
        self._whole(
            "pull", push if self.pull is None else self.pull, 1, "the steps between takes are an int of at least 1"
        )
        self._whole("fragments", self.fragments, 1, "the number of groups of layers is an int of at least 1")
        for name in ("offset", "delay"):
            if self._whole(name, getattr(self, name), 0, "it is an int of at least 0") >= push:
                raise PolicyError(
                    f"Every(push={push}, {name}={getattr(self, name)}): it is a number of steps below push; "
                    f"give {name}=0 to {push - 1}"
                )
        if self.fragments > push:
            raise PolicyError(
                f"Every(push={push}, fragments={self.fragments}): fragments push at different steps, and there are "
                f"only {push} between two pushes; give at most {push} fragments, or a larger push"
            )
        if self.pull != push and (self.offset or self.delay or self.fragments > 1):
            raise PolicyError(
                f"Every(push={push}, pull={self.pull}): offset, fragments and delay belong to a replica that takes a "
                "value after each of its pushes; leave pull out, or leave them out"
            )

    def _whole(self, name: str, value: object, least: int, what: str) -> int:
        number = whole(value)
        if number is None or number < least:
            raise PolicyError(f"Every({name}={value!r}): {what}")
        msgspec.structs.force_setattr(self, name, number)
        return number

    def __repr__(self) -> str:
        if self == Once():
            return "fm.Once()"
        more = [f"{n}={getattr(self, n)}" for n in ("offset", "delay") if getattr(self, n)]
        more += [f"fragments={self.fragments}"] if self.fragments > 1 else []
        pull = [f"pull={self.pull}"] if self.pull != self.push else []
        return f"fm.Every({', '.join([str(self.push), *pull, *more])})"

    def fragment(self, number: int) -> Every:
        """The rhythm of fragment `number`. The last one has the offset of the whole."""
        offset = (self.offset + (number + 1) * self.push // self.fragments) % self.push
        return msgspec.structs.replace(self, offset=offset, fragments=1)

    def due(self, clock: int, last_clock: int) -> bool:
        """Whether step `clock` ends with a push."""
        return due(clock, self.push, last_clock, self.offset)

    def pushed(self, clock: int) -> int:
        """How many steps are due to be pushed before step `clock`."""
        return window(clock, self.push, self.offset)

    def next_due(self, clock: int, last_clock: int) -> int:
        """The first step from `clock` on that ends with a push."""
        return min(-(-(clock + 1 - self.offset) // self.push) * self.push - 1 + self.offset, last_clock)

    def taken(self, clock: int) -> int:
        """The first step that computes with the value that step `clock` computes with."""
        delayed = max(clock - self.delay, 0)
        return window(delayed, self.pull or self.push, self.offset)

    @property
    def takes_after_push(self) -> bool:
        """Whether each take comes right after a push, and not each step begins with one."""
        pull = self.pull or self.push
        return pull > 1 and pull % self.push == 0 and not self.delay

    def asks(self, clock: int) -> bool:
        """Whether the step after `clock` takes, where each take comes right after a push."""
        return due(clock, self.pull or self.push, -1, self.offset)

    def needed(self, clock: int, staleness: float) -> float:
        """How many clocks the version that step `clock` takes has to contain to be fresh enough for the last step that
        computes with it. No more can be asked for than what is pushed before step `clock`."""
        pull = self.pull or self.push
        if pull == self.push:
            return 0
        last = self.taken(clock) + pull - 1
        return min(self.pushed(last) - staleness, self.pushed(clock))

    @property
    def between(self) -> str:
        """The steps between two pushes, for tables: "4", or "once"."""
        return "once" if self.push == ONCE else str(self.push)

    def describe(self) -> str:
        """A short text for tables: "every 4", "every 6 of 2 fragments, delay 1", "once"; "" for each step."""
        words = [] if self.push == 1 else [self.between if self.push == ONCE else f"every {self.push}"]
        if self.fragments > 1:
            words = [f"every {self.push} of {self.fragments} fragments"]
        words += [f"from {self.offset}"] if self.offset else []
        words += [f"pull {self.pull}"] if self.pull != self.push else []
        words += [f"delay {self.delay}"] if self.delay else []
        return ", ".join(words)


def Once() -> Every:
    """A replica pushes once, at the end of the run."""
    return Every(ONCE)


worded(globals(), ("Once",), PolicyError)
