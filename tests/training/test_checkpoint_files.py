"""Files of checkpoints: complete or not there, checked when they are read, and readable without a cluster."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver.checkpoint import newest
from flowml_runtime.environment import checkpoints
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

ARRAYS = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.asarray(7), "empty": np.zeros((0, 4), np.int8)}


class Stopped(Exception):
    """Ends a fit."""


def written(path: Path, steps: tuple[int, ...] = (1, 2)) -> list[Path]:
    for step in steps:
        checkpoints.write(path, step, b'{"n":1}', {**ARRAYS, "step": np.asarray(step)}, keep=3)
    return checkpoints.snapshots(path)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    newest, _ = written(tmp_path)
    content, arrays = checkpoints.read(newest)
    assert content == b'{"n":1}'
    for name, array in ARRAYS.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(arrays[name], array)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    assert [checkpoints.step_of(p) for p in written(tmp_path, tuple(range(6)))] == [5, 4, 3]
    assert len(list(tmp_path.iterdir())) == 3


def test_objects_are_refused_in_both_directions(tmp_path: Path) -> None:
    with pytest.raises(fm.CheckpointError, match="holds Python objects"):
        checkpoints.write(tmp_path, 1, b"{}", {"x": np.asarray([object()])}, keep=1)
    assert list(tmp_path.iterdir()) == []
    newest = written(tmp_path)[0]
    change_manifest(newest, lambda body: body["arrays"][0]["spec"].update(dtype="object"))
    with pytest.raises(fm.CheckpointError, match="has dtype 'object', which holds no numbers"):
        checkpoints.read(newest)


def change_manifest(snapshot: Path, change: Callable[[Any], Any], *, honest: bool = True) -> None:
    """Change a manifest, with the checksum of the changed one if `honest`."""
    path = snapshot / checkpoints.MANIFEST
    found = msgspec.json.decode(path.read_bytes())
    change(found["body"])
    if honest:
        found["checksum"] = checkpoints._checksum(msgspec.json.encode(found["body"]))  # pyright: ignore[reportPrivateUsage]
    path.write_bytes(msgspec.json.encode(found))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda p: flip(p / checkpoints.DATA, 9), "'a/b' .* was changed or is damaged"),
    "a cut file": (lambda p: (p / checkpoints.DATA).write_bytes(b"abc"), "ends at byte 24 of a file of 3: it is cut"),
    "no data": (lambda p: (p / checkpoints.DATA).unlink(), "cannot be read: No such file"),
    "no manifest": (lambda p: (p / checkpoints.MANIFEST).unlink(), "cannot be read: No such file"),
    "a cut manifest": (lambda p: (p / checkpoints.MANIFEST).write_bytes(b'{"checksum": "12'), "manifest .* is damaged"),
    "a changed manifest": (
        lambda p: change_manifest(p, lambda body: body["content"].update(n=2), honest=False),
        "manifest .* was changed",
    ),
    "another format": (
        lambda p: change_manifest(p, lambda body: body.update(format=2)),
        "has format 2, .* reads format 1; install a newer version",
    ),
    "a huge array": (
        lambda p: change_manifest(p, lambda body: body["arrays"][0]["spec"].update(shape=[2**40, 2**40])),
        "it is cut",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_error(tmp_path: Path, name: str) -> None:
    newest = written(tmp_path)[0]
    damage, words = DAMAGE[name]
    damage(newest)
    with pytest.raises(fm.CheckpointError, match=words):
        checkpoints.read(newest)


def data_of(snapshot: Path) -> Path:
    """A file with arrays."""
    return max(snapshot.glob("*.bin"), key=lambda path: path.stat().st_size)


def fitted(cluster: fm.Cluster, path: Path, steps: int, *, keep: int = 3, **more: Any) -> fm.TrainingResult:
    trainer = fm.Trainer(mlp_loss, optax.sgd(0.1, momentum=0.9), cluster=cluster)
    checkpoint = fm.Checkpoint(path, every_steps=2, keep=keep)
    options: dict[str, Any] = {"batch_size": BATCH, "steps": steps, "progress": False, "checkpoint": checkpoint}
    return trainer.fit(mlp(), data(), **options, **more)


def test_a_fit_goes_on_from_the_newest_complete_snapshot(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    whole = fitted(threads_cluster, tmp_path / "whole", 8)
    fitted(threads_cluster, tmp_path / "stopped", 4)  # the end of a fit is always saved
    fitted(threads_cluster, tmp_path / "stopped", 6, resume="auto")
    newest = checkpoints.snapshots(tmp_path / "stopped")[0]
    flip(data_of(newest), -1)
    with pytest.warns(fm.FlowmlWarning, match=r"step-000000000006 was changed or is damaged.* goes on from step-0+4"):
        resumed = fitted(threads_cluster, tmp_path / "stopped", 8, resume="auto")
    assert [r["step"] for r in resumed.history] == [4, 5, 6, 7]
    assert resumed.resumed_at == 4 and whole.resumed_at == 0
    assert resumed.ledger == whole.ledger
    assert resumed.table().endswith("pushes and bytes are those since step 4.")
    assert "since step" not in whole.table()
    assert_same(resumed.params, whole.params)
    assert fm.restore(tmp_path / "stopped").step == 8
    assert not [p for p in newest.parent.iterdir() if p.name.startswith(".damaged")]


def test_a_damaged_snapshot_takes_no_place_of_those_that_are_kept(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """A fit that goes on from an older one has fewer steps than the damaged one when it writes its first."""
    fitted(threads_cluster, tmp_path, 4)
    fitted(threads_cluster, tmp_path, 8, resume="auto")
    (tmp_path / "step-000000000999").mkdir()
    flip(data_of(tmp_path / "step-000000000008"), -1)
    kept = [p.name for p in checkpoints.snapshots(tmp_path) if checkpoints.step_of(p) < 8]
    with pytest.warns(fm.FlowmlWarning) as told:
        resumed = fitted(threads_cluster, tmp_path, 7, resume="auto", keep=1)
    assert ["step-000000000999 cannot be read" in str(told[0].message), "or is damaged" in str(told[1].message)] == [
        1,
        1,
    ]
    assert resumed.resumed_at == int(kept[0][5:])
    assert fm.restore(tmp_path).step == 7
    assert [p.name for p in checkpoints.snapshots(tmp_path)] == ["step-000000000007"]


def test_a_tree_is_not_saved_over_a_fit(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    fitted(threads_cluster, tmp_path / "fit", 4)
    there = checkpoints.snapshots(tmp_path / "fit")
    with pytest.raises(fm.CheckpointError, match=r"holds a fit, and no tree .* give another directory"):
        fm.save({"x": np.ones(3)}, tmp_path / "fit")
    assert checkpoints.snapshots(tmp_path / "fit") == there
    fm.save({"x": np.ones(3)}, tmp_path / "tree")
    for resume in (None, "auto"):
        with pytest.raises(fm.CheckpointError, match=r"holds trees of fm.save, and no fit; .* another directory"):
            fitted(threads_cluster, tmp_path / "tree", 8, resume=resume)
    (tmp_path / "empty").mkdir()
    with pytest.raises(fm.CheckpointError, match="there is no checkpoint at"):
        fm.restore(tmp_path / "empty")


def test_a_fit_does_not_begin_anew_where_all_snapshots_are_damaged(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    fitted(threads_cluster, tmp_path, 4)
    for snapshot in checkpoints.snapshots(tmp_path):
        flip(data_of(snapshot), -1)
    with pytest.raises(fm.CheckpointError, match=r"none of the 2 checkpoints in .* can be read; remove them to begin"):
        fitted(threads_cluster, tmp_path, 8, resume="auto")
    removed = [data_of(snapshot) for snapshot in checkpoints.snapshots(tmp_path)]
    for path in removed:
        path.unlink()
    missing = rf"cannot be read: No such file or directory \({removed[0].name}\)$"
    with pytest.raises(fm.CheckpointError, match=missing):
        fitted(threads_cluster, tmp_path, 8, resume="auto")


def test_a_disk_that_refuses_does_not_end_the_fit(
    threads_cluster: fm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoints, "offered", refuse)
    for step in range(5):  # files where the directories of snapshots would be written
        (tmp_path / f".writing-{step:012d}-{os.getpid()}").write_text("not a directory")
    with pytest.warns(fm.FlowmlWarning, match=r"the checkpoint after step \d could not be written .* the fit goes on"):
        result = fitted(threads_cluster, tmp_path, 4)
    assert len(result.history) == 4


def test_a_path_that_cannot_be_a_directory_is_refused_before_the_fit(
    threads_cluster: fm.Cluster, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(
            fm.CheckpointError, match=r"no checkpoint can be written into .*file.*; give fm\.Checkpoint a"
        ):
            fitted(threads_cluster, path, 4)


def test_a_fit_that_ends_before_its_snapshot_is_refused(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    fitted(threads_cluster, tmp_path, 4)
    with pytest.raises(fm.CheckpointError, match=r"has 4 steps, and the fit has 2 in all; .* give at least 4 steps"):
        fitted(threads_cluster, tmp_path, 2, resume="auto")
    again = fitted(threads_cluster, tmp_path, 4, resume="auto")
    assert again.history == [] and again.resumed_at == 4, "the history is that of this call, which had no step to do"
    assert again.ledger.used == 4
    assert again.table().endswith("pushes and bytes are those after step 4: no step was left.")
    assert str(again.stragglers()) == "No replica was late in 0 steps."


def test_a_newer_format_is_no_damage(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """A fit that went on from an older snapshot would remove what the newer version has written."""
    fitted(threads_cluster, tmp_path, 4)
    change_manifest(checkpoints.snapshots(tmp_path)[0], lambda body: body.update(format=2))
    with pytest.raises(fm.CheckpointError, match=r"step-0+4 has format 2, .*; install a newer version"):
        fitted(threads_cluster, tmp_path, 8, resume="auto")


def test_a_write_that_fails_is_warned_of_while_the_fit_goes_on(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """The disk is full after some bytes: a limit of the process refuses the rest of a file, as a quota would."""

    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean((batch["x"] @ params["w"]) ** 2)

    params, source = {"w": np.ones((128, 512), np.float32)}, {"x": np.ones((16, 128), np.float32)}
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=threads_cluster)
    before, seen = resource.getrlimit(resource.RLIMIT_FSIZE), list[str]()

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        if caught:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            seen.extend(str(w.message) for w in caught)
            caught.clear()
            raise Stopped

    checkpoint = fm.Checkpoint(tmp_path, every_steps=2)
    options: dict[str, Any] = {"batch_size": 8, "seed": 1, "progress": False, "checkpoint": checkpoint}
    try:
        with warnings.catch_warnings(record=True) as caught, pytest.raises(Stopped):
            warnings.simplefilter("always")
            trainer.fit(params, source, steps=100_000, callbacks=[fill], **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "could not be written" in seen[0] and "File too large" in seen[0] and "the fit goes on" in seen[0]
    assert not [*tmp_path.glob(".writing*"), *tmp_path.glob(".offered*")], "what was written of it is removed"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "; make room on the disk: an older checkpoint is removed only when a newer one is complete"),
        (errno.EROFS, "; the disk is read-only"),
        (errno.ENOENT, "; see whether the directory was removed"),
        (errno.EINTR, ""),
    ],
)
def test_the_advice_is_that_of_the_error(number: int, text: str) -> None:
    assert checkpoints.advice(OSError(number, "")) == text
    assert not checkpoints.advice(fm.CheckpointError("another process has taken it over"))


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_damage(tmp_path: Path) -> None:
    def write(step: int) -> None:
        checkpoints.write(tmp_path, step, b"{}", {"a": np.full(4, step)}, keep=1)

    def read(path: Path) -> int:
        if checkpoints.step_of(path) == 1:
            write(2)
        return int(checkpoints.read(path)[1]["a"][0])

    write(1)
    assert newest(tmp_path, read) == (checkpoints.snapshots(tmp_path)[0], 2)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from flowml_runtime.environment import checkpoints, locks
array = np.zeros(2**22)
for step in range(1, 10**6):
    array[:] = step
    checkpoints.write(Path(sys.argv[1]), step, b"{}", {"a": array, "b": array}, keep=2)
    print(step, flush=True)
"""


