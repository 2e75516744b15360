"""Writes docs/reference.md: every public name with its signature and its docstring. `--check` only compares.

The text comes from the code, so the page always agrees with it. Run `make reference` after a docstring changes.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, ForwardRef

import flowml as fm

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"

SECTIONS = {
    "Where things run": ("layer", "device", "Device", "AutoPlacement", "Pipeline"),
    "Programs and plans": ("dataflow", "compile", "Plan", "Estimate", "Transfer"),
    "Clusters": ("Cluster",),
    "Training": ("Trainer", "TrainingResult", "Shards", "WithReplacement", "Checkpoint", "Restored", "restore"),
    "Simulation": ("SimulatedCluster", "advise", "Advice", "sim"),
    "Policies": (),  # all names that no other section has, except errors
    "Errors": (),
}


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print(f"docs/{PAGE.name} is out of date: make reference", file=sys.stderr)
        return 1
    PAGE.write_text(text)
    return 0


def page() -> str:
    """The whole page."""
    parts = [
        "# Reference",
        "Every public name of `import flowml as fm`, with its docstring. `make reference` writes this page.\n"
        "The guides show how the parts work together: [programs](guide.md), [training](training.md),\n"
        "[policies](policies.md), [clusters](clusters.md), [errors](errors.md).",
    ]
    for title, names in sections().items():
        parts.append(f"## {title}")
        parts += [entry(f"fm.{name}", getattr(fm, name)) for name in names]
    return "\n\n".join(parts) + "\n"


def sections() -> dict[str, tuple[str, ...]]:
    """Titles and the names in each section. Each public name is in exactly one."""
    named = {name for names in SECTIONS.values() for name in names}
    rest = [name for name in fm.__all__ if name not in named and name != "__version__"]
    errors = tuple(name for name in rest if name.endswith("Error"))
    others = tuple(name for name in rest if name not in errors)
    return SECTIONS | {"Policies": others, "Errors": errors}


def entry(name: str, value: Any, level: int = 3) -> str:
    """A heading, the signature and the docstring, and the same for the members of a class or module."""
    lines = [f"{'#' * level} `{name}`"]
    signature = signature_of(value)
    if signature:
        lines.append(f"```\n{name}{signature}\n```")
    elif not callable(value) and not isinstance(value, types.ModuleType | property):
        lines.append(f"The value `{value!r}`.")
    document = inspect.getdoc(value) if callable(value) or isinstance(value, types.ModuleType | property) else None
    if document and not re.match(rf"{getattr(value, '__name__', '')}\(.*\)$", document):  # a dataclass's own signature
        lines.append(as_markdown(document))
    if level == 3:
        lines += [entry(f"{name}.{member}", each, 4) for member, each in members(value)]
    return "\n\n".join(lines)


class _Written:
    """An annotation as written in the source. Without this, `inspect` would put it in quotes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def signature_of(value: Any) -> str:
    """The signature as in the source, with one parameter per line if it is long; "" if `value` is not callable."""
    if not callable(value):
        return ""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parameters = [_plain(p.replace(annotation=_written(p.annotation))) for p in signature.parameters.values()]
    result = _written(signature.return_annotation)
    text = str(signature.replace(parameters=parameters, return_annotation=result)).removesuffix(" -> None")
    if len(text) < 90:
        return _short(text)
    star = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    lines = [str(p) for p in parameters]
    if star is not None and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        lines.insert(star, "*")
    arrow = "" if result is inspect.Signature.empty or str(result) == "None" else f" -> {result}"
    return _short("(\n" + "".join(f"    {line},\n" for line in lines) + ")" + arrow)


def _short(signature: str) -> str:
    """A signature with the names of our classes as in the source, without their modules."""
    return re.sub(r"\bflowml(?:_runtime)?(?:\.[a-z]\w*)*\.([A-Z]\w*)", r"\1", signature)


def _plain(parameter: inspect.Parameter) -> inspect.Parameter:
    default = parameter.default
    if inspect.isroutine(default):  # a clock, for instance: its name says more than its repr
        return parameter.replace(default=_Written(f"{default.__module__}.{default.__name__}"))
    return parameter


def _written(annotation: Any) -> Any:
    if isinstance(annotation, ForwardRef):  # the annotations of a named tuple
        annotation = annotation.__forward_arg__
    return _Written(annotation) if isinstance(annotation, str) else _without_limits(annotation)


def _without_limits(annotation: Any) -> Any:
    """A type without the limits that only the decoder of messages checks: `int` for `Annotated[int, Meta(ge=0)]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _without_limits(arguments[0])
    bare = tuple(map(_without_limits, arguments))
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, bare)
    return tuple[bare] if origin is tuple else annotation


def as_markdown(document: str) -> str:
    """A docstring whose sections such as "Args:" become lists."""
    out: list[str] = []
    in_section = False
    for line in document.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            in_section = True
            out += ["", line, ""]
        elif in_section and re.match(r"    \S", line):
            name, colon, rest = line.strip().partition(": ")
            out.append(f"- `{name}`: {rest}" if colon else f"- {line.strip()}")
        elif in_section and line.startswith("     "):
            out.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line.strip()
            out += ["", line] if out and not in_section and line.startswith("Returns: ") else [line]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def members(value: Any) -> list[tuple[str, Any]]:
    """The public methods and properties of a class, or the public names of a module."""
    if isinstance(value, types.ModuleType):
        return [(n, getattr(value, n)) for n in value.__all__ if callable(getattr(value, n))]
    if not inspect.isclass(value) or issubclass(value, Exception):
        return []
    found: list[tuple[str, Any]] = []
    for name, raw in vars(value).items():
        if name.startswith("_") or not isinstance(raw, types.FunctionType | property | staticmethod | classmethod):
            continue
        found.append((name, raw if isinstance(raw, property) else getattr(value, name)))
    return [(n, v) for n, v in found if inspect.getdoc(v)]


if __name__ == "__main__":
    sys.exit(main())
