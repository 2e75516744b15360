"""Defines how a home applies contributions: which coefficients they get, and what their sum does to the parameters.

Each kind is a value that travels in the plan. It says whether contributions are averaged or added, and by what a stale
one is scaled; `mathematics.coefficients` computes with that. What the sum does to the parameters is compiled into the
tasks of the home (`flowml.training.updates`). A new kind is a class that follows `Apply`, whose `gradient` changes what
the optimizer gets, and is registered.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import real, whole
from flowml.policy.kinds import Knob, check, register
from flowml.policy.wording import Value, wrong_kind

if TYPE_CHECKING:
    from flowml.policy.spec import Policy


class Apply(Knob):
    """How a home applies contributions. As it is here, it applies their mean."""

    __slots__ = ()

    @property
    def averages(self) -> bool:
        """Whether the mean of the contributions is taken, and not their sum."""
        return True

    def scale(self, staleness: int) -> float:
        """By what a contribution is multiplied that so many versions of the home were made after."""
        return 1.0

    def gradient(self, mean: Any, parameter: Any, xp: Any) -> Any:
        """What the optimizer gets in place of the mean of one array. JAX traces it, and `xp` is jax.numpy."""
        return mean

    def describe(self) -> str:
        """A short text for tables; "" for the default."""
        return type(self).__name__.lower()


@register
class Mean(Apply, Value, frozen=True, tag=True):
    """Apply the mean of the contributions: `"mean"`. Each counts by the number of microbatch gradients in it."""

    def describe(self) -> str:
        return ""


@register
class Sum(Apply, Value, frozen=True, tag=True):
    """Apply the sum of the mean gradients of all replicas' steps, as if each were applied alone: `"sum"`."""

    @property
    def averages(self) -> bool:
        return False

    def describe(self) -> str:
        return "sum"


@register
class StalenessScaled(Apply, Value, frozen=True, tag=True):
    """Like the mean, but a contribution that is σ versions late counts `rate / σ` (Gupta et al., Rudra, 2016).

    σ is the number of versions that the home made between the read of the replica and the update with its
    contribution, and at least 1. A fresh contribution (no version in between) and one that missed a single version
    both count `rate`, one that missed two counts `rate / 2`.

    Raises:
        PolicyError: for a rate that is not a positive number.
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        _check(self, "rate", 0 < _number(self.rate) < math.inf, "a contribution is multiplied by a number above 0")

    def scale(self, staleness: int) -> float:
        return self.rate / max(staleness, 1)

    def describe(self) -> str:
        return "÷ staleness" if self.rate == 1 else f"{self.rate:g} ÷ staleness"


@register
class Outer(Apply, Value, frozen=True, tag=True):
    """Give the mean to an optimizer of the home's own, which has its state there (Douillard et al., DiLoCo, 2023).

    With gradients it takes the place of the trainer's optimizer for these layers. With deltas, which point from the new
    to the old parameters as a gradient does, the trainer's optimizer makes the local steps.

    Args:
        optimizer: an `optax.GradientTransformation`, by default `sgd(0.7, momentum=0.9, nesterov=True)`. The plan holds
            its compiled update, so it does not travel with the policy.
    """

    optimizer: Any = None

    def __post_init__(self) -> None:
        if self.optimizer is not None and not (hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")):
            raise PolicyError(
                f"Outer({self.optimizer!r}) has no optimizer; give an optax.GradientTransformation, as optax.sgd(0.7)"
            )

    def __repr__(self) -> str:
        return "fm.Outer()" if self.optimizer is None else "fm.Outer(optimizer)"

    def describe(self) -> str:
        return "outer"


@register
class Mix(Apply, Value, frozen=True, tag=True):
    """Replicas and the home pull each other: both move by `pull` times their distance (Zhang et al., Deep learning with
    Elastic Averaging SGD, NeurIPS 2015). With k contributions at once the home moves by k · pull towards their mean.

    Raises:
        PolicyError: for a pull outside (0, 1].
    """

    pull: float

    def __post_init__(self) -> None:
        _check(self, "pull", 0 < _number(self.pull) <= 1, "it is a share of a distance; give a number in (0, 1]")

    def describe(self) -> str:
        return f"mix {self.pull:g}"


@register
class Consensus(Apply, Value, frozen=True, tag=True):
    """The consensus step of ADMM: the home keeps the mean of what replicas reported last, each its parameters plus its
    dual variables (Boyd et al., *Distributed Optimization and ADMM*, 2011; Zhang and Kwok, *Asynchronous Distributed
    ADMM*, ICML 2014). `Prox` says what penalty the global parameters have.

    A replica's steps minimise its own loss plus rho / 2 · |x - z + u|². Here z are the global parameters, and u its
    dual variables: after each round u grows by x - z.

    Raises:
        PolicyError: for a rho that is not a positive number.
    """

    rho: float

    @property
    def averages(self) -> bool:
        return False

    def __post_init__(self) -> None:
        _check(self, "rho", 0 < _number(self.rho) < math.inf, "a distance is multiplied by a number above 0")

    def describe(self) -> str:
        return f"consensus {self.rho:g}"


@register
class Vote(Apply, Value, frozen=True, tag=True):
    """Apply only the rows that win a vote: each contribution votes for its `rows` largest rows, and 2 · `rows` win.

    A row is what one index of a parameter's first dimension selects, such as a feature's histogram. Its size is its
    sum of squares. Rows with equal votes win by the size of their sum (Meng et al., PV-tree, NeurIPS 2016).

    Raises:
        PolicyError: for a number of rows below 1, and by the Trainer for more rows than a layer has.
    """

    rows: int

    def __post_init__(self) -> None:
        rows = whole(self.rows)
        _check(self, "rows", rows is not None and rows > 0, "the number of rows to vote for is an int of at least 1")

    def describe(self) -> str:
        return f"vote {self.rows}"


class Examples:
    """The inputs of a `Distill`. They are compared by identity, because arrays cannot be compared cheaply."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs


