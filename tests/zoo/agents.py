"""Loops of agents and samplers: policies, values and target networks, and Hamiltonian Monte Carlo."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import flowml as fm
from tests.zoo.loop import ROWS, STEPS, Made, apply, dense, normal, tokens

SENSES, ACTIONS = 5, 3


def _net(seed: int, inputs: int, outputs: int) -> Any:
    return {"in": dense(seed, inputs, 16), "out": dense(seed + 1, 16, outputs)}


def _run(name: str, params: Any, x: Any) -> Any:
    with fm.layer(name):
        return apply(params["out"], jnp.tanh(apply(params["in"], x)))


def _experience(discrete: bool = True) -> list[Any]:
    found: list[Any] = []
    for i in range(STEPS):
        action = tokens(i, ROWS, most=ACTIONS) if discrete else np.tanh(normal(i, ROWS, 2))
        one = {"seen": normal(10 + i, ROWS, SENSES), "next": normal(20 + i, ROWS, SENSES), "action": action}
        over = (np.arange(ROWS) % 4 == 3).astype(np.float32)
        found.append(one | {"reward": normal(30 + i, ROWS), "over": over})
    return found


def ppo() -> Made:
    """Advantages by a reversed scan, then two epochs over two shuffled halves of what was seen, in a scan of scans."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))

    def advantages(values: Any, batch: Any) -> Any:
        def back(after: Any, at: Any) -> Any:
            value, following, reward, over = at
            after = reward + 0.99 * following * (1 - over) - value + 0.95 * 0.99 * (1 - over) * after
            return after, after

        following = jnp.append(values[1:], values[-1])
        return lax.scan(back, 0.0, (values, following, batch["reward"], batch["over"]), reverse=True)[1]

    def loss(params: Any, part: Any) -> Any:
        chances = jax.nn.log_softmax(_run("actor", params["actor"], part["seen"]))
        taken = jnp.take_along_axis(chances, part["action"][:, None], 1)[:, 0]
        ratio = jnp.exp(taken - part["chance"])
        clipped = jnp.minimum(ratio * part["gain"], jnp.clip(ratio, 0.8, 1.2) * part["gain"])
        error = (_run("critic", params["critic"], part["seen"])[:, 0] - part["target"]) ** 2
        return -clipped.mean() + 0.5 * error.mean() + 0.01 * jnp.sum(jnp.exp(chances) * chances, -1).mean()

    def step(state: Any, batch: Any) -> Any:
        params, moments, key = state
        key, sub = jax.random.split(key)
        values = _run("critic", params["critic"], batch["seen"])[:, 0]
        gain = advantages(values, batch)
        chances = jax.nn.log_softmax(_run("actor", params["actor"], batch["seen"]))
        chance = jnp.take_along_axis(chances, batch["action"][:, None], 1)[:, 0]
        seen = {"seen": batch["seen"], "action": batch["action"], "chance": chance, "target": gain + values}
        seen |= {"gain": (gain - gain.mean()) / (gain.std() + 1e-8)}

        def epoch(carry: Any, key: Any) -> Any:
            order = jax.random.permutation(key, ROWS).reshape(2, -1)

            def part(carry: Any, rows: Any) -> Any:
                params, moments = carry
                value, gradients = jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[rows], seen))
                updates, moments = optimizer.update(gradients, moments)
                return (optax.apply_updates(params, updates), moments), value

            return lax.scan(part, carry, order)

        (params, moments), losses = lax.scan(epoch, (params, moments), jax.random.split(sub, 2))
        return (params, moments, key), {"loss": losses.mean(), "return": batch["reward"].sum()}

    params = {"actor": _net(0, SENSES, ACTIONS), "critic": _net(2, SENSES, 1)}
    return Made(step, (params, optimizer.init(params), jax.random.key(0)), _experience())


def reinforce() -> Made:
    """The policy gradient with a moving average of rewards as the baseline."""
    optimizer = optax.sgd(0.1)

    def step(state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            with fm.layer("trunk"):
                h = jnp.tanh(apply(params["trunk"], batch["seen"]))
            with fm.layer("head"):
                chances = jax.nn.log_softmax(apply(params["head"], h))
                taken = jnp.take_along_axis(chances, batch["action"][:, None], 1)[:, 0]
                return -jnp.mean(taken * (batch["reward"] - state["baseline"]))

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, moments = optimizer.update(gradients, state["moments"])
        baseline = 0.9 * state["baseline"] + 0.1 * batch["reward"].mean()
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "moments": moments, "baseline": baseline}, value

    params = {"trunk": dense(0, SENSES, 16), "head": dense(1, 16, ACTIONS)}
    return Made(step, {"params": params, "moments": optimizer.init(params), "baseline": jnp.zeros(())}, _experience())


def dqn() -> Made:
    """A target network that is replaced every other step, by `lax.cond`."""
    optimizer = optax.adam(1e-2)

    def step(state: Any, batch: Any) -> Any:
        goal = _run("target", state["target"], batch["next"]).max(-1)
        goal = batch["reward"] + 0.99 * (1 - batch["over"]) * goal

        def loss(params: Any) -> Any:
            values = _run("online", params, batch["seen"])
            return optax.huber_loss(jnp.take_along_axis(values, batch["action"][:, None], 1)[:, 0], goal).mean()

        value, gradients = jax.value_and_grad(loss)(state["online"])
        updates, moments = optimizer.update(gradients, state["moments"])
        online, count = optax.apply_updates(state["online"], updates), state["count"] + 1
        with fm.layer("target"):
            target = lax.cond(count % 2 == 0, lambda: online, lambda: state["target"])
        return {"online": online, "target": target, "moments": moments, "count": count}, {"loss": value}

    net = _net(0, SENSES, ACTIONS)
    state = {"online": net, "target": jax.tree.map(jnp.copy, net), "moments": optimizer.init(net)}
    return Made(step, state | {"count": jnp.int32(0)}, _experience())


