"""Holds a replica's own parameters and optimizer state of one store on one stage, between the steps of a run.

A step reads the own parameters, and at its end updates them with its gradients. The stage runner decides when to send
and when to take global parameters; `flowml.training.local` describes the tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flowml.plan import Plan, StoreSpec
from flowml.policy import Delta, Mix, Policy
from flowml.policy.apply import base_of
from flowml_runtime.execution.programs import Array, TaskFunction, aligned_copy
from flowml_runtime.worker.training.resident import Arrays, number, row, row_of

_KEPT = ("params", "state", "started", "kept")


class OwnRhythm:
    """When a replica takes the global parameters of a store whose values it updates itself."""

    def __init__(self, policy: Policy) -> None:
        self.every = policy.every
        self.mixes = isinstance(base_of(policy.apply), Mix)
        """Whether the replica is pulled to the global parameters when it pushes, and never takes them later."""
        self.steps = 0
        """The number of steps in what the next push sends."""
        self._taken = -1
        self._owes = policy.owes
        self._drops = policy.owes and policy.clocked and not policy.late.folds
        self._since = 0
        """The first step that the next push sends, if a decision may drop those of the push before."""

    def numbers(self) -> Arrays:
        """Where it stands, for a snapshot between two steps."""
        return {"steps": number(self.steps), "taken": number(self._taken), "since": number(self._since)}

    def set_numbers(self, arrays: Arrays) -> None:
        """Go on where a snapshot was taken."""
        self.steps, self._taken, self._since = (int(arrays[name]) for name in ("steps", "taken", "since"))

    @property
    def began(self) -> bool:
        """Whether it has taken any."""
        return self._taken >= 0

    def begin(self, clock: int) -> bool:
        """The step of `clock` begins. Returns whether with a take."""
        first = self.every.pushed(clock) if self._drops else 0
        if first > self._since:
            self._since = first
            self.forget()
        return self.takes(clock)

    def forget(self) -> None:
        """The next push sends only what later steps change.

        That is so after each push, and also after one that was left out because a decision had come without it: then
        all steps since the push before count as dropped, or others compute their examples again.
        """
        self.steps = 0

    def takes(self, clock: int) -> bool:
        """Whether the step of `clock` begins with a take."""
        return self._taken < 0 or (not self.mixes and self.every.taken(clock) > self._taken)

    def took(self, clock: int) -> None:
        """The step of `clock` has taken them."""
        self._taken = self.every.taken(clock)
        if not self._owes:
            self.steps = min(self.steps, self.every.delay)

    def pushed(self) -> int:
        """A push sends the steps since the last one. Returns their number."""
        steps, self.steps = self.steps, 0
        return steps


class OwnValues(OwnRhythm):
    """The buffers of one store. The executor's thread uses them, and no other."""

    def __init__(self, spec: StoreSpec, plan: Plan, tasks: Mapping[int, TaskFunction], replica: int) -> None:
        assert spec.local is not None and plan.training is not None
        super().__init__(spec.policy)
        self.spec = spec
        self._own = len(spec.local.state) - spec.local.outer
        """The leaves of state that are not those of an outer optimizer."""
        self.dtype = plan.tasks[spec.local.update].inputs[len(spec.specs) + self._own].dtype
        """That of the coefficients, which divide by the number of microbatches of the replica's site."""
        self.params: Sequence[Array] = ()
        self.state: Sequence[Array] = ()
        self.started: Sequence[Array] = ()
        """The global parameters that it took last, or those at the beginning of a round of gossip."""
        self.kept: Sequence[Array] = ()
        """The dual variables and the last report of ADMM."""
        self._update = tasks[spec.local.update]
        self._send = None if spec.local.send is None else tasks[spec.local.send]
        self._weight_dtype = "" if spec.local.send is None else plan.tasks[spec.local.send].inputs[-1].dtype
        self._take = None if spec.local.take is None else tasks[spec.local.take]
        site = spec.site_of(replica)
        self._stands_for = len(site.replicas) if site else 1
        """The replicas for which it counts: in a consensus, whose home divides by the number of all, and in a mean."""
        self._weights = Weights(spec.policy.every.delay) if spec.applies.weighted else None
        """Those of the steps in what the next push sends, if the home takes its mean by them."""
        added = plan.training.microbatches * (len(site.replicas) if site else 1)
        self._coefficients = aligned_copy(np.full((2, 1), 1 / added, self.dtype))

    def export(self) -> Arrays:
        """All buffers, for a snapshot between two steps."""
        found = (row(name, getattr(self, name)) for name in _KEPT)
        weights = {} if self._weights is None else {"weights": self._weights.export()}
        return {k: a for one in found for k, a in one.items()} | dict(self.numbers()) | weights

    def restore(self, arrays: Arrays, adopt: Callable[[Sequence[Array]], Sequence[Array]]) -> None:
        """Go on with the buffers of a snapshot."""
        for name in _KEPT:
            setattr(self, name, adopt(row_of(arrays, name)))
        self.set_numbers(arrays)
        if self._weights is not None and "weights" in arrays:
            self._weights.restore(arrays["weights"])

    def forget(self) -> None:
        super().forget()
        if self._weights is not None:
            self._weights.clear()
        if not self.kept:
            self.started = self.params

    def take(self, clock: int, values: Sequence[Array]) -> None:
        """Take the global parameters, or a mixture of them and the own ones."""
        if self.spec.local is not None and self.spec.local.dual:
            self._anchor(values)
        elif self._take is None or not self.began:
            self.params = self.started = values
        else:
            results = self._take(*values, *self.params, *self.started)
            self.params, self.started = results[: len(values)], results[len(values) :]
        self.took(clock)
        if self._weights is not None and not self._owes:
            self._weights.keep_last()

    def _anchor(self, values: Sequence[Array]) -> None:
        """Take the global parameters as what steps are pulled to. The first are also the own ones, without duals."""
        if not self.began:
            self.params = self.started = values
            self.kept = (*(np.zeros_like(np.asarray(v)) for v in values), *values)
        elif self._take is not None:
            self.started = self._take(*values, *self.kept[: len(values)])

    def update(self, gradients: Sequence[Array]) -> None:
        """Do one step of the optimizer with the sum of the gradients of all microbatches."""
        own, outer = self.state[: self._own], self.state[self._own :]
        results = self._update(*self.params, *own, self._coefficients, *gradients, *(self.started if self.kept else ()))
        self.params, self.state = results[: len(self.params)], (*results[len(self.params) :], *outer)

    def weigh(self, gradients: Sequence[Array]) -> None:
        """Count the weight of a step, with which its gradients end. One whose gradients are left out weighs nothing."""
        if self._weights is not None:
            self._weights.add(float(np.real(np.asarray(gradients[-1]))) if len(gradients) else 0.0)

    def sent(self) -> Sequence[Array]:
        """What a push sends. The next one sends only what has changed since, if nothing is taken before."""
        if self._send is None:
            return self.params
        if self.kept:
            count = len(self.params)
            results = self._send(*self.started, *self.params, *self.kept[count:])
            self.kept = results[count:]
            return results[:count] if self._stands_for == 1 else [_times(a, self._stands_for) for a in results[:count]]
        if self._weights is None:
            sent = self._send(*self.started, *self.params)
        else:
            weight = aligned_copy(np.array(self._weights.take() / self._stands_for, self._weight_dtype))
            sent = self._send(*self.started, *self.params, weight)
        if isinstance(self.spec.policy.payload, Delta):
            self.started = self.params
        return sent


