"""The update of every optimizer of optax, divided over three homes, equals the whole update.

Nothing is jitted, because most of the time would go into compiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from flowml.training.coupled import Coupling, Step
from flowml.training.optimizer import slice_optimizer

STEPS = 2


def params() -> dict[str, dict[str, jax.Array]]:
    def one(number: int, m: int, n: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(number)
        return {
            "b": jnp.asarray(rng.normal(size=n), jnp.float32),
            "w": jnp.asarray(rng.normal(size=(m, n)), jnp.float32),
        }

    return {"a": one(0, 8, 36), "b": one(1, 36, 10), "c": one(2, 300, 1)}


STORES = ((0, 1), (2, 3), (4, 5))
RATE = 1e-2
CLIP = optax.clip_by_global_norm(1.0)
LABELS = {"a": "x", "b": "y", "c": "y"}
MASK = {"a": True, "b": False, "c": True}


def _masked_clip() -> Any:
    return optax.chain(optax.masked(CLIP, MASK), optax.adam(RATE))


ALONE: dict[str, Callable[[], Any]] = {
    "adabelief": lambda: optax.adabelief(RATE),
    "adadelta": lambda: optax.adadelta(RATE),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=4),
    "adagrad": lambda: optax.adagrad(RATE),
    "adam": lambda: optax.adam(optax.cosine_decay_schedule(RATE, 10)),
    "adamax": lambda: optax.adamax(RATE),
    "adamaxw": lambda: optax.adamaxw(RATE),
    "adamw": lambda: optax.adamw(RATE, mask=MASK),
    "adan": lambda: optax.adan(RATE),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(RATE)),
    "add_noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(RATE)),
    "amsgrad": lambda: optax.amsgrad(RATE),
    "apply_every": lambda: optax.chain(optax.apply_every(2), optax.sgd(RATE)),
    "centralize": lambda: optax.chain(optax.centralize(), optax.sgd(RATE)),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.sgd(RATE)),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(RATE)),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.adam(RATE), lambda step, **_: step % 2 == 0),
    "conditionally_transform": lambda: optax.conditionally_transform(optax.adam(RATE), lambda step, **_: step > 1),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(RATE)),
    "fromage": lambda: optax.fromage(RATE),
    "freeze": lambda: optax.chain(optax.sgd(RATE), optax.transforms.freeze(MASK)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(RATE, 0.0, 10)),
    "keep_params_nonnegative": lambda: optax.chain(optax.sgd(RATE), optax.keep_params_nonnegative()),
    "lamb": lambda: optax.lamb(RATE),
    "lars": lambda: optax.lars(RATE),
    "lion": lambda: optax.lion(RATE),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(RATE), 2),
    "multi_transform": lambda: optax.multi_transform({"x": optax.adam(RATE), "y": optax.sgd(RATE)}, LABELS),
    "nadam": lambda: optax.nadam(RATE),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=jax.random.key(0)),
    "novograd": lambda: optax.novograd(RATE),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(RATE),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(RATE),
    "radam": lambda: optax.radam(RATE),
    "rmsprop": lambda: optax.rmsprop(RATE, momentum=0.9, centered=True),
    "rprop": lambda: optax.rprop(RATE),
    "scale_by_param_block_norm": lambda: optax.chain(optax.scale_by_param_block_norm(), optax.sgd(RATE)),
    "scale_by_rss": lambda: optax.chain(optax.scale_by_rss(), optax.sgd(RATE)),
    "selective_transform": lambda: optax.selective_transform(optax.adam(RATE), freeze_mask=MASK),
    "sgd": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(RATE),
    "signum": lambda: optax.signum(RATE),
    "sm3": lambda: optax.sm3(RATE),
    "yogi": lambda: optax.yogi(RATE),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.sgd(RATE)),
    "acprop": lambda: contrib.acprop(RATE),
    "ademamix": lambda: contrib.ademamix(RATE),
    "adopt": lambda: contrib.adopt(RATE),
    "cocob": contrib.cocob,
    "galore": lambda: contrib.galore(RATE, rank=4, update_proj_gap=2),
    "madgrad": lambda: contrib.madgrad(RATE),
    "muon": lambda: contrib.muon(RATE),
    "schedule_free": lambda: contrib.schedule_free_sgd(RATE),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(RATE),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(RATE),
    "sam": lambda: contrib.sam(optax.sgd(RATE), optax.chain(contrib.normalize(), optax.sgd(0.1)), sync_period=2),
}
"""Optimizers, some of which couple layers."""

COUPLING: dict[str, tuple[Callable[[], Any], int]] = {
    "clip_by_global_norm": (lambda: optax.chain(CLIP, optax.adam(RATE)), 1),
    "masked clip": (_masked_clip, 1),
    "clip after clip": (lambda: optax.chain(CLIP, optax.scale(3.0), CLIP, optax.sgd(RATE)), 2),
    "multi_steps of clip": (lambda: optax.MultiSteps(optax.chain(CLIP, optax.adam(RATE)), 2), 1),
    "multi_steps that skips": (
        lambda: optax.MultiSteps(optax.adam(RATE), 2, should_skip_update_fn=optax.skip_not_finite),
        1,
    ),
    "skip_large_updates": (
        lambda: optax.MultiSteps(
            optax.adam(RATE), 2, should_skip_update_fn=lambda u, s, p: optax.skip_large_updates(u, s, p, 9.0)
        ),
        1,
    ),
    "apply_if_finite": (lambda: optax.apply_if_finite(optax.adam(RATE), 3), 1),
    "apply_if_finite of clip": (lambda: optax.apply_if_finite(optax.chain(CLIP, optax.adam(RATE)), 3), 1),
    "normalize_by_update_norm": (lambda: optax.chain(optax.normalize_by_update_norm(), optax.sgd(RATE)), 1),
    "contrib.normalize": (lambda: optax.chain(contrib.normalize(), optax.sgd(RATE)), 1),
    "dadapt_adamw": (contrib.dadapt_adamw, 1),
    "prodigy": (contrib.prodigy, 1),
    "dog": (contrib.dog, 1),
    "dowg": (contrib.dowg, 1),
    "mechanize": (lambda: contrib.mechanize(optax.adam(RATE)), 2),
}
"""Optimizers that couple layers, with the rounds in which homes exchange values."""


def plain(optimizer: Any, gradients: Sequence[Any], start: Any) -> tuple[Any, Any]:
    def step(values: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, values)
        return optax.apply_updates(values, updates), state

    values, state = start, optimizer.init(start)
    for gradient in gradients:
        values, state = step(values, state, gradient)
    return values, state


def divided(coupling: Coupling, gradients: Sequence[Any], start: Any, first: Any) -> list[Any]:
    """What the homes compute: the leaves of parameters and state."""
    count, members = len(jax.tree.leaves(start)), list(zip(coupling.members, STORES, strict=True))

    def step(kept: list[Any], gradient: list[Any]) -> list[Any]:
        values, state = kept[:count], kept[count:]
        given = [
            [*(gradient[i] for i in mine), *(values[i] for i in mine), *(state[s] for s in member.state)]
            for member, mine in members
        ]
        commons: list[Any] = []

        def run(step: Step, number: int) -> Any:
            return step.run(*given[number], *(commons[i] for i in step.takes))

        for number, combination in enumerate(coupling.combinations):
            rows = [row for m, (member, _) in enumerate(members) for row in run(member.shares[number], m)]
            taken = [*(state[s] for s in coupling.state), *(commons[i] for i in combination.takes)]
            commons += combination.run(*taken, *rows)
        kept = list(kept)
        for number, (member, mine) in enumerate(members):
            places = (*mine, *(count + s for s in member.state))
            for place, value in zip(places, run(member.update, number), strict=True):
                kept[place] = value
        return kept

    kept = [*jax.tree.leaves(start), *jax.tree.leaves(first)]
    for gradient in gradients:
        kept = step(kept, jax.tree.leaves(gradient))
    return kept


def check(name: str, optimizer: Any) -> Coupling:
    start = params()
    slices = slice_optimizer(optimizer, start)
    first, because = slices.together
    assert list(first) == list(range(6)), because
    coupling = slices.divide(STORES)
    rng = np.random.default_rng(1)
    gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), start) for _ in range(STEPS)]
    expected = plain(optimizer, gradients, start)
    got = divided(coupling, gradients, start, optimizer.init(start))
    for (path, want), value in zip(jax.tree_util.tree_leaves_with_path(expected), got, strict=True):
        where = name + jax.tree_util.keystr(path)
        np.testing.assert_allclose(_plain(value), _plain(want), rtol=2e-5, atol=2e-6, err_msg=where)
    return coupling


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


STRANGE = ("adafactor", "cocob", "conditionally_transform", "galore", "multi_steps", "multi_transform", "sam", "sm3")
"""Those of them that have branches, loops or state of other shapes."""


@pytest.mark.parametrize("name", STRANGE)
def test_optimizers(name: str) -> None:
    check(name, ALONE[name]())


@pytest.mark.parametrize("name", sorted({*ALONE} - {*STRANGE}))
def test_optimizers_need_no_exchange(name: str) -> None:
    """They are sliced by layer, which other tests compare with the loop."""
    slices = slice_optimizer(ALONE[name](), params())
    assert all(slices.is_closed(leaves) for leaves in STORES)


@pytest.mark.parametrize("name", COUPLING)
def test_optimizers_that_couple_layers(name: str) -> None:
    make, rounds = COUPLING[name]
    assert len(check(name, make()).combinations) == rounds


def test_only_few_bytes_are_shared() -> None:
    coupling = check("clip", COUPLING["clip_by_global_norm"][0]())
    assert [[s.nbytes for s in member.shares[0].returns] for member in coupling.members] == [[4], [8], [8]]
    assert [s.shape for c in coupling.combinations for s in c.returns] == [(), ()]


def test_what_cannot_be_divided_stays_together() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        flat = jnp.cumsum(jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves((updates["a"], updates["b"]))]))
        return jax.tree.map(lambda x: x + flat[-1], updates), state

    slices = slice_optimizer(optax.GradientTransformation(lambda _: optax.EmptyState(), update), params())
    first, because = slices.together
    assert list(first) == [0, 0, 0, 0, 4, 5]
    assert because == {0: "concatenate"}


@pytest.mark.parametrize("call", ["init", "update"])
def test_an_error_of_the_users_optimizer_has_the_line_that_raised_it(call: str) -> None:
    def trouble(*_: Any) -> Any:
        raise ZeroDivisionError("no such rate")

    optimizer = optax.GradientTransformation(**{"init": lambda _: (), "update": lambda g, s, _: (g, s), call: trouble})
    with pytest.raises(ZeroDivisionError, match="no such rate") as caught:
        slice_optimizer(optax.chain(optax.scale(1.0), optimizer), params())
    notes = " ".join(caught.value.__notes__)
    assert f"raised by the optimizer at {Path(__file__).name}:" in notes and f"(trouble), while its {call}(" in notes


@pytest.mark.parametrize(
    ("optimizer", "where"),
    [
        (optax.masked(optax.sgd(0.1), {"a": True}), "at the top: one has a subtree of type dict .*'?a'?"),
        (optax.masked(optax.sgd(0.1), [True]), "at the top: one has a subtree of type list, the other a .*dict"),
        (optax.masked(optax.sgd(0.1), lambda _: {"a": True}), "at the top: one"),
        (optax.multi_transform({"all": optax.sgd(0.1)}, {"a": "all"}), "at the top: one"),
    ],
)
def test_a_mask_that_does_not_fit_the_parameters_is_told_in_one_line(optimizer: Any, where: str) -> None:
    with pytest.raises(ValueError, match=rf"^the optimizer combines two trees that differ {where}") as caught:
        slice_optimizer(optimizer, params())
    text = str(caught.value)
    assert "\n" not in text and "in its init(params), at " in text and "give a function of them" in text


def test_loops_over_all_layers_stay_together() -> None:
    """The memory of L-BFGS is in a loop over the whole tree."""
    first, because = slice_optimizer(optax.lbfgs(RATE, linesearch=None), params()).together
    assert (list(first), because) == ([0] * 6, {0: "scan"})


def test_branches_of_one_layer_stay_branches() -> None:
    """Only branches that handle several layers are computed on both sides."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def one(g: Any, s: Any) -> Any:
            return jax.lax.cond(state["n"] % 2 == 0, lambda: (g * 2, s + g), lambda: (g, s))

        both: Mapping[str, Any] = jax.tree.map(one, updates, state["s"])
        pairs = jax.tree.leaves(both, is_leaf=lambda x: isinstance(x, tuple))
        tree = jax.tree.structure(updates)
        new = {"n": state["n"] + 1, "s": tree.unflatten([p[1] for p in pairs])}
        return tree.unflatten([p[0] for p in pairs]), new

    def init(params: Any) -> Any:
        return {"n": jnp.zeros((), jnp.int32), "s": jax.tree.map(jnp.zeros_like, params)}

    slices = slice_optimizer(optax.GradientTransformation(init, update), params())
    assert [node.op for node in slices.graph.nodes].count("cond") == 6
