"""Planning and drawing take work in proportion to the model: counted in calls, at one size and at four times that."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import flowml as fm
from flowml.ir import _mlir
from flowml.ir.label import matches
from flowml.placement.auto import ERROR, _stage_counts
from flowml.render.drawing import fit, text_width
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec

GROWTH = 4
MOST = 6.5
"""What four times the size may cost: 4 where all is linear, 16 where something is quadratic."""
X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


def calls(run: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(run)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


def weights(layers: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {f"l{i}": jax.ShapeDtypeStruct((8, 8), jnp.float32) for i in range(layers)}


def chain(params: Any, x: jax.Array) -> jax.Array:
    for w in params.values():
        x = jnp.tanh(x @ w)
    return x.mean()


def fan(params: Any, x: jax.Array) -> list[jax.Array]:
    return [jnp.tanh(x @ w) for w in params.values()]


def in_turn(graph: Any, devices: Any) -> dict[int, Any]:
    return {n.id: devices[int(n.layer[1:]) % len(devices)] for n in graph.nodes if n.layer}


def test_what_a_module_overwrites_reads_the_types_of_its_arguments_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading makes a list of all of them, which took two thirds of the first call with 3,000 small arrays."""
    main, reads = _mlir._main, 0

    class Counted:
        def __init__(self, function: Any) -> None:
            object.__setattr__(self, "function", function)

        def __getattr__(self, name: str) -> Any:
            nonlocal reads
            reads += name == "type"
            return getattr(object.__getattribute__(self, "function"), name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(object.__getattribute__(self, "function"), name, value)

    count = 20
    arrays = [jax.ShapeDtypeStruct((2,), jnp.float32)] * count
    lowered = jax.jit(lambda *xs: [x + 1 for x in xs]).lower(*arrays)
    module: Any = lowered.compiler_ir("stablehlo")
    monkeypatch.setattr(_mlir, "_main", lambda m: Counted(main(m)))
    _mlir.overwrite(module, range(count))
    assert str(module).count("tf.aliasing_output") == count
    assert reads <= 2


def placed(fn: Callable[..., Any], layers: int, devices: int, placement: Any = in_turn) -> fm.Plan:
    names = [f"worker:{i}" for i in range(devices)]
    return fm.compile(fn, weights(layers), X, devices=names, placement=placement)


def trained(layers: int, replicas: int = 2, stages: int = 2, microbatches: int = 1, clip: bool = False) -> fm.Plan:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)) if clip else optax.adam(1e-3)
    placement = fm.Pipeline(stages)
    spec = TrainingSpec(chain, optimizer, replicas=replicas, placement=placement, microbatches=microbatches)
    batch = jax.ShapeDtypeStruct((replicas * microbatches, 8), jnp.float32)
    return compile_training(spec, weights(layers), batch, [f"worker:{i}" for i in range(replicas * stages)]).plan


def deep(depth: int) -> fm.Plan:
    """One label, so many scopes deep."""

    def fn(x: jax.Array) -> jax.Array:
        with ExitStack() as stack:
            for i in range(depth):
                stack.enter_context(fm.layer(f"scope{i}"))
            return jnp.sin(x)

    return fm.compile(fn, X, devices=["worker:0"])


