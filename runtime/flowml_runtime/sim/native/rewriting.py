"""Rewrites the sources of the simulator and its machines into a package that mypyc compiles well.

The package, `flowml_native`, has copies of the modules whose objects meet in a simulated run, so that they live beside
the usual ones in one process. What crosses its border, such as messages, plans and models, is shared with the usual
modules. The text of the modules stays as it is, but for what the compiler cannot take or what would be slow:

* imports name the copies;
* a table of methods in the body of a class moves behind the class;
* structs and dataclasses become plain classes with the same constructor, equality and order of attributes. mypyc
  stores the attributes of a plain class in its own structure, and reads them without a lookup. Those that are frozen
  are values, of which no cycle can be made, so the collector of cyclic garbage does not know them. A cached property
  becomes one that keeps its value in an attribute, and `dataclasses.replace` a method;
* `__slots__` go, since such classes have no other attributes anyway.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import flowml_runtime

PACKAGE = "flowml_native"
ATTRIBUTES = "attributes"
_ATTRIBUTES = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:
    def mypyc_attr(**_):
        return lambda made: made
"""
"""A module of the package, in Python: what mypyc reads of a class when it compiles, so that the result needs nothing
of mypyc."""
BUILD_S = 1800.0
"""The most seconds that its build takes, on a busy machine."""
_OURS = "flowml_runtime"

_TRAINING = (
    "accounts accumulator actions branch clocks couple cut decision early exchange fit forwarding home home_events "
    "items pace places portions replica resting site stage staleness store store_terms terms worker"
)
COMPILED = (
    *(f"protocol.training.{name}" for name in _TRAINING.split()),
    "worker.training.counts",
    *(f"sim.{name}" for name in ("executor", "heap", "network", "node", "world")),
)
"""The modules that become machine code."""
COPIED = tuple(f"sim.{name}" for name in ("collectives", "kept", "neighbours", "parallel", "post", "sites"))
"""Those that meet objects of them, and stay Python."""

_OF_DRIVER = "commits departed driver ledger over shards silent speculation untold work"
DRIVER = tuple(f"protocol.training.{name}" for name in _OF_DRIVER.split())
"""Those of the driver's machine, which become machine code too. The usual driver carries out what that wants, so the
classes of messages, events and actions stay those of the usual package: structs, and `_SHARED`."""
_SHARED = ("Work",)

_REPLACED: Mapping[str, tuple[tuple[str, str], ...]] = {
    # A worker of another process is no `Node` (`post.Away`); the compiler would check.
    "sim.world": (
        ("self.nodes = Nodes(", "self.nodes: Any = Nodes("),
        ("    values: Values\n", "    values: Any\n"),  # names the actions of the usual package
    ),
    "protocol.training.fit": (
        (
            "**msgspec.structs.asdict(paused)",
            "hold=paused.hold, clock=paused.clock, pushed=paused.pushed, number=paused.number",
        ),
    ),
    "sim.heap": (("self._most: float = _FLUSH", "self._most: float = float(_FLUSH)"),),
}
"""Text in which the type checkers differ, or that needs a struct."""


def rewritten() -> dict[str, str]:
    """The sources of the package: the path of each file in it, and its text."""
    trees = {name: ast.parse(_text(name)) for name in (*COMPILED, *DRIVER, *COPIED)}
    tables = {table: name for name in (*COMPILED, *DRIVER) for table in _tables(trees[name])}
    found = {f"{folder}/__init__.py": "" for folder in (PACKAGE, *(f"{PACKAGE}/{f}" for f in _FOLDERS))}
    found[f"{PACKAGE}/{ATTRIBUTES}.py"] = _ATTRIBUTES
    for name, tree in trees.items():
        _Imports(DRIVER if name in DRIVER else (*COMPILED, *COPIED)).visit(tree)
        if name in DRIVER:
            _share(tree, name)
        if name not in COPIED:
            _behind(tree, name, tables)
            if any(_takes_replace(node) for node in tree.body):
                _Replaced().visit(tree)
            tree.body = [_plain(node) if isinstance(node, ast.ClassDef) else node for node in tree.body]
            last = _after_imports(tree)
            for module, name_of in ((f"{PACKAGE}.{ATTRIBUTES}", "mypyc_attr"), ("typing", "Any")):
                tree.body.insert(last, ast.ImportFrom(module, [ast.alias(name_of)], 0))
        found[f"{PACKAGE}/{name.replace('.', '/')}.py"] = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    return found