def test_a_kill_while_writing_leaves_the_snapshots_before(tmp_path: Path) -> None:
    """The process is killed while files of a third snapshot are there, which has no name yet."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != b"2":
            assert process.poll() is None
        while not list(tmp_path.glob(".writing-*/buffers.bin")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    found = checkpoints.snapshots(tmp_path)
    assert len(found) >= 2
    for path in found:
        _, arrays = checkpoints.read(path)
        for array in arrays.values():
            assert (array == checkpoints.step_of(path)).all()
    checkpoints.write(tmp_path, 10**6, b"{}", {}, keep=2)
    assert not list(tmp_path.glob(".writing-*")), "what a killed process has left is removed"


def test_a_slow_disk_slows_no_step(
    threads_cluster: fm.Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write hangs until many more checkpoints were due. The fit goes on, and the newest one is written."""
    hangs, on, sync, steps, seen = threading.Event(), threading.Event(), os.fsync, 60, list[int]()

    def slow(number: int) -> None:
        hangs.set()
        assert on.wait(120)
        sync(number)

    def note(record: dict[str, Any]) -> None:
        seen.append(record["step"])
        if record["step"] == steps - 10 and hangs.is_set():
            on.set()

    monkeypatch.setattr(os, "fsync", slow)
    result = fitted(threads_cluster, tmp_path, steps, callbacks=[note])
    assert on.is_set(), "steps went on while the disk hung"
    assert seen == list(range(steps))
    assert_same(fm.restore(tmp_path).params, result.params)
    found = [checkpoints.step_of(path) for path in checkpoints.snapshots(tmp_path)]
    assert found[0] == steps
    assert len(found) <= 3


