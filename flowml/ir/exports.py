"""Serialises functions of flat arrays as StableHLO, and reads them again where their author is not known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, MutableMapping, Sequence
from typing import Any

import jax
import jax.export
import msgspec

from flowml.errors import UnsupportedError
from flowml.ir import _jax, _mlir
from flowml.ir._compiled import compile_module
from flowml.ir.forms import Exported, Form, form_of
from flowml.ir.stablehlo import forbidden

_EXPORTED = Exported(max_bytes=64 * 2**20)
"""What this process exported."""


def export(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    platforms: Sequence[str],
    known: MutableMapping[Form, bytes] | None = None,
    form: Form | None = None,
) -> bytes:
    """Lower a function of flat arrays and serialise it as StableHLO: one module for each of `platforms`.

    `known` maps forms to earlier exports for the same platforms and settings; a form in it is not lowered again. `form`
    is the form of the function, if it is known without tracing. Raises UnsupportedError for operations that no worker
    runs, and any error that JAX raises for what it cannot lower.
    """
    known = {} if known is None else known
    context = tuple(platforms), _jax.trace_context()
    if form is not None and (data := _found(known, context, form)) is not None:
        return data
    traced = jax.jit(fn, keep_unused=True).trace(*inputs)
    if form is None:
        form = form_of(traced.jaxpr.jaxpr, traced.jaxpr.consts)
        if form is not None and (data := _found(known, context, form)) is not None:
            return data
    modules: dict[str, bytes] = {}
    for platform in platforms:
        module = _jax.lowered(traced, platform)
        if found := _refused(module, _mlir.operations(module)):
            raise UnsupportedError(f"it is {found}, which no worker runs")
        modules[platform] = _mlir.write(module)
    data = msgspec.msgpack.encode(modules)
    if form is not None:
        known[form] = data
        if form.lasting:
            _EXPORTED.add(context, form, data)
    return data


def _found(known: MutableMapping[Form, bytes], context: Hashable, form: Form) -> bytes | None:
    """What was exported before: for the same program, or for another one of this process."""
    if (data := known.get(form)) is None and form.lasting and (data := _EXPORTED.get(context, form)) is not None:
        known[form] = data
    return data


def export_traceable(fn: Callable[..., Any], inputs: Sequence[Any], platforms: Sequence[str]) -> bytes:
    """Like `export`, in the form of `jax.export`, whose functions another function may call while it is traced.

    JAX's check that later versions support custom calls is off, because workers have the same version.
    """
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("ALL")]
    jitted = jax.jit(fn, keep_unused=True)
    exported = jax.export.export(jitted, platforms=list(platforms), disabled_checks=unchecked)(*inputs)
    module = _mlir.read(_mlir.context(), exported.mlir_module_serialized)
    if found := _refused(module, _mlir.operations(module)):
        raise UnsupportedError(f"it is {found}, which no worker runs")
    return bytes(exported.serialize())


def _refused(module: Any, operations: Iterable[tuple[str, str]]) -> str:
    """What a module is or holds that no worker runs; "" if it is nothing."""
    if (several := _mlir.devices(module)) != 1:
        return f"a program for {several} devices"
    return forbidden(operations)


class Imported:
    """An executable of `export`, read and checked for one platform. Several threads may use it."""

    def __init__(self, data: bytes, platform: str, context: Any) -> None:
        """Read it into a context of `_mlir`, for devices of a platform as JAX names it ("gpu" is CUDA or ROCm).

        Raises UnsupportedError for other bytes and for what no worker runs, because the sender is not trusted.
        """
        self._lock = threading.Lock()
        self._context = context
        try:
            modules = msgspec.msgpack.decode(data, type=dict[str, bytes])
            self.platforms = tuple(modules)
            names = ("cuda", "rocm") if platform == "gpu" else (platform,)
            self._data = next((modules[n] for n in names if n in modules), b"")
            self._module: Any = _mlir.read(context, self._data) if self._data else None
            operations = _mlir.operations(self._module) if self._data else []
            found = _refused(self._module, operations) if self._data else ""
            self._lapack = any(target.startswith("lapack_") for _, target in operations)
        except Exception as error:  # several libraries raise errors of many types
            raise UnsupportedError(f"is damaged ({type(error).__name__})") from None
        if found:
            raise UnsupportedError(f"holds {found}, which no worker runs")

    @property
    def fits(self) -> bool:
        """Whether it was made for this platform too."""
        return bool(self._data)

    def takes(self, inputs: Sequence[jax.ShapeDtypeStruct], outputs: Sequence[jax.ShapeDtypeStruct]) -> bool:
        """Whether it is a function from such arrays to such arrays. To be asked before it is compiled."""
        return self._module is None or _mlir.takes(self._module, inputs, outputs)

    def may_not_end(self) -> bool:
        """Whether it has a loop that may go on for ever for some values of its inputs."""
        return _mlir.may_not_end(_mlir.read(self._context, self._data))

    def compile(
        self,
        inputs: Sequence[jax.ShapeDtypeStruct],
        outputs: Sequence[jax.ShapeDtypeStruct],
        device: Any,
        *,
        donate: Sequence[int],
        committed: bool,
    ) -> Callable[..., list[jax.Array]]:
        """Compile it for a device, to overwrite the arguments `donate`. Raises any error of XLA."""
        with self._lock:
            module, self._module = self._module, None
        if module is None:  # compiled before, with other donations or for another device
            module = _mlir.read(self._context, self._data)
        if donate:
            _mlir.overwrite(module, donate)
        if self._lapack:
            _jax.load_lapack()
        return compile_module(module, inputs, outputs, device, committed=committed)
