"""The rules of the house that no other tool holds: where packages lie, what may import what, sizes, pins.

import-linter holds the directions of imports; here are the rules that need an exact list.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "flowml", ROOT / "runtime" / "flowml_runtime", ROOT / "tools" / "flowml_tools")
SOURCES = sorted(f for package in PACKAGES for f in package.rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70  # below its `def`

PROTOCOL_MAY_IMPORT = (
    "flowml.devices",
    "flowml.errors",
    "flowml.instructions",
    "flowml.plan",
    "flowml.policy",
    "flowml_runtime.wire",
    "flowml_runtime.protocol",
    "msgspec",  # events and actions are its structs, as the messages are
)
IMPURE = {
    "asyncio",
    "concurrent",
    "contextvars",
    "datetime",
    "fcntl",
    "io",
    "mmap",
    "multiprocessing",
    "os",
    "pathlib",
    "queue",
    "random",
    "resource",
    "sched",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "socketserver",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "uuid",
}


def imports(path: Path) -> Iterator[str]:
    """Full names of what the file imports, wherever in the file: `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_runtime_and_tools_are_folders_and_not_packages() -> None:
    assert not (ROOT / "runtime" / "__init__.py").exists()
    assert not (ROOT / "tools" / "__init__.py").exists()


def test_every_package_folder_has_an_init_and_types() -> None:
    folders = {f.parent for f in SOURCES}
    assert [relative(f) for f in folders if not (f / "__init__.py").exists()] == []
    assert [relative(p) for p in PACKAGES if not (p / "py.typed").exists()] == []


def test_private_jax_names_stay_in_one_file() -> None:
    elsewhere = [f for f in SOURCES if f != ROOT / "flowml" / "ir" / "_jax.py"]
    private = {relative(f): n for f in elsewhere for n in imports(f) if within(n, "jax._src", "jaxlib")}
    assert private == {}
    assert [relative(f) for f in elsewhere if "jax._src" in f.read_text()] == []


def test_the_protocol_imports_only_what_it_may() -> None:
    files = sorted((ROOT / "runtime" / "flowml_runtime" / "protocol").rglob("*.py"))
    assert files
    allowed = sys.stdlib_module_names - IMPURE
    offenders = {
        relative(f): name
        for f in files
        for name in imports(f)
        if name.split(".")[0] not in allowed and not within(name, *PROTOCOL_MAY_IMPORT)
    }
    assert offenders == {}


@pytest.mark.parametrize("module", ["flowml", "flowml.plan", "flowml.policy", "flowml.sim", "flowml_tools.main"])
def test_imports_without_jax(module: str) -> None:
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_protocol_module_imports_without_jax_or_grpc() -> None:
    files = (ROOT / "runtime" / "flowml_runtime" / "protocol").rglob("[a-z]*.py")
    modules = [".".join(f.relative_to(ROOT / "runtime").with_suffix("").parts) for f in files]
    code = f"import sys, {', '.join(modules)}; sys.exit(bool({{'jax', 'grpc', 'optax'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_public_names_are_there_and_documented() -> None:
    import flowml as fm

    missing = [name for name in fm.__all__ if not hasattr(fm, name)]
    assert missing == []
    bare = [n for n in fm.__all__ if callable(getattr(fm, n)) and not getattr(fm, n).__doc__]
    assert bare == []


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    import flowml as fm

    with pytest.raises(AttributeError, match="has no attribute 'Ringg'"):
        _ = fm.Ringg


def test_every_error_that_users_see_is_in_the_table_of_errors() -> None:
    import flowml as fm
    from flowml_runtime.environment.checkpoints import FormatError

    public = [
        name for name in fm.__all__ if isinstance(found := getattr(fm, name), type) and issubclass(found, Exception)
    ]
    rows = re.findall(r"^\| `(?:fm\.)?(\w+)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert {*public, FormatError.__name__} - {"FlowmlError", "FlowmlWarning"} == {*rows}


def test_every_public_name_that_errors_and_documents_advise_exists() -> None:
    import flowml as fm

    def exists(dotted: str) -> bool:
        found: object = fm
        for part in dotted.split("."):
            if not (isinstance(found, type) or hasattr(found, "__path__") or hasattr(found, "__spec__")):
                return True  # an attribute of an object
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True

    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")]
    advised = {
        (relative(f), name)
        for f in (*SOURCES, *(ROOT / "examples").rglob("*.py"), *pages)
        for name in re.findall(r"(?<![\w.])fm\.([A-Za-z_][\w.]*\w|[A-Za-z_]\w*)", f.read_text())
    }
    assert len(advised) > 500
    assert sorted((f, name) for f, name in advised if not exists(name)) == []


def test_files_and_functions_stay_small() -> None:
    long_files = {relative(f): n for f in SOURCES if (n := len(f.read_text().splitlines())) > MAX_FILE_LINES}
    assert long_files == {}
    long_functions = {
        f"{relative(f)}:{node.name}": lines
        for f in SOURCES
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno) > MAX_FUNCTION_LINES
    }
    assert long_functions == {}


def test_every_module_says_what_it_is_for() -> None:
    assert [relative(f) for f in SOURCES if not ast.get_docstring(ast.parse(f.read_text()))] == []


def test_the_layout_names_every_module() -> None:
    layout = (ROOT / "ARCHITECTURE.md").read_text().partition("## From function to plan")[0]
    named = set(re.findall(r"\w+", layout))
    modules = [f for package in PACKAGES[:2] for f in package.rglob("*.py") if f.stem != "__init__"]
    assert [relative(f) for f in modules if f.stem not in named] == []


def test_the_version_has_one_source() -> None:
    import flowml as fm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert f"## {fm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_are_names_and_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9a-z.]*", line)] == []


def test_constraints_pin_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["dev"], *extras["examples"]]
    pinned = {canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert [name for name in declared if canonical(re.split(r"[^A-Za-z0-9._-]", name)[0]) not in pinned] == []


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
