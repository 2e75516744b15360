"""What goes wrong in mid-fit: one typed error that says where, soon; nothing hangs, and the next fit works."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import ClusterError, DeadlineError, WorkerError, WorkerLostError
from flowml_runtime import wire
from tests.training.reference import BATCH, assert_close, assert_same, data, mlp, mlp_loss, optax_loop, refuse_marked

SOURCE = data()
SGD = optax.sgd(0.1)
NoLeaks = Callable[[], AbstractContextManager[None]]
FOREVER = 1_000_000
"""Steps of a fit that something is to end."""


def piped(cluster: fm.Cluster, **options: Any) -> fm.Trainer:
    return fm.Trainer(mlp_loss, SGD, cluster=cluster, **{"placement": fm.Pipeline(2), "microbatches": 2, **options})


def works(trainer: fm.Trainer) -> bool:
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=5)
    assert_close(result.params, optax_loop(mlp_loss, mlp(), SGD, SOURCE, 5).params)
    return True


def at(step: int, act: Callable[[], Any]) -> Callable[[dict[str, Any]], None]:
    """A callback that acts at one step."""

    def callback(record: dict[str, Any]) -> None:
        if record["step"] == step:
            act()

    return callback


@pytest.mark.parametrize(
    ("victim", "layout"),
    [
        ("worker:0", {"placement": fm.Pipeline(2), "microbatches": 2}),
        ("worker:1", {"replicas": 2, "policies": {"*": fm.policies.asynchronous(staleness=4)}}),
    ],
    ids=["first stage", "asynchronous replica"],
)
def test_a_killed_worker_ends_the_fit_at_once(no_leaks: NoLeaks, victim: str, layout: dict[str, Any]) -> None:
    with no_leaks(), fm.Cluster.local(workers=2) as cluster:
        trainer = fm.Trainer(mlp_loss, SGD, cluster=cluster, **layout)

        def kill() -> None:
            os.kill(cluster.pids[victim], signal.SIGKILL)

        with pytest.raises(WorkerLostError, match=f"{victim} was lost during training at step") as caught:
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=FOREVER, callbacks=[at(3, kill)])
        assert "heartbeat" not in str(caught.value), "that would take 5 s"
        assert caught.value.worker == victim
        assert (caught.value.step or 0) >= 3
        assert cluster.lost == (victim,)
        with pytest.raises(fm.FlowmlError, match="there are 1"):
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=5)
        assert works(fm.Trainer(mlp_loss, SGD, cluster=cluster))


def test_the_cluster_knows_of_a_loss_when_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the connection tells of the loss before the coordinator does."""
    asked = threading.Event()
    with fm.Cluster.local(workers=2) as cluster:
        have, notice = cluster.have, cluster.notice

        def have_later(*given: Any) -> None:
            asked.wait(20)
            have(*given)

        def asked_for(worker: str | None, timeout_s: float | None = None) -> None:
            asked.set()
            notice(worker, timeout_s)

        def kill() -> None:
            monkeypatch.setattr(cluster, "have", have_later)
            monkeypatch.setattr(cluster, "notice", asked_for)
            os.kill(cluster.pids["worker:1"], signal.SIGKILL)

        trainer = fm.Trainer(mlp_loss, SGD, cluster=cluster, replicas=2)
        with pytest.raises(WorkerLostError):
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=FOREVER, callbacks=[at(3, kill)])
        assert cluster.lost == ("worker:1",)
        cluster.bring_back(cluster.lost)
        assert works(trainer)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("kind", "policy"),
    [(KeyboardInterrupt, fm.Policy()), (Stop, fm.policies.asynchronous()), (Stop, fm.policies.every(3))],
    ids=["Ctrl-C, sync", "async", "every 3"],
)
def test_an_exception_in_a_callback_ends_the_fit(
    process_cluster: fm.Cluster, kind: type[BaseException], policy: fm.Policy
) -> None:
    trainer = piped(process_cluster, policies={"*": policy})

    def stop() -> None:
        raise kind("enough")

    for _ in range(2):
        with pytest.raises(kind, match="enough"):
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=FOREVER, callbacks=[at(2, stop)])
    first, second = (trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=5) for _ in range(2))
    assert_same(first.params, second.params)
    assert len(second.history) == 5


def test_ctrl_c_while_the_workers_work(process_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes once the workers have asked for work, while `fit` waits for a message."""
    session, take, sent_at = process_cluster.session, process_cluster.session.on_message, list[float]()

    def interrupt(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        take(peer, message, arrays)
        if isinstance(message, wire.Ask) and not sent_at:
            sent_at.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    monkeypatch.setattr(session, "on_message", interrupt)
    trainer = piped(process_cluster, delays={"worker:0": 30.0})
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=5)
    assert time.monotonic() - sent_at[0] < 20
    assert works(piped(process_cluster))


class Interrupting:
    """Its finalizer is interrupted by a Ctrl-C, which Python cannot raise there."""

    left = 3

    def __del__(self) -> None:
        if Interrupting.left:
            Interrupting.left -= 1
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_a_finalizer_ends_the_fit(threads_cluster: fm.Cluster) -> None:
    """As in JAX's callback of the garbage collector, which runs while it traces."""

    def interrupted_loss(params: Any, batch: Any) -> Any:
        Interrupting()
        return mlp_loss(params, batch)

    before = sys.unraisablehook
    trainer = fm.Trainer(interrupted_loss, SGD, cluster=threads_cluster)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=FOREVER)
    assert sys.unraisablehook is before
    Interrupting.left = 0
    result = trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=5)
    assert_close(result.params, optax_loop(mlp_loss, mlp(), SGD, SOURCE, 5).params)


