"""Every wait has a deadline, or says why it needs none; and invariants hold under `python -O`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_house import SOURCES, relative

WAITS = {
    "accept": 0,
    "acquire": 0,
    "communicate": 0,
    "get": 0,
    "join": 0,
    "poll": 0,
    "recv": 1,
    "result": 0,
    "select": 3,
    "wait": 0,
    "wait_for": 1,
}
"""Method -> how many arguments it has when it waits without a deadline."""

PROGRAMS = {"call", "check_call", "check_output", "run"}
"""Functions of subprocess that wait for a program, unless they are given `timeout=`."""

FINISHED = {"done", "process", "select"}
"""What `done.result()` in a callback, `process.poll()` and `select.poll()` do not wait for."""

REASON = "# no deadline: "
"""Opens the comment that says why; on the line of the call, or on the one before."""


def unbounded(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls that may wait for ever, by their names."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        named = {k.arg for k in node.keywords}
        of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        if of == "subprocess":
            if node.func.attr in PROGRAMS and "timeout" not in named:
                yield node
        elif of in FINISHED:
            continue
        elif WAITS.get(node.func.attr) == len(node.args) and not named & {"timeout", "timeout_s", "blocking", "block"}:
            yield node


def unexplained(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    found = sorted({n.end_lineno or 0 for n in unbounded(ast.parse("\n".join(lines)))})
    return [
        f"{relative(path)}:{n}: {lines[n - 1].strip()}"
        for n in found
        if REASON not in lines[n - 1] and REASON not in lines[n - 2]
    ]


def test_every_wait_has_a_deadline_or_a_reason() -> None:
    """In the runtime and the command; benchmarks are run by hand, and each of their processes ends with the first."""
    waiting = [f for f in SOURCES if "flowml_" in relative(f) and "/bench/" not in relative(f)]
    assert [line for f in waiting for line in unexplained(f)] == []


def test_the_search_for_waits_finds_them() -> None:
    waits = ["queue.get()", "event.wait()", "lock.acquire()", "changed.wait_for(ready)", "subprocess.run(command)"]
    fine = ["queue.get(timeout=1)", "event.wait(1)", "table.get('key')", "changed.wait_for(ready, 1)", "done.result()"]
    assert [ast.unparse(node) for node in unbounded(ast.parse("\n".join(waits + fine)))] == waits


def narrows(test: ast.expr) -> bool:
    """Whether an assertion only tells the type checker what a value is: an attribute error says the same later."""
    match test:
        case ast.Compare(ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
        case ast.BoolOp(op=ast.And(), values=values):
            return all(map(narrows, values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return narrows(operand)
        case ast.Call(func=ast.Name(id="isinstance")):
            return True
        case _:
            return False


def test_invariants_are_errors_and_not_assertions() -> None:
    """`python -O` leaves assertions out."""
    found = [
        f"{relative(f)}:{node.lineno}"
        for f in SOURCES
        if "/bench/" not in relative(f)
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.Assert) and not narrows(node.test)
    ]
    assert found == []
