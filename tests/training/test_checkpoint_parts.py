"""Checkpoints that workers write: who writes what, and that an old or a new one is whole whatever fails."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.driver.training import parts
from flowml_runtime.environment import checkpoints
from flowml_runtime.transport.ending import Ending
from flowml_runtime.worker.checkpoint_parts import CheckpointParts
from tests.conftest import wait_until
from tests.training.reference import assert_same
from tests.training.test_checkpoint_files import TEAR
from tests.training.test_kills import doom
from tests.training.test_lost_and_replaced import EVERY, STEPS, fit

ROOT = Path(__file__).parents[2]


def files(snapshot: Path) -> list[str]:
    return sorted(path.name for path in snapshot.iterdir())


@pytest.fixture
def told(processes: fm.Cluster, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(type, bytes) of the messages about snapshots that the driver gets."""
    endpoint: Any = processes.endpoint
    take, found = endpoint._on_message, list[tuple[str, int]]()

    def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        if isinstance(message, wire.Buffers | wire.Wrote):
            found.append((type(message).__name__, sum(a.nbytes for a in arrays)))
        take(peer, message, arrays)

    monkeypatch.setattr(endpoint, "_on_message", receive)
    return found


def paced(cluster: fm.Cluster, path: Path) -> Callable[[dict[str, Any]], None]:
    """A callback in which a fit waits for the checkpoints that are due, while all workers live: if the disk is slower
    than the steps, some are left out, and the driver writes the last one."""

    everyone = set(cluster.pids)

    def callback(record: dict[str, Any]) -> None:
        due = record["step"] // EVERY * EVERY

        def is_written() -> bool:
            written = max(map(checkpoints.step_of, checkpoints.snapshots(path)), default=0) >= due
            return everyone != set(cluster.pids) or (written and any(path.glob(f".offered-*/{checkpoints.TOKEN}")))

        wait_until(is_written, f"the checkpoint after step {due} is written", 60)

    return callback


def test_workers_write_what_they_keep_and_the_driver_gets_names(
    processes: fm.Cluster, told: list[tuple[str, int]], tmp_path: Path
) -> None:
    found = fit(processes, "synchronous", tmp_path, callbacks=[paced(processes, tmp_path)])
    assert {name for name, _ in told} == {"Buffers", "Wrote"}
    assert sum(nbytes for _, nbytes in told) == 0
    newest = checkpoints.snapshots(tmp_path)[0]
    own = [checkpoints.part_of(f"worker:{n}") for n in range(4)]
    assert set(files(newest)) <= {*own, checkpoints.MANIFEST}
    assert len(files(newest)) == 5, "each worker keeps something"
    restored = fm.restore(tmp_path)
    assert restored.step == STEPS
    assert_same(restored.params, found.params)
    assert not list(tmp_path.glob(".offered-*"))


def test_a_fit_that_goes_on_after_losses_has_its_state_in_the_driver(
    processes: fm.Cluster, told: list[tuple[str, int]], tmp_path: Path
) -> None:
    fit(processes, "synchronous", tmp_path, on_loss="replace")
    assert {name for name, _ in told} == {"Buffers"}
    assert sum(nbytes for _, nbytes in told) > 0
    assert files(checkpoints.snapshots(tmp_path)[0]) == [checkpoints.DATA, checkpoints.MANIFEST]


