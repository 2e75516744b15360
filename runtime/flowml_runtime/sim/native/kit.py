"""The classes that a simulated run is made of: those of the usual modules, or the compiled ones of `flowml_native`.

Both do the same, event for event. The compiled ones are built once for each version of the sources and of Python, into
`flowml/simulator` under $XDG_CACHE_HOME, else ~/.cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowml.callers import warn
from flowml_runtime.driver.progress import shown
from flowml_runtime.protocol.training.driver import TrainingDriver
from flowml_runtime.sim.heap import Clock
from flowml_runtime.sim.native.rewriting import BUILD_S, PACKAGE, rewritten, sources
from flowml_runtime.sim.parallel import Team
from flowml_runtime.sim.world import Layout, World


@dataclass(frozen=True)
class Kit:
    """The classes of one kind. Those of two kinds do not mix."""

    clock: type[Clock]
    driver: type[TrainingDriver]
    layout: type[Layout]
    team: type[Team]
    world: type[World]


SPEED = "-O1"
"""How much the C compiler optimizes. The time of a build is nearly all its own; more than this gains little."""
USUAL = Kit(Clock, TrainingDriver, Layout, Team, World)


def compiled() -> Kit:
    """The compiled classes, which this builds if they are not there. If that fails, a warning says why, and the usual
    ones do."""
    try:
        folder = _built()
    except (OSError, subprocess.SubprocessError, _MissingError) as error:
        warn(f"the simulator runs as Python, because it cannot be compiled: {_why(error)}")
        return USUAL
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    heap, world, parallel = (importlib.import_module(f"{PACKAGE}.sim.{name}") for name in ("heap", "world", "parallel"))
    machine = importlib.import_module(f"{PACKAGE}.protocol.training.driver")
    return Kit(heap.Clock, machine.TrainingDriver, world.Layout, parallel.Team, world.World)


class _MissingError(Exception):
    """What a build needs is not there."""


def _built() -> Path:
    """The folder of the compiled package."""
    about = (sys.version, sysconfig.get_platform(), SPEED, *sources())
    folder = _cache() / hashlib.sha256("\0".join(about).encode()).hexdigest()[:24]
    if not folder.exists():
        _build(folder, rewritten())
    return folder


def _cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "flowml" / "simulator"
    except RuntimeError:
        raise _MissingError("there is no home directory to keep it in; set XDG_CACHE_HOME") from None


def what_is_missing() -> str | None:
    """What a build needs and does not find here, with a remedy."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    for module, name in (("mypyc", "mypy"), ("setuptools", "setuptools")):  # mypyc uses the other one
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed; run `pip install 'flowml[compiled]'`"
    if shutil.which(compiler) is None:
        return f"there is no C compiler {compiler!r}"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h is not installed, as by the package python3-dev"
    return None


def _build(folder: Path, sources: dict[str, str]) -> None:
    missing = what_is_missing()
    if missing is not None:
        raise _MissingError(missing)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for path, text in sources.items():
            file = made / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        command = [sys.executable, "-m", "flowml_runtime.sim.native.compiling", str(made), SPEED]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with shown(lambda: f"compiling the simulator into {folder}, once: a minute or two"):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_S, env=environment)
        for rest in ("c", "mypy"):
            shutil.rmtree(made / rest, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines: Any = (error.stdout or "") + (error.stderr or "")
        return next((line for line in str(lines).splitlines() if "error" in line), "the compiler failed")
    return str(error)
