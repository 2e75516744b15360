"""The rule for service threads: each goes on, or says what ends with it; and the text that every failure has."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowml as fm
import flowml_runtime
from flowml.errors import WorkerError
from flowml_runtime import service
from flowml_runtime.execution.faults import step_failed
from tests.network import Network
from tests.plans import callback_then_double

X = np.arange(4, dtype=np.float32)
WAIT_S = 30.0
SOURCES = sorted(Path(str(flowml_runtime.__file__)).parent.rglob("*.py"))


class Speechless(Exception):
    """Has neither a text nor a representation."""

    def __str__(self) -> str:
        raise ValueError("no text")

    def __repr__(self) -> str:
        raise ValueError("no representation")


class Leaving(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


def raiser(error: BaseException) -> Any:
    def check(x: Any) -> Any:
        if x.min() < 0:
            raise error
        return x

    return check


def test_every_thread_of_the_runtime_keeps_to_the_rule() -> None:
    made = {
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        if path.name != "service.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("threading.Thread", "Thread", "threading.Timer")
    }
    assert made == set()


@pytest.mark.parametrize("error", [ValueError("it broke"), SystemExit(1), KeyboardInterrupt(), Speechless()])
def test_a_thread_that_fails_says_so(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def run() -> None:
        raise error

    reasons: list[str] = []
    thread = service.start("flowml-test", run, reasons.append)
    thread.join(WAIT_S)
    (reason,) = reasons
    assert reason.startswith(f"thread 'flowml-test' failed: {type(error).__name__}")
    assert reason in caplog.text


def test_a_thread_whose_failure_cannot_be_told_ends_the_process() -> None:
    code = """
import threading
from flowml_runtime import service
def run(): raise OSError(24, "Too many open files")
def failed(reason): raise ValueError("and now?")
service.start("flowml-test", run, failed)
threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == service.STATUS
    assert "this process ends: thread 'flowml-test' failed: OSError: [Errno 24] Too many open files" in done.stderr
    assert "and now?" in done.stderr


def test_what_goes_on_logs_what_it_could_not_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "flowml"):
        for error in (SystemExit(1), Speechless(), OSError("no more")):
            with service.going_on("a report could not be taken in"):
                raise error
    assert caplog.text.count("a report could not be taken in") == 3


def test_no_more_threads_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", exhausted)
    with pytest.raises(fm.ClusterError, match="cannot start thread 'flowml-test': can't start new thread; allow more"):
        service.start("flowml-test", lambda: None, lambda _: None)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Speechless(), "Speechless: its text cannot be shown"),
        (Leaving(), "Leaving: its text cannot be shown"),
        (ValueError("name \udcff\nof a file"), "ValueError: name \\udcff of a file"),
        (ValueError(), "ValueError"),
        (fm.FlowmlError("a sentence"), "a sentence"),
        (ExceptionGroup("several", [Speechless()]), "ExceptionGroup: several (1 sub-exception)"),
    ],
)
def test_every_error_has_a_text_that_a_message_can_carry(error: BaseException, text: str) -> None:
    from flowml_runtime import wire

    error.__cause__ = Speechless()
    message = step_failed("p", 0, "worker:0", "node \udcff", error)
    assert message.error == text
    assert message.traceback
    assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize("error", [Speechless(), Leaving(), ValueError("\udcff")], ids=["str", "exit", "surrogate"])
def test_an_error_without_a_text_fails_its_call_and_no_other(error: BaseException) -> None:
    with Network() as network:
        handle = network.session.load(callback_then_double(raiser(error)))
        with pytest.raises(WorkerError, match=type(error).__name__):
            network.session.submit(handle, [X - 1]).result(timeout=WAIT_S)
        assert network.session.submit(handle, [X]).exception(timeout=WAIT_S) is None


def test_an_error_without_a_text_fails_its_fit(threads_cluster: fm.Cluster) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    check = raiser(Speechless())

    def loss(params: Any, batch: Any) -> Any:
        x = jax.pure_callback(check, jax.ShapeDtypeStruct(batch["x"].shape, batch["x"].dtype), batch["x"])
        return jnp.mean(params["w"] * x)

    trainer = fm.Trainer(loss, optax.sgd(0.1), replicas=2, cluster=threads_cluster)
    with pytest.raises(WorkerError, match=r"Speechless|its text cannot be shown"):
        trainer.fit({"w": np.float32(1)}, {"x": -np.ones((8, 2), np.float32)}, batch_size=4, steps=2)
