"""Rewrites the programs that are among the parameters of an equation: bodies of loops, branches and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.extend import core as jex


def map_bodies(parameters: Mapping[str, Any], rewrite: Callable[[Any, tuple[Any, ...]], Any]) -> dict[str, Any]:
    """The parameters, with `rewrite(jaxpr, constants)` in place of each jaxpr. An open jaxpr has no constants."""
    return {name: _mapped(value, rewrite) for name, value in parameters.items()}


def _mapped(value: Any, rewrite: Callable[[Any, tuple[Any, ...]], Any]) -> Any:
    match value:
        case jex.ClosedJaxpr():
            return jex.ClosedJaxpr(rewrite(value.jaxpr, tuple(value.consts)), value.consts)
        case jex.Jaxpr():
            return rewrite(value, ())
        case tuple():
            return tuple(_mapped(v, rewrite) for v in value)
        case _:
            return value
