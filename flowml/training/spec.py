"""Defines `TrainingSpec`: what is trained and how, as the user says it to `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowml.arguments import choice, flag, is_text
from flowml.devices import Device
from flowml.lowering.schedule import SCHEDULES
from flowml.numbers import whole_number
from flowml.placement import Placement
from flowml.placement.homes import Homes, divide, homes_of, is_home
from flowml.policy import DEFAULT_PATTERN, Policy, named, published, resolve
from flowml.policy.published import PolicyRule
from flowml.training.couplings import policy_of_value
from flowml.training.evaluated import EvaluatingOptimizer, Evaluations
from flowml.training.local import fragmented
from flowml.training.step import Weight, loss_takes_rng
from flowml.training.untrained import Untrained
from flowml.training.valued import ValuedOptimizer, is_given

MAKERS = (named.__name__, published.__name__)
"""The modules whose functions make policies."""


@dataclass(frozen=True)
class TrainingSpec:
    """The user's settings. `flowml.Trainer` documents each."""

    loss: Callable[..., Any]
    optimizer: Any
    replicas: int = 1
    placement: Placement = "auto"
    microbatches: int = 1
    schedule: str = "1f1b"
    policies: Mapping[str, Policy] | Policy | PolicyRule | None = None
    weight: Weight | None = None
    has_state: bool = False
    untrained: Untrained | None = None
    """The leaves of the parameters that are not trained, which the loss holds."""
    homes: Homes | None = None

    def __post_init__(self) -> None:
        homes_of(self.homes)
        for name in ("replicas", "microbatches"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        if not callable(self.loss):
            raise TypeError(
                f"loss={self.loss!r} is of type {type(self.loss).__name__}; give a function of (params, batch), or of "
                "(params, batch, rng)"
            )
        if isinstance(self.policies, Policy):
            object.__setattr__(self, "policies", {DEFAULT_PATTERN: self.policies})
        given: Any = self.policies
        if getattr(given, "__module__", "") in MAKERS and "<locals>" not in given.__qualname__:
            raise TypeError(
                f"policies={given.__name__}: it makes a policy, and is none; call it: fm.policies.{given.__name__}(…)"
            )
        if isinstance(given, type):
            raise TypeError(
                f"policies={given.__name__}: it is a class, and no policy; give a value, such as fm.Policy() or one of "
                "fm.policies"
            )
        for pattern in self.policies if isinstance(self.policies, Mapping) else ():
            if not is_text(pattern):
                raise TypeError(
                    f"policies has the pattern {pattern!r} of type {type(pattern).__name__}; give patterns of "
                    'parameter paths as text, such as {"*": fm.policies.every(4)}'
                )
        if not (isinstance(self.policies, Mapping | None) or callable(self.policies)):
            raise TypeError(
                f"policies={self.policies!r} is a {type(self.policies).__name__}; give a mapping from patterns of "
                'parameter paths to policies, such as {"*": fm.policies.every(4)}, one fm.Policy for all, or a rule '
                "(path, shape) -> fm.Policy"
            )
        if not (self.weight is None or isinstance(self.weight, str) or callable(self.weight)):
            raise TypeError(
                f"weight={self.weight!r} is a {type(self.weight).__name__}; give the name of a leaf of aux, or a "
                "function of the batch"
            )
        choice("schedule", self.schedule, SCHEDULES)
        flag("has_state", self.has_state)

    def resolve(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Policy]:
        """The policy of each parameter, by the shapes of all."""
        assert not isinstance(self.policies, Policy)
        given = [path for path in shapes if self.has_value and is_given(path)]
        shapes = {path: shape for path, shape in shapes.items() if path not in given}
        if callable(self.policies):
            policies = {path: self.policies(path, shape) for path, shape in shapes.items()}
        else:
            policies = self.policies or {}
        untrained = self.untrained.names if self.untrained else ()
        found = fragmented({path: policy for path, (_, policy) in resolve(policies, shapes, untrained).items()})
        return found | dict.fromkeys(given, policy_of_value(found.values())) if given else found

    def divide(self, devices: Sequence[Device]) -> tuple[tuple[Device, ...], tuple[Device, ...]]:
        """The devices of replicas, and those of workers that only hold parameters."""
        return divide(homes_of(self.homes), devices, self.replicas)

    def is_home(self, worker: str) -> bool:
        """Whether `homes` names a worker."""
        return is_home(homes_of(self.homes), worker)

    @property
    def evaluations(self) -> Evaluations | None:
        """How the optimizer gets the loss of a batch, if it wants it."""
        return self.optimizer.evaluations if isinstance(self.optimizer, EvaluatingOptimizer) else None

    @property
    def takes_words(self) -> bool:
        """Whether a microbatch is fed the words of its key."""
        return loss_takes_rng(self.loss, has_state=self.has_state) or self.evaluations is not None

    @property
    def has_value(self) -> bool:
        """Whether the value of the loss is among the parameters, for the optimizer."""
        return isinstance(self.optimizer, ValuedOptimizer)
