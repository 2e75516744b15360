"""Lists the knobs that cases never draw: every field and every named value of policies, machines, networks and faults.

The list of knobs is read from the types, so a new knob is in it at once. A knob counts as drawn when some case has a
value of it other than the default. `NEVER` gives the reason for each knob that no case draws.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from types import NoneType
from typing import Any, Literal

import msgspec

from flowml import sim
from flowml.policy import Policy
from flowml.policy.kinds import Knob, kinds_of
from flowml_tools.faults.cases import Case

_NO_KNOBS = (sim.Operation, sim.Recording)
"""What was recorded of a job, which no run reads."""
_ROOTS: tuple[type, ...] = (
    Policy,
    *typing.get_args(sim.Fault),
    *(kind for name in sim.__all__ if isinstance(kind := getattr(sim, name), type) and kind not in _NO_KNOBS),
)
_PLACES = ("flowml.policy", "flowml.sim")


NEVER = {
    "Churn": "it makes crashes and returns at the level of a cluster, and these runs have one fit",
    "Churn.changes": "as Churn",
    **dict.fromkeys(("Churn.notice_s", "Churn.start_s", "Churn.pause_s"), "as Churn"),
    "Crash": "the case itself stops a worker (`Case.crashed`)",
    "Crash.at_s": "as Crash",
    "Crash.noticed_s": "as Crash: a crash is noticed after 1 s",
    "Crash.worker": "as Crash",
    "Compress.feedback": "a lossless filter refuses it",
    "KeyCache.feedback": "a lossless filter refuses it",
    "Deadline.of=samples": "a Deadline refuses it",
    **dict.fromkeys(
        [f"Distill{f}" for f in ("", ".batch_size", ".inputs", ".loss", ".optimizer", ".predict", ".steps")],
        "it needs a model, which these runs do not have",
    ),
    "Every.fragments": "a plan has resolved it to offsets before a run begins",
    "Outer.optimizer": "it is compiled into the task of a home, and these runs have no compiled tasks",
}
"""Why no case draws these."""


def every_knob() -> frozenset[str]:
    """Class, Class.field, and Class.field=value where the values have names."""
    found: set[str] = set()
    seen: set[type] = set(_NO_KNOBS)
    waiting = [kind for kind in _ROOTS if _has_fields(kind)]
    while waiting:
        kind = waiting.pop()
        if kind in seen:
            continue
        seen.add(kind)
        found.add(kind.__name__)
        for name, hint in _hints(kind).items():
            found.add(f"{kind.__name__}.{name}")
            found.update(f"{kind.__name__}.{name}={value}" for value in _literals(hint))
            waiting += [c for c in _classes(hint) if _has_fields(c) and c.__module__.startswith(_PLACES)]
    return frozenset(found)


def drawn(cases: Iterable[Case]) -> frozenset[str]:
    """The knobs that these cases set."""
    found: set[str] = set()
    for case in cases:
        for value in (*case.policies, case.compute, case.network, case.homes, *case.faults):
            found.update(_set(value))
    return frozenset(found)


def _set(value: Any) -> Iterator[str]:
    if isinstance(value, tuple | list):
        for one in typing.cast(Sequence[Any], value):
            yield from _set(one)
        return
    kind: type = type(value)
    if not _has_fields(kind) or not kind.__module__.startswith(_PLACES):
        return
    yield kind.__name__
    for name, default in _defaults(kind).items():
        held = getattr(value, name)
        if held != default:
            yield f"{kind.__name__}.{name}"
        if isinstance(held, str) and held in _literals(_hints(kind)[name]):
            yield f"{kind.__name__}.{name}={held}"
        yield from _set(held)


def _has_fields(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or issubclass(kind, msgspec.Struct)


def _defaults(kind: Any) -> dict[str, Any]:
    if issubclass(kind, msgspec.Struct):
        return {f.name: f.default for f in msgspec.structs.fields(kind)}
    return {f.name: f.default for f in dataclasses.fields(kind) if f.init}


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in _defaults(kind)}


def _parts(hint: Any) -> Iterator[Any]:
    """The hint, and what it is made of."""
    yield hint
    if typing.get_origin(hint) is not Literal:
        for part in typing.get_args(hint):
            yield from _parts(part)


def _literals(hint: Any) -> Collection[str]:
    found = (typing.get_args(part) for part in _parts(hint) if typing.get_origin(part) is Literal)
    return {value for values in found for value in values if isinstance(value, str)}


def _classes(hint: Any) -> list[type]:
    found = [part for part in _parts(hint) if isinstance(part, type) and part is not NoneType]
    return [kind for part in found for kind in (kinds_of(part) if issubclass(part, Knob) else (part,))]
