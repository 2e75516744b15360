"""Options that name a folder make it, and say in one line why they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowml_tools import bench
from flowml_tools.command import CommandError, make_folder
from flowml_tools.main import main


def test_a_folder_is_made_or_refused_in_one_line(tmp_path: Path) -> None:
    make_folder("--plots", tmp_path / "a" / "b")
    make_folder("--plots", tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for name, says in (("file", "is not a folder"), ("file/below", "cannot be made: Not a directory; give another")):
        with pytest.raises(CommandError, match=says):
            make_folder("--plots", tmp_path / name)


def test_plots_of_a_benchmark_need_no_folder_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was refused if it was not there."""
    monkeypatch.setattr(bench, "_parts", lambda *_: (part for part in ()))
    assert main(["bench", "policies", "--plots", str(tmp_path / "new")]) == 0, capsys.readouterr().err
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("")
    assert main(["bench", "policies", "--plots", str(tmp_path / "file")]) == 2
    assert "is not a folder" in capsys.readouterr().err
