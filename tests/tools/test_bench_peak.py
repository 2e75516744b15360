"""The memory of a process with those that it has started."""

from __future__ import annotations

import os

from flowml_tools.bench.peak import Peak

MIB = 2**20


def test_pages_that_two_processes_share_count_once() -> None:
    with Peak() as before:
        pass
    with Peak() as peak:
        held = bytearray(os.urandom(MIB)) * 128
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(theirs)
            os.read(ours, 1)  # no deadline: the pipe is closed below, or with its process
            os._exit(0)
        os.close(ours)
    os.close(theirs)
    os.waitpid(pid, 0)
    assert len(held) == 128 * MIB
    assert 110 * MIB < peak.nbytes - before.nbytes < 200 * MIB
