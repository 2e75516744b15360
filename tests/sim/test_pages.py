"""Memory that a simulation has taken since it began is put into huge pages, where the kernel can do that."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from flowml_runtime.sim.pages import without

TAKES_MEMORY = """
import mmap, re
from flowml_runtime.sim.pages import HugePages

MIB = 2**20

def huge():
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"AnonHugePages: *([0-9]+)", file.read())[1]) // 1024

def take(count):
    pieces = [mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(count)]
    for piece in pieces:
        piece.write(b"x" * MIB)
    return pieces

before = take(300)
pages = HugePages()
few = take(100)
pages.tidy()
print(huge())
many = take(300)
pages.tidy()
print(huge())
assert all(piece[:] == b"x" * MIB for piece in before + few + many)
"""


def can_collapse() -> bool:
    """Whether the kernel has MADV_COLLAPSE, and may use huge pages."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if sys.platform != "linux" or not setting.exists() or "[never]" in setting.read_text():
        return False
    major, minor = (int(part) for part in platform.release().split(".")[:2])
    return (major, minor) >= (6, 1)


@pytest.mark.skipif(not can_collapse(), reason="needs Linux 6.1 with transparent huge pages")
def test_what_is_new_is_collapsed_once_it_is_much() -> None:
    """400 of 700 MiB are new. Some pieces of 2 MiB at the ends are left, and what was there before is."""
    command = [sys.executable, "-c", TAKES_MEMORY]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    few, many = map(int, run.stdout.split())
    assert few == 0 and 350 < many <= 400


def test_parts_of_a_span() -> None:
    assert list(without((10, 20), [])) == [(10, 20)]
    assert list(without((10, 20), [(0, 5), (25, 30)])) == [(10, 20)]
    assert list(without((10, 20), [(5, 12), (14, 16), (19, 25)])) == [(12, 14), (16, 19)]
    assert list(without((10, 20), [(0, 30)])) == []
    assert list(without((10, 20), [(10, 15), (15, 20)])) == []
