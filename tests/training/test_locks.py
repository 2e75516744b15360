"""One fit at most writes into a directory of checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import flowml as fm
from flowml_runtime.environment import checkpoints, locks
from tests.training.test_checkpoint_files import fitted


def test_a_second_fit_in_the_same_directory_is_refused(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    refused: list[str] = []

    def resume_too(_: dict[str, Any]) -> None:
        if not refused:
            with pytest.raises(fm.CheckpointError) as error:
                fitted(threads_cluster, tmp_path, 4, resume="auto")
            refused.append(str(error.value))

    fitted(threads_cluster, tmp_path, 4, callbacks=[resume_too])
    here = f"process {os.getpid()} on {socket.gethostname()}"
    assert refused == [f"{tmp_path} is in use by a fit of {here}; wait for its end, stop it, or give another directory"]
    assert len(fitted(threads_cluster, tmp_path, 6, resume="auto").history) == 2, "the lock is given back"
    assert not (tmp_path / locks.LOCK).exists()


def test_a_directory_that_is_removed_under_a_fit_is_locked_again(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    where, refused = tmp_path / "fit", list[str]()

    def remove(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            where.rename(tmp_path / "gone")
        if record["step"] > 3 and not refused and checkpoints.snapshots(where):
            with pytest.raises(fm.CheckpointError) as error, locks.locked(where):
                pass
            refused.append(str(error.value))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the snapshot that was being written is lost
        fitted(threads_cluster, where, 400, callbacks=[remove])
    assert "is in use by a fit of process" in refused[0]
    assert not (where / locks.LOCK).exists()


def test_a_directory_that_becomes_a_file_does_not_end_a_fit(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    where = tmp_path / "fit"

    def replace(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            file = tmp_path / "file"
            file.write_text("another file")
            for moved in itertools.count():
                with contextlib.suppress(OSError):  # the next snapshot can make the directory again in between
                    where.rename(tmp_path / f"gone{moved}")
                    file.rename(where)
                    break

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing can be written any more
        assert len(fitted(threads_cluster, where, 8, callbacks=[replace]).history) == 8
    assert where.read_text() == "another file"


def test_a_fit_begins_and_resumes_on_a_full_disk(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    fitted(threads_cluster, tmp_path / "old", 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # as a quota would
    try:
        for name, first in (("old", 4), ("new", 0)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = fitted(threads_cluster, tmp_path / name, 6, resume="auto")
            assert f"the disk of {tmp_path / name} is full (File too large); the fit goes on" in str(caught[0].message)
            assert "the checkpoint after step" in str(caught[1].message)
            assert [record["step"] for record in found.history] == list(range(first, 6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert fm.restore(tmp_path / "old").step == 4
    assert not checkpoints.snapshots(tmp_path / "new")


HOLDER = """
import sys
from pathlib import Path
from flowml_runtime.environment import checkpoints, locks
with locks.locked(Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.read()  # until it is killed
"""


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    command, pipe = [sys.executable, "-c", HOLDER, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"has it\n"
        expected = pytest.raises(fm.CheckpointError, match=rf"in use by a fit of process {process.pid} on ")
        with expected, locks.locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with locks.locked(tmp_path):
        assert (tmp_path / locks.LOCK).read_text().split()[0] == str(os.getpid())
