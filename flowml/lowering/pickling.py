"""Pickles what a program calls in Python, with what it closes over.

cloudpickle writes functions and classes of modules by name, and every other object by value. Two kinds of objects that
a module holds as a global are written by name too. A *sentinel* has no state, and code compares it by identity: a copy
would be another sentinel. For an object that cannot be pickled, such as one with a lock, the worker takes that of its
own module.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]


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