def sources() -> list[str]:
    """All on which the package depends: the text of this module, and of those that it has. To read them takes a
    hundredth of the time of `rewritten`."""
    return [Path(__file__).read_text(), *(_source(name) for name in (*COMPILED, *DRIVER, *COPIED))]


_FOLDERS = ("protocol", "protocol/training", "sim", "worker", "worker/training")


def _source(name: str) -> str:
    (folder,) = flowml_runtime.__path__
    return (Path(folder) / (name.replace(".", "/") + ".py")).read_text()


def _text(name: str) -> str:
    text = _source(name)
    for before, after in _REPLACED.get(name, ()):
        if text.count(before) != 1:
            raise ValueError(f"{name} has {before!r} {text.count(before)} times")
        text = text.replace(before, after)
    return text


class _Imports(ast.NodeTransformer):
    """Lets imports name the copies of these modules."""

    def __init__(self, names: Iterable[str]) -> None:
        self._modules = {f"{_OURS}.{name}" for name in names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | list[ast.ImportFrom]:
        module, modules = node.module or "", self._modules
        if module in modules:
            node.module = PACKAGE + module.removeprefix(_OURS)
            return node
        copied = [alias for alias in node.names if f"{module}.{alias.name}" in modules]
        others = [alias for alias in node.names if alias not in copied]
        if not copied:
            return node
        found = [ast.ImportFrom(PACKAGE + module.removeprefix(_OURS), copied, 0)]
        return [*found, *([ast.ImportFrom(module, others, 0)] if others else [])]


def _share(tree: ast.Module, name: str) -> None:
    """Let the module take the classes that are shared from the usual one."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    taken = [n for n in classes if n.name in _SHARED or "msgspec.Struct" in map(ast.unparse, n.bases)]
    if taken:
        last = _after_imports(tree)
        tree.body.insert(last, ast.ImportFrom(f"{_OURS}.{name}", [ast.alias(n.name) for n in taken], 0))
        tree.body = [n for n in tree.body if n not in taken]


def _is_table(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and "ClassVar[dict" in ast.unparse(node.annotation)


def _tables(tree: ast.Module) -> list[str]:
    """The tables of methods in the bodies of classes. Their names are unique."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [ast.unparse(n.target) for c in classes for n in c.body if isinstance(n, ast.AnnAssign) and _is_table(n)]


def _behind(tree: ast.Module, module: str, tables: Mapping[str, str]) -> None:
    """Move the tables of classes behind them, and let the module name them where they are now."""
    body: list[ast.stmt] = []
    for node in tree.body:
        body.append(node)
        if not isinstance(node, ast.ClassDef):
            continue
        methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        moved = [n for n in node.body if isinstance(n, ast.AnnAssign) and _is_table(n)]
        node.body = [n for n in node.body if n not in moved]
        for table in moved:
            assert isinstance(table.annotation, ast.Subscript) and table.value is not None
            value = _Methods(node.name, methods).visit(table.value)
            target = ast.Name(_moved(ast.unparse(table.target)), ast.Store())
            body.append(ast.AnnAssign(target, table.annotation.slice, value, simple=1))
    tree.body = body
    renamed = _Tables(tables)
    renamed.visit(tree)
    others = sorted(name for name in renamed.used if tables[name] != module)
    imports = [ast.ImportFrom(f"{PACKAGE}.{tables[n]}", [ast.alias(_moved(n))], 0) for n in others]
    last = _after_imports(tree)
    tree.body[last:last] = imports


def _after_imports(tree: ast.Module) -> int:
    return 1 + max(n for n, node in enumerate(tree.body) if isinstance(node, ast.ImportFrom))


def _moved(table: str) -> str:
    return f"table{table}"


class _Methods(ast.NodeTransformer):
    """Names the methods of a class from outside of it."""

    def __init__(self, owner: str, methods: Iterable[str]) -> None:
        self._owner, self._methods = owner, methods

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Attribute(ast.Name(self._owner), node.id) if node.id in self._methods else node


class _Tables(ast.NodeTransformer):
    """Names tables where they have moved."""

    def __init__(self, tables: Iterable[str]) -> None:
        self._tables = tables
        self.used: set[str] = set()

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr not in self._tables:
            return node
        self.used.add(node.attr)
        return ast.Name(_moved(node.attr))


def _takes_replace(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.ImportFrom) and node.module == "dataclasses" and "replace" in (a.name for a in node.names)
    )


