"""Which nodes make up a layer, and in which order layers come: parents, closed-over weights, optimizer state, keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import flowml as fm
from flowml.compiler import compile_function
from flowml.ir.label import label
from flowml.ir.simplify import simplify
from flowml.ir.trace import trace
from flowml.placement.pipeline import pipeline_items

TWO = ["worker:0", "worker:1"]
X = jnp.ones((4, 8))


def order(fn: Callable[..., Any], *args: Any) -> list[str]:
    """The layers in the order in which a pipeline is cut."""
    traced = trace(fn, args, {})
    graph = label(simplify(traced.graph), traced.parameters, closed_over=traced.closed_over)
    return list(dict.fromkeys(item[0].layer for item in pipeline_items(graph) if item[0].layer))


def layers(fn: Callable[..., Any], *args: Any, **options: Any) -> set[str]:
    return {n.layer for n in fm.compile(fn, *args, devices=TWO, **options).nodes}


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (nn.Dense(8, name=n)(x) for n in "qkv")
        return nn.Dense(8, name="out")(nn.softmax(q @ k.T) @ v)


class Encoder(nn.Module):
    own: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.own:
            x = x + self.param("position", nn.initializers.normal(0.02), x.shape)
        for i in range(4):
            x = x + Attention(name=f"attention_{i}")(x)
        return x


class Net(nn.Module):
    own: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name="head")(Encoder(self.own, name="encoder")(x)).mean()


def test_a_module_with_a_parameter_does_not_swallow_the_layers_below_it() -> None:
    found: dict[bool, Any] = {}
    for own in (False, True):
        net = Net(own)
        params = net.init(jax.random.key(0), X)["params"]
        step = jax.value_and_grad(lambda p, x, net=net: net.apply({"params": p}, x))
        found[own] = fm.compile(step, params, X, devices=TWO, placement=fm.Pipeline(2))
    tasks = {own: sum(len(p.tasks) for p in plan.partitions) for own, plan in found.items()}
    assert tasks[True] <= tasks[False] + 1 and tasks[True] <= 4
    assert len(found[True].transfers) <= len(found[False].transfers) + 1
    of_parent = [n.op for n in found[True].nodes if n.layer == "encoder"]
    assert "add" in of_parent
    assert "dot_general" not in of_parent and "exp" not in of_parent


FROZEN = {f"b{i}": jnp.eye(8) for i in range(4)}
NESTED = {
    "enc": {"fc1": {"kernel": np.eye(8, dtype=np.float32), "bias": np.ones(8, np.float32)}, "fc2": {"kernel": X.T}}
}


def through_frozen(params: Any, x: jax.Array) -> jax.Array:
    for w in FROZEN.values():
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params["head"]) ** 2)


def through_nested(x: jax.Array) -> jax.Array:
    fc1, fc2 = NESTED["enc"]["fc1"], NESTED["enc"]["fc2"]
    return (x @ fc1["kernel"] + fc1["bias"]) @ fc2["kernel"]


def test_what_is_closed_over_is_a_layer_by_its_path() -> None:
    head = {"head": jnp.ones((8, 2))}
    assert order(through_frozen, head, X) == ["b0", "b1", "b2", "b3", "head"]
    assert order(jax.jit(jax.value_and_grad(through_frozen)), head, X) == ["b0", "b1", "b2", "b3", "head"]
    assert order(through_nested, X) == ["enc/fc1", "enc/fc2"]
    plan = fm.compile(
        through_frozen, head, X, devices=TWO, placement={"b0": "worker:0", "b*": "worker:1", "*": "worker:0"}
    )
    assert {n.device for n in plan.nodes if n.layer == "b2"} == {"worker:1/cpu:0"}
    assert layers(through_nested, X, placement={"enc": "worker:1"}) == {"enc/fc1", "enc/fc2"}


def test_a_trainer_cuts_layers_that_are_closed_over() -> None:
    with fm.Cluster.threads(workers=2):
        trainer = fm.Trainer(through_frozen, optax.sgd(0.1), placement=fm.Pipeline(stages=2))
        result = trainer.fit({"head": jnp.ones((8, 2))}, np.ones((8, 8), np.float32), batch_size=4, steps=2)
    assert len(result.history) == 2


def test_closures_with_the_same_name_are_layers_of_their_own() -> None:
    def dense(w: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jnp.tanh(x @ w)

    stack = [dense(jnp.eye(8) * i) for i in range(4)]

    def fn(x: jax.Array) -> jax.Array:
        for apply in stack:
            x = apply(x)
        return x

    assert len(order(fn, X)) == 4
    assert compile_function(fn, (X,), {}, devices=TWO, placement=fm.Pipeline(2)).plan.devices == (
        "worker:0/cpu:0",
        "worker:1/cpu:0",
    )


def test_arrays_of_no_variable_are_numbered_layers() -> None:
    def fn(x: jax.Array) -> jax.Array:
        for i in range(2):
            x = jnp.tanh(x @ np.full((8, 8), float(i), np.float32))
        return x

    assert order(fn, X) == ["closed_over_0", "closed_over_1"]


def test_a_table_that_is_only_added_is_no_layer() -> None:
    mask = jnp.ones((4, 8))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for w in params.values():
            x = jnp.tanh((x + mask) @ w)
        return x

    assert layers(fn, {f"l{i}": jnp.eye(8) for i in range(3)}, X) == {"l0", "l1", "l2"}


def test_data_that_is_closed_over_is_no_layer() -> None:
    assert layers(lambda params: mlp(params, jnp.ones((4, 8))), PARAMS) == set(PARAMS)
    assert layers(jax.grad(lambda params: mlp(params, X)), PARAMS) == set(PARAMS)


def test_frozen_weights_and_adapters_of_one_name_are_one_layer() -> None:
    def fn(params: Any, x: jax.Array) -> jax.Array:
        for name, w in FROZEN.items():
            x = jnp.tanh(x @ w + x @ params[name]["a"] @ params[name]["b"])
        return x

    adapters = {name: {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))} for name in FROZEN}
    assert layers(fn, adapters, X) == set(FROZEN)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean(x**2)


PARAMS = {f"fc{i}": {"kernel": jnp.eye(8), "bias": jnp.ones(8)} for i in range(4)}
ADAM = optax.adam(1e-3)
MOMENTS = ADAM.init(PARAMS)


class Everything(NamedTuple):
    opt_state: Any
    key: jax.Array
    model: Any


def update(params: Any, opt_state: Any, x: jax.Array) -> Any:
    updates, opt_state = ADAM.update(jax.grad(mlp)(params, x), opt_state)
    return optax.apply_updates(params, updates), opt_state


def everything(state: Everything, x: jax.Array) -> Everything:
    key, mine = jax.random.split(state.key)
    x = x * jax.random.bernoulli(mine, 0.5, x.shape)
    model, opt_state = update(state.model["params"], state.opt_state, x)
    return Everything(opt_state, key, {"params": model})


STEPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "two arguments": (update, (PARAMS, MOMENTS, X)),
    "state first": (lambda state, params, x: update(params, state, x), (MOMENTS, PARAMS, X)),
    "a tuple": (lambda state, x: update(state[0], state[1], x), ((PARAMS, MOMENTS), X)),
    "a tuple, variables": (lambda s, x: update(s[0]["params"], s[1], x), (({"params": PARAMS}, MOMENTS), X)),
    "TrainState": (
        lambda state, x: state.apply_gradients(grads=jax.grad(mlp)(state.params, x)),
        (TrainState.create(apply_fn=None, params=PARAMS, tx=ADAM), X),
    ),
    "after a key": (everything, (Everything(MOMENTS, jax.random.key(0), {"params": PARAMS}), X)),
}


@pytest.mark.parametrize("name", STEPS)
def test_optimizer_state_belongs_to_the_layer_of_its_parameter(name: str) -> None:
    step, args = STEPS[name]
    found = order(step, *args)
    assert [layer.rpartition("/")[2] for layer in found] == list(PARAMS)
    plan = fm.compile(step, *args, devices=TWO, placement=fm.Pipeline(2))
    expected = fm.compile(update, PARAMS, MOMENTS, X, devices=TWO, placement=fm.Pipeline(2))
    moved = sum(t.nbytes for t in plan.transfers)
    assert moved <= sum(t.nbytes for t in expected.transfers) + X.nbytes + 64


def test_the_weights_of_a_linear_loss_are_parameters_and_its_batch_is_none() -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"])

    params = {"dense": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}}
    assert layers(jax.value_and_grad(loss), params, {"x": X, "y": X}) - {""} == {"dense"}


def test_layers_come_in_the_order_of_the_data() -> None:
    def fn(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        last, first = (jax.random.bernoulli(k, 0.5, (8,)) for k in jax.random.split(key))
        prepared = {name: w / jnp.linalg.norm(w) for name, w in params.items()}
        x = jnp.tanh(x @ prepared["z_first"]) * first
        x = jnp.tanh(x @ prepared["m_middle"])
        return jnp.tanh((x * last) @ prepared["a_last"])

    params = {name: jnp.eye(8) for name in ("a_last", "m_middle", "z_first")}
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert order(fn, params, X, key) == ["z_first", "m_middle", "a_last"]
    assert order(lambda p, x: fn(p, x, jax.random.key(0)), params, X) == ["z_first", "m_middle", "a_last"]
    assert order(lambda p, x, step: fn(p, x, jax.random.fold_in(jax.random.key(0), step)), params, X, jnp.int32(3)) == [
        "z_first",
        "m_middle",
        "a_last",
    ]


def test_a_loss_with_keys_split_at_the_top_is_cut_along_its_data() -> None:
    def loss(params: Any, batch: jax.Array, rng: jax.Array) -> jax.Array:
        keys = dict(zip(("d", "c", "b", "a"), jax.random.split(rng, 4), strict=True))
        for name in ("a", "b", "c", "d"):
            batch = jnp.tanh(batch @ params[name]) * jax.random.bernoulli(keys[name], 0.5, (8,))
        return jnp.mean(batch)

    from flowml.training.compiler import compile_training
    from flowml.training.spec import TrainingSpec

    spec = TrainingSpec(loss, optax.sgd(0.1), placement=fm.Pipeline(2))
    plan = compile_training(spec, {name: jnp.eye(8) for name in "abcd"}, X, TWO).plan
    assert plan.training is not None
    homes = {store.name: store.home for store in plan.training.stores}
    assert homes == {"a": "worker:0/cpu:0", "b": "worker:0/cpu:0", "c": "worker:1/cpu:0", "d": "worker:1/cpu:0"}
