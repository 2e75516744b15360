"""A training loop of the zoo: a step as someone has written it for `jax.jit`, its first state, and its batches.

    made = loop.make()
    for batch in made.batches:
        state, metrics = jax.jit(made.step)(state, batch)

Most are made of a loss and an optimizer (`Supervised`), and these a `Trainer` runs too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 6
ROWS = 8

Tree = dict[str, Any]


class Made(NamedTuple):
    """`step(state, batch)` -> (state, metrics), and what someone has called in place of `fm.dataflow`."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batches: Sequence[Any]
    jit: Callable[..., Any] = jax.jit


@dataclass(frozen=True)
class Supervised:
    """`loss(params, [state, ]batch[, rng])` -> a mean over examples, with `state` if the model has some."""

    loss: Callable[..., Any]
    optimizer: Any
    params: Any
    source: Any
    state: Any = None
    rng: bool = False

    def made(self) -> Made:
        """The loop: the key is split in each step, as public scripts do."""
        gradient = jax.value_and_grad(self.loss, has_aux=self.state is not None)

        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            beside, found = (state["model"],) if self.state is not None else (), {}
            key, sub = jax.random.split(state["key"]) if self.rng else (None, None)
            value, gradients = gradient(state["params"], *beside, batch, *([sub] if self.rng else []))
            updates, opt_state = self.optimizer.update(gradients, state["opt_state"], state["params"])
            if self.state is not None:
                value, found["model"] = value
            if self.rng:
                found["key"] = key
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "opt_state": opt_state, **found}, {"loss": value}

        state = {"params": self.params, "opt_state": self.optimizer.init(self.params)}
        state |= {"model": self.state} if self.state is not None else {}
        state |= {"key": jax.random.key(7)} if self.rng else {}
        return Made(step, state, [_rows(self.source, i) for i in range(STEPS)])


def _rows(source: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x[number * ROWS :][:ROWS], source)


@dataclass(frozen=True)
class Loop:
    """`layers` are patterns of the layers on the first worker, and of those on the second one. `tolerance` bounds
    differences, relative to the largest value of an array."""

    name: str
    make: Callable[[], Made | Supervised]
    layers: tuple[tuple[str, ...], tuple[str, ...]]
    tolerance: float = 1e-4


def normal(seed: int, *shape: int) -> Any:
    """Normal numbers by NumPy, which compiles nothing."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tokens(seed: int, *shape: int, most: int = 11) -> Any:
    return np.random.default_rng(seed).integers(0, most, shape).astype(np.int32)


def dense(seed: int, inputs: int, outputs: int) -> Tree:
    return {"w": jnp.asarray(normal(seed, inputs, outputs) / inputs**0.5), "b": jnp.zeros(outputs)}


def apply(layer: Any, x: Any) -> Any:
    return x @ layer["w"] + layer["b"]


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def rows(seed: int, features: int = 6, outputs: int = 3) -> Tree:
    """STEPS batches of a regression."""
    x = normal(seed, STEPS * ROWS, features)
    return {"x": x, "y": np.tanh(x @ normal(seed + 1, features, outputs))}


def batches(seed: int, *shape: int) -> list[Any]:
    """STEPS batches of normal numbers."""
    return list(normal(seed, STEPS, *shape))