class _Replaced(ast.NodeTransformer):
    """Calls the method of plain classes that does what `dataclasses.replace` does for dataclasses."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if ast.unparse(node.func) != "replace":
            return node
        return ast.Call(ast.Attribute(node.args[0], _REPLACED_BY), [], node.keywords)


_REPLACED_BY = "replaced_by"


def _cached(node: ast.ClassDef) -> list[str]:
    """Make properties of those that are cached: each calls what makes its value once, and keeps that. Returns the names
    of the attributes that say whether it is kept."""
    flags: list[str] = []
    for made in [n for n in node.body if isinstance(n, ast.FunctionDef)]:
        if [ast.unparse(d) for d in made.decorator_list] != ["cached_property"]:
            continue
        name, kind = made.name, ast.unparse(made.returns or ast.Constant(None))
        kept, flag, made.name, made.decorator_list = f"_kept_{name}", f"_has_{name}", f"_make_{name}", []
        text = [f"{kept}: {kind}", f"{flag}: bool", "@property", f"def {name}(self) -> {kind}:"]
        text += [f"    if not self.{flag}:", f"        self.{kept} = self.{made.name}()", f"        self.{flag} = True"]
        node.body += ast.parse("\n".join([*text, f"    return self.{kept}"])).body
        flags.append(flag)
    return flags


def _plain(node: ast.ClassDef) -> ast.ClassDef:
    """The class without slots; a plain one if it is a struct or a dataclass."""
    slots = [n for n in node.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__slots__"]
    used = {n.id for slot in slots for n in ast.walk(slot) if isinstance(n, ast.Name)} | {"__slots__"}
    node.body = [n for n in node.body if not (isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in used)]
    made = [d for d in node.decorator_list if ast.unparse(d).startswith("dataclass")]
    struct = [b for b in node.bases if ast.unparse(b) == "msgspec.Struct"]
    if not made and not struct:
        return node
    given = [*node.keywords, *(k for d in made if isinstance(d, ast.Call) for k in d.keywords)]
    options = {k.arg: ast.unparse(k.value) for k in given}
    node.decorator_list = [d for d in node.decorator_list if d not in made]
    node.bases = [b for b in node.bases if b not in struct]
    node.keywords = []
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    after = any(isinstance(n, ast.FunctionDef) and n.name == "__post_init__" for n in node.body)
    flags = _cached(node)
    equal, hashed = options.get("eq") != "False", "frozen" in options
    text = _constructor(node.name, fields, flags, after=after, equal=equal, hashed=hashed)
    for field in fields:
        field.value = None
    node.body += ast.parse(text).body
    if "frozen" in options and not node.bases:
        node.decorator_list.append(ast.parse("mypyc_attr(acyclic=True)", mode="eval").body)
    return node


def _made(default: ast.expr | None) -> str | None:
    """What makes the default of a field for each object, if it is not one for all."""
    if isinstance(default, ast.Call) and ast.unparse(default.func) in ("field", "msgspec.field"):
        return f"{ast.unparse(default.keywords[0].value)}()"
    return ast.unparse(default) if isinstance(default, ast.Dict | ast.List | ast.Set | ast.Call) else None


def _constructor(
    name: str, fields: list[ast.AnnAssign], flags: list[str], *, after: bool, equal: bool, hashed: bool
) -> str:
    """The constructor of a plain class, and what else a struct or dataclass has. `flags` are false at first."""
    parameters: list[str] = []
    lines: list[str] = []
    for field in fields:
        own, kind, default = ast.unparse(field.target), ast.unparse(field.annotation), field.value
        value = own
        made = _made(default)
        if made is not None:
            kind, value, default = f"{kind} | None", f"{made} if {own} is None else {own}", ast.Constant(None)
        parameters.append(f"{own}: {kind}" + ("" if default is None else f" = {ast.unparse(default)}"))
        lines.append(f"    self.{own} = {value}")
    names = [ast.unparse(field.target) for field in fields]
    lines += [f"    self.{flag} = False" for flag in flags]
    lines += ["    self.__post_init__()"] if after else [] if lines else ["    pass"]
    text = [f"__match_args__ = ({''.join(f'{n!r}, ' for n in names)})"]
    text += [f"def __init__(self, {', '.join(parameters)}) -> None:", *lines]
    text += [f"def {_REPLACED_BY}(self, **changes: Any) -> {name!r}:"]
    text += [f"    return {name}(**({{n: getattr(self, n) for n in self.__match_args__}} | changes))"]
    if equal:
        same = " and ".join(f"self.{n} == other.{n}" for n in names) or "True"
        text += ["def __eq__(self, other: object) -> bool:", f"    return isinstance(other, {name}) and {same}"]
        values = "".join(f"self.{n}, " for n in names)
        text += ["def __hash__(self) -> int:", f"    return hash(({values}))"] if hashed else []
    return "\n".join(text)
