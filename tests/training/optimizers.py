"""How to build every optimizer of optax: those that a Trainer takes, and those that it refuses with the reason."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import jax
import optax
import pytest
from optax import contrib

from tests.compiler.test_optimizer_division import ALONE, COUPLING

RATE = 1e-2


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


_MASK: Any = _matrices


def _dimensions(params: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers((0,), (1,)), params)


_DIMENSIONS: Any = _dimensions


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
    "lookahead": lambda: optax.lookahead(optax.adam(RATE), 2, 0.5),
    "masked": lambda: _then(optax.masked(optax.clip_by_global_norm(0.1), _MASK)),
    "freeze": lambda: _then(optax.transforms.freeze(_MASK)),
    "MultiSteps": COUPLING["multi_steps of clip"][0],
    "measure_with_ema": lambda: _then(optax.monitor({"ema": optax.measure_with_ema(optax.tree.norm, 0.9)})),
    "monitor": lambda: _then(optax.monitor({"norm": optax.tree.norm, "one": lambda u: optax.tree.norm(u) > 0.1})),
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
    "contrib.scale_by_muon": lambda: _then(contrib.scale_by_muon(weight_dimension_numbers=_DIMENSIONS)),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE), RATE),
    "contrib.schedule_free_sgd": lambda: contrib.schedule_free_sgd(RATE),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(optax.adam(RATE)),
}
"""How to build those that need more than a learning rate, and are in no other table."""

APART = {
    "contrib.muon": "its tree may hold no masked leaves",
    "contrib.scale_by_muon": "it takes matrices alone",
    "lookahead": "its parameters are pairs of fast and slow ones",
}
"""Optimizers with a fit of their own."""

PRIVATE: dict[str, Callable[[], Any]] = {
    "contrib.differentially_private_aggregate": lambda: _then(
        contrib.differentially_private_aggregate(0.3, 0.5, jax.random.key(0))
    ),
    "contrib.dpsgd": lambda: contrib.dpsgd(RATE, 0.3, 0.5, seed=0, momentum=0.9),
}
"""Those that take the gradient of each example: `test_private` trains them."""

EVALUATING: dict[str, Callable[[], Any]] = {
    "contrib.hutchinson_estimator_diag_hessian": lambda: _then(contrib.hutchinson_estimator_diag_hessian()),
    "contrib.sophia": lambda: contrib.sophia(RATE, update_interval=2),
    "scale_by_backtracking_linesearch": lambda: optax.chain(optax.sgd(RATE), optax.scale_by_backtracking_linesearch(3)),
    "scale_by_zoom_linesearch": lambda: optax.chain(optax.sgd(RATE), optax.scale_by_zoom_linesearch(3)),
}
"""Those that evaluate the loss within an update."""

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "WrappedSchedule": (lambda: optax.schedules.WrappedSchedule(optax.constant_schedule(RATE)), "it is a schedule"),
}
"""What a Trainer refuses: how to build it, and why."""


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


def built(name: str) -> Any:
    """An optimizer; one with a learning rate or without needed arguments needs no entry in a table."""
    if name in REFUSED:
        return REFUSED[name][0]()
    short = name.removeprefix("contrib.")
    if (make := PRIVATE.get(name) or EVALUATING.get(name) or MORE.get(name) or ALONE.get(short)) is not None:
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
NAMES = sorted(set(FOUND) - set(REFUSED) - set(APART) - set(PRIVATE) - set(EVALUATING) - set(VALUED))
