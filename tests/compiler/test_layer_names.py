"""A layer's name keeps its meaning, whatever it is made of: as a label, as a pattern, drawn, saved and in errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flowml as fm
from flowml.ir.label import matches

TWO = ["worker:0", "worker:1"]
W, X = jnp.ones((4, 4)), jnp.ones((2, 4))
NAMES = [
    "block(1)", "relu(x)", "a->b", "a->a", "ij,jk->ik", "a,b", "ij,jk", "transpose(k)", "jvp(x)",
    "jit(f)", "конв1", "层", "é😀", "with space", " ", "a.b", "a:b", "a*b", "a?", "[0]", "conv[0-9]",
    "a\nb", "a\tb", "a\0b", "\"q\"", "<b>", "&amp;", "x" * 5000, "a/b", "/a", "a//b", "a/", "/",
    ")", "(", "f(", "eqx.Linear", "eqx.nn.Linear", "a@b", "x/@worker:1", "=", "=a->b",
    "fm.device(worker:1)", "=fm.device(worker:1)", "worker:1/cpu:0", "\\", "{x|y}", "%s", "-->",
    "]]>",
]  # fmt: skip


def short(name: str) -> str:
    return ascii(name)[1:-1][:20]


def scoped(scope: Any, name: str) -> Any:
    def net(w: jax.Array, x: jax.Array) -> jax.Array:
        with scope(name):
            h = jnp.tanh(x @ w)
        with fm.layer("rest"):
            return jnp.sum(h)

    return net


def layers(plan: fm.Plan) -> list[str]:
    return [layer for p in plan.partitions for t in p.tasks for layer in t.layers]


@pytest.mark.parametrize("name", NAMES, ids=short)
def test_a_name_is_kept_and_is_a_pattern_for_itself(name: str, tmp_path: Path) -> None:
    placement = {name: "worker:1", "rest": "worker:0"}
    plan = fm.compile(scoped(fm.layer, name), W, X, devices=TWO, placement=placement)
    assert {n.layer: n.device for n in plan.nodes} == {name: "worker:1/cpu:0", "rest": "worker:0/cpu:0"}
    both = fm.compile(jax.value_and_grad(scoped(fm.layer, name)), W, X, devices=TWO)
    assert {n.layer for n in both.nodes} == {name, "rest"}
    plan.save(tmp_path / "plan")
    assert fm.Plan.load(tmp_path / "plan") == plan
    ElementTree.parse(plan.render(tmp_path / "p.svg"))
    for suffix in ("html", "dot", "txt"):
        text = plan.render(tmp_path / f"p.{suffix}").read_text()
        assert "\0" not in text
        assert suffix != "html" or "<b>" not in text.replace("<b></b>", "")
    assert "\0" not in plan.explain()


@pytest.mark.parametrize("name", [n for n in NAMES if "->" not in n and n != "ij,jk" and "eqx.nn" not in n], ids=short)
def test_a_scope_of_jax_is_a_layer_like_any_other(name: str) -> None:
    if "fm.device" in name or name.startswith("="):
        pytest.skip("the form in which fm.device and fm.layer write theirs")
    assert layers(fm.compile(scoped(jax.named_scope, name), W, X, devices=["worker:0"])) == [name, "rest"]


@pytest.mark.parametrize("name", ["@", "@home", "block(1)", "in->out"])
def test_scopes_of_libraries_and_flax_modules_keep_theirs(name: str) -> None:
    assert layers(fm.compile(scoped(jax.named_scope, name), W, X, devices=["worker:0"])) == [name, "rest"]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4, name=name)(nn.Dense(4, name="first")(x))

    params = Net().init(jax.random.key(0), X)
    placement = {name: "worker:1", "first": "worker:0"}
    assert set(layers(fm.compile(Net().apply, params, X, devices=TWO, placement=placement))) == {"first", name}


def test_a_name_that_is_no_text_is_refused_or_escaped() -> None:
    with pytest.raises(ValueError, match=r"layer name '\\udcff' is not valid Unicode; try layer\('\\\\udcff'\)"):
        fm.layer("\udcff")
    assert layers(fm.compile(scoped(jax.named_scope, "\udcff"), W, X, devices=["worker:0"])) == ["\\udcff", "rest"]
    plan = fm.compile(lambda p, x: x @ p["\udcff"], {"\udcff": W}, X, devices=["worker:0"])
    assert (layers(plan), plan.input_names[0]) == (["\\udcff"], "\\udcff")
    assert fm.Plan.decode(plan.encode()) == plan


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ij,jk", "...j,jk->...k", "ij, jk -> ik", "ij->j"])
def test_the_equation_of_an_einsum_is_no_layer(equation: str) -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        with fm.layer("a"):
            return jnp.einsum(equation, x, *([w] if "," in equation else []))

    assert layers(fm.compile(fn, W, X, devices=["worker:0"])) == ["a"]


def test_a_block_that_is_computed_again_keeps_its_layer() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        with fm.layer("outer"), fm.layer("inner"):
            return jnp.sum(jax.checkpoint(lambda v: jnp.tanh(v @ w) @ w)(x))

    assert {n.layer for n in fm.compile(jax.grad(fn), W, X, devices=["worker:0"]).nodes} == {"outer/inner"}


@pytest.mark.parametrize(
    ("layer", "patterns", "others"),
    [
        (
            "encoder/fc1",
            ["encoder", "fc1", "encoder/fc1", "enc*", "*", "encoder/*", "f?1"],
            ["enc", "fc", "c1", "fc1/*"],
        ),
        ("a/b/c/d", ["b/c", "a/b", "c/d", "b/*", "a/*/c"], ["a/c", "b/d", "bc", ""]),
        ("conv[0-9]", ["conv[0-9]", "conv[[]*"], ["conv1"]),
        ("model/conv1", ["conv*", "conv[0-9]"], ["onv1"]),
    ],
)
def test_a_pattern_names_a_layer_by_any_run_of_its_components(
    layer: str, patterns: list[str], others: list[str]
) -> None:
    assert [p for p in patterns if not matches(layer, p)] == []
    assert [p for p in others if matches(layer, p)] == []


def test_a_prefix_places_everything_below_it() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4, name="fc2")(nn.Dense(4, name="fc1")(x))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Block(name="decoder")(Block(name="encoder")(x))

    params = Net().init(jax.random.key(0), X)
    placement = {"encoder": "worker:0", "decoder": "worker:1"}
    plan = fm.compile(Net().apply, params, X, devices=TWO, placement=placement)
    where = {n.layer: n.device for n in plan.nodes}
    assert where == {f"{b}/fc{i}": f"worker:{d}/cpu:0" for d, b in enumerate(("encoder", "decoder")) for i in (1, 2)}


def test_a_pattern_for_everything_places_what_has_no_label() -> None:
    def fn(x: jax.Array) -> jax.Array:
        return jnp.sin(x) + 1

    assert fm.compile(fn, X, devices=TWO, placement={"*": "worker:1"}).devices == ("worker:1/cpu:0",)
    with pytest.raises(fm.PlacementError, match=r"matches no layer; layers are: none; label code with fm\.layer"):
        fm.compile(fn, X, devices=TWO, placement={"a*": "worker:1"})


def test_an_error_shows_names_on_one_line_and_not_thousands() -> None:
    def fn(x: jax.Array) -> jax.Array:
        for name in ("a\nb", "y" * 500, *(f"l{i}" for i in range(30))):
            with fm.layer(name):
                x = jnp.sin(x)
        return x

    with pytest.raises(fm.PlacementError) as caught:
        fm.compile(fn, X, devices=TWO, placement={"nope": "worker:0"})
    text = str(caught.value)
    assert "'a\\nb', l0, l1, l10" in text and "… (32 in all)" in text
    assert "\n" not in text and len(text) < 500

    with pytest.raises(fm.PolicyError, match=r"matches no parameter; there are: 'a\\nb'"):
        trainer_plan({"a\nb": W}, {"nope": fm.Policy()})


def trainer_plan(params: Any, policies: dict[str, fm.Policy]) -> fm.Plan:
    import optax

    from flowml.training.compiler import compile_training
    from flowml.training.spec import TrainingSpec

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        for w in params.values():
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch)

    spec = TrainingSpec(loss, optax.sgd(0.1), replicas=2, policies=policies)
    return compile_training(spec, params, X, TWO).plan


def test_a_policy_names_a_parameter_as_it_is_written() -> None:
    plan = trainer_plan({"conv[0-9]": W, "rest": W}, {"conv[0-9]": fm.policies.every(4), "*": fm.Policy()})
    assert plan.training is not None
    assert {s.name: s.every for s in plan.training.stores} == {"conv[0-9]": 4, "rest": 1}
