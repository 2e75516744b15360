"""A number that makes no sense is one line of error, in every example."""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_every_number_is_checked() -> None:
    """Options of examples are parsed by types that know what makes sense, never by plain `int` or `float`."""
    for path in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "type" and isinstance(node.value, ast.Name):
                assert node.value.id not in ("int", "float"), f"{path.name}, line {node.value.lineno}"


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("wan", ["--steps", "0"], "argument --steps: 0 is out of range; give 1 or more"),
        ("policies", ["--steps", "-1"], "argument --steps: -1 is out of range; give 1 or more"),
        ("spot", ["--interval", "0"], "argument --interval: 0 is not a time; give seconds above 0"),
        ("spot", ["--intervals", "none"], "argument --intervals: 'none' is not a whole number, such as 10"),
        ("spot", ["--trace", "missing.json"], "missing.json cannot be read: No such file"),
    ],
)
def test_one_line_says_what_is_wrong(
    name: str, arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "policies":
        pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{name}.py: error: {text}")


def test_seeds_and_times_are_in_range() -> None:
    spec = importlib.util.spec_from_file_location("arguments", EXAMPLES / "_arguments.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (module.natural("0"), module.positive("7"), module.seconds("1e-3")) == (0, 7, 0.001)
    for parse, text in (
        (module.natural, str(2**32)),
        (module.natural, "-1"),
        (module.seconds, "inf"),
        (module.seconds, "x"),
    ):
        with pytest.raises(Exception, match=r"out of range|not a time|not a number"):
            parse(text)
