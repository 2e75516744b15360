"""Runs the kernels of filters (`flowml.policy.filters`) with NumPy, or as JAX tasks on the device of the arrays.

Which is faster depends on the machine, the kernel and the size, so the first call of a kernel on arrays of one kind and
device measures both, and the process remembers the faster. Exact kernels give the same bits both ways, so the choice
does not change a fit. The others, which multiply matrices, are not measured: they run with NumPy on CPUs, and as JAX
tasks elsewhere. Small arrays stay with NumPy, because a measurement takes longer than they ever would.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowml.errors import ClusterError
from flowml.ir._jax import exact_types
from flowml.policy.filters import Kernel, on_numpy
from flowml_runtime.execution.programs import JaxDevice

MODES = ("measure", "numpy", "jax")
MODE_VARIABLE = "FLOWML_FILTERS"

SMALL = 2**16
"""Arrays with fewer elements stay with NumPy, unless all are to run as JAX tasks."""

NAMESPACE = SimpleNamespace(**vars(jnp) | {"top_k": jax.lax.top_k})
"""The array namespace of JAX tasks."""

REPEATS = 3
"""Runs of each, of which the fastest counts."""

Kind = tuple[str, str, tuple[object, ...], tuple[object, ...]]
"""(kernel, device, shapes and dtypes, numbers)"""

_chosen: dict[Kind, str] = {}
_lock = threading.Lock()


def filters_mode(asked: str | None = None) -> str:
    """Who runs kernels: as asked, else from $FLOWML_FILTERS, else "measure". Raises ClusterError."""
    mode = asked or os.environ.get(MODE_VARIABLE) or "measure"
    if mode not in MODES:
        raise ClusterError(f"{MODE_VARIABLE}={mode!r} is not a mode; use {', '.join(map(repr, MODES))}")
    return mode


def choices() -> Mapping[Kind, str]:
    """What this process has measured: "numpy" or "jax", whichever was faster."""
    with _lock:
        return dict(_chosen)


class Kernels:
    """Runs the kernels for one device. Several threads may call it."""

    def __init__(self, device: JaxDevice, mode: str | None = None) -> None:
        self._device = device
        self._mode = filters_mode(mode)

    def __call__(self, kernel: Kernel, *arrays: Any, exact: bool = True, **numbers: Any) -> Any:
        """Run a kernel. `numbers` decide the shapes of its results."""
        return (self._jax if self._who(kernel, arrays, exact, numbers) == "jax" else self._numpy)(
            kernel, arrays, numbers
        )

    def _who(self, kernel: Kernel, arrays: tuple[Any, ...], exact: bool, numbers: Mapping[str, Any]) -> str:
        if self._mode != "measure":
            return self._mode
        if not exact:
            return "numpy" if self._device.platform == "cpu" else "jax"
        if max(a.size for a in arrays if a is not None) < SMALL:
            return "numpy"
        kinds = tuple(None if a is None else (a.shape, a.dtype.name) for a in arrays)
        kind = (kernel.__name__, str(self._device), kinds, tuple(sorted(numbers.items())))
        with _lock:  # one measurement at a time, because they would disturb each other
            if kind not in _chosen:
                one, other = (partial(run, kernel, arrays, numbers) for run in (self._numpy, self._jax))
                _chosen[kind] = "numpy" if fastest(one) <= fastest(other) else "jax"
            return _chosen[kind]

    def _numpy(self, kernel: Kernel, arrays: tuple[Any, ...], numbers: Mapping[str, Any]) -> Any:
        return on_numpy(kernel, *arrays, **numbers)

    def _jax(self, kernel: Kernel, arrays: tuple[Any, ...], numbers: Mapping[str, Any]) -> Any:
        with exact_types(), jax.default_device(self._device):
            results = _task(kernel, tuple(numbers))(*arrays, **numbers)
        if self._device.platform != "cpu":
            return results
        return jax.tree.map(np.asarray, results)  # views of the results


@cache
def _task(kernel: Kernel, numbers: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(partial(kernel, xp=NAMESPACE), static_argnames=numbers)


def fastest(run: Callable[[], Any]) -> float:
    """The seconds of the fastest of several runs, after one that may compile."""
    jax.block_until_ready(run())
    found: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return min(found)
