"""Words policies in errors: how a value is written in Python, and what to write in place of one of the wrong kind."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import msgspec

from flowml.errors import PolicyError

_ARGUMENTS = {
    "Quorum": "0.75",
    "Deadline": "0.75",
    "Coded": "1",
    "Hierarchy": "local, remote",
    "Outer": "optimizer",
    "Mix": "0.1",
    "Consensus": "1.0",
    "Vote": "10",
    "Prox": "l1=1e-4",
    "Distill": "predict, inputs, steps=100, optimizer=optimizer",
}
"""Class -> the arguments with which an error shows it, if it needs some."""


class _Worded(msgspec.StructMeta):
    """Makes values, and says in an error of ours which arguments a class has."""

    def __call__(cls, *given: Any, **named: Any) -> Any:
        try:
            return super().__call__(*given, **named)
        except TypeError:
            wrong = _arguments(cls, given, named)
            if wrong is None:
                raise
        raise PolicyError(wrong)


class Value(msgspec.Struct, metaclass=_Worded, frozen=True):
    """A part of a policy. An argument that it does not have raises PolicyError, with the nearest that it has."""


def _arguments(kind: Any, given: Sequence[object], named: Mapping[str, object]) -> str | None:
    """What is wrong with the arguments of a class; None if it is not their names or their number."""
    name, fields = kind.__name__, _fields(kind)
    known = [field.name for field in fields]
    has = f"{name} has {', '.join(f'{one}=' for one in known)}" if known else f"{name}() has no arguments"
    for one in named:
        if one not in known:
            near = get_close_matches(one, known, 1)
            return f"{name} has no argument {one}=; {f'did you mean {near[0]}=? ' if near else ''}{has}"
    if len(given) > len(known):
        return f"{name} is given too many values ({len(given)}): {has}"
    missing = [f"{field.name}=" for field in fields[len(given) :] if field.required and field.name not in named]
    return f"{name} needs {' and '.join(missing)}; give {example(kind)}" if missing else None


def brief(value: msgspec.Struct, hidden: Sequence[str] = ()) -> str:
    """The call that makes a value, without the arguments that have their default, and without the `hidden` fields."""
    given = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in _fields(type(value))
        if field.name not in hidden and getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(given)})"


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """The fields of a class. msgspec evaluates its annotations for each call."""
    return msgspec.structs.fields(kind)


def example(kind: type) -> str:
    """How a value of a class is written: `flowml.Ring()`, `flowml.Quorum(0.75)`."""
    return f"flowml.{kind.__name__}({_ARGUMENTS.get(kind.__name__, '')})"


def wrong_kind(knob: str, value: object, kinds: Sequence[type]) -> PolicyError:
    """The error for a value that is of none of these classes. The one that was meant, by its name, comes first."""
    if isinstance(value, type) and value in kinds:
        return PolicyError(f"{knob}={value.__name__} is a class; give a value of it, as {knob}={example(value)}")
    if knob == "quorum" and isinstance(value, int | float):
        return PolicyError(f"quorum={value!r} is not known; give quorum=flowml.Quorum({value!r})")
    meant = str(value).replace("_", "").replace("-", "").replace(" ", "").lower() if isinstance(value, str) else ""
    known = " or ".join(map(example, sorted(kinds, key=lambda kind: kind.__name__.lower() != meant)))
    return PolicyError(f"{knob}={value!r} is not known; give {knob}={known}")