TEAR = """
import errno, io, os, sys
from pathlib import Path
import numpy as np
from flowml_runtime.environment import checkpoints, locks

folder, how = Path(sys.argv[1]), sys.argv[2]
made = 0

def at_this(file=None, data=None):
    "Ends the process at the chosen change, or has the disk refuse it. Half of what is written is there."
    global made
    made += 1
    if made != chosen:
        return
    if file is not None:
        file.write(memoryview(data).cast("B")[: len(data) // 2])
        file.flush()
    if how == "kill":
        os._exit(9)
    raise OSError(errno.ENOSPC, "No space left on device")

class Torn(io.BufferedWriter):
    def write(self, data):
        if len(data):
            at_this(super(), data)
        return super().write(data)

def torn_open(path, mode="r", *rest, **more):
    if mode in ("wb", "xb"):
        return Torn(io.FileIO(path, mode.replace("b", "")))
    return io.open(path, mode, *rest, **more)

def watched(name):
    real = getattr(os, name)
    def change(*given, **more):
        at_this()
        return real(*given, **more)
    setattr(os, name, change)

Path.open = torn_open
for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
    watched(name)

chosen = 0

def arrays(step):
    return {"a": np.full(1000, step), "b": np.full((3, 5), step, np.int8)}
"""
"""Ends a process, or has the disk refuse, at the change `chosen` that it makes on the disk."""

