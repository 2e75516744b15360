"""Every optimizer of optax, found in its modules, trains at two homes and two stages as the plain loop does.

Compiling takes most of a fit, so optimizers share fits: each has a model of its own in one, and `optax.partition` gives
each model its optimizer. Simulated workers with arithmetic run the tasks that real ones run. Both layers of a model
have one shape, so that their updates share executables, and XLA leaves out what only makes them faster.

Those that a Trainer refuses run in a loop with `fm.dataflow`, over two stages, as they do under jit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.data import epoch_order
from tests.training.optimizers import APART, EVALUATING, FOUND, MORE, NAMES, PRIVATE, REFUSED, VALUED, built
from tests.training.test_coupled_fits import simulated

STEPS, BATCH, EXAMPLES, WIDTH = 4, 8, 24, 4
FITS = 9
TOGETHER = [VALUED, *(NAMES[i::FITS] for i in range(FITS)), *([name] for name in APART)]
"""The optimizers that share a fit."""


@pytest.fixture(autouse=True)
def quickly_compiled() -> Iterator[None]:
    """Compiling takes most of the time, and what is compiled runs a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _params(names: Iterable[str], biases: bool = True) -> dict[str, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def layer() -> dict[str, jax.Array]:
        made = {"w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / 2, jnp.float32)}
        return {**made, "b": jnp.zeros(WIDTH)} if biases else made

    return {f"{place}:{name}": layer() for name in names for place in ("in", "out")}


def _loss(params: dict[str, dict[str, Any]], batch: dict[str, Any]) -> Any:
    names = [name.removeprefix("in:") for name in params if name.startswith("in:")]

    def through(place: str, x: Any) -> Any:
        layer = params[place]
        return x @ layer["w"] + layer.get("b", 0)

    hidden = {n: jnp.tanh(through(f"in:{n}", batch["x"])) for n in names}
    return sum(jnp.mean((through(f"out:{n}", hidden[n]) - batch["y"]) ** 2) for n in names)


def _labels(params: dict[str, Any]) -> dict[str, Any]:
    return {name: name.partition(":")[2] for name in params}


def _source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=(EXAMPLES, WIDTH)).astype(np.float32) for name in ("x", "y")}


def _batches() -> Iterator[dict[str, np.ndarray]]:
    for number in range(STEPS):
        rows = epoch_order(EXAMPLES, 0, number // 3)[number % 3 * BATCH :][:BATCH]
        yield {name: rest[rows] for name, rest in _source().items()}


def _loop(optimizer: Any, params: Any, valued: bool) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        value, gradients = jax.value_and_grad(_loss)(getattr(params, "fast", params), batch)
        given = {"value": value} if valued else {}
        updates, state = optimizer.update(gradients, state, params, **given)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for batch in _batches():
        params, state = step(params, state, batch)
    return params, state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some are deprecated
@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_fits_equal_the_plain_loop(names: list[str]) -> None:
    made: dict[Any, Any] = {name: built(name) for name in names}
    params: Any = _params(names, biases=names != ["contrib.scale_by_muon"])
    params = optax.LookaheadParams.init_synced(params) if names == ["lookahead"] else params
    optimizer: Any = optax.partition({**made}, _labels) if len(names) > 1 else made[names[0]]
    places = {"*in:*": "worker:0/cpu:0", "*out:*": "worker:1/cpu:0"}
    trainer = fm.Trainer(_loss, optimizer, cluster=simulated(), replicas=2, placement=places, on_nonfinite="apply")
    result = trainer.fit(params, _source(), batch_size=BATCH, steps=STEPS, progress=False)
    wanted = _loop(optimizer, params, names == VALUED)
    training = result.plan.training
    assert training is not None
    assert len({store.home for store in training.stores}) > 1
    _compare(result.params, wanted[0], rtol=2e-4, atol=2e-5)
    _compare(result.opt_state, wanted[1], rtol=2e-3, atol=2e-4)


def _compare(got: Any, wanted: Any, rtol: float, atol: float) -> None:
    """Keys and their like are drawn alike, so every leaf is compared."""
    found, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, wanted))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, have), (_, want) in zip(found, expected, strict=True):
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            have, want = jax.random.key_data(have), jax.random.key_data(want)
        assert have.dtype == want.dtype
        np.testing.assert_allclose(have, want, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def _given(name: str, value: Any, gradients: Any, loss: Any) -> dict[str, Any]:
    if "linesearch" in name:
        return {"value": value, "grad": gradients, "value_fn": loss}
    return {"obj_fn": loss} if name in EVALUATING else {}


def _own_step(name: str, optimizer: Any) -> Callable[..., Any]:
    def step(kept: Any, batch: Any) -> Any:
        params, state = kept

        def loss(params: Any) -> Any:
            return _loss(params, batch)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params, **_given(name, value, gradients, loss))
        return (optax.apply_updates(params, updates), state), value

    return step


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", EVALUATING)
def test_those_that_evaluate_the_loss_equal_the_plain_loop(threads_cluster: fm.Cluster, name: str) -> None:
    """In a fit, and in a loop of one's own, where each is at its place."""
    params, optimizer = _params([name]), built(name)
    places = {"*in:*": "worker:0", "*out:*": "worker:1"}
    trainer = fm.Trainer(_loss, optimizer, cluster=simulated(), replicas=2)
    result = trainer.fit(params, _source(), batch_size=BATCH, steps=STEPS, progress=False)
    step = _own_step(name, optimizer)
    mine = fm.dataflow(step, cluster=threads_cluster, placement=places, keep=0)
    kept, wanted, plain = (params, optimizer.init(params)), (params, optimizer.init(params)), jax.jit(step)
    for batch in _batches():
        (kept, value), (wanted, expected) = mine(kept, batch), plain(wanted, batch)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert len({leaf.device for leaf in jax.tree.leaves(kept[0])}) == 2
    _compare(jax.tree.map(lambda leaf: leaf.fetch(), kept), wanted, rtol=2e-3, atol=2e-4)
    _compare((result.params, result.opt_state), wanted, rtol=2e-3, atol=2e-4)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be an optax.GradientTransformation such as"):
        fm.Trainer(_loss, built("WrappedSchedule"), cluster=simulated())
    trainer = fm.Trainer(_loss, optax.measure_with_ema(optax.tree.norm, 0.9), cluster=simulated())
    with pytest.raises(TypeError, match=r"a measure such as optax.measure_with_ema belongs in optax.monitor"):
        trainer.plan(_params(["a"]), _source())
    trainer = fm.Trainer(_loss, built("lookahead"), cluster=simulated())
    with pytest.raises(TypeError, match=r"pairs; give fit\(optax.LookaheadParams.init_synced\(params\)"):
        trainer.plan(_params(["a"]), _source())


def test_the_tables_name_what_optax_has() -> None:
    missing = {*REFUSED, *APART, *PRIVATE, *EVALUATING, *MORE} - set(FOUND)
    assert not missing, "these are in no module any more"
