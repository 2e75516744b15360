"""The rounds of gossip of one store at one replica in virtual time, as in `worker.training.exchange.neighbours`.

A replica sends its parameters when its step begins, or when it ends if there is an outer optimizer or filters lose
something, and waits for its neighbours at the end of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowml.policy import Gossip, Outer
from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Start
from flowml_runtime.sim.program import At

if TYPE_CHECKING:
    from flowml_runtime.sim.node import Node


class Neighbours:
    """The rounds of one store. The executor of its stage uses it."""

    def __init__(self, node: Node, at: At, store: int, gossip: Gossip, senders: Sequence[int]) -> None:
        """`senders` are the replicas that take part in rounds: one of each site."""
        world = node.world
        terms = world.terms.stores[store]
        self._node = node
        self._at = at
        self._store = store
        self._gossip = gossip
        outer, policy = isinstance(terms.policy.apply, Outer), terms.policy
        self._at_end = outer or policy.tracked
        self._senders = senders
        self._number = senders.index(at[0])
        self._workers = [world.places.stages[r][terms.stages[0]] for r in senders]
        sizes = world.sizes.told if policy.tracked else world.sizes.stores
        self._nbytes = sizes[store] * (2 if outer else 1)
        self._told = -1

    def begin(self, step: Start) -> None:
        """The step has its parameters."""
        if not self._at_end and self._told < step.clock:
            self._tell(step)

    def updated(self, step: Start) -> None:
        """The step has updated the own parameters."""
        if self._at_end:
            self._tell(step)

    def end(self, step: Start) -> bool:
        """End the round, if one is due. Returns whether it is over; if not, a neighbour's parameters are missing."""
        if not self._gossip.due(step.clock):
            return True
        replica, told = self._number, self._node.told
        weights = self._gossip.weights(replica, len(self._workers), step.clock)
        keys = {j: (self._store, self._at[0], self._senders[j], step.clock) for j in weights if j != replica}
        if not all(key in told for key in keys.values()):
            return False
        theirs = {j: told.pop(key) for j, key in keys.items()}
        self._node.world.values.mix(self._at, self._store, weights, theirs)
        return True

    def _tell(self, step: Start) -> None:
        if not self._gossip.due(step.clock):
            return
        self._told = step.clock
        node, replica = self._node, self._number
        value, packed = node.world.values.told(self._at, self._store, step.clock)
        nbytes = self._nbytes if packed is None else packed
        for other in self._gossip.readers(replica, len(self._workers), step.clock):
            message = wire.Gossip(
                **node.ids,
                cause=step.cause,
                store=self._store,
                replica=self._senders[other],
                source=self._at[0],
                clock=step.clock,
            )
            node.send(self._workers[other], message, value, nbytes)
            if self._workers[other] != node.name:
                node.counts.crossing(self._store, nbytes)
