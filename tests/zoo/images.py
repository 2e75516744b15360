"""Loops of models of images, each small: classifiers with batch statistics and dropout, and generators."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import flowml as fm
from tests.zoo.loop import ROWS, STEPS, Made, Supervised, apply, batches, cross_entropy, dense, normal, tokens


def digits() -> dict[str, Any]:
    return {"image": normal(0, STEPS * ROWS, 8, 8, 1), "label": tokens(1, STEPS * ROWS, most=3)}


def mnist_linen() -> Supervised:
    """Batch statistics and dropout in flax linen."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
            x = nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
            x = nn.relu(nn.Dense(16, name="fc1")(x))
            return nn.Dense(3, name="fc2")(nn.Dropout(0.25, deterministic=not train)(x))

    net = Net()
    variables: Any = net.init(jax.random.key(0), digits()["image"][:1], train=False)

    def loss(params: Any, stats: Any, batch: Any, rng: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        given = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": rng}}
        logits, new = net.apply(variables, batch["image"], **given)
        return cross_entropy(logits, batch["label"]), new["batch_stats"]

    params, stats = variables["params"], variables["batch_stats"]
    return Supervised(loss, optax.adam(1e-2), params, digits(), state=stats, rng=True)


def mnist_nnx() -> Supervised:
    """The same in flax nnx, split into its graph, parameters and the rest."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.drop = nnx.Dropout(0.25, rngs=rngs)
            self.fc1 = nnx.Linear(64, 16, rngs=rngs)
            self.fc2 = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.relu(self.norm(self.conv(x)))
            x = nnx.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
            return self.fc2(self.drop(nnx.relu(self.fc1(x))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        net = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
        logits = net(batch["image"])
        return cross_entropy(logits, batch["label"]), nnx.split(net, nnx.Param, ...)[2]

    return Supervised(loss, optax.sgd(0.05, momentum=0.9), params, digits(), state=rest)


def vit() -> Supervised:
    """A vision transformer: patches, positions, attention with a class token."""
    width, patches = 8, 16

    def attend(p: Any, x: Any) -> Any:
        q, k, v = jnp.einsum("blw,nwd->nbld", x, p["qkv"])
        return jax.nn.softmax(q @ k.mT / width**0.5) @ v

    def loss(params: Any, batch: Any) -> Any:
        with fm.layer("embed"):
            x = batch["image"].reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, patches, 4)
            x = apply(params["embed"], x)
            x = jnp.concatenate([jnp.broadcast_to(params["token"], (len(x), 1, width)), x], 1) + params["place"]
        for i in range(2):
            with fm.layer(f"block{i}"):
                p = params[f"block{i}"]
                x = x + attend(p, jax.nn.standardize(x))
                x = x + apply(p["down"], jax.nn.gelu(apply(p["up"], jax.nn.standardize(x))))
        with fm.layer("head"):
            return cross_entropy(apply(params["head"], x[:, 0]), batch["label"])

    def block(seed: int) -> Any:
        return {
            "qkv": jnp.asarray(normal(seed, 3, width, width) / 3),
            "up": dense(seed + 4, width, 16),
            "down": dense(seed + 5, 16, width),
        }

    params = {"embed": dense(0, 4, width), "block0": block(10), "block1": block(20), "head": dense(1, width, 3)}
    params |= {"token": jnp.zeros((1, 1, width)), "place": jnp.asarray(normal(2, 1, patches + 1, width) / 10)}
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, STEPS)
    return Supervised(loss, optax.chain(optax.clip(0.5), optax.adamw(schedule)), params, digits())


def vae() -> Supervised:
    """A variational autoencoder with the reparameterization trick."""

    def loss(params: Any, batch: Any, rng: Any) -> Any:
        x = batch["x"]
        with fm.layer("encoder"):
            mean, log_var = jnp.split(
                apply(params["encoder"]["out"], jnp.tanh(apply(params["encoder"]["in"], x))), 2, -1
            )
            z = mean + jnp.exp(log_var / 2) * jax.random.normal(rng, mean.shape)
        with fm.layer("decoder"):
            y = apply(params["decoder"]["out"], jnp.tanh(apply(params["decoder"]["in"], z)))
            error = jnp.sum((y - x) ** 2, -1)
        with fm.layer("divergence"):
            return jnp.mean(error - 0.5 * jnp.sum(1 + log_var - mean**2 - jnp.exp(log_var), -1))

    params = {
        "encoder": {"in": dense(0, 12, 16), "out": dense(1, 16, 4)},
        "decoder": {"in": dense(2, 2, 16), "out": dense(3, 16, 12)},
    }
    return Supervised(loss, optax.adam(1e-2), params, {"x": normal(4, STEPS * ROWS, 12)}, rng=True)


def _generate(params: Any, z: Any) -> Any:
    with fm.layer("generator"):
        return apply(params["out"], jax.nn.relu(apply(params["in"], z)))


def _judge(params: Any, x: Any) -> Any:
    with fm.layer("critic"):
        return apply(params["out"], jax.nn.leaky_relu(apply(params["in"], x)))[..., 0]


def _adversaries() -> tuple[Any, Any]:
    return (
        {"in": dense(0, 4, 16), "out": dense(1, 16, 6)},
        {"in": dense(2, 6, 16), "out": dense(3, 16, 1)},
    )


def gan() -> Made:
    """Two losses and two optimizers that take turns."""
    optimizers = optax.adam(1e-2), optax.adam(5e-3)

    def step(state: Any, real: Any) -> Any:
        key, one, two = jax.random.split(state["key"], 3)
        (generator, critic), moments = state["params"], state["moments"]

        def critic_loss(critic: Any) -> Any:
            fake = _generate(generator, jax.random.normal(one, (ROWS, 4)))
            right = optax.sigmoid_binary_cross_entropy(_judge(critic, real), jnp.ones(ROWS))
            return jnp.mean(right + optax.sigmoid_binary_cross_entropy(_judge(critic, fake), jnp.zeros(ROWS)))

        critic_value, gradients = jax.value_and_grad(critic_loss)(critic)
        updates, second = optimizers[1].update(gradients, moments[1])
        critic = optax.apply_updates(critic, updates)

        def generator_loss(generator: Any) -> Any:
            fake = _generate(generator, jax.random.normal(two, (ROWS, 4)))
            return jnp.mean(optax.sigmoid_binary_cross_entropy(_judge(critic, fake), jnp.ones(ROWS)))

        value, gradients = jax.value_and_grad(generator_loss)(generator)
        updates, first = optimizers[0].update(gradients, moments[0])
        generator = optax.apply_updates(generator, updates)
        found = {"params": (generator, critic), "moments": (first, second), "key": key}
        return found, {"generator": value, "critic": critic_value}

    params = _adversaries()
    moments = tuple(o.init(p) for o, p in zip(optimizers, params, strict=True))
    return Made(step, {"params": params, "moments": moments, "key": jax.random.key(0)}, batches(5, ROWS, 6))


def wgan_gp() -> Made:
    """A gradient of a gradient: the penalty. The critic takes two steps for each of the generator, in a scan."""
    optimizer = optax.adam(1e-2, b1=0.5)

    def critic_loss(critic: Any, generator: Any, real: Any, key: Any) -> Any:
        one, two = jax.random.split(key)
        fake = _generate(generator, jax.random.normal(one, (ROWS, 4)))
        share = jax.random.uniform(two, (ROWS, 1))
        slope = jax.vmap(jax.grad(lambda x: _judge(critic, x)))(share * real + (1 - share) * fake)
        penalty = jnp.mean((jnp.linalg.norm(slope, axis=-1) - 1) ** 2)
        return jnp.mean(_judge(critic, fake)) - jnp.mean(_judge(critic, real)) + 10 * penalty

    def step(state: Any, real: Any) -> Any:
        (generator, critic), (first, second), key = state
        key, *subs = jax.random.split(key, 4)

        def critic_step(carry: Any, sub: Any) -> Any:
            critic, second = carry
            value, gradients = jax.value_and_grad(critic_loss)(critic, generator, real, sub)
            updates, second = optimizer.update(gradients, second)
            return (optax.apply_updates(critic, updates), second), value

        with fm.layer("critic"):
            (critic, second), values = lax.scan(critic_step, (critic, second), jnp.stack(subs[:2]))

        def generator_loss(generator: Any) -> Any:
            return -jnp.mean(_judge(critic, _generate(generator, jax.random.normal(subs[2], (ROWS, 4)))))

        value, gradients = jax.value_and_grad(generator_loss)(generator)
        updates, first = optimizer.update(gradients, first)
        return ((optax.apply_updates(generator, updates), critic), (first, second), key), (value, values)

    params = _adversaries()
    return Made(step, (params, tuple(map(optimizer.init, params)), jax.random.key(1)), batches(6, ROWS, 6))


def diffusion() -> Supervised:
    """Denoising diffusion: a time and a noise for each example, and a network with an embedding of the time."""
    levels = 10
    kept = jnp.cumprod(1 - jnp.linspace(1e-2, 0.3, levels))

    def loss(params: Any, x: Any, rng: Any) -> Any:
        one, two = jax.random.split(rng)
        with fm.layer("noise"):
            t = jax.random.randint(one, (len(x),), 0, levels)
            noise = jax.random.normal(two, x.shape)
            noisy = jnp.sqrt(kept[t])[:, None] * x + jnp.sqrt(1 - kept[t])[:, None] * noise
        with fm.layer("time"):
            angle = t[:, None] / 100 ** (jnp.arange(4) / 4)
            h = apply(params["time"], jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1))
        with fm.layer("down"):
            h = jax.nn.silu(apply(params["down"], noisy) + h)
        with fm.layer("up"):
            return jnp.mean((apply(params["up"], h) - noise) ** 2)

    params = {"time": dense(0, 8, 16), "down": dense(1, 6, 16), "up": dense(2, 16, 6)}
    return Supervised(loss, optax.adam(1e-2), params, normal(3, STEPS * ROWS, 6), rng=True)
