"""`flowml viz` draws a function's plan without running it."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from flowml_tools.command import CommandError, count, positive
from flowml_tools.script import load, own_errors, script

if TYPE_CHECKING:
    from flowml.devices import Device
    from flowml.plan import Plan

SUMMARY = "draw a function's plan"
DESCRIPTION = """\
Draw the plan of a function: which device runs what, and what crosses between them. Nothing is run but the file's
own top level.

FUNCTION is one of
  a function of no arguments that returns an fm.Plan, or an fm.Plan itself;
  a function, an fm.dataflow or an fm.Trainer, with example arguments beside it in the file: a tuple called
  FUNCTION_args, or else example_args (arrays or jax.ShapeDtypeStruct; only their shapes and dtypes matter).
"""
SUFFIXES = (".svg", ".html", ".dot", ".txt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="FILE.py:FUNCTION", help="the file and the function in it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="G.svg", help="svg, html, dot or txt")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="plan for N workers (default 2)")


def main(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    if output.suffix.lower() not in SUFFIXES:
        raise CommandError(f"cannot draw {str(output)!r}: name it .svg, .html, .dot or .txt")
    if not output.parent.is_dir():
        raise CommandError(f"the folder of {str(output)!r} does not exist")
    text, colon, name = arguments.target.rpartition(":")
    if not colon or not name.isidentifier():
        raise CommandError(f"{arguments.target!r} is not FILE.py:FUNCTION")
    path = script(text)
    from flowml_runtime.cluster import Cluster

    # A threads cluster is cheap. It only provides devices to code that asks for the current cluster, and runs nothing.
    with Cluster.threads(arguments.workers) as cluster:
        module = load(path)
        with own_errors(path):
            plan = _plan(module, path, name, cluster.devices)
    plan.render(output)
    print(f"{output}: {count(len(plan.devices), 'device')}, {count(len(plan.transfers), 'transfer')}")
    return 0


def _plan(module: ModuleType, path: Path, name: str, devices: Sequence[Device]) -> Plan:
    target: Any = getattr(module, name, None)
    if target is None:
        raise CommandError(f"{str(path)!r} has no {name!r}; it has {', '.join(_functions(module)) or 'no functions'}")
    import flowml as fm

    if isinstance(target, fm.Plan):
        return target
    planner = getattr(target, "plan", None)
    if planner is None and not callable(target):
        raise CommandError(f"{name!r} in {str(path)!r} is a {type(target).__name__}, which has no plan")
    examples = _example_arguments(module, name)
    if examples is not None:
        return planner(*examples) if planner else fm.compile(target, *examples, devices=devices)
    if planner or inspect.signature(target).parameters:
        raise CommandError(f"{name!r} takes arguments: put examples beside it in {str(path)!r}, as {name}_args = (…,)")
    plan = target()
    if not isinstance(plan, fm.Plan):
        raise CommandError(f"{name}() returned a {type(plan).__name__}; a function of no arguments returns an fm.Plan")
    return plan


def _functions(module: ModuleType) -> list[str]:
    own = (n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__)
    return sorted(own)


def _example_arguments(module: ModuleType, name: str) -> tuple[Any, ...] | None:
    for attribute in (f"{name}_args", "example_args"):
        if hasattr(module, attribute):
            value = getattr(module, attribute)
            if not isinstance(value, tuple):
                raise CommandError(f"{attribute} is a {type(value).__name__}; make it a tuple of example arguments")
            return cast("tuple[Any, ...]", value)
    return None
