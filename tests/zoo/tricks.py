"""Loops of regressions and classifiers whose steps do something special: with the optimizer, the gradients or the
precision. And the libraries whose models are no dicts."""

from __future__ import annotations

import importlib
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import lax

import flowml as fm
from tests.zoo.loop import ROWS, STEPS, Made, Supervised, apply, batches, cross_entropy, dense, normal, rows, tokens

SIZES = ((6, 16), (16, 16), (16, 3))


def net() -> Any:
    return {f"fc{i}": dense(i, *sizes) for i, sizes in enumerate(SIZES)}


def run(params: Any, x: Any) -> Any:
    for i in range(len(SIZES)):
        with fm.layer(f"fc{i}"):
            x = apply(params[f"fc{i}"], x if not i else jnp.tanh(x))
    return x


def error(params: Any, batch: Any) -> Any:
    return jnp.mean((run(params, batch["x"]) - batch["y"]) ** 2)


def _parts() -> list[Any]:
    source = rows(3)
    return [{k: v[i * ROWS :][:ROWS] for k, v in source.items()} for i in range(STEPS)]


def plain_sgd() -> Supervised:
    return Supervised(error, optax.sgd(0.1, momentum=0.9, nesterov=True), net(), rows(3))


def lookahead() -> Made:
    """Slow parameters follow fast ones."""
    optimizer = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        value, gradients = jax.value_and_grad(error)(params.fast, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    params = optax.LookaheadParams.init_synced(net())
    return Made(step, (params, optimizer.init(params)), _parts())


def multi_steps() -> Made:
    """Gradients of two batches for each update, by `optax.MultiSteps`."""
    optimizer = optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2)

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        value, gradients = jax.value_and_grad(error)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return Made(step, (net(), optimizer.init(net())), _parts())


def accumulation() -> Made:
    """Gradients of four microbatches, added up in a scan."""
    optimizer = optax.adamw(1e-2)

    def step(state: Any, batch: Any) -> Any:
        params, moments = state

        def add(total: Any, part: Any) -> Any:
            value, gradients = jax.value_and_grad(error)(params, part)
            return jax.tree.map(jnp.add, total, gradients), value

        parts = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
        total, values = lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        updates, moments = optimizer.update(jax.tree.map(lambda g: g / 4, total), moments, params)
        return (optax.apply_updates(params, updates), moments), values.mean()

    return Made(step, (net(), optimizer.init(net())), _parts())


def frozen() -> Supervised:
    """Only the head is trained."""
    labels = {"fc0": "frozen", "fc1": "frozen", "fc2": "trained"}
    optimizer = optax.multi_transform({"frozen": optax.set_to_zero(), "trained": optax.adam(1e-2)}, labels)
    return Supervised(error, optimizer, net(), rows(5))


def mixed_precision() -> Made:
    """Computes in float16 with a scale that halves when a gradient overflows and doubles after some good steps."""
    optimizer = optax.adam(1e-2)

    def step(state: Any, batch: Any) -> Any:
        params, moments, (scale, good) = state

        def scaled(params: Any) -> Any:
            half = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch))
            return error(*half).astype(jnp.float32) * scale

        value, gradients = jax.value_and_grad(scaled)(params)
        gradients = jax.tree.map(lambda g: g / scale, gradients)
        finite = jnp.all(jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)]))
        updates, new = optimizer.update(gradients, moments, params)
        new = optax.apply_updates(params, updates), new
        params, moments = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, (params, moments))
        grown = jnp.where(good >= 1, scale * 2, scale)
        scale, good = jnp.where(finite, grown, scale / 2), jnp.where(finite, (good + 1) % 2, 0)
        return (params, moments, (scale, good)), {"loss": value / scale, "finite": finite}

    return Made(step, (net(), optimizer.init(net()), (jnp.float32(2.0**17), jnp.int32(0))), _parts())


