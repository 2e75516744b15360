"""Serialises functions of flat arrays as StableHLO, and reads them again where their author is not known."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import jax
import jax.export

from flowml.errors import UnsupportedError
from flowml.ir import _jax
from flowml.ir.forms import form_of
from flowml.ir.stablehlo import forbidden


def export(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    platforms: Sequence[str],
    known: MutableMapping[Any, bytes] | None = None,
    form: Any = None,
) -> bytes:
    """Lower a function of flat arrays for `platforms` and serialise it as StableHLO.

    `known` maps forms to earlier exports for the same platforms and settings; a form in it is not lowered again. `form`
    is the form of the function, if it is known without tracing. JAX's check that later versions support custom calls
    is off, because workers have the same version; the calls on our list are allowed. Raises UnsupportedError for other
    custom calls, and any error that JAX raises for what it cannot export.
    """
    known = {} if known is None else known
    jitted = jax.jit(fn, keep_unused=True)
    if form is None:
        closed = jitted.trace(*inputs).jaxpr
        form = form_of(closed.jaxpr, closed.consts)
    if form in known:
        return known[form]
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("ALL")]
    exported = jax.export.export(jitted, platforms=list(platforms), disabled_checks=unchecked)(*inputs)
    if found := forbidden(_jax.operations(exported)):
        raise UnsupportedError(f"it is {found}, which no worker runs")
    data = bytes(exported.serialize())
    if form is not None:
        known[form] = data
    return data


def load_exported(data: bytes) -> jax.export.Exported:
    """Read bytes made by `export`. Raises UnsupportedError for others, because their sender is not trusted."""
    try:
        exported = jax.export.deserialize(bytearray(data))
        found = forbidden(_jax.operations(exported))
    except Exception as error:  # several libraries raise errors of many types
        raise UnsupportedError(f"is damaged ({type(error).__name__})") from None
    if exported.ordered_effects or exported.unordered_effects:
        found = "a side effect"
    if exported.nr_devices != 1:
        found = f"a program for {exported.nr_devices} devices"
    if found:
        raise UnsupportedError(f"holds {found}, which no worker runs")
    return exported