@register
class Distill(Apply, Value, frozen=True, tag=True):
    """Train a model of the original size to give the mean of the outputs of the replicas' models (Sun et al.,
    *Ensemble-compression*, ECML 2017; Lin et al., *FedDF*, NeurIPS 2020).

    The home computes the outputs of each model on the same examples, and averages them example by example. A student
    starts from the mean of the models' parameters, and learns these outputs. Its parameters are the new global ones.
    The outputs are those of the whole model, so all layers need the same policy, with `payload=flowml.Weights()`.

    Args:
        predict: `predict(params, inputs) -> outputs`, a function that JAX can trace; pytrees of floating arrays.
        inputs: the examples: arrays with a row an example, or a pytree of such arrays. Labels are not needed. They are
            compiled into the task of the home.
        steps: the steps of the student.
        optimizer: the student's `optax.GradientTransformation`. Its state begins anew with each student.
        loss: `loss(outputs, targets) -> scalar`, by default the mean of the squared differences.
        batch_size: the examples of a step, taken in order, round and round; by default all of them.

    Raises:
        PolicyError: for an argument that is out of range or of the wrong kind.
    """

    predict: Any
    inputs: Any
    steps: int
    optimizer: Any = None
    loss: Any = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = whole(getattr(self, name))
            absent = name == "batch_size" and self.batch_size is None
            _check(self, name, absent or (value is not None and value > 0), "give a whole number of at least 1")
            msgspec.structs.force_setattr(self, name, value)
        if self.travels:
            return
        for name, form in (("predict", "predict(params, inputs)"), ("loss", "loss(outputs, targets)")):
            value = getattr(self, name)
            absent = name == "loss" and value is None
            _check(self, name, absent or callable(value), f"give a function {form} that JAX can trace")
        if not (hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")):
            raise PolicyError(
                f"Distill(optimizer={self.optimizer!r}): the student needs an optimizer; give an "
                "optax.GradientTransformation, as optax.adam(1e-3)"
            )
        if not isinstance(self.inputs, Examples):
            msgspec.structs.force_setattr(self, "inputs", Examples(self.inputs))

    @property
    def travels(self) -> bool:
        """Whether it is the form in a plan, which holds the compiled distillation."""
        return self.predict is None and self.inputs is None and self.optimizer is None

    def describe(self) -> str:
        return f"distill {self.steps}"

    def __repr__(self) -> str:
        if self.travels:
            return f"fm.Distill(None, None, steps={self.steps})"
        given = [getattr(self.predict, "__name__", "predict").replace("<lambda>", "predict"), "inputs"]
        given += [f"steps={self.steps}", "optimizer=optimizer", *(["loss=loss"] if self.loss else [])]
        given += [f"batch_size={self.batch_size}"] if self.batch_size else []
        return f"fm.Distill({', '.join(given)})"


@register
class Prox(Apply, Value, frozen=True, tag=True):
    """Apply as `after` does, then take the proximal step of l1 · |x| + l2 / 2 · x² inside a box, number by number.

    The new value is the x between `low` and `high` that minimises ½ (x - updated)² + l1 · |x| + l2 / 2 · x². Both
    factors are those of one step, so multiply a penalty by the learning rate (Parikh and Boyd, Proximal Algorithms,
    2014).

    Raises:
        PolicyError: for a negative factor, an empty box, or no effect at all.
    """

    l1: float = 0.0
    l2: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    after: Apply = Mean()

    if TYPE_CHECKING:

        def __init__(
            self,
            l1: float = 0.0,
            l2: float = 0.0,
            low: float = -math.inf,
            high: float = math.inf,
            after: Apply | Literal["mean", "sum"] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "after", as_apply(self.after, "after", BASES))
        for name in ("l1", "l2"):
            _check(
                self, name, 0 <= _number(getattr(self, name)) < math.inf, "a penalty is multiplied by a number from 0"
            )
        if not _number(self.low) <= _number(self.high) or self.low == math.inf or self.high == -math.inf:
            raise PolicyError(f"Prox(low={self.low!r}, high={self.high!r}): no number lies in this box")
        if not self.l1 and not self.l2 and self.low == -math.inf and self.high == math.inf:
            raise PolicyError("Prox() changes nothing; give l1=, l2=, low= or high=")

    @property
    def averages(self) -> bool:
        return self.after.averages

    def scale(self, staleness: int) -> float:
        return self.after.scale(staleness)

    def describe(self) -> str:
        found = [self.after.describe()]
        found += [f"{name} {value:g}" for name, value in (("l1", self.l1), ("l2", self.l2)) if value]
        if (self.low, self.high) != (-math.inf, math.inf):
            found.append(f"box {self.low:g}..{self.high:g}")
        return " ".join(filter(None, found))


BASES = (Mean, Sum, StalenessScaled, Outer, Mix, Consensus, Vote, Distill)
APPLIES = (*BASES, Prox)
_NAMED: dict[object, Mean | Sum] = {"mean": Mean(), "sum": Sum()}


def as_apply(value: object, knob: str = "apply", kinds: tuple[type, ...] = APPLIES) -> Any:
    """The kind that a user gives by its name or as a value. Raises PolicyError for anything else."""
    found = _NAMED.get(value, value) if isinstance(value, str) else value
    if not isinstance(found, Apply) or (knob == "after" and isinstance(found, Prox)):
        if hasattr(value, "init") and hasattr(value, "update"):
            raise PolicyError(f"{knob}=... is an optax optimizer, not an apply; give {knob}=fm.Outer(optimizer)")
        if isinstance(value, type) and value in kinds:
            raise wrong_kind(knob, value, kinds)
        others = ", ".join(f"fm.{k.__name__}" for k in kinds if k not in (Mean, Sum))
        raise PolicyError(f"{knob}={value!r} is not available; give {knob}='mean', {knob}='sum', or one of {others}")
    check(Apply, found)
    return found


def base_of(apply: Apply) -> Apply:
    """The kind that decides the update, which `Prox` follows."""
    return apply.after if isinstance(apply, Prox) else apply


def scales(apply: Apply) -> bool:
    """Whether contributions count by their staleness."""
    return isinstance(base_of(apply), StalenessScaled)


def travelling(apply: Apply) -> Apply:
    """The kind without its functions, which the plan holds as compiled updates."""
    base = base_of(apply)
    if isinstance(base, Outer):
        base = Outer()
    elif isinstance(base, Distill):
        base = Distill(None, None, base.steps)
    else:
        return apply
    return msgspec.structs.replace(apply, after=base) if isinstance(apply, Prox) else base


def most_at_once(policy: Policy, replicas: int) -> float:
    """The most contributions of `replicas` that a home applies at once; infinite if late ones join a later clock."""
    members = policy.members(replicas)
    if policy.collective or members == 1:
        return 1
    if not policy.clocked:
        return policy.quorum.need(replicas)
    return math.inf if policy.quorum.late.folds else members


def unsound(apply: Apply, payload: str, *, collective: bool) -> str | None:
    """Why a kind is not sound with a payload of this name and the way it travels, and the nearest that is sound."""
    base = base_of(apply)
    if isinstance(base, Mix) and payload != "Weights":
        return (
            "replicas and home pull each other's parameters, so these have to be sent; use payload=Weights(), or "
            "apply='mean'"
        )
    if isinstance(base, Consensus) and payload != "Delta":
        return (
            "each replica has parameters and dual variables of its own, and sends their change; use payload=Delta(), "
            "or apply='mean'"
        )
    if isinstance(base, Distill) and payload != "Weights":
        return (
            "the outputs of whole models are averaged, so their parameters have to be sent; use payload=Weights(), or "
            "apply='mean'"
        )
    if payload == "Weights" and not isinstance(base, Mean | Mix | Distill):
        return (
            "parameters can be averaged, but not added up, scaled, or used as a gradient; use payload=Delta(), or "
            "apply='mean'"
        )
    if isinstance(base, Vote) and payload == "Delta":
        return "a vote leaves out rows of a gradient; use payload=Gradient(), or apply='mean'"
    if collective and isinstance(base, StalenessScaled):
        return "a sum over all replicas is never stale; use apply='mean'"
    if collective and isinstance(base, Vote):
        return (
            "a vote needs each contribution, and a home gets only their sum; use topology=ParameterServer(), or "
            "apply='mean'"
        )
    return None


def _number(value: object) -> float:
    """A number of the user's as a float; NaN, which no range holds, for anything else."""
    found = real(value)
    return math.nan if found is None else found


def _check(kind: object, name: str, sound: bool, reason: str) -> None:
    if not sound:
        raise PolicyError(f"{type(kind).__name__}({name}={getattr(kind, name)!r}): {reason}")