@pytest.mark.parametrize("far", [("worker:1",), ("worker:0", "worker:1", "worker:2", "worker:3")])
def test_the_driver_writes_what_workers_with_another_disk_keep(
    threads_cluster: fm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: tuple[str, ...]
) -> None:
    """It says so once, and the next fit goes on with the same bits."""
    write, others = checkpoints.write_invited, {checkpoints.part_of(worker) for worker in far}

    def elsewhere(folder: Path, file: str, token: str, arrays: Mapping[str, Any]) -> Any:
        return None if file in others else write(folder, file, token, arrays)

    whole = fit(threads_cluster, "synchronous")
    monkeypatch.setattr(checkpoints, "write_invited", elsewhere)
    with pytest.warns(fm.FlowmlWarning) as said:
        fit(threads_cluster, "synchronous", tmp_path, steps=STEPS // 2)
    monkeypatch.undo()
    assert len(said) == 1
    assert "not see" in str(said[0].message) and "the driver, which writes it" in str(said[0].message)
    newest = checkpoints.snapshots(tmp_path)[0]
    assert checkpoints.DATA in files(newest)
    assert others.isdisjoint(files(newest))
    found = fit(threads_cluster, "synchronous", tmp_path, resume="auto")
    assert found.resumed_at == STEPS // 2
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_a_worker_is_warned_of_once_and_ends_no_fit(
    threads_cluster: fm.Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """A read-only disk also refuses to remove what was offered to workers, also after the last snapshot."""

    def refuse(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    remove = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == checkpoints.TOKEN and number == errno.EROFS:
            refuse()
        remove(path, missing_ok=missing_ok)

    whole = fit(threads_cluster, "synchronous")
    monkeypatch.setattr(checkpoints, "write_invited", refuse)
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.warns(fm.FlowmlWarning) as said:
        found = fit(threads_cluster, "synchronous", tmp_path)
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    why = rf"worker:\d could not write its part: \[Errno {number}\] {os.strerror(number)}"
    advice = "make room on the disk: an older .*" if number == errno.ENOSPC else "the disk is read-only"
    said_as = rf"the checkpoint after step (\d+) could not be written to .*: {why}; {advice}; the fit goes on, .*"
    steps = [match[1] if (match := re.fullmatch(said_as, str(one.message))) else str(one.message) for one in said]
    assert steps and all(step.isdigit() for step in steps), steps
    assert len(set(steps)) == len(steps), "one warning for each"


def test_a_snapshot_counts_as_written_though_older_ones_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        patch.setattr(Path, "glob", lambda path, _: refuse(path))
        written = checkpoints.write(tmp_path, 1, b"{}", {"x": np.arange(3)}, 1)
        checkpoints.remove_withdrawn(tmp_path)
    assert checkpoints.snapshots(tmp_path) == [written]


@pytest.mark.parametrize("at", ["before send Wrote 5", "after send Wrote 5", "soon send Wrote 4"])
def test_a_worker_that_dies_while_it_writes_leaves_the_checkpoint_before(
    processes: fm.Cluster, tmp_path: Path, at: str
) -> None:
    when, verb, message, number = at.split()
    doom(processes, "worker:1", Ending(when, verb, message, int(number)))  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings(), pytest.raises(fm.WorkerLostError):
            warnings.filterwarnings("ignore", "the checkpoint after step .* was lost before it had written its part")
            fit(processes, "synchronous", tmp_path, callbacks=[paced(processes, tmp_path)])
    finally:
        processes.bring_back(processes.lost)
    assert not list(tmp_path.glob(".offered-*"))
    for snapshot in checkpoints.snapshots(tmp_path):
        checkpoints.read(snapshot)
    whole = fit(processes, "synchronous")
    found = fit(processes, "synchronous", tmp_path, resume="auto")
    assert found.resumed_at >= 5
    assert_same((found.params, found.opt_state), (whole.params, whole.opt_state))


@pytest.mark.parametrize("way", ["reply lost", "both lost"])
def test_a_lost_word_of_a_worker_is_asked_for_again(
    threads_cluster: fm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What a worker says after it has written, and the first question for it."""
    monkeypatch.setattr(parts, "ASK_S", 0.1)
    endpoint: Any = threads_cluster.endpoint
    take, send, lost = endpoint._on_message, endpoint.send, list[str]()

    def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        if isinstance(message, wire.Wrote) and lost.count(peer) < 2:
            lost.append(peer)
        else:
            take(peer, message, arrays)

    def ask(peer: str, message: wire.Wire, *more: Any) -> None:
        if isinstance(message, wire.AskWrote) and way == "both lost" and f"asked {peer}" not in lost:
            lost.append(f"asked {peer}")
        else:
            send(peer, message, *more)

    monkeypatch.setattr(endpoint, "_on_message", receive)
    monkeypatch.setattr(endpoint, "send", ask)
    found = fit(threads_cluster, "synchronous", tmp_path)
    assert len(lost) == (8 if way == "reply lost" else 12)
    restored = fm.restore(tmp_path)
    assert restored.step == STEPS
    assert_same(restored.params, found.params)
    assert not list(tmp_path.glob(".offered-*"))


def test_a_worker_that_knows_nothing_of_a_folder_says_so() -> None:
    said: list[wire.Wrote] = []

    class Endpoint:
        name = "worker:0"

        def send(self, peer: str, message: Any, arrays: Sequence[Any] = (), timeout_s: float | None = None) -> None:
            said.append(message)

    CheckpointParts("worker:0", Endpoint()).say_again("driver", "token")  # type: ignore[arg-type]
    assert [(one.plan_id, one.last, one.error) for one in said] == [("token", True, "this worker knows nothing of it")]


CUT = (
    f"{TEAR}\n"
    + """
from flowml.errors import CheckpointError
from flowml_runtime.driver.training.parts import Parts
from flowml_runtime.worker.checkpoint_parts import CheckpointParts

class Session:
    def register(self, name, handler): pass
    def unregister(self, name): pass
    def check_workers(self, so): raise CheckpointError("closed")

class Endpoint:
    def __init__(self, name): self.name = name
    def send(self, peer, message, arrays=()): parts.on_message(self.name, message, arrays)

WORKERS = ("worker:0", "worker:1")

def write(step, cut):
    "A snapshot of a home at each of two workers, and of one array of the driver. `cut`: who may fail."
    global parts, made
    parts = Parts(Session(), folder, WORKERS)
    for worker in WORKERS:
        if cut == worker:
            made = 0
        writer = CheckpointParts(worker, Endpoint(worker))
        part = writer.begin("driver", str(parts.folder), parts.token, 2)
        for what in ("values", "known"):
            part.add(f"home/{worker}/{what}", {"w": np.full(100, step), "b": np.full(3, step)})
        writer._lane.flush()
        if cut == worker:
            made = 10**9
    names = [f"home/{w}/{what}/{n}" for w in WORKERS for what in ("values", "known") for n in "wb"]
    if cut == "driver":
        made = 0
    try:
        parts.complete(step, b"{}", names, {"rest": np.full(7, step)}, 2)
    except (OSError, CheckpointError):
        parts.remove()
        os._exit(7)
    finally:
        made = 10**9

made = chosen = 0
for step in (1, 2):
    write(step, "")
tried = 0
last = 2
for cut in (*WORKERS, "driver"):
    chosen = 1
    while True:
        made, step = 10**9, last + 1
        pid = os.fork()
        if pid == 0:
            write(step, cut)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended in (0, 7, 9), ended
        found = checkpoints.snapshots(folder)
        steps = [checkpoints.step_of(path) for path in found]
        assert steps[0] in (last, step), (cut, chosen, steps)
        assert ended != 0 or steps[0] == step, (cut, chosen, steps)
        assert len(steps) >= 2, (cut, chosen, steps)
        for path in found[:2]:
            _, there = checkpoints.read(path)
            assert len(there) == 9
            assert {int(x) for array in there.values() for x in array.ravel()} == {checkpoints.step_of(path)}, chosen
        last = steps[0]
        if ended == 0 and chosen > 3:
            break
        chosen, tried = chosen + 1, tried + 1
assert len(list(folder.glob(".offered-*"))) <= 1, "what killed processes have left is removed"
print(tried)
"""
)


@pytest.mark.parametrize("how", ["kill", "refuse"])
def test_whichever_change_on_the_disk_of_a_worker_or_the_driver_fails_a_checkpoint_is_whole(
    tmp_path: Path, how: str
) -> None:
    """Each write (torn in the middle), fsync, rename and removal of each worker and the driver in turn is the last, or
    fails."""
    command = [sys.executable, "-c", CUT, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20, "so many changes were tried"


def test_a_folder_that_a_late_worker_keeps_from_being_removed_goes_with_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker writes while the folder is removed: it is there again after that."""
    late, remove = checkpoints.offered(tmp_path), checkpoints.shutil.rmtree
    token = checkpoints.invite(late)

    def refilled(path: Path, **options: Any) -> None:
        remove(path, **options)
        path.mkdir()
        checkpoints.write_arrays(path / "part1.bin", {"x": np.arange(3)})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", refilled)
        checkpoints.withdraw(late)
    assert late.exists()
    assert checkpoints.write_invited(late, "part2.bin", token, {"x": np.arange(3)}) is None, "no longer invited"
    waiting, whole = checkpoints.offered(tmp_path), checkpoints.offered(tmp_path)
    checkpoints.complete(whole, b"{}", [], 1, 1)
    assert not late.exists()
    assert waiting.exists(), "workers may still write there"
    checkpoints.withdraw(waiting)
    waiting.mkdir()
    checkpoints.remove_withdrawn(tmp_path)  # at the end of a fit
    assert not list(tmp_path.glob(".offered-*"))
