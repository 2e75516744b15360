"""Workers write the last checkpoint of a fit without a driver: on the disk there is the old one or the new, whatever
fails. `test_orphans` does the same with real fits.
"""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from flowml_runtime.environment import checkpoints, last_checkpoints, locks
from flowml_runtime.environment.last_checkpoints import Known
from flowml_runtime.protocol.training.kept_fits import Write
from flowml_runtime.worker.last_checkpoint import Found, write_last
from tests.training.test_checkpoint_files import TEAR

ROOT = Path(__file__).resolve().parents[2]
CONTENT = msgspec.json.encode(
    {"owners": {"one": ["a", "b"], "two": ["a", "b"]}, "params": [{"buffer": "rest"}], "opt_state": []}
)


def asked(directory: Path, *keys: str, again: bool = False) -> Write:
    fit = checkpoints.identity(directory, anew=False)
    return Write(fit, keys, str(directory), keep=2, lost=("driver",), again=again)


def part(owner: str, step: int, *, knows: bool = True) -> Found:
    arrays = {f"{owner}/{name}": np.full(100, step) for name in "ab"}
    return Found({**arrays, "rest": np.asarray(step)} if knows else arrays, Known(step, CONTENT) if knows else None)


def give(directory: Path, owner: str, parts: Mapping[str, Found], *, again: bool = False) -> bool:
    return write_last(asked(directory, *parts, again=again), f"worker {owner}", parts)


def steps(directory: Path) -> list[int]:
    """Of the snapshots of a directory that are kept, each of which is whole."""
    found = checkpoints.snapshots(directory)[:2]
    for path in found:
        _, arrays = checkpoints.read(path)
        assert {int(x) for a in arrays.values() for x in a.ravel()} == {checkpoints.step_of(path)}
    return [checkpoints.step_of(path) for path in found]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """That of a fit, with a checkpoint."""
    checkpoints.identity(tmp_path, anew=True)
    checkpoints.write(tmp_path, 1, b"{}", {"x": np.asarray(1)}, keep=2)
    return tmp_path


@pytest.mark.parametrize("known", [(True, True), (True, False), (False, True)])
def test_the_last_of_the_workers_completes_it(directory: Path, known: tuple[bool, bool]) -> None:
    """One that was not told that the snapshot is complete does not know its content."""
    assert not give(directory, "one", {"key": part("one", 5, knows=known[0])})
    assert steps(directory) == [1]
    assert give(directory, "two", {"key": part("two", 5, knows=known[1])})
    assert steps(directory) == [5, 1]
    assert give(directory, "one", {"key": part("one", 5)}, again=True), "it sees that nothing is left to do"
    assert {p.name for p in (directory / "step-000000000005").iterdir()} >= {checkpoints.MANIFEST}
    assert not list(directory.glob("step-*/part*.json"))
    assert not list(directory.glob(f"{checkpoints.LAST}*"))


def test_the_newest_of_two_is_completed(directory: Path) -> None:
    """One worker was told that the second is complete, and dropped its part of the first. The other was not."""
    assert not give(directory, "one", {"first": part("one", 4), "second": part("one", 6, knows=False)})
    assert give(directory, "two", {"second": part("two", 6)})
    assert steps(directory) == [6, 1]
    assert give(directory, "one", {"first": part("one", 4), "second": part("one", 6, knows=False)}, again=True)
    assert not list(directory.glob(f"{checkpoints.LAST}*")), "the first is not needed"


def test_nothing_is_written_if_the_driver_has_written_it(directory: Path) -> None:
    checkpoints.write(directory, 5, b"{}", {"x": np.asarray(5)}, keep=2)
    before = sorted(directory.rglob("*"))
    assert give(directory, "one", {"key": part("one", 5)})
    assert sorted(directory.rglob("*")) == before


