"""Requests and replies outside training are lost, ten times each, in each of three ways.

The request is lost or the reply is, on a connection that works, or the connection is cut while one of them is under
way. Then the outcome is what it would have been without, because the driver asks again, or one error says within the
deadline what did not come. After that error the same call has the same outcome as if nothing had been lost: what
a worker did for the first request changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from flowml.errors import FlowmlError, WorkerLostError
from flowml.instructions import Feed, Free, Keep, Run
from flowml.plan import ArraySpec, Output, Plan
from flowml_runtime import wire
from flowml_runtime.driver import loading, tracing
from flowml_runtime.driver.remote import Kind
from flowml_runtime.driver.tracing import Tracing
from flowml_runtime.driver.training.kept import KeptFit
from flowml_runtime.environment import checkpoints
from flowml_runtime.links.prober import Prober
from tests.network import Network
from tests.plans import VECTOR, W0, W1, PlanBuilder, chain

TIMES = 10
DEADLINE_S, PATIENCE_S = 0.1, 60.0
"""While a message is lost, and otherwise."""
X = np.arange(4, dtype=np.float32)
LARGE = np.arange(5 * 2**20, dtype=np.float32)
"""It goes in three pieces."""
Way = Literal["request lost", "reply lost", "cut"]
Do = Callable[[Network, Path], Any]


def called(network: Network, path: Path) -> Any:
    handle = network.session.load(chain())
    try:
        return np.asarray(network.session.submit(handle, [X]).result(timeout=60)[0])
    finally:
        network.session.unload(handle)


def kept(network: Network, path: Path) -> Any:
    remotes = brought(network)
    return [np.asarray(x) for x in network.session.held.recall(remotes)]


def kept_call(network: Network, path: Path) -> Any:
    """Two calls: what the first keeps is fed to the second. Both are recalled, and dropped."""
    handle = network.session.load(keeping())
    try:
        remotes = network.session.submit(handle, [X]).result(timeout=60)
        remotes += network.session.submit(handle, remotes).result(timeout=60)
        found = [np.asarray(x) for x in network.session.held.recall(remotes)]
        for remote in remotes:
            remote.delete()
        return found
    finally:
        network.session.unload(handle)


def kept_dropped(network: Network, path: Path) -> Any:
    found = kept_call(network, path)
    network.session.held.close()  # waits until the workers are told
    return found


def keeping() -> Plan:
    """x -> x + 1 on one device, which keeps it."""
    build = PlanBuilder("keeping")
    add = build.xla("add", lambda x: (x + 1,), [VECTOR], [VECTOR])
    build.program(W0, Feed((0,), (0,)), Run(add, (0,), (1,)), Free((0,)), Keep((0,), (1,), 0), Free((1,)))
    return build.build([VECTOR], [Output(VECTOR, "keep", 0, stays=True, device=W0, name="x")])


def dropped(network: Network, path: Path) -> Any:
    remotes = brought(network)
    found = [np.asarray(x) for x in network.session.held.recall(remotes)]
    for remote in remotes:
        remote.delete()
    network.session.held.close()  # waits until the workers are told
    return found


def brought(network: Network) -> list[Any]:
    kinds = [Kind(VECTOR, W0, "x"), Kind(VECTOR, W1, "y")]
    return list(network.session.held.bring([X, X + 1], kinds, "put").handles())


def lent(network: Network, path: Path) -> Any:
    spec = ArraySpec(LARGE.shape, "float32")
    data = LARGE.view(np.uint8)
    return np.asarray(
        network.session.held.recall([network.session.held.lend(data, Kind(spec, W0, "x"), "f", whole=False)])[0]
    )


def written(network: Network, path: Path) -> Any:
    with checkpoints.writing(path, 1) as folder:
        found = network.session.held.write(brought(network), folder, checkpoints.invite(folder))
        entries = [
            checkpoints.Entry(str(i), *about[1:]) for i, (_, entry) in enumerate(found) for about in [fields(entry)]
        ]
        where = checkpoints.complete(folder, b"{}", entries, keep=1)
    return checkpoints.read(where)[1]


def fields(entry: checkpoints.Entry) -> tuple[Any, ...]:
    return entry.name, entry.spec, entry.offset, entry.checksum, entry.file


def read(network: Network, path: Path) -> Any:
    path.mkdir(exist_ok=True)
    (path / "a.bin").unlink(missing_ok=True)
    entries = checkpoints.write_arrays(path / "a.bin", {"x": X, "y": X + 1})
    kinds = [Kind(VECTOR, W0, "x"), Kind(VECTOR, W1, "y")]
    remotes = network.session.held.load(entries, kinds, path, lambda i: X + i, "load")
    return [np.asarray(x) for x in network.session.held.recall(remotes)]


def traced(network: Network, path: Path) -> Any:
    path.mkdir(exist_ok=True)
    with Tracing(network.session, path / "trace.json"):
        pass
    return (path / "trace.json").exists()


def probed(network: Network, path: Path) -> Any:
    probe = wire.Probe(number=next(PROBERS[network]._numbers))  # pyright: ignore[reportPrivateUsage]
    found = PROBERS[network]._exchange("worker:0", probe, deadline_s=network.session.deadline_s)  # pyright: ignore[reportPrivateUsage]
    return found.error


def claimed(network: Network, path: Path) -> Any:
    fit = KeptFit(network.session, "fit", ["worker:0", "worker:1"], 0.0)
    try:
        asked = {
            w: lambda n: wire.Recover(plan_id="fit", number=n, key="k", owner="o") for w in ("worker:0", "worker:1")
        }
        answers = fit._ask(asked)  # pyright: ignore[reportPrivateUsage]
        if len(answers) < 2:
            raise WorkerLostError("a worker is lost")
        return fit.keeps, fit.lost, {w: answer.found for w, (answer, _) in answers.items()}
    finally:
        fit.release(over=True)


PROBERS: dict[Network, Prober] = {}


@dataclass(frozen=True)
class Method:
    """A request and its reply, and a call that needs both. `again`: the driver asks again by itself."""

    request: Callable[[wire.Wire], bool]
    reply: Callable[[wire.Wire], bool] | None
    do: Do
    again: bool = False


def of(kind: type[wire.Wire]) -> Callable[[wire.Wire], bool]:
    return lambda message: isinstance(message, kind)


def value(kind: str) -> Callable[[wire.Wire], bool]:
    return lambda message: isinstance(message, wire.Value) and message.kind == kind


METHODS = {
    "kept feed": Method(value("feed"), value("fetch"), kept_call),
    "kept recall": Method(of(wire.Recall), of(wire.Recalled), kept_call, again=True),
    "kept drop": Method(of(wire.Drop), None, kept_dropped, again=True),
    "load": Method(of(wire.LoadPlan), of(wire.Loaded), called),
    "unload": Method(of(wire.Unload), None, called, again=True),
    "step": Method(value("feed"), value("fetch"), called),
    "edge": Method(value("edge"), None, called),
    "bring": Method(of(wire.Bring), None, kept),
    "bring in pieces": Method(of(wire.BringPiece), None, lent),
    "recall": Method(of(wire.Recall), of(wire.Recalled), kept, again=True),
    "drop": Method(of(wire.Drop), None, dropped, again=True),
    "write": Method(of(wire.Write), of(wire.Written), written, again=True),
    "read a file": Method(of(wire.ReadFile), of(wire.FileRead), read, again=True),
    "trace": Method(of(wire.Trace), of(wire.Traced), traced),
    "probe": Method(of(wire.Probe), of(wire.Probed), probed),
    "claim": Method(of(wire.Claim), of(wire.Claimed), claimed),
    "recover": Method(of(wire.Recover), of(wire.Recovered), claimed),
    "release": Method(of(wire.Released), None, claimed),
}
CELLS = [
    (name, way)
    for name, method in METHODS.items()
    for way in ("request lost", "reply lost", "cut")
    if way != "reply lost" or method.reply
]


class Losing:
    """Loses the n-th of the messages that are `asked`, or cuts its connection. Counts them if n is 0."""

    def __init__(self, network: Network, asked: Callable[[wire.Wire], bool], n: int, *, cut: bool) -> None:
        self.seen = 0
        self._network, self._asked, self._n, self._cut = network, asked, n, cut
        for name in list(network.receivers):
            network.receivers[name] = self._watched(name, network.receivers[name])

    def _watched(self, name: str, take: Callable[..., None]) -> Callable[..., None]:
        def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
            self.seen += self._asked(message)
            if not self._asked(message) or self.seen != self._n:
                take(peer, message, arrays)
            elif self._cut:
                worker = peer if name == "driver" else name
                self._network.lose(worker)
                PROBERS[self._network].on_lost(worker, "connection closed")

        return receive


def network_of() -> Network:
    network = Network(deadline_s=PATIENCE_S)
    PROBERS[network] = prober = Prober(network.driver)
    take = network.receivers["driver"]

    def receive(peer: str, message: wire.Wire, arrays: Sequence[Any]) -> None:
        if isinstance(message, wire.Probed):
            prober.on_message(peer, message)
        else:
            take(peer, message, arrays)

    network.receivers["driver"] = receive
    return network


def bring_back(network: Network) -> None:
    """Others take the places of lost workers."""
    for number in range(2):
        if f"worker:{number}" not in network.receivers:
            network.start(number)


@contextmanager
def hurried(network: Network, *, load: bool) -> Generator[None]:
    """Waits of the driver are short."""
    session: Any = network.session
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_deadline_s", DEADLINE_S)
        patch.setattr(session.held, "_deadline_s", DEADLINE_S)
        patch.setattr(tracing, "ANSWER_S", DEADLINE_S)
        if load:
            patch.setattr(loading, "LOAD_DEADLINE_S", DEADLINE_S)
        yield


@pytest.mark.parametrize(("name", "way"), CELLS, ids=lambda value: value.replace(" ", "-"))
def test_a_lost_message_changes_nothing(tmp_path: Path, seed: int, name: str, way: Way) -> None:
    method, rng = METHODS[name], random.Random(f"{seed} {name} {way}")
    with network_of() as network:
        requests = Losing(network, method.request, 0, cut=False)
        replies = Losing(network, method.reply or method.request, 0, cut=False)
        expected = method.do(network, tmp_path / "whole")
        counts = {method.request: requests.seen, method.reply: replies.seen}
    PROBERS.pop(network).close()
    assert all(counts.values()), "the call needs both"
    for time in range(TIMES):
        asked = [method.request] if way == "request lost" else [method.reply] if way == "reply lost" else [*counts]
        lost = rng.choice([kind for kind in asked if kind is not None])
        with network_of() as network:
            losing = Losing(network, lost, rng.randint(1, counts[lost]), cut=way == "cut")
            try:
                with hurried(network, load=name == "load"):
                    found = method.do(network, tmp_path / str(time))
            except FlowmlError as error:
                assert way == "cut" or not method.again, error
                if way == "cut" and name not in ("trace", "claim", "recover", "release"):
                    assert isinstance(error, WorkerLostError), error
                bring_back(network)
                found = method.do(network, tmp_path / str(time))
            assert losing.seen, "it was lost"
            np.testing.assert_equal(found, expected)
        PROBERS.pop(network).close()
