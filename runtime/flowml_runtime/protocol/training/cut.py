"""Counts the microbatches that a step computes on one stage, where a replica may stop between two of them.

The stage that decides (`flowml.training.cuts`) asks the policy before the first instruction of each microbatch, and it
leaves out this microbatch and all later ones when the policy says so. The other stages of the replica learn it from a
message without arrays. The first microbatch is always computed, so that every replica contributes.
"""

from __future__ import annotations

from flowml_runtime.protocol.training.terms import Terms


class Cut:
    """The microbatches of the running step. The executor of the stage calls it, also between events."""

    def __init__(self, terms: Terms, stage: int) -> None:
        self._rule = terms.cut
        self._all = terms.microbatches
        self._decides = stage == terms.cuts_at
        self.used = terms.microbatches
        """How many microbatches the step computes, as far as is known: the first ones."""
        self._asked = 0
        self._halted = False

    @property
    def left_out(self) -> int:
        """How many microbatches the step leaves out."""
        return self._all - self.used

    def begin(self) -> None:
        """The next step begins."""
        self.used, self._asked, self._halted = self._all, 0, False

    def halt(self) -> None:
        """Begin no more microbatches."""
        self._halted = True

    def leaves_out(self, microbatch: int, seconds: float) -> bool:
        """Whether the step leaves out a microbatch. `seconds` is how long the step has computed.

        Ask before each instruction. The first answer for each microbatch is final on the stage that decides.
        """
        if self._decides and self._rule is not None and microbatch > self._asked:
            self._asked = microbatch
            if self._halted or self._rule.stops(seconds):
                self.lacks(microbatch)
        return microbatch >= self.used

    def lacks(self, microbatch: int) -> None:
        """The microbatch is left out, and so are all later ones."""
        self.used = min(self.used, microbatch)