def private() -> Made:
    """Differential privacy: the gradient of each example is clipped, and noise is added to their sum."""
    optimizer = optax.sgd(0.1)

    def step(state: Any, batch: Any) -> Any:
        params, moments, key = state
        key, sub = jax.random.split(key)
        one = lambda p, x, y: error(p, {"x": x[None], "y": y[None]})  # noqa: E731
        values, gradients = jax.vmap(jax.value_and_grad(one), (None, 0, 0))(params, batch["x"], batch["y"])
        norms = jax.vmap(optax.tree.norm)(gradients)
        shares = 1 / jnp.maximum(norms, 1.0)
        keys = jax.tree.unflatten(jax.tree.structure(params), list(jax.random.split(sub, len(jax.tree.leaves(params)))))
        clipped = jax.tree.map(lambda g: jnp.einsum("b...,b->...", g, shares), gradients)
        noisy = jax.tree.map(lambda g, k: (g + 0.5 * jax.random.normal(k, g.shape)) / ROWS, clipped, keys)
        updates, moments = optimizer.update(noisy, moments, params)
        return (optax.apply_updates(params, updates), moments, key), (values.mean(), norms)

    return Made(step, (net(), optimizer.init(net()), jax.random.key(3)), _parts())


def ema_targets() -> Made:
    """Learns to predict what a slow copy of itself makes of another view of the same example."""
    optimizer = optax.adam(1e-2)

    def step(state: Any, x: Any) -> Any:
        key, one, two = jax.random.split(state["key"], 3)
        views = [x + 0.1 * jax.random.normal(k, x.shape) for k in (one, two)]
        target = jax.nn.standardize(run(state["slow"], views[1]))

        def loss(params: Any) -> Any:
            with fm.layer("predictor"):
                found = apply(params["predictor"], run(params["net"], views[0]))
                return jnp.mean((jax.nn.standardize(found) - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, moments = optimizer.update(gradients, state["moments"])
        params = optax.apply_updates(state["params"], updates)
        slow = optax.incremental_update(params["net"], state["slow"], 0.1)
        return {"params": params, "slow": slow, "moments": moments, "key": key}, value

    params = {"net": net(), "predictor": dense(9, 3, 3)}
    state = {"params": params, "slow": net(), "moments": optimizer.init(params), "key": jax.random.key(0)}
    return Made(step, state, batches(4, ROWS, 6))


def maml() -> Supervised:
    """The gradient through an inner step of gradient descent, for each of the tasks of a batch."""

    def loss(params: Any, tasks: Any) -> Any:
        def adapted(task: Any) -> Any:
            gradients = jax.grad(error)(params, {"x": task["x"], "y": task["y"]})
            inner = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
            return error(inner, {"x": task["x2"], "y": task["y2"]})

        return jnp.mean(jax.vmap(adapted)(tasks))

    tasks = {"x": normal(0, STEPS * ROWS, 4, 6), "x2": normal(1, STEPS * ROWS, 4, 6)}
    slopes = normal(2, STEPS * ROWS, 6, 3) / 3
    tasks |= {"y": tasks["x"] @ slopes, "y2": tasks["x2"] @ slopes}
    return Supervised(loss, optax.adam(1e-2), net(), tasks)


def sharpness_aware() -> Made:
    """The gradient at the worst point nearby: two gradients a step, of which the first sets the point."""
    optimizer = optax.sgd(0.1)

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        value, gradients = jax.value_and_grad(error)(params, batch)
        norm = optax.tree.norm(gradients)
        worst = jax.tree.map(lambda p, g: p + 0.05 * g / norm, params, gradients)
        updates, moments = optimizer.update(jax.grad(error)(worst, batch), moments, params)
        return (optax.apply_updates(params, updates), moments), {"loss": value, "norm": norm}

    return Made(step, (net(), optimizer.init(net())), _parts())


def distillation() -> Made:
    """A teacher that stays as it is, beside the student that is trained."""
    optimizer = optax.novograd(1e-2)

    def step(state: Any, x: Any) -> Any:
        with fm.layer("teacher"):
            goal = jax.nn.softmax(apply(state["teacher"], x) / 2)

        def loss(student: Any) -> Any:
            return optax.safe_softmax_cross_entropy(run(student, x) / 2, goal).mean()

        value, gradients = jax.value_and_grad(loss)(state["student"])
        updates, moments = optimizer.update(gradients, state["moments"], state["student"])
        student = optax.apply_updates(state["student"], updates)
        return {"teacher": state["teacher"], "student": student, "moments": moments}, value

    state = {"teacher": dense(30, 6, 3), "student": net(), "moments": optimizer.init(net())}
    return Made(step, state, batches(4, ROWS, 6))


def contrastive() -> Made:
    """Two encoders and a temperature; each example is told from the others of its batch."""
    optimizer = optax.adam(1e-2)

    def loss(params: Any, batch: Any) -> Any:
        sides: list[Any] = []
        for name in ("image", "text"):
            with fm.layer(name):
                z = apply(params[name]["out"], jax.nn.gelu(apply(params[name]["in"], batch[name])))
                sides.append(z / jnp.linalg.norm(z, axis=-1, keepdims=True))
        with fm.layer("match"):
            scores = sides[0] @ sides[1].T * jnp.exp(params["heat"])
            return (cross_entropy(scores, jnp.arange(ROWS)) + cross_entropy(scores.T, jnp.arange(ROWS))) / 2

    def step(state: Any, batch: Any) -> Any:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    sides = {n: {"in": dense(i, 6, 16), "out": dense(i + 1, 16, 4)} for i, n in ((0, "image"), (2, "text"))}
    params = sides | {"heat": jnp.zeros(())}
    pairs = [{"image": x, "text": y} for x, y in zip(batches(5, ROWS, 6), batches(6, ROWS, 6), strict=True)]
    return Made(step, (params, optimizer.init(params)), pairs)


def line_search() -> Made:
    """The optimizer evaluates the loss itself, in a loop, until a step is short enough."""
    optimizer = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=4))

    def step(state: Any, batch: Any) -> Any:
        params, memory = state

        def loss(params: Any) -> Any:
            return error(params, batch)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, memory = optimizer.update(gradients, memory, params, value=value, grad=gradients, value_fn=loss)
        return (optax.apply_updates(params, updates), memory), value

    return Made(step, (net(), optimizer.init(net())), _parts())


