"""The example that kills its own workers does what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.test_docs import ROOT, run


def test_a_fit_whose_workers_are_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    output = run([sys.executable, str(ROOT / "examples" / "survive.py"), "--epochs", "1", "--kills", "1"], tmp_path)
    assert "kill -9 worker:" in output
    assert "losses: 1; accuracy: " in output
    assert "0 dropped, 0 unseen, 0 open" in output
    assert "the same bits: True" in output


def test_a_loop_of_its_own_whose_workers_are_killed_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    command = [sys.executable, str(ROOT / "examples" / "survive_loop.py"), "--steps", "45", "--kills", "1"]
    output = run(command, tmp_path)
    assert "kill -9 worker:" in output
    assert "on from step 20" in output
    assert "45 steps; accuracy: " in output
    assert float(output.rsplit("accuracy: ", 1)[1].rstrip("%\n")) > 50
