"""The environment in which Ray and TensorFlow are measured: made by one command, outside the project's own.

They bring dozens of packages with pins of their own, which nobody should have to reconcile with the project's. The
folder holds a stamp from its first moment on, which is empty until all is installed: so a half-made environment is
known as one, and nothing is ever removed that this module did not make.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flowml_tools.bench.rows import BenchError
from flowml_tools.bench.timing import tell
from flowml_tools.command import CommandError

VERSIONS = {"ray": "2.60.0", "tensorflow-cpu": "2.21.0"}
COMMAND = "flowml bench --make-peers"
VARIABLE = "FLOWML_PEERS"
STAMP = "flowml-peers.txt"

_REQUIREMENTS = [f"{package}=={version}" for package, version in VERSIONS.items()]
_CONTENT = "\n".join(_REQUIREMENTS) + "\n"
_WORTH_TELLING = ("Collecting ", "Installing ")
_SHOWN = 100
"""Characters of a line of progress."""


def folder() -> Path:
    """Where the environment is, or will be: $FLOWML_PEERS, or a folder in the user's cache directory."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "flowml" / "peers"


def complete() -> bool:
    """Whether the environment is there, with the versions of today."""
    try:
        return (folder() / STAMP).read_text() == _CONTENT
    except OSError:
        return False


def python() -> Path:
    """The environment's interpreter. Raises BenchError where there is no complete environment."""
    if not complete():
        raise BenchError(f"not installed ({COMMAND})")
    return _python(folder())


def make() -> None:
    """Make the environment, unless it is complete. Whatever stops that (an error, Ctrl-C), no half-made one stays."""
    where = folder()
    if complete():
        return
    if not _ours(where):
        raise CommandError(f"{str(where)!r} holds something else; ${VARIABLE} names another folder for the peers")
    try:
        _remove(where)
        where.mkdir(parents=True)
        (where / STAMP).touch()
        tell(f"peers: an environment in {where}")
        _run(sys.executable, "-m", "venv", where)
        options = ("--no-input", "--no-color", "--progress-bar=off", "--disable-pip-version-check")
        _run(_python(where), "-m", "pip", "install", *options, *_REQUIREMENTS)
        (where / STAMP).write_text(_CONTENT)
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}; ${VARIABLE} names another folder") from None
    finally:
        if not complete() and _ours(where):
            _remove(where)


def _python(where: Path) -> Path:
    return where / "bin" / "python"


def _ours(where: Path) -> bool:
    """Whether nothing is lost with the folder: it is not there, empty, or was made here."""
    if not where.exists():
        return True
    return where.is_dir() and ((where / STAMP).exists() or not any(where.iterdir()))


def _remove(where: Path) -> None:
    """The stamp goes last, so that what an interruption leaves is still known as ours."""
    if not where.exists():
        return
    for path in where.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != STAMP:
            path.unlink()
    (where / STAMP).unlink(missing_ok=True)
    where.rmdir()


def _run(*command: str | Path) -> None:
    """Run one step with its progress shown. Raises BenchError with the step's last words."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process,
    ):
        try:
            said = [""]
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.strip())
                if line.startswith(_WORTH_TELLING):
                    tell(f"peers: {line.strip()[:_SHOWN]}")
            failed = process.wait() != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with whatever pip has started
        if failed:
            log.seek(0)
            raise BenchError(_failure(command, [*said, *log.read().decode(errors="replace").strip().splitlines()]))


def _failure(command: Sequence[str | Path], said: Sequence[str]) -> str:
    step = command[2]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    why = errors[-1] if errors else next((line for line in reversed(said) if line), "it said nothing")
    return f"no environment for the peers, as {step} failed: {why}; see to that and run `{COMMAND}` again"
