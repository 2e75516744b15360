"""Work of the caller that takes more than a second shows a line on a terminal: a compile of a new batch shape too."""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml_runtime.driver import progress


class Terminal(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.shows = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if "flowml: " in text:
            self.shows.set()
        return super().write(text)


class Lengths:
    """Examples of another length in each batch."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2 * self.batches

    def __getitem__(self, indices: Any) -> Any:
        return {"x": np.ones((len(indices), 1 + int(indices[0]) // 2, 3), np.float32)}


def loss(params: Any, batch: Any) -> Any:
    """It is compiled for as long as it takes until a line is shown, if there is a terminal."""
    if isinstance(sys.stderr, Terminal):
        assert sys.stderr.shows.wait(60)
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def fit(cluster: fm.Cluster, batches: int) -> Any:
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster)
    return trainer.fit({"w": jnp.ones(3)}, Lengths(batches), batch_size=2, steps=batches, shuffle=False)


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr. Set in a test, because pytest sets its own after the fixtures."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setattr(progress, "SLOW_S", 1e-3)
    return found


def test_a_new_shape_is_shown_while_it_is_compiled(
    threads_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = terminal_of(monkeypatch)
    fit(threads_cluster, 2)
    lines = terminal.getvalue().split(progress.CLEAR)
    for length in (1, 2):
        assert any(
            line.startswith(f"flowml: compiling loss for batches of float32[2, {length}, 3], ") for line in lines
        )
    assert any("workers ready, " in line for line in lines)
    assert terminal.getvalue().endswith(progress.CLEAR), "the line is removed"


def test_a_function_is_shown_too(threads_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    fm.dataflow(loss, cluster=threads_cluster)({"w": jnp.ones(3)}, {"x": np.ones((2, 3), np.float32)})
    assert "flowml: compiling loss, 0 s" in terminal.getvalue()


def test_nothing_is_shown_without_a_terminal_or_of_short_work(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown(lambda: "working"):
        pass
    assert capsys.readouterr().err == ""