def test_a_fit_that_waits_too_long_says_how_to_allow_more() -> None:
    with fm.Cluster.threads(workers=2, deadline_s=0.5) as cluster:
        slow = {"placement": fm.Pipeline(1), "microbatches": 1, "replicas": 2, "delays": {"worker:0": 5.0}}
        trainer = piped(cluster, **slow)
        with pytest.raises(DeadlineError, match=r"waited 0\.5 s for .*allow a longer deadline: deadline_s="):
            trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=4)


class Breaking:
    """A source that raises in the middle of training, in the process of the caller."""

    def __init__(self) -> None:
        self.batches = 0
        self.broken = True

    def __len__(self) -> int:
        return len(SOURCE["x"])

    def __getitem__(self, indices: Any) -> Any:
        self.batches += 1
        if self.batches > 6 and self.broken:
            raise OSError("the disk is gone")
        return {k: v[indices] for k, v in SOURCE.items()}


def test_a_source_that_raises(process_cluster: fm.Cluster) -> None:
    source, trainer = Breaking(), piped(process_cluster)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(mlp(), source, batch_size=BATCH, steps=FOREVER)
    source.broken = False
    result = trainer.fit(mlp(), source, batch_size=BATCH, steps=5)
    assert_close(result.params, optax_loop(mlp_loss, mlp(), SGD, SOURCE, 5).params)


def checked_loss(params: Any, batch: Any) -> Any:
    with fm.layer("check"):
        shape = jax.ShapeDtypeStruct(batch["x"].shape, batch["x"].dtype)
        x = jax.pure_callback(refuse_marked, shape, batch["x"], batch["bad"])
    return mlp_loss(params, {"x": x, "y": batch["y"]})


def test_an_exception_on_a_worker_brings_its_traceback(threads_cluster: fm.Cluster) -> None:
    bad = np.zeros(96, bool)
    source = {**SOURCE, "bad": bad}
    trainer = fm.Trainer(checked_loss, SGD, cluster=threads_cluster, replicas=2, placement=fm.Pipeline(1))
    bad[BATCH * 2] = True  # the first item of step 2, which is replica 0's
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"ValueError: example 0 of the share is marked") as caught:
            trainer.fit(mlp(), source, batch_size=BATCH, steps=4, shuffle=False)
        error = caught.value
        assert (error.worker, error.step) == ("worker:0", 2)
        assert "check" in str(error.node)
        assert "refuse_marked" in (error.remote_traceback or "")
    bad[:] = False
    assert len(trainer.fit(mlp(), source, batch_size=BATCH, steps=4, shuffle=False).history) == 4


def test_nan_is_applied_where_the_user_asks_for_it(threads_cluster: fm.Cluster) -> None:
    params = {**mlp(), "fc1": {"kernel": jnp.full((16, 16), jnp.nan), "bias": jnp.zeros(16)}}
    trainer = piped(threads_cluster, replicas=2, on_nonfinite="apply")
    result = trainer.fit(params, SOURCE, batch_size=BATCH, steps=4)
    assert [np.isnan(r["loss"]) for r in result.history] == [True] * 4
    assert np.isnan(result.params["fc0"]["kernel"]).all()


def test_closing_the_cluster_ends_a_fit(no_leaks: NoLeaks) -> None:
    errors: list[BaseException] = []
    running = threading.Event()
    with no_leaks():
        cluster = fm.Cluster.threads(workers=2)
        trainer = piped(cluster)

        def fit() -> None:
            try:
                trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=FOREVER, callbacks=[lambda _: running.set()])
            except fm.FlowmlError as error:
                errors.append(error)

        thread = threading.Thread(target=fit)
        thread.start()
        assert running.wait(60)
        cluster.close()
        thread.join(15)
        assert not thread.is_alive(), "the fit outlives its cluster"
    assert isinstance(errors[0], ClusterError | WorkerLostError)
    assert "during training at step" in str(errors[0])


def test_two_trainers_at_once(threads_cluster: fm.Cluster) -> None:
    """Plans do not disturb each other, even on the same devices."""
    outcomes: dict[int, Any] = {}

    def run(number: int) -> None:
        policy = fm.policies.every(2) if number else fm.Policy()
        trainer = piped(threads_cluster, replicas=2, policies={"*": policy})
        outcomes[number] = [trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=12).params for _ in range(2)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert_close(outcomes[0][0], optax_loop(mlp_loss, mlp(), SGD, SOURCE, 12).params)
    for first, second in outcomes.values():
        assert_same(first, second)


def test_trainers_that_are_gone_leave_no_threads(no_leaks: NoLeaks) -> None:
    with fm.Cluster.threads(workers=2) as cluster:
        last = piped(cluster)
        assert works(last)
        with no_leaks():
            assert works(piped(cluster))
            last.fit(mlp(), SOURCE, batch_size=BATCH, steps=1)