def sac() -> Made:
    """A soft actor and critic: two critics, their slow targets, a temperature that is learned, three optimizers."""
    optimizers = {"critic": optax.adam(1e-2), "actor": optax.adam(5e-3), "heat": optax.adam(1e-2)}

    def act(actor: Any, seen: Any, key: Any) -> Any:
        mean, spread = jnp.split(_run("actor", actor, seen), 2, -1)
        spread = jnp.clip(spread, -5, 2)
        raw = mean + jnp.exp(spread) * jax.random.normal(key, mean.shape)
        chance = (
            -0.5 * ((raw - mean) / jnp.exp(spread)) ** 2 - spread - 2 * (jnp.log(2) - raw - jax.nn.softplus(-2 * raw))
        )
        return jnp.tanh(raw), chance.sum(-1)

    def judge(critics: Any, seen: Any, action: Any, name: str = "critic") -> Any:
        x = jnp.concatenate([seen, action], -1)
        return jnp.stack([_run(f"{name}/{i}", c, x)[:, 0] for i, c in enumerate(critics)])

    def step(state: Any, batch: Any) -> Any:
        params, moments = state["params"], state["moments"]
        key, one, two = jax.random.split(state["key"], 3)
        heat = jnp.exp(params["heat"])
        action, chance = act(params["actor"], batch["next"], one)
        soft = judge(state["target"], batch["next"], action, "target").min(0) - heat * chance
        goal = batch["reward"] + 0.99 * (1 - batch["over"]) * soft

        def critic_loss(critics: Any) -> Any:
            return jnp.mean((judge(critics, batch["seen"], batch["action"]) - goal) ** 2)

        def actor_loss(actor: Any) -> Any:
            action, chance = act(actor, batch["seen"], two)
            return jnp.mean(heat * chance - judge(params["critic"], batch["seen"], action).min(0)), chance.mean()

        value, gradients = {}, {}
        value["critic"], gradients["critic"] = jax.value_and_grad(critic_loss)(params["critic"])
        (value["actor"], surprise), gradients["actor"] = jax.value_and_grad(actor_loss, has_aux=True)(params["actor"])
        gradients["heat"] = -(lax.stop_gradient(surprise) - 2.0)
        found, kept = {}, {}
        for name, optimizer in optimizers.items():
            updates, kept[name] = optimizer.update(gradients[name], moments[name])
            found[name] = optax.apply_updates(params[name], updates)
        target = optax.incremental_update(found["critic"], state["target"], 0.05)
        return {"params": found, "moments": kept, "target": target, "key": key}, value

    critics = [_net(10 * i, SENSES + 2, 1) for i in range(2)]
    params = {"critic": critics, "actor": _net(5, SENSES, 4), "heat": jnp.zeros(())}
    moments = {name: o.init(params[name]) for name, o in optimizers.items()}
    state = {"params": params, "moments": moments, "target": jax.tree.map(jnp.copy, critics)}
    return Made(step, state | {"key": jax.random.key(4)}, _experience(discrete=False))


def hmc() -> Made:
    """Hamiltonian Monte Carlo over the weights of a net: leapfrog steps, then accept or reject."""

    def energy(weights: Any, batch: Any) -> Any:
        with fm.layer("first"):
            h = jnp.tanh(apply(weights["first"], batch["x"]))
        with fm.layer("second"):
            error = jnp.sum((apply(weights["second"], h) - batch["y"]) ** 2)
        return error + 0.5 * optax.tree.norm(weights, squared=True)

    def step(state: Any, batch: Any) -> Any:
        weights, key = state
        key, one, two = jax.random.split(key, 3)
        keys = jax.random.split(one, len(jax.tree.leaves(weights)))
        keys = jax.tree.unflatten(jax.tree.structure(weights), list(keys))
        pull = jax.grad(energy)
        begun = jax.tree.map(lambda w, k: jax.random.normal(k, w.shape), weights, keys)

        def leap(at: Any, _: Any) -> Any:
            q, p = at
            p = jax.tree.map(lambda p, g: p - 5e-3 * g, p, pull(q, batch))
            q = jax.tree.map(lambda q, p: q + 1e-2 * p, q, p)
            return (q, jax.tree.map(lambda p, g: p - 5e-3 * g, p, pull(q, batch))), None

        (q, p), _ = lax.scan(leap, (weights, begun), length=4)
        kinetic = [0.5 * optax.tree.norm(x, squared=True) for x in (begun, p)]
        rise = energy(q, batch) + kinetic[1] - energy(weights, batch) - kinetic[0]
        accepted = jnp.log(jax.random.uniform(two)) < -rise
        weights = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), q, weights)
        return (weights, key), {"accepted": accepted, "energy": energy(q, batch)}

    weights = {"first": dense(0, 4, 8), "second": dense(1, 8, 2)}
    found = [{"x": normal(i, ROWS, 4), "y": normal(10 + i, ROWS, 2)} for i in range(STEPS)]
    return Made(step, (weights, jax.random.key(2)), found)
