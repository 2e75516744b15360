"""Defines what replicas send: gradients, the factors of gradients, or parameters of their own."""

from __future__ import annotations

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import real
from flowml.policy.wording import Value


class Gradient(Value, frozen=True, tag=True):
    """Replicas send gradients, summed over the microbatches and steps since their last push."""


class Factors(Value, frozen=True, tag=True):
    """Replicas send the operands a and δ of the product aᵀδ, and the home forms the gradient.

    This sends less for a large dense layer and a small batch (Chilimbi et al., Project Adam, OSDI 2014).
    """


class Delta(Value, frozen=True, tag=True):
    """Replicas update local parameters, and send the parameters they started from minus their local ones.

    `alpha` is the share of its own value that a replica keeps when it takes the global one: 0 takes the global value,
    1 keeps its own (Douillard et al., Streaming DiLoCo, 2025).
    """

    alpha: float = 0.0

    def __post_init__(self) -> None:
        _check_alpha(self)


class Weights(Value, frozen=True, tag=True):
    """Replicas update local parameters, and send these. `alpha` is as in `Delta`."""

    alpha: float = 0.0

    def __post_init__(self) -> None:
        _check_alpha(self)


LocalPayload = Delta | Weights
"""Each replica keeps a copy of the parameters and of the optimizer's state, and updates it at every step."""

Payload = Gradient | Factors | LocalPayload

PAYLOADS = (Gradient, Factors, Delta, Weights)


def _share(value: object) -> float | None:
    """A number from 0 to 1 as a float; None for anything else."""
    found = real(value)
    return found if found is not None and 0 <= found <= 1 else None


def _check_alpha(payload: LocalPayload) -> None:
    value = _share(payload.alpha)
    if value is None:
        raise PolicyError(
            f"{type(payload).__name__}(alpha={payload.alpha!r}): it is the share of its own value that a replica "
            "keeps; give a number from 0 to 1"
        )
    msgspec.structs.force_setattr(payload, "alpha", value)
