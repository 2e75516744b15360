"""Settles which persistent compilation cache of JAX the workers of one machine use.

If the owner of the cluster has configured one, its workers use it too, with the owner's settings: a second run of a
script loads what the first has compiled. Otherwise they share a folder of the cluster, which only the user can read
and which is removed with it. Both hold only what the workers have compiled themselves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from flowml.callers import warn
from flowml_runtime.environment.spread import Spread
from flowml_runtime.execution.turns import Turns
from flowml_runtime.worker.config import WorkerConfig

_FOLDER = "jax_compilation_cache_dir"
_SETTINGS = (
    _FOLDER,
    "jax_enable_compilation_cache",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
)


def settings_here() -> tuple[tuple[str, Any], ...]:
    """This process's settings of the cache. () if it has not imported JAX: workers inherit environment variables."""
    if "jax" not in sys.modules:
        return ()
    import jax

    return tuple((name, getattr(jax.config, name)) for name in _SETTINGS if hasattr(jax.config, name))


class CacheFolder:
    """The folder that workers are started with. It tells if their owner sets another one later."""

    def __init__(self) -> None:
        self._first = _folder_here()
        self._told = False

    def warn(self) -> None:
        """Warn once if this process now has another folder than the workers."""
        now = _folder_here()
        if now != self._first and not self._told:
            self._told = True
            warn(
                f"{_FOLDER} is {now!r}, and the workers were started with {self._first!r}, which they keep; set it "
                "before the cluster starts"
            )


def _folder_here() -> str | None:
    if "jax" not in sys.modules:
        return os.environ.get("JAX_COMPILATION_CACHE_DIR")
    import jax

    config: Any = jax.config
    return config.jax_compilation_cache_dir


def share_compilations(config: WorkerConfig, spread: Spread) -> Turns:
    """Apply the settings in this worker, before it compiles anything."""
    import jax

    for name, value in config.compile_cache:
        jax.config.update(name, value)
    here: Any = jax.config
    if not config.compiled or not here.jax_enable_compilation_cache:
        return Turns(spread=spread)
    if here.jax_compilation_cache_dir is None:
        jax.config.update(_FOLDER, config.compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return Turns(Path(config.compiled), spread=spread)
