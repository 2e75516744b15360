"""Every public constructor of the algebra and the simulator, called with what nobody should give it.

A call either works or raises an error of the house, in one line: none that Python, NumPy or a comparison has raised.
"""

from __future__ import annotations

import inspect
import linecache
import math
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest

import flowml as fm
from flowml import policy
from flowml_runtime.sim.native import kit

BAD: tuple[Any, ...] = (
    *(None, "a", "", b"x", math.nan, math.inf, -math.inf, -1, 0, -0.5, 10**30, 10**400, 1e308, True, False, 1j),
    *((), [None], {}, {"a": 1}, {1: 2}, object(), int, len, np.float32(0.5), np.arange(2), np.array("x")),
)

GOOD: dict[str, dict[str, Any]] = {
    "Hierarchy": {"local": fm.Ring(), "remote": fm.ParameterServer()},
    "Outer": {"optimizer": optax.sgd(0.1)},
    "Empirical": {"samples_s": [1.0]},
    "Recorded": {"trace": [[1.0]]},
    "Recording": {"operations": [fm.sim.Operation(0, 0, 0, 0, "forward", 0.0, 1.0)]},
    "Operation": {"kind": "forward", "end_s": 2.0},
    "Straggler": {"base": fm.sim.Constant(1.0), "factor": 2, "share": 0.5},
    "Regions": {"links": {("a", "b"): (0, 1)}},
    "Sites": {"table": {("a", "b"): (0, 1)}, "members": ["a", "b"]},
    "Churn": {"changes": []},
    "Change": {"up": True},
    "Partition": {"workers": [0], "start_s": 0, "end_s": 1},
    "ComputeTimes": {"model": fm.sim.Constant(1.0)},
    "SimulatedCluster": {"compute": fm.sim.Constant(1.0), "network": fm.sim.Network(0, 1e6)},
    "Quorum": {"count_or_fraction": 0.5},
    "coded_reduce": {"children": 2, "levels": 2},
    "Coded": {"stragglers": 1},
}
"""Name -> arguments beside which each other one is tried. A required one that is not here is 1."""


def constructors() -> Iterator[tuple[str, Callable[..., Any]]]:
    for place, module in (("policies", fm.policies), ("filters", fm.filters), ("sim", fm.sim)):
        yield from ((f"{place}.{name}", getattr(module, name)) for name in module.__all__)
    yield from ((name, getattr(fm, name)) for name in policy.__all__ if hasattr(fm, name))
    yield "SimulatedCluster", fm.SimulatedCluster


CONSTRUCTORS = {name: made for name, made in constructors() if callable(made) and not inspect.isabstract(made)}


def is_of_the_house(error: Exception) -> bool:
    """Whether a `raise` statement of ours has raised it, in one line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    lines = [linecache.getline(last.filename, number) for number in range(last.lineno or 1, (last.lineno or 1) - 8, -1)]
    typed = isinstance(error, fm.FlowmlError | TypeError | ValueError)
    return typed and "/flowml" in last.filename and any("raise " in line for line in lines) and "\n" not in str(error)


def fault(call: Callable[..., Any], *given: Any, **named: Any) -> Exception | None:
    try:
        call(*given, **named)
    except Exception as error:
        return None if is_of_the_house(error) else error
    return None


@pytest.mark.filterwarnings("ignore:the simulator runs as Python")
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_bad_values_get_an_error_of_the_house(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kit, "what_is_missing", lambda: "nothing compiles here")  # it would take a minute
    call = CONSTRUCTORS[name]
    parameters = inspect.signature(call).parameters.values()
    arguments = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    good = GOOD.get(name.rpartition(".")[2], {})
    base = {p.name: 1 for p in arguments if p.default is p.empty} | good
    assert fault(call, **base) is None
    every = [p.name for p in arguments] + (["staleness", "quorum", "every", "topology"] if "policies" in name else [])
    for argument in every:
        for value in BAD:
            wrong = fault(call, **(base | {argument: value}))
            assert wrong is None, f"{name}({argument}={value!r}): {type(wrong).__name__}: {wrong}"


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_wrong_names_and_numbers_of_arguments_get_an_error_of_the_house(name: str) -> None:
    call, short = CONSTRUCTORS[name], name.rpartition(".")[2]
    needed = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty and p.kind < p.VAR_KEYWORD]
    with pytest.raises(fm.FlowmlError, match=r"has no argument zyx=.*has"):
        call(**{p.name: GOOD.get(short, {}).get(p.name, 1) for p in needed}, zyx=1)
    with pytest.raises(fm.FlowmlError, match=r"is given too many values \(40\)|has no argument"):
        call(*range(40))
    if needed:
        with pytest.raises(fm.FlowmlError, match=rf"needs {needed[0].name}="):
            call()


def test_the_nearest_argument_is_named() -> None:
    with pytest.raises(fm.PolicyError, match=r"^top_k has no argument sare=; did you mean share=\? top_k has share=$"):
        fm.filters.top_k(sare=0.1)  # pyright: ignore[reportCallIssue]
    with pytest.raises(fm.SimulationError, match=r"^Pareto has no argument scale=; did you mean scale_s=\?"):
        fm.sim.Pareto(scale=1, alpha=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(fm.SimulationError, match=r"^Constant is given s= twice, by its place and by its name"):
        fm.sim.Constant(1, s=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(
        fm.PolicyError, match=r"^double_buffer has no argument staleness=; double_buffer has topology=,"
    ):
        fm.policies.double_buffer(staleness=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(fm.SimulationError, match=r"^Regions\.read has no argument pth=; did you mean path=\?"):
        fm.sim.Regions.read(pth="links.csv")  # pyright: ignore[reportCallIssue]


def test_a_named_policy_names_its_own_arguments() -> None:
    with pytest.raises(
        fm.PolicyError, match=r"^sparse_loco has no argument kep=; did you mean keep=\? .* bits=, outer="
    ):
        fm.policies.sparse_loco(8, kep=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(fm.PolicyError, match=r"^Quorum\(2.0\): a fraction lies in"):
        fm.policies.quorum(2.0, every=2)


def test_the_nearest_name_is_named() -> None:
    for module, wrong, right in (
        (fm, "Quorom", "fm.Quorum"),
        (fm.filters, "topk", "fm.filters.top_k"),
        (fm.sim, "Paretto", "fm.sim.Pareto"),
        (fm.policies, "local_sdg", "fm.policies.local_sgd"),
    ):
        with pytest.raises(AttributeError, match=rf"has no attribute '{wrong}'; did you mean {right}\?$"):
            getattr(module, wrong)


def test_an_error_further_in_is_not_taken_for_a_wrong_call() -> None:
    class Odd:
        def __index__(self) -> int:
            raise TypeError("further in")

        def __iter__(self) -> Iterator[int]:
            raise TypeError("further in")

    with pytest.raises(TypeError, match="further in"):
        fm.policies.choco(Odd())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fm.policies.compensate(1),
            r"compensate\(1\): a clock would be complete with one replica; give a share",
        ),
        (lambda: fm.policies.choco(()), r"choco\(\(\)\): it has no filters; .* without any it is gossip\(\)"),
    ],
)
def test_a_slip_that_makes_another_method_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(fm.PolicyError, match=message):
        make()