def linen_train_state() -> Made:
    """Flax's own `TrainState`, with functions among its fields."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Dense(16, name="fc0")(x))
            return nn.Dense(3, name="fc1")(nn.LayerNorm(name="norm")(x))

    def step(state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = state.apply_fn({"params": params}, batch["x"])
            return cross_entropy(logits, batch["label"]), jnp.mean(logits.argmax(-1) == batch["label"])

        (value, right), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients), {"loss": value, "accuracy": right}

    model = Net()
    params: Any = model.init(jax.random.key(0), jnp.zeros((1, 6)))
    state = train_state.TrainState.create(apply_fn=model.apply, params=params["params"], tx=optax.adam(1e-2))
    state = state.replace(step=jnp.int32(0))
    found = [{"x": x, "label": tokens(i, ROWS, most=3)} for i, x in enumerate(batches(7, ROWS, 6))]
    return Made(step, state, found)


def equinox_mlp() -> Made:
    """An equinox module as the state: its functions are static leaves."""
    optimizer = optax.adam(1e-2)

    def step(state: Any, batch: Any) -> Any:
        model, moments = state

        @eqx.filter_value_and_grad
        def gradient(model: Any) -> Any:
            return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)

        value, gradients = gradient(model)
        updates, moments = optimizer.update(gradients, moments, eqx.filter(model, eqx.is_inexact_array))
        return (eqx.apply_updates(model, updates), moments), value

    model = eqx.nn.MLP(6, 3, 16, 2, key=jax.random.key(0))
    state = model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return Made(step, state, _parts(), jit=eqx.filter_jit)


def haiku_batch_norm() -> Supervised:
    """A haiku model with state and dropout."""
    hk: Any = importlib.import_module("haiku")  # it has no types

    def forward(x: Any) -> Any:
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(16, with_bias=False)(x), is_training=True))
        return hk.Linear(3, name="head")(hk.dropout(hk.next_rng_key(), 0.2, x))

    model = hk.transform_with_state(forward)
    params, state = model.init(jax.random.key(0), jnp.zeros((2, 6)))

    def loss(params: Any, state: Any, batch: Any, rng: Any) -> Any:
        y, new = model.apply(params, state, rng, batch["x"])
        return jnp.mean((y - batch["y"]) ** 2), new

    return Supervised(loss, optax.adam(1e-2), params, rows(6), state=state, rng=True)
