"""What filters cost and save, for the claims about compressed gradients.

A filter pays on a link that carries fewer bytes a second than it saves in a second of its own work, encoding and
decoding. That time is measured on this machine, so the rate differs between machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowml_tools.bench import filters as cost
from flowml_tools.reproduce.learning import final_loss, loss, problem, pushed, train

REPLICAS, SIDE = 4, 1024
SETTING = (
    f"{REPLICAS} replicas, a network of 32 x 64 x 8 on data of 8 classes, SGD, real arithmetic. Cost: encoding and "
    f"decoding an array of {SIDE} x {SIDE} on this machine, in measured seconds."
)


@dataclass(frozen=True)
class Payoff:
    """What a chain of filters does to a fit, and to one large array."""

    fewer: float
    """Bytes of plain gradients, as a multiple of those that the filtered fit pushes."""
    large: float
    """The same for one array of SIDE x SIDE."""
    loss: float
    """Loss after as many steps as without filters, as a multiple."""
    pays_below: float
    """The rate of a link, in bytes a second, below which the filters pay for that array."""


def measure(chain: Sequence[Any], *, steps: int, seed: int, rate: float) -> Payoff:
    import jax
    import optax

    import flowml as fm
    from flowml_runtime.execution.kernels import Kernels

    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    ours, plain = (
        train(policy, REPLICAS, steps=steps, seed=seed, problem=task, optimizer=optax.sgd(rate), batch=64)
        for policy in (fm.Policy(filters=chain), fm.Policy())
    )
    value = _large(seed)
    ways = [Kernels(jax.local_devices()[0], way) for way in ("jax", "numpy")]
    seconds = min(cost.sample(run, tuple(chain), value, 3).median for run in ways)
    saved = value.nbytes * (1 - 1 / fewer(chain, seed))
    return Payoff(
        pushed(plain) / pushed(ours),
        fewer(chain, seed),
        final_loss(task, ours) / final_loss(task, plain),
        saved / seconds,
    )


def fewer(chain: Sequence[Any], seed: int) -> float:
    """Bytes of an array of SIDE x SIDE, as a multiple of those that the filters leave."""
    import jax

    from flowml_runtime.execution.kernels import Kernels

    value = _large(seed)
    return value.nbytes / cost.sent(Kernels(jax.local_devices()[0], "numpy"), tuple(chain), value)


def _large(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).normal(size=(SIDE, SIDE)).astype(np.float32)
