"""`flowml run --jit auto`: jit functions of an unmodified script run on a cluster where that is faster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flowml as fm
from flowml_runtime.auto_jit import AutoJit, Record, auto_jit
from flowml_runtime.driver.trial import TIMED_CALLS, WARMING_CALLS

HERE = Path(__file__).parent
TRIAL = WARMING_CALLS + TIMED_CALLS


class Clock:
    """A clock that shows how long calls took: `jit_s` and `cluster_s`, by the way that a function runs now."""

    def __init__(self, jit_s: float, cluster_s: float) -> None:
        self.took = {False: jit_s, True: cluster_s}
        self.record: Record | None = None
        self._now_s, self._began = 0.0, False

    def __call__(self) -> float:
        self._began = not self._began
        if not self._began:
            assert self.record is not None
            ways = self.record.functions[0].ways.values()
            self._now_s += self.took[any(way.on_cluster for way in ways)]
        return self._now_s


@pytest.fixture(scope="module")
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=2) as made:
        yield made


def step(params: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """A training step whose two layers are pinned to two workers, so that every plan has a cut."""

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        with fm.device("worker:0"):
            hidden = jnp.tanh(x @ params["a"])
        with fm.device("worker:1"):
            return jnp.mean((hidden @ params["b"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def start() -> tuple[dict[str, jax.Array], jax.Array]:
    a, b, x = (jax.random.normal(k, (160, 160)) / 12 for k in jax.random.split(jax.random.key(3), 3))
    return {"a": a, "b": b}, x


def under(cluster: fm.Cluster, clock: Clock, fn: Callable[..., object], **options: object) -> tuple[AutoJit, Record]:
    with auto_jit(cluster, HERE, now_s=clock) as record:
        jitted = jax.jit(fn, **options)  # pyright: ignore
    clock.record = record
    assert isinstance(jitted, AutoJit)
    return jitted, record


@pytest.mark.parametrize("faster", [True, False])
def test_a_step_runs_on_the_cluster_if_its_calls_are_faster_there(cluster: fm.Cluster, faster: bool) -> None:
    jitted, record = under(cluster, Clock(2e-3, 1e-3 if faster else 3e-3), step, donate_argnums=0)
    params, x = start()
    expected, _ = start()
    plain = jax.jit(step)
    kinds: list[bool] = []
    for _ in range(2 * TRIAL + 3):
        params, value = jitted(params, x)
        expected, wanted = plain(expected, x)
        kinds.append(isinstance(params["a"], fm.Remote))
        assert float(value) == pytest.approx(float(wanted), rel=1e-6)
    assert kinds == [False] * TRIAL + [True] * TRIAL + [faster] * 3
    np.testing.assert_allclose(params["a"], expected["a"], rtol=1e-5, atol=1e-7)
    (line,) = record.lines()
    assert line.startswith(f"step: {TRIAL + 3 * (not faster)} with jit, {TRIAL + 3 * faster} on the cluster (")
    assert line.endswith(f"{1 if faster else 3} ms a call on the cluster, 2 ms with jit)")


def test_a_function_whose_arguments_are_on_the_cluster_goes_there(cluster: fm.Cluster) -> None:
    params, x = start()
    there = fm.put(params, cluster)
    jitted, record = under(cluster, Clock(2e-3, 1e-3), lambda p, x: jnp.sum(x @ p["a"]))
    np.testing.assert_allclose(jitted(there, x), jnp.sum(x @ params["a"]), rtol=1e-5)
    assert record.lines() == ["<lambda>: 1 on the cluster (arguments are on the cluster)"]


def test_short_calls_and_plans_of_one_device_stay_with_jit(cluster: fm.Cluster) -> None:
    for seconds, why in ((1e-4, "0.1 ms a call is too short to gain"), (2e-3, "no cut over devices is expected")):
        jitted, record = under(cluster, Clock(seconds, 1e-9), lambda x: x + 1)
        for _ in range(TRIAL + 2):
            assert type(jitted(jnp.ones(3))) is type(jnp.ones(3))
        (line,) = record.lines()
        assert why in line
        assert f"{TRIAL + 2} with jit" in line


@pytest.mark.parametrize("faster", [True, False])
def test_parts_that_do_not_depend_on_each_other_are_tried_on_the_cluster(cluster: fm.Cluster, faster: bool) -> None:
    """The function of the page "Your own training loop": nothing in it names a device."""

    def last_state(weights: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, row: (jnp.tanh(h @ weights + row), None), jnp.zeros(256), rows)[0]

    def both_ways(forward: jax.Array, backward: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.mean(last_state(forward, rows)) + jnp.mean(last_state(backward, rows[::-1]))

    keys = jax.random.split(jax.random.key(0), 3)
    given = [jax.random.normal(k, (256, 256)) / 16 for k in keys[:2]] + [jax.random.normal(keys[2], (500, 256))]
    jitted, record = under(cluster, Clock(2e-3, 1e-3 if faster else 3e-3), both_ways)
    for _ in range(2 * TRIAL + 1):
        found: Any = jitted(*given)
        np.testing.assert_allclose(found, jax.jit(both_ways)(*given), rtol=1e-5, atol=1e-6)
    (line,) = record.lines()
    assert line.startswith(f"both_ways: {TRIAL + (not faster)} with jit, {TRIAL + faster} on the cluster (")


class Layers(nnx.Module):
    """Two layers that are pinned to two workers, with state that a step updates in place."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Linear(160, 160, rngs=rngs)
        self.norm = nnx.BatchNorm(160, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.b = nnx.Linear(160, 160, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        with fm.device("worker:0"):
            x = self.drop(self.norm(nnx.relu(self.a(x))))
        with fm.device("worker:1"):
            return self.b(x)


def nnx_step(model: Layers, optimizer: nnx.Optimizer[Layers], x: jax.Array) -> jax.Array:
    value, gradients = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
    optimizer.update(model, gradients)
    return value


@pytest.mark.parametrize("graph_updates", [True, False])
def test_flax_objects_are_updated_by_steps_on_the_cluster(cluster: fm.Cluster, graph_updates: bool) -> None:
    def begin() -> tuple[Layers, nnx.Optimizer[Layers]]:
        model = Layers(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    (model, optimizer), expected, (_, x) = begin(), begin(), start()
    clock = Clock(2e-3, 1e-3)
    with auto_jit(cluster, HERE, now_s=clock) as clock.record:
        jitted = nnx.jit(nnx_step, graph_updates=graph_updates)
        mean = nnx.jit(lambda model, x: jnp.mean(model.a(x)))
    plain = nnx.jit(nnx_step)
    for _ in range(2 * TRIAL + 3):
        assert float(jitted(model, optimizer, x)) == pytest.approx(float(plain(*expected, x)), rel=1e-4)
    assert isinstance(model.a.kernel.get_value(), fm.Remote)
    np.testing.assert_allclose(model.norm.mean.get_value(), expected[0].norm.mean.get_value(), rtol=1e-4)
    assert float(mean(model, x)) == pytest.approx(float(jnp.mean(expected[0].a(x))), rel=1e-3)
    line, other = clock.record.lines()
    assert line.startswith(f"nnx_step: {TRIAL} with jit, {TRIAL + 3} on the cluster (1 ms a call on the cluster")
    assert other == "<lambda>: 1 on the cluster (arguments are on the cluster)"


@pytest.mark.parametrize("split", [True, False])
def test_jit_leaves_flax_objects_and_states_as_they_are(cluster: fm.Cluster, split: bool) -> None:
    """`jax.jit`, unlike `nnx.jit`, takes them as pytrees."""
    model, (_, x) = Layers(nnx.Rngs(0)), start()
    graph, state = cast(tuple[Any, Any], nnx.split(model))

    def sample(given: Any, x: jax.Array) -> jax.Array:
        return jnp.mean((nnx.merge(graph, given) if split else given)(x) ** 2)

    given = state if split else model
    expected = float(jax.jit(sample)(given, x))
    jitted, record = under(cluster, Clock(2e-3, 1e-3), sample)
    assert [float(jitted(given, x)) for _ in range(2 * TRIAL + 1)] == pytest.approx(
        [expected] * (2 * TRIAL + 1), rel=1e-5
    )
    assert "on the cluster" in record.lines()[0]
    drop: Any = model.drop
    assert int(drop.rngs.count[...]) == int(state["drop"]["rngs"]["count"][...]) == 0


@pytest.mark.parametrize("donate", ["none", "all-except-first"])
def test_equinox_modules_run_on_the_cluster(cluster: fm.Cluster, donate: Any) -> None:
    def update(x: jax.Array, model: eqx.nn.MLP, *, rate: float) -> tuple[eqx.nn.MLP, jax.Array]:
        def loss(model: eqx.nn.MLP) -> jax.Array:
            with fm.device("worker:0"):
                hidden = jnp.tanh(jax.vmap(model.layers[0])(x))
            with fm.device("worker:1"):
                return jnp.mean(jax.vmap(model.layers[1])(hidden) ** 2)

        value, gradients = eqx.filter_value_and_grad(loss)(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -rate * g, gradients)), value

    def reference(*args: Any, **kwargs: Any) -> Any:  # equinox caches the jit of a name
        return update(*args, **kwargs)

    model, expected = (eqx.nn.MLP(160, 160, 160, 1, key=jax.random.key(0)) for _ in range(2))
    (_, x), clock = start(), Clock(2e-3, 1e-3)
    with auto_jit(cluster, HERE, now_s=clock) as clock.record:
        jitted = eqx.filter_jit(update, donate=donate)
    plain = eqx.filter_jit(reference)
    for _ in range(2 * TRIAL + 3):
        model, value = jitted(x, model, rate=0.1)
        expected, wanted = plain(x, expected, rate=0.1)
        assert float(value) == pytest.approx(float(wanted), rel=1e-4)
    assert isinstance(model.layers[0].weight, fm.Remote)
    assert model.activation is expected.activation
    np.testing.assert_allclose(model.layers[1].weight, expected.layers[1].weight, rtol=1e-4, atol=1e-6)
    (line,) = clock.record.lines()
    assert line.startswith(f"update: {TRIAL} with jit, {TRIAL + 3} on the cluster (1 ms a call on the cluster")


STATEFUL = """
import copy, pickle
import jax, jax.numpy as jnp, numpy as np, optax
from flax import serialization
import flowml as fm

optimizer = optax.adam(1e-2)

@jax.jit
def train(state, x):
    params, moments = state
    def loss(params):
        with fm.device("worker:0"):
            hidden = jnp.tanh(x @ params["a"])
        with fm.device("worker:1"):
            return jnp.mean((hidden @ params["b"]) ** 2)
    value, gradients = jax.value_and_grad(loss)(params)
    updates, moments = optimizer.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), value

params = {n: jax.random.normal(jax.random.key(i), (160, 160)) for i, n in enumerate("ab")}
state, x = (params, optimizer.init(params)), np.ones((8, 160), np.float32)
for i in range(STEPS):
    state, value = train(state, x)
    if i == STEPS - 3:
        best = copy.deepcopy(state)
w = state[0]["a"]
show(value, isinstance(w, jax.Array), w.shape, w.dtype, w.sharding, w.T.shape, w[0, :2].sum(), (w > 0).sum(), len(w))
show(w.at[0].set(0.0).mean(), jnp.linalg.norm(w), *(r.sum() for r in w[:2]), w.block_until_ready().ndim)
show(f"{w.std():.3f}")
show(optax.tree.norm(best[0]), optax.tree.norm(pickle.loads(pickle.dumps(state[0]))))
show(jnp.abs(serialization.from_bytes(params, serialization.to_bytes(state[0]))["b"]).sum())
show(train(jax.tree.map(lambda a: a * 0.5, best), x)[1])
"""


def test_a_script_copies_saves_and_shows_its_state_as_under_jit(cluster: fm.Cluster) -> None:
    def shown() -> list[Any]:
        found: list[Any] = []
        code = compile(STATEFUL, str(HERE / "script.py"), "exec")
        exec(code, {"show": lambda *values: found.extend(values), "STEPS": 2 * TRIAL + 3})
        return found

    plain, clock = shown(), Clock(2e-3, 1e-3)
    with auto_jit(cluster, HERE, now_s=clock) as clock.record:
        on_cluster = shown()
    for got, want in zip(on_cluster, plain, strict=True):
        if isinstance(want, jax.Array):
            np.testing.assert_allclose(got, want, rtol=1e-5)
        else:
            assert got == want
    assert f"{TRIAL + 3} on the cluster" in clock.record.lines()[0]


def test_typed_keys_are_arguments_as_under_jit(cluster: fm.Cluster) -> None:
    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, sub = jax.random.split(key)
        return key, jax.random.normal(sub, (200, 200))

    key = expected = jax.random.key(1)
    jitted, record = under(cluster, Clock(2e-3, 1e-3), draw)
    for _ in range(TRIAL + 1):
        (key, got), (expected, wanted) = jitted(key), jax.jit(draw)(expected)
        np.testing.assert_array_equal(got, wanted)
    assert "no cut over devices is expected" in record.lines()[0]


def test_each_signature_is_judged_by_itself(cluster: fm.Cluster) -> None:
    jitted, record = under(cluster, Clock(1e-4, 1e-9), lambda x, n: x * n, static_argnums=1)
    for x, n in ((jnp.ones(3), 2), (jnp.ones(4), 2), (jnp.ones(3), 3), (np.ones(3, np.float32), 2)):
        np.testing.assert_array_equal(jitted(x, n), x * n)
        assert len(jitted.ways) == len(record.lines())
    assert len(jitted.ways) == 3  # an array of NumPy has the program of one of JAX


def test_what_jit_alone_can_do_stays_with_jit(cluster: fm.Cluster) -> None:
    with auto_jit(cluster, HERE) as record:

        class Scale:
            @partial(jax.jit, static_argnums=0)
            def twice(self, x: jax.Array) -> jax.Array:
                return 2 * x

        @jax.jit
        def inner(x: jax.Array) -> jax.Array:
            return jnp.sin(x)

        @jax.jit(static_argnames="n")
        def power(x: jax.Array, n: int) -> jax.Array:
            return inner(x) ** n

        shown: list[float] = []

        @jax.jit
        def shows(x: jax.Array) -> jax.Array:
            jax.debug.callback(lambda v: shown.append(float(v)), x)
            return x

        placed = jax.jit(lambda x: x, compiler_options={})

    assert not isinstance(placed, AutoJit)
    x = jnp.float32(0.5)
    assert Scale().twice(x) == 1
    assert power(x, n=2) == pytest.approx(np.sin(0.5) ** 2)
    assert jax.grad(inner)(x) == pytest.approx(np.cos(0.5))
    np.testing.assert_allclose(jax.vmap(inner)(jnp.ones(3)), np.sin(np.ones(3)), rtol=1e-6)
    assert inner.lower(x).compile()(x) == pytest.approx(np.sin(0.5))
    for _ in range(3):
        shows(x)
    jax.effects_barrier()
    assert shown == [0.5] * 3
    with pytest.raises(TypeError, match="as an abstract array"):
        inner("text")  # pyright: ignore
    assert [line.split(":")[0] for line in record.lines()] == ["twice", "power", "shows"]
    assert "jit" not in vars(jax.jit) and not isinstance(jax.jit(lambda x: x), AutoJit)


SCRIPT = """
from functools import partial
import jax, jax.numpy as jnp, optax
from jax import jit

@partial(jit, donate_argnums=(0, 1))
def train(w, state, x):
    value, grad = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
    updates, state = optimizer.update(grad, state, w)
    return optax.apply_updates(w, updates), state, value

optimizer = optax.adam(1e-2)
w, x = jnp.ones((8, 2)), jnp.ones((4, 8))
state = optimizer.init(w)
for _ in range(20):
    w, state, value = train(w, state, x)
print(f"loss {value:.6f}")
"""


def test_the_command_runs_a_script_and_says_what_ran_where(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    command = [sys.executable, "-m", "flowml_tools.main", "run", "--jit", "auto", "--workers", "2", str(path)]
    auto = subprocess.run(command, capture_output=True, text=True, check=True)
    assert auto.stdout == plain.stdout != ""
    assert "flowml: train: 20 with jit (" in auto.stderr
