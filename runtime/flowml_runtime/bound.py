"""A program that is a method of a class, as a jitted function can be."""

from __future__ import annotations

from typing import Any


class Method:
    """A program with the instance that it was taken from, which each call gets as its first argument."""

    def __init__(self, program: Any, instance: Any) -> None:
        self._program = program
        self._instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program(self._instance, *args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.submit(self._instance, *args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.plan(self._instance, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_program":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self._program, name)