CUT = (
    f"{TEAR}\n"
    + """
for step in (1, 2):
    checkpoints.write(folder, step, b"{}", arrays(step), keep=2)
chosen, last = 1, 2
while True:
    made, step = 0, last + 1
    pid = os.fork()
    if pid == 0:
        try:
            checkpoints.write(folder, step, b"{}", arrays(step), keep=2)
        except OSError:
            os._exit(7)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended in (0, 7, 9), ended
    found = checkpoints.snapshots(folder)
    steps = [checkpoints.step_of(path) for path in found]
    assert steps[0] in (last, step), (chosen, steps)
    assert len(steps) >= 2, (chosen, steps)
    for path in found[:2]:
        _, there = checkpoints.read(path)
        assert {int(x) for array in there.values() for x in array.ravel()} == {checkpoints.step_of(path)}, chosen
    last = steps[0]
    if ended == 0 and chosen > 5:
        break
    chosen += 1
print(chosen - 1)
"""
)


@pytest.mark.parametrize("how", ["kill", "refuse"])
def test_whichever_change_on_the_disk_is_the_last_an_old_or_a_new_snapshot_is_whole(tmp_path: Path, how: str) -> None:
    """Each write (torn in the middle), fsync, rename and removal in turn is the last that a process makes, or fails."""
    command = [sys.executable, "-c", CUT, str(tmp_path), how]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) >= 10, "so many changes make a snapshot"


def test_each_flipped_bit_and_each_cut_is_found(tmp_path: Path) -> None:
    """Of a whole snapshot: what is read is what was written, or it is an error."""
    newest = written(tmp_path)[0]
    content, arrays = checkpoints.read(newest)
    for name in (checkpoints.DATA, checkpoints.MANIFEST):
        path, whole = newest / name, (newest / name).read_bytes()
        found = 0
        for at in range(len(whole)):
            flip(path, at)
            found += is_refused(newest, content, arrays)
            path.write_bytes(whole[:at])
            assert is_refused(newest, content, arrays), f"{name} is cut after {at} bytes"
            path.write_bytes(whole)
        assert found >= sum(a.nbytes for a in arrays.values()), "all but what is between the arrays"
    assert not is_refused(newest, content, arrays)


def is_refused(path: Path, content: bytes, arrays: Mapping[str, Any]) -> bool:
    try:
        again, found = checkpoints.read(path)
    except fm.CheckpointError:
        return True
    assert again == content
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    return False


def test_arguments_that_make_no_sense() -> None:
    for nowhere in (lambda: fm.Checkpoint(""), lambda: fm.save({"n": 1}, "")):
        with pytest.raises(ValueError, match=r"give the name of a directory; '.' is the current one"):
            nowhere()
    with pytest.raises(fm.CheckpointError, match=r"there is no checkpoint at .*nowhere; see whether that is its name"):
        fm.restore("nowhere")
    for options, words in (
        ({"every_steps": 2, "every_s": 1.0}, "and not both"),
        ({"every_steps": 0}, "every_steps"),
        ({"every_s": float("nan")}, "above 0"),
        ({"keep": 0}, "keep"),
    ):
        with pytest.raises(ValueError, match=words):
            fm.Checkpoint("here", **options)  # type: ignore[arg-type]