class Weights:
    """The sum of the weights of steps, and their number. The `last` few may stay when others are forgotten."""

    def __init__(self, last: int) -> None:
        self._total, self._count = 0.0, 0
        self._recent: deque[float] = deque(maxlen=last)

    def add(self, weight: float) -> None:
        self._total, self._count = self._total + weight, self._count + 1
        self._recent.append(weight)

    def clear(self) -> None:
        self._total, self._count = 0.0, 0
        self._recent.clear()

    def keep_last(self) -> None:
        """Forget all but the last steps."""
        self._total, self._count = sum(self._recent), len(self._recent)

    def take(self) -> float:
        """The mean weight of a step, and forget all. It is 1 if no step was counted, as after a change of policies."""
        mean = self._total / self._count if self._count else 1.0
        self.clear()
        return mean

    def export(self) -> Array:
        """All as one array, of a length that depends on the policy alone, so that those of replicas have a mean."""
        padding = [0.0] * ((self._recent.maxlen or 0) - len(self._recent))
        return np.array([self._total, self._count, *padding, *self._recent])

    def restore(self, array: Array) -> None:
        total, count, *recent = (float(x) for x in np.asarray(array))
        self._total, self._count = total, round(count)
        self._recent.extend(recent[max(len(recent) - self._count, 0) :])


def _times(array: Array, factor: int) -> Array:
    found = np.asarray(array)
    return aligned_copy((found * np.asarray(factor, found.dtype)).astype(found.dtype))
