"""Counts the microbatches that a step computes on one stage, where a replica may stop between two of them.

The stage that decides (`flowml.training.cuts`) asks the policy before the first instruction of each microbatch, and it
leaves out this microbatch and all later ones when the policy says so, or when the replicas together have computed
enough (`pace`). The other stages of the replica learn it from a message without arrays. The first microbatch is always
computed, so that every replica contributes.

If enough is a number of microbatches of all replicas, this stage also tells what it has computed. It tells nothing
while the others together cannot have the rest, nor after enough are computed, and one message stands for all
microbatches that end before it is sent.
"""

from __future__ import annotations

from flowml_runtime.protocol.training.accounts import NONE
from flowml_runtime.protocol.training.terms import Terms


class Cut:
    """The microbatches of the running step. The executor of the stage calls it, also between events."""

    def __init__(self, terms: Terms, stage: int) -> None:
        self._rule = terms.cut
        sums = (i for i, s in enumerate(terms.stores) if s.collective or (s.sites and not s.relayed))
        self._summed = frozenset(sums) or NONE
        self._all = terms.microbatches
        self._decides = stage == terms.cuts_at
        self.used = terms.microbatches
        """How many microbatches the step computes, as far as is known: the first ones."""
        self._asked = 0
        self.clock = -1
        """That of the step."""
        self._halted = -1
        """The newest clock at which enough is computed."""
        quorum = terms.paced if self._decides else None
        self._tells = quorum is not None
        others = (terms.replicas - 1) * terms.microbatches
        self._least = quorum.need(others + terms.microbatches) - others if quorum else 0
        self.computed = 0
        """How many microbatches of the step are computed, if this stage tells it."""
        self._telling = False
        """Whether the machine is about to tell it."""

    @property
    def left_out(self) -> int:
        """How many microbatches the step leaves out."""
        return self._all - self.used

    def weight(self, store: int) -> int:
        """What the step weighs in its push to a store: the microbatches that it computes, as far as is known.

        In a sum of several replicas, which may stop at different microbatches, each step weighs as a whole one. All
        workers then agree without messages, and how much of each step is there says the sum itself: gradients of
        steps that may be cut are sent with their weights.
        """
        return self._all if store in self._summed else self.used

    def begin(self, clock: int = 0) -> None:
        """The step of `clock` begins."""
        self.used, self._asked, self.clock = self._all, 0, clock
        self.computed, self._telling = 0, False

    def halt(self, clock: int) -> None:
        """Begin no more microbatches of `clock`."""
        self._halted = max(self._halted, clock)

    def leaves_out(self, microbatch: int, seconds: float) -> bool:
        """Whether the step leaves out a microbatch. `seconds` is how long the step has computed.

        Ask before each instruction. The first answer for each microbatch is final on the stage that decides.
        """
        if self._decides and self._rule is not None and microbatch > self._asked:
            self._asked = microbatch
            if self.clock <= self._halted or self._rule.stops(seconds):
                self.lacks(microbatch)
        return microbatch >= self.used

    def lacks(self, microbatch: int) -> None:
        """The microbatch is left out, and so are all later ones."""
        self.used = min(self.used, microbatch)

    def finish(self) -> bool:
        """A microbatch is computed. Whether to give the machine the event that makes it tell."""
        if not self._tells:
            return False
        self.computed += 1  # before the next line, because the machine reads it after it has said that it tells
        if self._telling or self.computed < self._least or self.clock <= self._halted:
            return False
        self._telling = True
        return True

    def told(self) -> int:
        """How many microbatches the machine tells now."""
        self._telling = False
        return self.computed
