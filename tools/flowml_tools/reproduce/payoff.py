"""What filters cost and save, for the claims about compressed gradients.

A filter pays on a link that carries fewer bytes a second than it saves in a second of its own work, encoding and
decoding. That work is counted in seconds of a core, which hardly depend on what else runs on the machine: wall seconds
differ by a factor of four between runs. Rounds of the two ways to encode alternate, and the median of the cheaper one
counts. The rate still differs between machines, so a finding about it is `timed`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowml_tools.bench import filters as cost
from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Finding, at_least
from flowml_tools.reproduce.learning import final_loss, loss, problem, pushed, train

REPLICAS, SIDE = 4, 1024
ROUNDS, FIRST = 11, 2
"""The rounds that count, after first ones that compile."""
ETHERNET = 125e6
"""Bytes a second of a link of 1 Gbit/s."""
SETTING = (
    f"{REPLICAS} replicas, a network of 32 x 64 x 8 on data of 8 classes, SGD, real arithmetic. Cost: encoding and "
    f"decoding an array of {SIDE} x {SIDE} in seconds of one core of this machine, the median of {ROUNDS} rounds and "
    "the range of the middle half."
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
    rates: tuple[float, ...]
    """The rates of a link, in bytes a second, below which the filters pay for that array, one of each round."""
    ours: tuple[tuple[float, float], ...]
    """The kilobytes that replicas have pushed, and the loss of the training examples then."""
    plain: tuple[tuple[float, float], ...]
    """The same without filters."""


def measure(chain: Sequence[Any], *, steps: int, seed: int, rate: float) -> Payoff:
    import optax

    import flowml as fm

    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    ours, plain = (
        train(policy, REPLICAS, steps=steps, seed=seed, problem=task, optimizer=optax.sgd(rate), batch=64)
        for policy in (fm.Policy(filters=chain), fm.Policy())
    )
    value = _large(seed)
    saved = value.nbytes * (1 - 1 / fewer(chain, seed))
    return Payoff(
        pushed(plain) / pushed(ours),
        fewer(chain, seed),
        final_loss(task, ours) / final_loss(task, plain),
        tuple(saved / seconds for seconds in core_seconds(chain, value)),
        course(ours),
        course(plain),
    )


def core_seconds(chain: Sequence[Any], value: Any) -> list[float]:
    """What encoding and decoding take of the machine's cores in each round, in the way that takes less."""
    import jax

    from flowml.policy import filters as f
    from flowml_runtime.execution.kernels import Kernels

    ways = [Kernels(jax.local_devices()[0], way) for way in ("jax", "numpy")]
    states: list[f.State] = [{} for _ in ways]
    found: list[list[float]] = [[] for _ in ways]
    form = f.Form(value.shape, value.dtype)
    for clock in range(FIRST + ROUNDS):
        for i, run in enumerate(ways):
            began = time.process_time()
            wire, states[i] = f.encode(tuple(chain), value, states[i], f.Context((clock,), clock, run=run))
            decoded, _ = f.decode(tuple(chain), iter(wire), form, {}, run)
            jax.block_until_ready(decoded)
            found[i].append(time.process_time() - began)
    return min((seconds[FIRST:] for seconds in found), key=statistics.median)


def pays(what: str, found: Payoff, link: float = ETHERNET) -> Finding:
    """Agrees if the filters pay on a link of `link` bytes a second."""
    low, median, high = (rate / 1e6 for rate in statistics.quantiles(found.rates, n=4))
    finding = at_least(what, link / 1e6, median, "{:.0f}")
    return replace(finding, ours=f"{median:.0f} ({low:.0f} to {high:.0f})", timed=True)


def plot(title: str, **ours: Payoff) -> Plot:
    """The loss against what was pushed, of fits with filters and of one without. `_` in a name is a space."""
    plain = next(iter(ours.values())).plain
    lines = [Line(name.replace("_", " "), found.ours) for name, found in ours.items()]
    return Plot(title, "kB pushed by all replicas", "loss", (Line("plain gradients", plain), *lines), log_x=True)


def course(result: Any, parts: int = 12) -> tuple[tuple[float, float], ...]:
    """Mean losses of so many parts of a fit."""
    losses = [float(record["loss"]) for record in result.history]
    size = max(len(losses) // parts, 1)
    each = pushed(result) / len(losses) / 1e3
    return tuple(
        ((i + size) * each, statistics.fmean(losses[i : i + size])) for i in range(0, len(losses) - size + 1, size)
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
