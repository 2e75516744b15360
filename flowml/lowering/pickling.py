"""Pickles what a program calls in Python, with what it closes over.

cloudpickle writes functions and classes of modules by name, and every other object by value. Two kinds of objects that
a module holds as a global are written by name too. A *sentinel* has no state, and code compares it by identity: a copy
would be another sentinel. For an object that cannot be pickled, such as one with a lock, the worker takes that of its
own module.

A copy of a function changes copies of the objects that the function changes. `copied_state` finds such objects, so that
a user can be told that the changes do not come back.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]
import jax
import numpy as np


def dumps(value: Any) -> bytes:
    """The value as bytes for `cloudpickle.loads`. Raises the error of an object that cannot be pickled."""
    try:
        return _dumps(value, _is_sentinel)
    except Exception:  # pickling runs code of the user's objects
        return _dumps(value, lambda found: _is_sentinel(found) or not _can_be_pickled(found))


def _dumps(value: Any, by_name: Callable[[Any], bool]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, by_name).dump(value)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, by_name: Callable[[Any], bool]) -> None:
        super().__init__(file)
        self._by_name = by_name

    def reducer_override(self, obj: Any) -> Any:
        name = _name_in_module(obj)
        if name is not None and self._by_name(obj):
            return _global, (type(obj).__module__, name)
        return super().reducer_override(obj)


def _global(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _name_in_module(value: Any) -> str | None:
    """The global name of an instance in the module of its class. None for what has no such name, and in a script."""
    kind = type(value)
    if isinstance(value, type) or kind.__module__ in ("builtins", "__main__") or not kind.__module__:
        return None
    module = sys.modules.get(kind.__module__)
    if module is None or module.__name__ in cloudpickle.list_registry_pickle_by_value():
        return None
    return next((name for name, found in vars(module).items() if found is value), None)


def _is_sentinel(value: Any) -> bool:
    """Whether an object has no state, and its class does not say how to pickle it."""
    kind = type(value)
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return False
    return not getattr(value, "__dict__", None) and value.__reduce_ex__(2)[2] is None


def _can_be_pickled(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:  # pickling runs code of the user's objects
        return False
    return True


def copied_state(function: Any) -> str:
    """What a function may change that a copy of it would have a copy of, in words; "" if nothing is found."""
    return next(_states(function, set()), "")


def _states(function: Any, seen: set[int]) -> Iterator[str]:
    if id(function) in seen:
        return
    seen.add(id(function))
    match function:
        case MethodType() if not isinstance(function.__self__, type | ModuleType):
            if not _is_frozen(function.__self__):
                yield f"the bound method {type(function.__self__).__name__}.{function.__name__}"
        case BuiltinMethodType():
            if isinstance(function.__self__, _CONTAINERS):
                yield f"the bound method {type(function.__self__).__name__}.{function.__name__}"
        case partial():
            for part in (function.func, *function.args, *function.keywords.values()):
                yield from _of_value("an argument", part, seen)
        case FunctionType():
            yield from _of_function(function, seen)
        case _ if _is_of_library(type(function).__module__):  # what JAX makes of a callback
            for field in dataclasses.fields(function) if dataclasses.is_dataclass(function) else ():
                part = getattr(function, field.name)
                if callable(part):
                    yield from _states(part, seen)
        case _:
            yield from _of_value("a callable", function, seen)


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[str]:
    of_library = _is_of_library(function.__module__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if not of_library:
            yield from _of_value(f"{name!r}", value, seen)
        elif callable(value):
            yield from _states(value, seen)
    if function.__module__ == "__main__":  # functions of a script are pickled by value
        for name in function.__code__.co_names:
            if name in function.__globals__:
                yield from _of_value(f"the global {name!r}", function.__globals__[name], seen)


def _of_value(what: str, value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, FunctionType | MethodType | BuiltinMethodType | partial):
        yield from _states(value, seen)
    elif _may_change(value):
        yield f"{what}, of type {type(value).__name__}"


_CONTAINERS = (list, dict, set, bytearray, deque)


def _may_change(value: Any) -> bool:
    if isinstance(value, _CONTAINERS):
        return True
    if isinstance(value, np.ndarray):
        return cast("np.ndarray[Any, Any]", value).flags.writeable
    if isinstance(value, type | ModuleType | jax.Array | os.PathLike) or _is_of_library(type(value).__module__):
        return False
    return bool(getattr(value, "__dict__", None)) and not _is_frozen(value)


def _is_frozen(value: Any) -> bool:
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def _is_of_library(module: str | None) -> bool:
    """Whether a module is part of Python, or installed. What its functions keep is not the user's concern."""
    if module is None or module == "__main__":
        return False
    if module.partition(".")[0] in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and "site-packages" in file
