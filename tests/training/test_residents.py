# pyright: reportPrivateUsage=false
"""Nothing that lives between steps is forgotten: every array of a running fit is registered, or passes by for a reason.

The walk begins at the live objects of all workers, when their replicas have stopped for a snapshot. An attribute with
arrays that is in no table here fails the test: a new buffer either registers itself (`worker.training.resident`), or
says here why a snapshot does not need it.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

import flowml as fm
from flowml_runtime import wire
from flowml_runtime.execution.future import Future
from flowml_runtime.protocol.training.accumulator import Accumulator
from flowml_runtime.worker.training.host import TrainingHost
from tests.training.test_checkpoints import POLICIES, STOP, Stopped, case

PASSING = {
    "Run.source": "the data of the fit, which the driver sends again",
    "Run.states": "the first optimizer state, which own values have replaced",
    "Run.told": "values of neighbours for a step that is over; a mirror exports those that it has not added",
    "StoreView._values": "a version of a home, which publishes it again",
    "Fetched._found": "losses that are reported",
    "StageRunner._compared": "parameters of the last step, which the next one reads again",
    "OwnValues._coefficients": "a constant",
    "Mirror._one": "a constant",
    "Mirror._share": "a constant",
    "Member._values": "what a leader tells again at the next step",
    "Copies._first": "a constant",
}
CASES = ("sums", "filtered sums", "residuals", "own parameters", "significance and duals", "gossip and copies")


def parts_of(thing: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object of training on a worker, and of sums."""
    kind = type(thing)
    if isinstance(thing, msgspec.Struct):
        yield from ((name, getattr(thing, name)) for name in thing.__struct_fields__)
    elif kind.__module__.startswith("flowml_runtime.worker.training") or isinstance(thing, Accumulator):
        yield from vars(thing).items()
    elif isinstance(thing, Future) and thing.done():  # pyright: ignore[reportUnknownMemberType]
        yield "value", thing.result(0)  # pyright: ignore[reportUnknownMemberType]


def arrays_below(root: Any) -> dict[str, list[np.ndarray[Any, Any]]]:
    """ "Class.attribute" -> the arrays that it holds, of all objects that can be reached."""
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        where, thing = waiting.pop()
        if isinstance(thing, np.ndarray | jax.Array):
            found.setdefault(where, []).append(np.asarray(thing))
        elif id(thing) in seen or isinstance(thing, str | bytes | type):
            continue
        elif isinstance(thing, Mapping):
            waiting += [(where, value) for value in list(thing.values())]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        elif isinstance(thing, Sequence | set | frozenset | deque):
            waiting += [(where, value) for value in list(thing)]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        else:
            inner = isinstance(
                thing, Future | msgspec.Struct
            )  # what these hold belongs to the attribute that holds them
            name = type(thing).__name__
            waiting += [(where if inner else f"{name}.{attribute}", value) for attribute, value in parts_of(thing)]
        seen.add(id(thing))
    return found


def stopped_hosts() -> list[TrainingHost]:
    """The hosts of a fit on threads, whose replicas have stopped, and whose homes have applied everything."""
    hosts = [x for x in gc.get_objects() if isinstance(x, TrainingHost) and x._fit is not None]
    for host in hosts:
        assert host._fit is not None and host.machine._fit is not None
        machine, run = host.machine._fit, host._fit.run
        replicas = len(run.training.replicas)
        asked = wire.Export(plan_id=run.plan_id, run=run.number, clocks=(STOP,) * replicas)
        with host.changed:
            assert host.changed.wait_for(lambda m=machine, a=asked: m._rests(a), 30), "the replicas did not stop"
        for resident in run.residents.found.values():
            if resident.lane is not None:
                resident.lane.flush()
    return hosts


def unregistered(hosts: Sequence[TrainingHost]) -> dict[str, int]:
    """The attributes with arrays that no resident exports, and that do not just pass by."""
    exported: set[tuple[Any, ...]] = set()
    for host in hosts:
        assert host._fit is not None
        for resident in host._fit.run.residents.found.values():
            exported |= {identity(np.asarray(array)) for array in resident.export().values()}
    missing: dict[str, int] = {}
    for host in hosts:
        for where, arrays in arrays_below(host._fit).items():
            left = [a for a in arrays if identity(a) not in exported]
            if left and where not in PASSING:
                missing[where] = missing.get(where, 0) + len(left)
    return missing


def identity(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.dtype.name, array.shape, array.tobytes()


@pytest.mark.filterwarnings("ignore:mlp_loss is not convex", "ignore:.*all replicas are in one site")
@pytest.mark.parametrize("name", CASES)
def test_all_that_lives_between_steps_is_registered(threads_cluster: fm.Cluster, tmp_path: Path, name: str) -> None:
    found: list[dict[str, int]] = []
    holders: set[str] = set()

    def look(record: dict[str, Any]) -> None:
        if record["step"] == STOP - 1:
            hosts = stopped_hosts()
            found.append(unregistered(hosts))
            for host in hosts:
                holders.update(arrays_below(host._fit))
            raise Stopped

    one = case(threads_cluster, tmp_path, POLICIES[name])
    with pytest.raises(Stopped):
        one.fit(checkpoint=one.checkpoint(), callbacks=[look])
    assert found == [{}]
    assert "Held.values" in holders, "the walk has not come to the homes"


def test_a_buffer_that_is_not_registered_is_found(threads_cluster: fm.Cluster, tmp_path: Path) -> None:
    """The walk fails for a new kind of buffer: here one that an object has beside its own."""
    found: list[dict[str, int]] = []

    def look(record: dict[str, Any]) -> None:
        if record["step"] == STOP - 1:
            hosts = stopped_hosts()
            assert hosts[0]._fit is not None
            hosts[0]._fit._homes._momentum = {0: np.full(3, 0.125)}  # type: ignore[attr-defined]
            found.append(unregistered(hosts))
            raise Stopped

    one = case(threads_cluster, tmp_path)
    with pytest.raises(Stopped):
        one.fit(checkpoint=one.checkpoint(), callbacks=[look])
    assert found == [{"Homes._momentum": 1}]
