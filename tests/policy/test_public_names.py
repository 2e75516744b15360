"""The modules that users reach as attributes of flowml list their own names, and nothing that they import."""

from __future__ import annotations

import inspect
import types

import pytest

import flowml as fm

MODULES = [name for name in fm.__all__ if isinstance(getattr(fm, name), types.ModuleType)]


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_lists_its_own_names_only(name: str):
    module = getattr(fm, name)
    assert sorted(dir(module)) == sorted(module.__all__)
    values = {each: getattr(module, each) for each in module.__all__}
    assert not [each for each, value in values.items() if isinstance(value, types.ModuleType)]
    made = {
        each: value.__module__ for each, value in values.items() if inspect.isroutine(value) or inspect.isclass(value)
    }
    assert not [each for each, home in made.items() if not home.startswith(("flowml.", "flowml_runtime.methods."))]


@pytest.mark.parametrize("name", ["policies", "filters"])
def test_every_function_that_makes_a_value_is_listed(name: str):
    module = getattr(fm, name)
    found = {n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    assert {n for n in found if not n.startswith("_")} <= set(module.__all__)
