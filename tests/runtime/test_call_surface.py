"""What a call takes beside arrays: static arguments, equinox modules, nnx objects; and what it refuses to lose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flowml as fm
from flowml.errors import UnsupportedError

X = jnp.arange(8, dtype=jnp.float32).reshape(2, 4) / 8


@pytest.fixture(params=["threads_cluster", "process_cluster"])
def cluster(request: pytest.FixtureRequest) -> fm.Cluster:
    return request.getfixturevalue(request.param)


# Static arguments


def power(x: Any, n: int, *, scale: float = 1.0) -> Any:
    return x**n * scale


@pytest.mark.parametrize(
    ("options", "args", "kwargs"),
    [
        ({"static_argnums": 1}, (X,), {"n": 3}),
        ({"static_argnums": (1,)}, (X, 3), {}),
        ({"static_argnums": -1}, (X, 3), {}),
        ({"static_argnames": "n"}, (X, 3), {}),
        ({"static_argnames": ("n", "scale")}, (X,), {"n": 3, "scale": 2.0}),
        ({"static_argnames": ["scale"]}, (X, 3), {"scale": 2.0}),
        ({"static_argnums": None, "static_argnames": None, "donate_argnums": 0, "donate_argnames": "x"}, (X, 3), {}),
    ],
)
def test_static_arguments_are_named_as_for_jit(cluster: fm.Cluster, options: Any, args: Any, kwargs: Any) -> None:
    if "donate_argnums" in options:
        expected = jax.jit(power)(*args, **kwargs)
    else:
        expected = jax.jit(power, **options)(*args, **kwargs)
    program = fm.dataflow(power, cluster=cluster, **options)
    for _ in range(2):
        np.testing.assert_array_equal(program(*args, **kwargs), expected)
        np.testing.assert_array_equal(program.submit(*args, **kwargs).result(timeout=60), expected)
    decorate = functools.partial(fm.dataflow, cluster=cluster, **options)
    np.testing.assert_array_equal(decorate(power)(*args, **kwargs), expected)


def test_a_program_in_a_class_is_a_method_as_under_jit(cluster: fm.Cluster) -> None:
    decorate = functools.partial(fm.dataflow, cluster=cluster)

    class Cubes:
        n = 3

        @functools.partial(decorate, static_argnums=0)
        def powers(self, x: Any) -> Any:
            return x**self.n

    class Line(eqx.Module):
        slope: Any

        @decorate
        def __call__(self, x: Any) -> Any:
            return self.slope * x

    class Counter(nnx.Module):
        def __init__(self) -> None:
            self.calls = nnx.Variable(jnp.int32(0))

        @decorate
        def __call__(self, x: Any) -> Any:
            self.calls[...] += 1
            return x * self.calls[...]

    cubes, counter = Cubes(), Counter()
    for _ in range(2):
        np.testing.assert_array_equal(cubes.powers(X), X**3)
        np.testing.assert_array_equal(cubes.powers.submit(x=X).result(timeout=60), X**3)
        np.testing.assert_array_equal(Cubes.powers(cubes, X), X**3)
        np.testing.assert_array_equal(Line(jnp.float32(2))(X), 2 * X)
    assert cubes.powers.plan(X).name == cubes.powers.__name__ == "powers"
    np.testing.assert_array_equal([counter(jnp.int32(2)), counter(jnp.int32(2))], [2, 4])
    with pytest.raises(TypeError, match=r"powers\(\) missing 1 required positional argument: 'x'"):
        cubes.powers()


def test_a_static_argument_is_the_same_however_it_is_passed(cluster: fm.Cluster) -> None:
    seen: list[Any] = []

    @fm.dataflow(cluster=cluster, static_argnames="mode")
    def f(x: Any, mode: Any) -> Any:
        seen.append(mode)
        return x * (2 if mode == "double" else mode)

    np.testing.assert_array_equal(f(X, "double"), X * 2)
    np.testing.assert_array_equal(f(X, mode="double"), X * 2)
    assert f(X.astype(int), 3).dtype == jnp.int32
    assert f(X.astype(int), 3.0).dtype == jnp.float32  # equal numbers of two types are two programs
    assert seen == ["double", "double", 3, 3.0]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"static_argnames": "m"}, ValueError, "static_argnames='m': power has no such argument; it has x, n, scale"),
        ({"static_argnums": 5}, ValueError, "static_argnums=5: power has 2 positional arguments"),
        ({"static_argnums": "n"}, TypeError, "static_argnums takes positions and static_argnames names"),
        ({"static_argnames": 1.5}, TypeError, "static_argnums takes positions|not iterable"),
    ],
)
def test_static_arguments_that_do_not_exist(options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        fm.dataflow(power, **options)


def test_compile_takes_static_arguments_by_name_too() -> None:
    plan = fm.compile(power, X, n=3, devices=["worker:0"], static_argnames="n")
    assert len(plan.inputs) == 1


def test_a_static_keyword_needs_a_hash(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match=r"power: static scale is of type list, which cannot be hashed"):
        fm.dataflow(power, cluster=threads_cluster, static_argnames="scale")(X, 2, scale=[1])


# equinox


class Net(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    activation: Callable[[Any], Any]
    name: str
    times: int
    rate: float
    nothing: None = None

    def __call__(self, x: Any) -> Any:
        for _ in range(self.times):  # an int that must not be traced
            x = self.first(x)
        return self.second(self.activation(x)) * (self.rate if self.name == "scaled" else 1.0)


def net(activation: Callable[[Any], Any] = jax.nn.relu) -> Net:
    a, b = jax.random.split(jax.random.key(0))
    return Net(eqx.nn.Linear(4, 4, key=a), eqx.nn.Linear(4, 2, key=b), activation, "scaled", 2, 0.5)


def predict(model: Net, x: Any) -> Any:
    return jax.vmap(model)(x)


@pytest.mark.parametrize("placement", ["auto", {"first": "worker:0", "second": "worker:1"}])
def test_leaves_of_a_module_that_are_no_arrays_are_static(cluster: fm.Cluster, placement: Any) -> None:
    program = fm.dataflow(predict, cluster=cluster, placement=placement)
    for activation in (jax.nn.relu, jnp.tanh):
        expected = eqx.filter_jit(predict)(net(activation), X)
        for _ in range(2):
            np.testing.assert_allclose(program(net(activation), X), expected, rtol=1e-6)


def test_a_filtered_step_returns_the_module_that_it_updates(cluster: fm.Cluster) -> None:
    optimizer = optax.adam(1e-2)

    @eqx.filter_jit
    def step(model: Net, state: Any, x: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(lambda m: jnp.mean(jax.vmap(m)(x) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss, "a label"

    expected = got = (net(), optimizer.init(eqx.filter(net(), eqx.is_inexact_array)))
    program = fm.dataflow(step, cluster=cluster)
    for _ in range(3):
        expected, got = step(*expected[:2], X), program(*got[:2], X)
    assert got[3] == "a label"
    assert got[0].activation is jax.nn.relu
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if isinstance(b, jax.Array):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        else:
            assert a is b or a == b


def test_outside_of_modules_numbers_are_traced_and_text_is_refused(threads_cluster: fm.Cluster) -> None:
    def scaled(model: Net, x: Any, by: Any) -> Any:
        return predict(model, x) * by["factor"]

    program = fm.dataflow(scaled, cluster=threads_cluster)
    for factor in (2, 3):
        np.testing.assert_allclose(program(net(), X, {"factor": factor}), predict(net(), X) * factor, rtol=1e-6)
    assert len(program._programs[threads_cluster]) == 1
    with pytest.raises(TypeError, match=r"scaled: args\[2\]\['factor'\] is of type str, which is not an array"):
        program(net(), X, {"factor": "two"})


# flax nnx


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.outer = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.outer(self.dropout(nnx.relu(self.norm(self.inner(x)))))


def made() -> tuple[Block, Any]:
    model = Block(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def train_step(model: Block, optimizer: Any, x: Any) -> None:
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model))


def assert_same_state(*objects: Any) -> None:
    first, second = (jax.tree.leaves(nnx.state(o)) for o in objects)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrap", [nnx.jit, lambda f: f], ids=["nnx.jit", "plain"])
def test_objects_are_updated_in_place_as_under_nnx_jit(cluster: fm.Cluster, wrap: Any) -> None:
    """Parameters, optimizer state, running statistics and the counts of random streams."""
    ours, theirs = made(), made()
    program, reference = fm.dataflow(wrap(train_step), cluster=cluster), nnx.jit(train_step)
    kernel = ours[0].inner.kernel
    before = np.array(kernel[...])
    for _ in range(3):
        assert program(*ours, X) is None
        reference(*theirs, X)
    assert ours[0].inner.kernel is kernel
    assert not np.array_equal(kernel[...], before)
    assert_same_state(ours, theirs)


def test_an_object_passed_twice_is_one_and_a_returned_one_is_the_callers(cluster: fm.Cluster) -> None:
    def step(a: Any, others: Any, x: Any) -> Any:
        a.kernel[...] = a.kernel[...] + 1
        others["same"].kernel[...] = others["same"].kernel[...] * 2
        return others["same"], a(x), {"new": nnx.Linear(4, 1, rngs=nnx.Rngs(1))}

    ours, theirs = (nnx.Linear(4, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    returned, y, made_there = fm.dataflow(step, cluster=cluster)(ours, {"same": ours}, X)
    _, expected, made_here = nnx.jit(step)(theirs, {"same": theirs}, X)
    assert returned is ours
    assert_same_state(ours, theirs)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert_same_state(made_there["new"], made_here["new"])


def test_placement_knows_the_layers_of_an_object(threads_cluster: fm.Cluster) -> None:
    program = fm.dataflow(
        lambda m, x: m(x), cluster=threads_cluster, placement={"inner": "worker:0", "norm": "worker:0", "*": "worker:1"}
    )
    model = made()[0]
    assert len(program.plan(model, X).devices) == 2


def test_an_object_whose_parts_change_is_refused(threads_cluster: fm.Cluster) -> None:
    def grow(model: Any, x: Any) -> Any:
        model.extra = nnx.Param(jnp.ones(3))
        return model(x)

    with pytest.raises(UnsupportedError, match="grow adds, removes or replaces parts of the nnx objects"):
        fm.dataflow(grow, cluster=threads_cluster)(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), X)


def test_objects_are_not_submitted(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(TypeError, match=r"train_step.submit\(\) cannot update nnx objects"):
        fm.dataflow(train_step, cluster=threads_cluster).submit(*made(), X)


# What else a function may change


@jax.tree_util.register_pytree_node_class
class Counter:
    def __init__(self, value: Any) -> None:
        self.value = value

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Counter:
        return cls(*children)


def count(counter: Counter, x: Any) -> Any:
    counter.value = counter.value + 1
    return x * 2


def update(params: dict[str, Any], x: Any) -> None:
    params["w"] = params["w"] - x


def test_an_object_changed_in_place_is_named(threads_cluster: fm.Cluster) -> None:
    says = r"count changes its argument args\[0\].* in place, which would be lost.*return the new Counter"
    with pytest.raises(UnsupportedError, match=says):
        fm.dataflow(count, cluster=threads_cluster)(Counter(X), X)
    with pytest.raises(UnsupportedError, match=says):
        fm.compile(count, Counter(X), X, devices=["worker:0"])


@pytest.mark.parametrize("extend", [lambda p, x: p["list"].append(x), lambda p, x: p.update(w=x), update])
def test_a_function_that_only_changes_lists_and_dicts_is_refused(threads_cluster: fm.Cluster, extend: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"changes its argument args\[0\].* in place.*return the new dict"):
        fm.dataflow(extend, cluster=threads_cluster)({"w": X, "list": [X]}, X)


def test_a_function_may_take_its_own_copies_of_lists_and_dicts_apart(cluster: fm.Cluster) -> None:
    def loss(batch: dict[str, Any]) -> Any:
        y = batch.pop("y")
        batch["x"] = batch["x"] * 2
        return jnp.mean((batch["x"] - y) ** 2)

    batch = {"x": X, "y": X + 1}
    np.testing.assert_allclose(fm.dataflow(loss, cluster=cluster)(batch), jax.jit(loss)(batch), rtol=1e-6)
    assert batch.keys() == {"x", "y"}


HISTORY: list[Any] = []


def test_a_value_left_in_a_variable_around_the_function_is_named(threads_cluster: fm.Cluster) -> None:
    seen: dict[str, Any] = {}

    def remember(x: Any) -> Any:
        seen["x"] = x * 2
        return x

    def record(x: Any) -> Any:
        HISTORY.append(x)
        return x

    with pytest.raises(UnsupportedError, match="remember stores a value in closed-over 'seen'"):
        fm.dataflow(remember, cluster=threads_cluster)(X)
    with pytest.raises(UnsupportedError, match="record stores a value in global 'HISTORY'"):
        fm.dataflow(record, cluster=threads_cluster)(X)
    HISTORY.clear()


def test_a_ref_that_is_closed_over_is_refused(threads_cluster: fm.Cluster) -> None:
    ref = jax.new_ref(X)

    def add(x: Any) -> Any:
        ref[...] = ref[...] + x
        return x

    with pytest.raises(UnsupportedError):
        fm.dataflow(add, cluster=threads_cluster)(X)
    np.testing.assert_array_equal(ref[...], X)


def test_a_numpy_argument_cannot_be_written_to(threads_cluster: fm.Cluster) -> None:
    def write(x: Any) -> Any:
        x[0] = 0
        return x

    with pytest.raises(TypeError, match="immutable"):
        fm.dataflow(write, cluster=threads_cluster)(np.ones(3, np.float32))


# Shapes


def test_each_shape_is_a_program_of_its_own_and_equals_jit(cluster: fm.Cluster) -> None:
    traced: list[int] = []

    def masked(x: Any) -> Any:
        traced.append(x.shape[1])
        return (x * (x > 0.5)).sum(1)

    program = fm.dataflow(masked, cluster=cluster)
    for length in (16, 24, 16, 24, 8, 16):
        x = jnp.linspace(0, 1, 3 * length).reshape(3, length)
        np.testing.assert_allclose(program(x), jax.jit(lambda v: (v * (v > 0.5)).sum(1))(x), rtol=1e-6)
    assert traced == [16, 24, 8]


class Accumulator:
    def __init__(self) -> None:
        self.total: Any = 0
        self.seen: list[Any] = []
        self.calls = 0

    def add(self, x: Any) -> Any:
        self.total = self.total + jnp.sum(x)
        return self.total

    def record(self, x: Any) -> Any:
        self.seen.append(x)
        return x

    def count(self, x: Any) -> Any:
        self.calls += 1
        return x * 2


def test_a_value_left_in_the_object_of_a_method_is_named(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(UnsupportedError, match="add stores a value in field 'total' of its Accumulator"):
        fm.dataflow(Accumulator().add, cluster=threads_cluster)(X)
    with pytest.raises(UnsupportedError, match="record stores a value in field 'seen' of its Accumulator"):
        fm.dataflow(Accumulator().record, cluster=threads_cluster)(X)
    np.testing.assert_allclose(fm.dataflow(Accumulator().count, cluster=threads_cluster)(X), X * 2)
