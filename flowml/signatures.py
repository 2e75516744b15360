"""Words the error of a call whose arguments a function or class does not have: one line, with the nearest that it has.

Python's own TypeError names a private `__init__` and counts `self`. `worded` gives a module's public functions and
classes the errors of the house; a call that fits costs one more Python call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints


def misfit(name: str, has: Mapping[str, bool], given: int, named: Iterable[str], example: str) -> str | None:
    """What is wrong with the names and the number of the arguments of a call; None if nothing is.

    `has` maps each argument to whether it is required; `given` is the number of values without a name.
    """
    known = f"{name} has {', '.join(f'{one}=' for one in has)}" if has else f"{name}() has no arguments"
    named = tuple(named)
    for one in named:
        if one not in has:
            near = get_close_matches(one, has, 1)
            return f"{name} has no argument {one}=; {f'did you mean {near[0]}=? ' if near else ''}{known}"
    if given > len(has):
        return f"{name} is given too many values ({given}): {known}"
    places = list(has)
    for one in named:
        if one in places[:given]:
            return f"{name} is given {one}= twice, by its place and by its name; leave one out"
    missing = [f"{one}=" for one in places[given:] if has[one] and one not in named]
    return f"{name} needs {' and '.join(missing)}; {example}" if missing else None


def worded(namespace: dict[str, Any], names: Sequence[str], error: type[Exception], module: str = "") -> None:
    """Let the functions and classes of these names raise `error`, in one line, for arguments that they do not have.

    A function is replaced in its namespace; a class is changed, with its static methods. If `module` is the name by
    which users know the namespace, a name that it does not have is answered with the nearest.
    """
    if module:

        def absent(name: str) -> Any:
            raise missing(module, names, name)

        namespace["__getattr__"] = absent
    for name in names:
        found = namespace[name]
        if inspect.isfunction(found):
            namespace[name] = explained(found, name, error)
        elif inspect.isclass(found) and found.__module__.startswith(__name__.partition(".")[0]):
            _explain_class(found, error)


def explained(function: Callable[..., Any], name: str, error: type[Exception], own: int = 0) -> Callable[..., Any]:
    """The function, which raises `error` for arguments that it does not have. The first `own` are not the user's."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except (TypeError, error) as raised:
            has = _arguments(function, own)
            passed_on = any(one not in has and f" has no argument {one}=" in str(raised) for one in named)
            if isinstance(raised, error) and not passed_on:
                raise
            wrong = misfit(name, has, len(given) - own, named, f"see help({name.rpartition('.')[2]})")
            if wrong is None:  # it was raised further in
                raise
        raise error(wrong)

    return call


def _explain_class(kind: Any, error: type[Exception]) -> None:
    for maker in ("__new__", "__init__"):
        found = vars(kind).get(maker)
        if inspect.isfunction(found):
            setattr(kind, maker, explained(found, kind.__name__, error, own=1))
        elif isinstance(found, staticmethod):
            setattr(kind, maker, staticmethod(explained(found.__func__, kind.__name__, error, own=1)))
    for name, found in list(vars(kind).items()):
        if isinstance(found, staticmethod) and not name.startswith("_"):
            setattr(kind, name, staticmethod(explained(found.__func__, f"{kind.__name__}.{name}", error)))


def missing(module: str, names: Sequence[str], name: str) -> AttributeError:
    """The error for a name that a module does not have, with the nearest that it has, as users write it."""
    written = module.replace("flowml", "fm", 1)
    near = get_close_matches(name, names, 1)
    return AttributeError(
        f"module {module!r} has no attribute {name!r}{f'; did you mean {written}.{near[0]}?' if near else ''}"
    )


def _arguments(function: Callable[..., Any], own: int) -> dict[str, bool]:
    """The arguments of a function, those of its `**overrides: Unpack[...]` among them."""
    found: dict[str, bool] = {}
    for parameter in list(inspect.signature(function).parameters.values())[own:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            for unpacked in get_args(get_type_hints(function)[parameter.name]):
                found |= dict.fromkeys(unpacked.__annotations__, False)
        else:
            found[parameter.name] = parameter.default is parameter.empty
    return found
