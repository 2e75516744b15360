"""Words policies in errors: how a value is written in Python, and what to write in place of one of the wrong kind."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flowml.errors import PolicyError
from flowml.numbers import MOST
from flowml.signatures import misfit

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

_INNER = ("flowml.policy.graphs", "flowml.policy.codes")
"""The modules whose values are made from names, and whose classes `flowml` does not have."""


class _Worded(msgspec.StructMeta):
    """Makes values, and says in an error of ours which arguments a class has, and how large a count may be."""

    def __call__(cls, *given: Any, **named: Any) -> Any:
        _check_counts(cls, given, named)
        try:
            return super().__call__(*given, **named)
        except TypeError:
            wrong = _misfit(cls, given, named)
            if wrong is None:
                raise
        raise PolicyError(wrong)


class Value(msgspec.Struct, metaclass=_Worded, frozen=True):
    """A part of a policy. An argument that it does not have raises PolicyError, with the nearest that it has.

    Its `repr` is Python that makes it, after `import flowml as fm`. Functions and arrays that it holds are names there,
    such as `optimizer`.
    """

    def __repr__(self) -> str:
        return brief(self)


def _misfit(kind: Any, given: Sequence[object], named: Mapping[str, object]) -> str | None:
    """What is wrong with the arguments of a class; None if it is not their names or their number."""
    has = {field.name: field.required for field in _fields(kind) if field.name != "counted"}  # which a count sets
    return misfit(_name(kind), has, len(given), named, f"give {example(kind)}")


def _check_counts(kind: Any, given: Sequence[object], named: Mapping[str, object]) -> None:
    """Refuse integers that no message holds, before anything is computed with them."""
    for name, value in (*zip((field.name for field in _fields(kind)), given, strict=False), *named.items()):
        if type(value) is int and abs(value) > MOST:
            raise PolicyError(f"{_name(kind)}({name}=...): give less than 2**53, which is as far as messages count")


def _name(kind: Any) -> str:
    """The name by which users make values of a class."""
    return getattr(kind, "call", kind.__name__)


def is_one_of(value: object, choices: Sequence[str | None]) -> bool:
    """Whether a value, of whatever type, is one of these names."""
    return (value is None or isinstance(value, str)) and value in choices


def brief(value: Value, hidden: Sequence[str] = (), shown: Sequence[str] = ()) -> str:
    """The call that makes a value, without the arguments that have their default, unless they are `shown`, and without
    the `hidden` fields. The first field has no name if users give it without."""
    fields = _fields(type(value))
    given = [
        f"{'' if field is fields[0] and unnamed(type(value)) else f'{field.name}='}{code(getattr(value, field.name))}"
        for field in fields
        if field.name not in hidden and (field.name in shown or getattr(value, field.name) != field.default)
    ]
    kind = type(value)
    ours = "fm." if kind.__module__.startswith("flowml.") else ""
    module = f"{kind.__module__.replace('flowml', 'fm', 1)}." if kind.__module__ in _INNER else ours
    return f"{module}{kind.__name__}({', '.join(given)})"


def unnamed(kind: type[msgspec.Struct]) -> bool:
    """Whether users give the first field without its name: where a value has one field, or cannot do without it."""
    return len(_fields(kind)) == 1 or kind.__name__ in ("Quorum", "Deadline", "Coded", "Speculate")


def code(value: object) -> str:
    """A field's value as Python. `inf` is no name there."""
    return "fm.UNBOUNDED" if value == math.inf else f"-{code(math.inf)}" if value == -math.inf else repr(value)


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    """The fields of a class. msgspec evaluates its annotations for each call."""
    return msgspec.structs.fields(kind)


def example(kind: type) -> str:
    """How a value of a class is written: `fm.Ring()`, `fm.Quorum(0.75)`."""
    return f"fm.{kind.__name__}({_ARGUMENTS.get(kind.__name__, '')})"


def wrong_kind(knob: str, value: object, kinds: Sequence[type]) -> PolicyError:
    """The error for a value that is of none of these classes. The one that was meant, by its name, comes first."""
    if isinstance(value, type) and value in kinds:
        return PolicyError(f"{knob}={value.__name__} is a class; give a value of it, as {knob}={example(value)}")
    if knob == "quorum" and isinstance(value, int | float):
        return PolicyError(f"quorum={value!r} is not known; give quorum=fm.Quorum({value!r})")
    meant = str(value).replace("_", "").replace("-", "").replace(" ", "").lower() if isinstance(value, str) else ""
    known = " or ".join(map(example, sorted(kinds, key=lambda kind: kind.__name__.lower() != meant)))
    return PolicyError(f"{knob}={value!r} is not known; give {knob}={known}")
