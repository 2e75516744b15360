"""Every optimizer of optax, found in its modules, trains at two homes and two stages as the plain loop does.

Compiling takes most of a fit, so optimizers share fits: each has a model of its own in one, and `optax.partition` gives
each model its optimizer. Simulated workers with arithmetic run the tasks that real ones run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import flowml as fm
from flowml.data import epoch_order
from tests.compiler.test_optimizer_division import ALONE, COUPLING
from tests.training.test_coupled_fits import simulated

RATE, STEPS, BATCH, EXAMPLES, WIDTH = 1e-2, 6, 8, 24, 5


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


_MASK: Any = _matrices


def _then(made: Any) -> Any:
    return optax.chain(made, optax.sgd(RATE))


MORE: dict[str, Callable[[], Any]] = {
    "add_decayed_weights": lambda: _then(optax.add_decayed_weights(0.1)),
    "apply_if_finite": COUPLING["apply_if_finite"][0],
    "chain": lambda: optax.chain(optax.clip(0.1), optax.adam(RATE)),
    "clip_by_global_norm": COUPLING["clip_by_global_norm"][0],
    "flatten": lambda: optax.flatten(optax.adam(RATE)),
    "identity": lambda: _then(optax.identity()),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.sgd)(learning_rate=RATE),
    "lbfgs": lambda: optax.lbfgs(RATE, linesearch=None),
    "masked": lambda: _then(optax.masked(optax.clip_by_global_norm(0.1), _MASK)),
    "freeze": lambda: _then(optax.transforms.freeze(_MASK)),
    "MultiSteps": COUPLING["multi_steps of clip"][0],
    "multi_transform": lambda: optax.multi_transform(
        {"x": optax.adam(RATE), "y": optax.sgd(RATE)}, lambda p: jax.tree.map(lambda x: "xy"[x.ndim > 1], p)
    ),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip(0.1)), ("adam", optax.adam(RATE))),
    "nadamw": lambda: optax.nadamw(RATE),
    "adamw": lambda: optax.adamw(RATE),
    "normalize_by_update_norm": COUPLING["normalize_by_update_norm"][0],
    "optimistic_adam": lambda: optax.optimistic_adam(RATE),
    "partition": lambda: optax.partition(
        {"x": optax.adam(RATE), "y": optax.sgd(RATE)}, lambda p: jax.tree.map(lambda x: "xy"[x.ndim > 1], p)
    ),
    "polyak_sgd": optax.polyak_sgd,
    "scale": lambda: optax.scale(-RATE),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(RATE),
    "scale_by_lbfgs": lambda: _then(optax.scale_by_lbfgs()),
    "scale_by_polyak": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_polyak()),
    "scale_by_rprop": lambda: optax.chain(optax.scale_by_rprop(RATE), optax.scale(-1.0)),
    "scale_by_schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(-RATE, 0.0, 10)),
    "selective_transform": lambda: optax.selective_transform(optax.adam(RATE), freeze_mask=_MASK),
    "set_to_zero": optax.set_to_zero,
    "snapshot": lambda: _then(optax.snapshot("norm", lambda updates, **_: optax.tree.norm(updates))),
    "stateless": lambda: optax.stateless(lambda updates, _: jax.tree.map(lambda g: -RATE * g, updates)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, _: -RATE * g),
    "trace": lambda: _then(optax.trace(0.9)),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.adam(RATE)),
    "contrib.acprop": ALONE["acprop"],
    "contrib.dadapt_adamw": contrib.dadapt_adamw,
    "contrib.dog": contrib.dog,
    "contrib.dowg": contrib.dowg,
    "contrib.mechanize": COUPLING["mechanize"][0],
    "contrib.momo": contrib.momo,
    "contrib.momo_adam": contrib.momo_adam,
    "contrib.normalize": lambda: _then(contrib.normalize()),
    "contrib.prodigy": contrib.prodigy,
    "contrib.reduce_on_plateau": lambda: optax.chain(optax.adam(RATE), contrib.reduce_on_plateau(patience=1, rtol=0.5)),
    "contrib.scale_by_madgrad": lambda: contrib.scale_by_madgrad(RATE),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE), RATE),
    "contrib.schedule_free_sgd": lambda: contrib.schedule_free_sgd(RATE),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
}
"""How to build those that need more than a learning rate, and are in no other table."""

APART = {
    "contrib.muon": "its tree may hold no masked leaves",
}
"""Optimizers with a fit of their own."""

REFUSED = {
    "measure_with_ema": "returns a measure, which updates no parameters",
    "contrib.scale_by_muon": "takes matrices alone; contrib.muon has it",
    "WrappedSchedule": "is a schedule",
    "lookahead": "its parameters are pairs of fast and slow ones, and the loss takes the fast ones",
    "monitor": "its metrics are functions of the caller",
    "scale_by_backtracking_linesearch": "evaluates the loss within an update",
    "scale_by_zoom_linesearch": "evaluates the loss within an update",
    "contrib.differentially_private_aggregate": "wants the gradient of each example",
    "contrib.dpsgd": "wants the gradient of each example",
    "contrib.hutchinson_estimator_diag_hessian": "evaluates the loss within an update",
    "contrib.sophia": "evaluates the loss within an update",
}
"""Optimizers without a fit here. The reasons are from their definitions; `test_extra_arguments` tries refusals."""


def _public(module: ModuleType) -> Iterable[tuple[str, Any]]:
    """What a module offers that makes an optimizer."""
    for name, made in vars(module).items():
        if name.startswith("_") or not callable(made):
            continue
        if inspect.isclass(made) and hasattr(made, "init") and hasattr(made, "update") and not issubclass(made, tuple):
            yield name, made
        function = inspect.unwrap(made.func if isinstance(made, functools.partial) else made)
        if inspect.isfunction(function):
            returns = inspect.signature(made).return_annotation
            unsaid = returns is inspect.Signature.empty
            if "GradientTransformation" in (inspect.getsource(function) if unsaid else str(returns)):
                yield name, made


FOUND = {
    **dict(_public(optax)),
    **{f"contrib.{name}": made for name, made in _public(contrib)},
}


def _built(name: str) -> Any:
    """An optimizer; one with a learning rate or without needed arguments needs no entry in a table."""
    short = name.removeprefix("contrib.")
    if (make := MORE.get(name) or ALONE.get(short)) is not None:
        return make()
    parameters = inspect.signature(FOUND[name]).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if needed == {"learning_rate"}:
        return FOUND[name](RATE)
    if needed:
        pytest.fail(f"optax has {name}, which wants {sorted(needed)}: add it to MORE, or to REFUSED with its reason")
    return _then(FOUND[name]())


VALUED = sorted({n for n in FOUND if "polyak" in n or "momo" in n} | {"contrib.reduce_on_plateau"})
"""Those that want the value of the loss."""
NAMES = sorted(set(FOUND) - set(REFUSED) - set(APART) - set(VALUED))
FITS = 10
TOGETHER = [VALUED, *(NAMES[i::FITS] for i in range(FITS)), *([name] for name in APART)]
"""The optimizers that share a fit."""


def _params(names: Iterable[str]) -> dict[str, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def layer(m: int, n: int) -> dict[str, jax.Array]:
        return {"w": jnp.asarray(rng.normal(size=(m, n)) / 2, jnp.float32), "b": jnp.zeros(n)}

    return {
        f"{place}:{name}": layer(*size) for name in names for place, size in (("in", (4, WIDTH)), ("out", (WIDTH, 2)))
    }


def _loss(params: dict[str, dict[str, Any]], batch: dict[str, Any]) -> Any:
    names = [name.removeprefix("in:") for name in params if name.startswith("in:")]
    hidden = {n: jnp.tanh(batch["x"] @ params[f"in:{n}"]["w"] + params[f"in:{n}"]["b"]) for n in names}
    found = [hidden[n] @ params[f"out:{n}"]["w"] + params[f"out:{n}"]["b"] for n in names]
    return sum(jnp.mean((y - batch["y"]) ** 2) for y in found)


def _labels(params: dict[str, Any]) -> dict[str, Any]:
    return {name: name.partition(":")[2] for name in params}


def _loop(optimizer: Any, params: Any, source: dict[str, np.ndarray], valued: bool) -> tuple[Any, Any]:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        value, gradients = jax.value_and_grad(_loss)(params, batch)
        given = {"value": value} if valued else {}
        updates, state = optimizer.update(gradients, state, params, **given)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(STEPS):
        rows = epoch_order(EXAMPLES, 0, number // 3)[number % 3 * BATCH :][:BATCH]
        params, state = step(params, state, {name: rest[rows] for name, rest in source.items()})
    return params, state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # some are deprecated
@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_fits_equal_the_plain_loop(names: list[str]) -> None:
    rng = np.random.default_rng(1)
    shapes = {"x": (EXAMPLES, 4), "y": (EXAMPLES, 2)}
    source = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    made: dict[Any, Any] = {name: _built(name) for name in names}
    params = _params(names)
    optimizer: Any = optax.partition({**made}, _labels) if len(names) > 1 else made[names[0]]
    stages = {"in:*": "worker:0/cpu:0", "out:*": "worker:1/cpu:0"}
    trainer = fm.Trainer(_loss, optimizer, cluster=simulated(), replicas=2, placement=stages)
    result = trainer.fit(params, source, batch_size=BATCH, steps=STEPS, progress=False)
    wanted = _loop(optimizer, params, source, names == VALUED)
    training = result.plan.training
    assert training is not None
    assert len({store.home for store in training.stores}) > 1
    for path, want in jax.tree_util.tree_leaves_with_path(wanted[0]):
        got = result.params[path[0].key][path[1].key]
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    _compare_states(result.opt_state, wanted[1])


def _compare_states(got: Any, wanted: Any) -> None:
    """Keys and their like are drawn alike, so every leaf is compared."""
    found, expected = (jax.tree_util.tree_leaves_with_path(tree) for tree in (got, wanted))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, have), (_, want) in zip(found, expected, strict=True):
        if jax.dtypes.issubdtype(want.dtype, jax.dtypes.prng_key):
            have, want = jax.random.key_data(have), jax.random.key_data(want)
        np.testing.assert_allclose(have, want, rtol=2e-3, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_the_tables_name_what_optax_has() -> None:
    missing = {*REFUSED, *APART, *MORE} - set(FOUND)
    assert not missing, "these are in no module any more"