def test_a_part_is_not_taken_for_the_whole(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The other worker is on a machine that has another directory of this name, or none."""
    elsewhere = directory / "other machine"
    elsewhere.mkdir()
    checkpoints.identity(elsewhere, anew=True)
    for there in (elsewhere, directory / "no such directory"):
        fit = checkpoints.identity(directory, anew=False)
        write = Write(fit, ("key",), str(there), keep=2, lost=(), again=False)
        with caplog.at_level(logging.WARNING):
            assert not write_last(write, "worker two", {"key": part("two", 5)})
        assert "worker two does not see the directory of this fit there" in caplog.messages[-1]
    assert sorted(p.name for p in elsewhere.iterdir()) == [checkpoints.IDENTITY]
    assert not give(directory, "one", {"key": part("one", 5)})
    assert not give(directory, "one", {"key": part("one", 5)}, again=True)
    assert "parts of other workers are missing: they were lost, or are on machines without" in caplog.messages[-1]
    assert steps(directory) == [1]


def test_a_disk_that_refuses_is_told_with_what_to_do(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_arrays", refuse)
    with caplog.at_level(logging.WARNING):
        assert not give(directory, "one", {"key": part("one", 5)})
    assert ": [Errno 28] No space left on device; make room on the disk" in caplog.messages[-1]
    assert steps(directory) == [1]


def test_a_fit_that_begins_anew_in_the_directory_is_not_overwritten(directory: Path) -> None:
    late = asked(directory, "key")
    checkpoints.identity(directory, anew=True)
    assert not write_last(late, "worker one", {"key": part("one", 5)})
    assert not list(directory.glob(f"{checkpoints.LAST}*"))


def test_another_fit_that_has_the_directory_keeps_it(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    assert not give(directory, "one", {"key": part("one", 5)})
    with locks.locked(directory, "another driver"), caplog.at_level(logging.WARNING):
        assert give(directory, "two", {"key": part("two", 5)})
        assert "is in use by a fit of process" in caplog.messages[-1]
        checkpoints.write(directory, 3, b"{}", {"x": np.asarray(3)}, keep=2)
    assert steps(directory) == [3, 1]
    assert not list(directory.glob(f"{checkpoints.LAST}*"))


def test_a_part_that_was_written_can_be_read(directory: Path) -> None:
    give(directory, "one", {"key": part("one", 5)})
    found = last_checkpoints.read(directory, "key", ["one"])
    assert {name: int(a[0]) for name, a in found.items()} == {"one/a": 5, "one/b": 5}
    assert last_checkpoints.read(directory, "another", ["one"]) == {}


CUT = (
    f"{TEAR}\n"
    + """
from tests.training.test_last_checkpoints import give, part, steps

def process(owner, step, again=False):
    "Runs a worker in a process of its own. Returns whether it was at the chosen change."
    pid = os.fork()
    if pid == 0:
        give(folder, owner, {f"key {step}": part(owner, step)}, again=again)
        os._exit(9 if how == "refuse" and made >= chosen > 0 else 0)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended in (0, 9), ended
    return ended == 9

at, last = 1, 1
while True:
    made, chosen, step = 0, 0, last + 1
    if sys.argv[3] == "two":
        process("one", step)
    chosen = at
    cut = process(sys.argv[3], step)
    chosen = 0
    assert steps(folder)[0] in (last, step), at
    if sys.argv[3] == "one":
        process("two", step)
    process("one", step, again=True)
    assert steps(folder)[0] in (last, step), at
    last = steps(folder)[0]
    assert cut or last == step, at
    if not cut:
        break
    with locks.locked(folder):
        checkpoints.write(folder, last + 1, b"{}", {"x": np.asarray(last + 1)}, keep=2)
    last += 1
    assert not list(folder.glob(".last-*")), "what was left is removed"
    at += 1
print(at)
"""
)


@pytest.mark.parametrize("how", ["kill", "refuse"])
@pytest.mark.parametrize("owner", ["one", "two"])
def test_whichever_change_on_the_disk_fails_the_old_or_the_new_checkpoint_is_whole(
    directory: Path, how: str, owner: str
) -> None:
    """Each change that the first or the last of two workers makes in turn is its last, or fails."""
    command = [sys.executable, "-c", CUT, str(directory), how, owner]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (6 if owner == "one" else 12), "so many changes were tried"