SHAPES: dict[str, tuple[Callable[[int], fm.Plan], int]] = {
    "many layers": (lambda n: placed(chain, n, 2, fm.Pipeline(2)), 50),
    "many transfers": (lambda n: placed(chain, n, 4), 50),
    "many devices": (lambda n: placed(chain, n, n), 16),
    "a pattern for each layer": (lambda n: placed(chain, n, 2, {f"l{i}": f"worker:{i % 2}" for i in range(n)}), 50),
    "wide fan-out": (lambda n: placed(fan, n, 4), 100),
    "fan-out over many devices": (lambda n: placed(fan, n, n), 32),
    "auto over many layers": (lambda n: placed(chain, n, 4, "auto"), 40),
    "training many layers": (trained, 20),
    "training layers that the optimizer couples": (lambda n: trained(n, clip=True), 20),
    "many replicas": (lambda n: trained(2, replicas=n), 16),
    "many microbatches": (lambda n: trained(4, 1, 2, n), 16),
    "a deep label": (deep, 40),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_planning_and_drawing_are_linear(shape: str, tmp_path: Path) -> None:
    make, size = SHAPES[shape]
    make(size)  # what happens once a process
    counted: dict[str, list[int]] = {}
    for n in (size, GROWTH * size):
        counted.setdefault("plan", []).append(calls(lambda n=n: make(n)))
        plan = make(n)
        for suffix in ("svg", "html", "dot", "txt"):
            path = tmp_path / f"p.{suffix}"
            counted.setdefault(suffix, []).append(calls(lambda plan=plan, path=path: plan.render(path)))
        counted.setdefault("explain", []).append(calls(plan.explain))
        counted.setdefault("encode", []).append(calls(plan.encode))
    grown = {what: round(after / before, 1) for what, (before, after) in counted.items()}
    assert all(factor < MOST for factor in grown.values()), grown


@contextmanager
def lowered() -> Iterator[list[str]]:
    """The modules that JAX lowers meanwhile."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == LOWERED:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_layers_that_are_alike_are_exported_once() -> None:
    plans: list[fm.Plan] = []
    counts: list[int] = []
    for layers in (8, 32):
        with lowered() as events:
            plans.append(trained(layers))
        counts.append(len(events))
    assert counts[0] == counts[1] > 0
    assert len(plans[1].executables) == len(plans[0].executables)
    assert len(plans[1].tasks) > 2 * 32


def test_what_differs_in_a_value_or_its_type_is_never_taken_for_the_same() -> None:
    def fn(x: jax.Array) -> list[jax.Array]:
        scales = [1.0, 2.0, -0.0, 0.0, 1, jnp.float32(1.0)]
        results: list[jax.Array] = []
        for number, scale in enumerate(scales):
            with fm.layer(f"l{number}"):
                results.append(jnp.sin(x) * scale)
        with fm.layer("l6"):
            results.append(jnp.cumsum(x, axis=0))
        with fm.layer("l7"):
            results.append(jnp.cumsum(x, axis=1))
        with fm.layer("l8"):
            results.append(jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=2)[0])
        with fm.layer("l9"):
            results.append(jax.lax.scan(lambda c, _: (c * 3, None), x, None, length=2)[0])
        return results

    names = [f"worker:{i}" for i in range(10)]
    x = jnp.linspace(-2.0, 2.0, 12).reshape(3, 4)
    with fm.Cluster.threads(workers=10) as cluster:
        placement = {f"l{i}": name for i, name in enumerate(names)}
        found = fm.dataflow(fn, cluster=cluster, placement=placement)(x)
    for ours, expected in zip(found, fn(x), strict=True):
        assert jnp.array_equal(jnp.signbit(ours), jnp.signbit(expected))
        assert jnp.array_equal(ours, expected)


def test_a_pattern_is_matched_in_linear_time() -> None:
    layers = ["/".join(f"part{i}" for i in range(depth)) for depth in (50, 200)]
    few, many = (calls(lambda layer=layer: matches(layer, "part3/*/nothing")) for layer in layers)
    assert many / few < MOST


def test_text_is_cut_in_linear_time_and_fits() -> None:
    few, many = (calls(lambda n=n: fit("scope/" * n, 100.0, 13.0)) for n in (100, 400))
    assert many / few < MOST
    for width in (0.0, 5.0, 13.0, 100.0, 1e6):
        for text in ("", "a", "wide WWW mmm", "scope/" * 80, "层" * 40):
            cut = fit(text, width, 13.0)
            assert cut == text or cut.endswith("…")
            assert text_width(cut, 13.0) <= max(width, text_width("…", 13.0))


@pytest.mark.parametrize("most", range(70))
def test_auto_weighs_numbers_of_stages_no_further_apart_than_its_error(most: int) -> None:
    counts = _stage_counts(most)
    assert counts == sorted(set(counts))
    assert counts[-1:] == [most][: most >= 2] and counts[:1] == [2][: most >= 2]
    assert all(b <= a + 1 or b <= a * (1 + ERROR) for a, b in pairwise(counts))
    assert len(counts) < 24
