"""A home folds any number of contributions, whatever the width of its tasks, and adds them up as a plain loop does."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.plan import ArraySpec, Part, Plan
from flowml.training import stores
from flowml.training.apply import HomeTasks, Payload
from tests.training.reference import data, mlp, mlp_loss

SHAPES = ((3, 2), (2,))


def sgd(*arrays: Any) -> tuple[Any, ...]:
    """The update p - g, with a count as the state."""
    (g0, g1), (p0, p1), (count,) = arrays[:2], arrays[2:4], arrays[4:]
    return p0 - g0, p1 - g1, count + 1


def home(*, weighted: bool = False, exact: bool = False) -> HomeTasks:
    specs = tuple(ArraySpec(s, "float32") for s in (*SHAPES, *([()] if weighted else [])))
    return HomeTasks(sgd, Payload([Part(0, (0, 1), specs)], SHAPES, {}, weighted, steps=False), 2, 1, exact)


def contribution(number: int, dtype: Any, *, weighted: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(number)
    found = [rng.normal(size=s).astype(np.float32).astype(dtype) for s in SHAPES]
    return [*found, np.float32(number + 1)] if weighted else found  # pyright: ignore[reportReturnType]


def rows(width: int, values: list[float]) -> np.ndarray:
    found = np.zeros((2, width), np.float32)
    found[:, : len(values)] = values
    return found


def applied(
    functions: HomeTasks, width: int, given: list[list[np.ndarray]], coefficients: list[float], dtype: Any
) -> Any:
    """What a home does: batches of `width`, the last one filled up with its first contribution."""
    params, total = [np.ones(s, dtype) for s in SHAPES], None
    for start in range(0, len(given), width):
        some = given[start : start + width]
        arguments = [a for g in some + [some[0]] * (width - len(some)) for a in g]
        table = rows(width, coefficients[start : start + width])
        if len(given) <= width:
            return jax.jit(functions.apply)(*params, np.int32(0), table, *arguments)
        if total is None:
            specs = jax.eval_shape(lambda *a: functions.folded(None, *a), table, *arguments)
            total = [np.zeros(s.shape, s.dtype) for s in specs]
        total = jax.jit(functions.fold)(*total, table, *arguments)
    assert total is not None
    return jax.jit(functions.finish)(*params, np.int32(0), *total)


@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_number_is_folded_as_a_loop_adds(width: int, count: int, weighted: bool, dtype: Any) -> None:
    given = [contribution(i, dtype, weighted=weighted) for i in range(count)]
    coefficients = [1.0] * count if weighted else [1 / count] * count
    result = applied(home(weighted=weighted), width, given, coefficients, dtype)
    for leaf in range(2):
        parts = [np.asarray(g[leaf], np.float64) for g in given]
        total = sum(c * p for c, p in zip(coefficients, parts, strict=True))
        if weighted:
            total = total / sum(float(g[2]) for g in given)
        expected = (1 - np.asarray(total).astype(dtype).astype(np.float64)).astype(dtype)
        tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
        np.testing.assert_allclose(
            np.asarray(result[leaf], np.float64), np.asarray(expected, np.float64), atol=tolerance
        )
    assert int(result[2]) == 1


def test_what_only_fills_the_arguments_is_not_added_even_if_it_is_infinite() -> None:
    given = [[np.full(s, np.inf, np.float32) for s in SHAPES]]
    result = applied(home(), 4, given, [1.0], np.float32)
    assert np.isneginf(np.asarray(result[0])).all()  # with inf · 0 added, NaN


def test_many_small_ones_are_added_wide() -> None:
    """256 + 1 is 256 in bfloat16."""
    given = [[np.full(s, v, jnp.bfloat16) for s in SHAPES] for v in (256, 1, 1, 1)]
    for width in (1, 4):
        result = applied(home(), width, given, [0.25] * 4, jnp.bfloat16)
        assert float(result[1][0]) == 1 - float(jnp.bfloat16(64.75))  # 1 - 64 with a sum in bfloat16


def test_a_share_of_the_weight_may_differ_from_the_coefficient() -> None:
    """Scaled by half, the gradient is halved, while its weight counts in full."""
    given = [contribution(0, np.float32, weighted=True)]
    table = np.array([[0.5], [1.0]], np.float32)
    result = jax.jit(home(weighted=True).apply)(
        *[np.ones(s, np.float32) for s in SHAPES], np.int32(0), table, *given[0]
    )
    np.testing.assert_allclose(result[1], 1 - given[0][1] / 2, rtol=1e-6)


def fit(replicas: int, **options: Any) -> Any:
    with fm.Cluster.threads(workers=replicas) as cluster:
        trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=replicas, **options)
        return trainer.fit(mlp(), data(), batch_size=24, steps=6)


def folds(plan: Plan) -> int:
    assert plan.training is not None
    return sum(s.applies.fold is not None for s in plan.training.stores)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("options", [{}, {"policies": fm.policies.factors()}, {"microbatches": 2}], ids=str)
def test_replicas_may_outnumber_the_width(monkeypatch: pytest.MonkeyPatch, width: int, options: dict[str, Any]) -> None:
    expected = fit(4, **options)
    assert folds(expected.plan) == 0
    monkeypatch.setattr(stores, "FOLD_WIDTH", width)
    result = fit(4, **options)
    assert folds(result.plan) > 0
    for mine, its in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-6)


def test_twelve_replicas_equal_one_batch() -> None:
    result, alone = fit(12), fit(1)
    assert folds(result.plan) > 0
    for mine, its in zip(jax.tree.leaves(result.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)
