"""Makes the environment in which Ray and TensorFlow are measured, separate from the project's environment.

They depend on dozens of packages whose version pins would conflict with those of the project. The folder holds a stamp
file from the start, which stays empty until everything is installed. So an incomplete environment can be recognized,
and this module never removes anything that it did not make.
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
"""The most characters in a line of progress."""


def folder() -> Path:
    """The folder of the environment: $FLOWML_PEERS, or a folder in the user's cache directory."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "flowml" / "peers"


def complete() -> bool:
    """Whether the environment is complete and has the pinned versions."""
    try:
        return (folder() / STAMP).read_text() == _CONTENT
    except OSError:
        return False


def python() -> Path:
    """The environment's interpreter. Raises BenchError if the environment is not complete."""
    if not complete():
        raise BenchError(f"not installed ({COMMAND})")
    return _python(folder())


def make() -> None:
    """Make the environment, unless it is complete. After an error or Ctrl-C, removes what it has made."""
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
    """Whether the folder may be removed: it does not exist, is empty, or was made here."""
    if not where.exists():
        return True
    return where.is_dir() and ((where / STAMP).exists() or not any(where.iterdir()))


def _remove(where: Path) -> None:
    """Remove the stamp last, so that the rest of an interrupted removal is still recognized."""
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
    """Run one step and show its progress. Raises BenchError with the end of the step's output."""
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
                os.killpg(process.pid, signal.SIGKILL)  # also ends the processes that pip has started
        if failed:
            log.seek(0)
            raise BenchError(_failure(command, [*said, *log.read().decode(errors="replace").strip().splitlines()]))


def _failure(command: Sequence[str | Path], said: Sequence[str]) -> str:
    step = command[2]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    why = errors[-1] if errors else next((line for line in reversed(said) if line), "it said nothing")
    return f"no environment for the peers, as {step} failed: {why}; see to that and run `{COMMAND}` again"
